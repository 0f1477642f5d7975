"""``python -m benchmarks.peers.table``: README's block, docs/peers.md and docs/growth-*.png of the committed results.

Every machine's results are a folder below benchmarks/results (``benchmarks.figures``) and a part of the page. The
figures of a row are medians with (minimum–maximum). ``README_ROWS`` are the systems that README shows.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS, ROOT
from benchmarks.peers.systems import MADE, SYSTEMS

PAGE = ROOT / "docs" / "peers.md"
BEGIN, END = "<!-- peers: python -m benchmarks.peers.table -->", "<!-- end of peers -->"
Document = dict[str, Any]

COLUMNS = (
    ("vision_ms", "vision ms"),
    ("prefill_ms", "prefill ms"),
    ("first_token_ms", "first token ms"),
    ("decode_ms_per_token", "ms a token"),
    ("open_ms", "open ms"),
)
README_ROWS = (
    "saccade cpu fp32",
    "saccade openvino fp32",
    "saccade openvino bf16",
    "saccade openvino bf16, fastv 9 %",
    "saccade openvino int4",
    "saccade cpu int4",
    "transformers fp32",
    "openvino genai f32",
    "openvino genai default",
    "openvino genai default, 50 % pruned",
    "openvino genai default, 90 % pruned",
    "openvino genai int4",
    "onnxruntime genai fp32",
    "onnxruntime genai int4",
)
SHAPES = {
    "qwen2_5_vl": "Shape (a): Qwen2.5-VL with 24 layers of width 896, 1,000 visual and 40 text tokens",
    "qwen2_5_vl-fp32": "Shape (a), fp32 alone, more rounds",
    "llava-1b": "Shape (b): LLaVA-1.5, 16 layers of width 2,048 behind CLIP-L, 576 visual tokens",
    "llava-3b": "Shape (b): LLaVA-1.5, 26 layers of width 3,200 behind CLIP-L, 576 visual tokens",
}

INTRODUCTION = """# Beside peers

Made by `python -m benchmarks.peers.table` out of `benchmarks/results/`.
Medians of an interleaved run, with (least–most) of as many questions as are told. Threads are what was asked for;
models of up to 16 MiB of weights, as the pair's are, take one since 22 November 2026. Figures of two machines are
not of one run, and the EPYC's of `cpu` are of the code before that day ([LOG](../benchmarks/LOG.md)). The Xeon's shape
(b) is from before the small maps were made whole and the one arena. Vision of OpenVINO GenAI contains the preparation
of the image, that of no other system does. ONNX Runtime GenAI's steps were taken while Python read its log, but for
those of shape (a) on the Xeon. STAR cuts before layer 10 of 24 in shape (a) on the Xeon, elsewhere before layer 2.
Made in s: all commands; "build alone" where the export was there and its time was not
kept."""

MACHINERY = ("cpu-fp32", "openvino-fp32", "openvino-bf16")


def table_of(document: Document, only: Sequence[str] | None = None) -> list[str]:
    """Lines of Markdown: medians with their range, peak memory, bytes on disk, seconds to make; what was skipped."""
    lines = [
        "| system | " + " | ".join(title for _, title in COLUMNS) + " | first open | peak GB | disk GB | made in s |",
        "|---|" + "---|" * (len(COLUMNS) + 4),
    ]
    for row in document["systems"]:
        if only is None or row["name"] in only:
            cells = [cell(row.get(key)) for key, _ in COLUMNS]
            sizes = [f"{row[key] / 1e9:.2f}" for key in ("peak_bytes", "disk_bytes")]
            lines.append(
                f"| {row['name']} | " + " | ".join([*cells, number(row["first_open_ms"]), *sizes, made_of(row)]) + " |"
            )
    if only is None:
        lines += ["", *(f"- {name}: not measured ({why})" for name, why in document["skipped"].items())]
    return lines


def made_of(row: Document) -> str:
    """Seconds to make it. Older results have those of the last command alone where the export was there already."""
    seconds, system = row["made_in_s"], SYSTEMS.get(row["name"])
    if not seconds:
        return ""
    return f"{sum(seconds):.0f}" + (", build alone" if system and len(seconds) < len(MADE[system.made]) else "")


def short_of(documents: Sequence[Document]) -> list[str]:
    """README's: medians only, three columns for a machine."""
    keys = (("vision_ms", "vision ms"), ("first_token_ms", "first token ms"), ("decode_ms_per_token", "ms a token"))
    heads = [f"{title}, {cpu_of(document)}" for document in documents for _, title in keys]
    rows = [{row["name"]: row for row in document["systems"]} for document in documents]
    lines = [f"| 1,000 visual tokens | {' | '.join(heads)} | highest peak GB |", "|---" * (len(heads) + 2) + "|"]
    for name in README_ROWS:
        if peaks := [of[name]["peak_bytes"] for of in rows if name in of]:
            values = [number(of[name][key][0]) if name in of else "" for of in rows for key, _ in keys]
            lines.append(f"| {name} | {' | '.join(values)} | {max(peaks) / 1e9:.2f} |")
    return lines


def questions_of(document: Document) -> list[str]:
    """Whole questions of the pair."""
    count, pause = document["conditions"]["questions"], document["conditions"].get("pause_s", 0)
    apart = f"{1000 * pause:g} ms apart" if pause else "without a pause"
    lines = [
        f"| {count} whole questions of the pair, {apart}, {cpu_of(document)} "
        "| right | exits | ms, mean | ms, median | least–most | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["systems"]:
        median, least, most = row["whole_ms"]
        lines.append(
            f"| {row['name']} | {row['accuracy']:.1%} | {row['exit_rate']:.0%} | "
            f"{number(row['whole_ms_mean'])} | {number(median)} | "
            f"{number(least)}–{number(most)} | {row['peak_bytes'] / 1e9:.2f} |"
        )
    return lines


def growth_of(document: Document) -> list[str]:
    """Milliseconds to the first token over visual tokens."""
    counts = sorted({int(count) for row in document["systems"] for count in row["first_token_ms"]})
    lines = [
        "| first token, ms, behind visual tokens | " + " | ".join(f"{count:,}" for count in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for row in document["systems"]:
        cells = [cell(row["first_token_ms"].get(str(count))) for count in counts]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def towers_of(document: Document) -> list[str]:
    """Milliseconds of the vision stage, and the process's peak so far, over patches (4 for a visual token)."""
    counts = sorted({int(count) for row in document["systems"] for count in row["vision_ms"]})
    lines = [
        "| vision, ms; peak GB, behind patches | " + " | ".join(f"{4 * count:,}" for count in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for row in document["systems"]:
        ms, peaks = row["vision_ms"], row["peak_bytes"]
        cells = [f"{number(ms[c][0])}; {peaks[c] / 1e9:.2f}" if c in ms else "" for c in map(str, counts)]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def machinery_of(documents: list[Document]) -> list[str]:
    """Ratios of pruning, guidance, consistency and the cache, a column for each target."""
    names = list(documents[0]["ratios"])
    heads = [f"{d['conditions']['target']} {d['conditions']['precision']}" for d in documents]
    lines = ["| part | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    return lines + [f"| {name} | " + " | ".join(f"{d['ratios'][name]:.3g}" for d in documents) + " |" for name in names]


def cpu_of(document: Document) -> str:
    """The processor's name, and AMX where it multiplies tiles."""
    of = document["conditions"]
    name = re.sub(r"\(\w+\)| Processor", "", of["cpu"])
    return name + (" with AMX" if "amx_bf16" in of.get("instructions", ()) else "")


def conditions_of(document: Document, asked: str = "") -> str:
    """One sentence. asked: how often, where that is more than one number."""
    of = document["conditions"]
    note = f", {of['note']}" if of["note"] else ""
    has = f" ({', '.join(of['instructions'])})" if "instructions" in of else ""
    ours, theirs = of.get("runtime", {}), of.get("peers", {})
    both = {name: f"{ours[name]} (saccade's), {theirs[name]} (peers')" for name in ours if name in theirs}
    peers = "".join(f", {name} {version}" for name, version in (ours | theirs | both).items() if name != "onnxruntime")
    commit = f"commit {of['commit']}; " if of.get("commit") else ""
    count = of["rounds"] * of["asks_a_round"]
    asked = asked or f"{count} question{'s' if count > 1 else ''} of each"
    return (
        f"{cpu_of(document)}{has}, {of['threads']} threads of {of['cores']} cores{note}; {of['date_utc']}; "
        f"{asked}; "
        f"{commit}"
        f"Python {of['python']}, onnxruntime {ours.get('onnxruntime', of['onnxruntime'])}, torch {of['torch']}, "
        f"transformers {of['transformers']}{peers}."
    )


def page() -> str:
    """docs/peers.md."""
    parts = [INTRODUCTION]
    for machine in machines():
        parts += part_of(machine)
    return "\n".join(parts) + "\n"


def part_of(machine: str) -> list[str]:
    """A machine's part of the page."""
    parts = ["", f"## On {cpu_of(found(machine)[0])}"]
    for shape, title in SHAPES.items():
        if document := result(machine, f"peers-{shape}"):
            parts += ["", f"### {title}", "", conditions_of(document), "", *table_of(document)]
    if document := result(machine, "questions"):
        parts += ["", "### Whole questions", "", conditions_of(document), "", *questions_of(document)]
    if document := result(machine, "growth"):
        parts += ["", "### Growth", "", conditions_of(document), "", *growth_of(document), "", *towers_of(document)]
        parts += ["", f"![growth]({plot_of(machine).name})"]
    if documents := [d for name in MACHINERY if (d := result(machine, f"machinery-{name}"))]:
        rounds = ", ".join(str(document["conditions"]["rounds"]) for document in documents)
        parts += [
            "",
            "### Pruning, guidance and the cache",
            "",
            conditions_of(documents[0], f"{rounds} rounds, by column"),
        ]
        parts += ["What each line is: `benchmarks/machinery.py`.", "", *machinery_of(documents)]
    return parts


def block() -> str:
    """README's, without its marks."""
    lines: list[str] = []
    if documents := [d for machine in machines() if (d := result(machine, "peers-qwen2_5_vl"))]:
        lines += [*short_of(documents), "", *(f"- {conditions_of(document)}" for document in documents)]
    for document in (d for machine in machines() if (d := result(machine, "questions"))):
        lines += ["", *questions_of(document)]
    return "\n".join(lines)


def readme_with(block_: str) -> str:
    """README.md with its block replaced."""
    text = (ROOT / "README.md").read_text("utf-8")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{block_}\n{END}", text, flags=re.DOTALL)


def machines() -> list[str]:
    """Folders with results that the page shows, in alphabetical order."""
    return sorted(folder.name for folder in RESULTS.iterdir() if folder.is_dir() and found(folder.name))


def found(machine: str) -> list[Document]:
    """A machine's results that say their conditions: all but the cache's, which stand for themselves."""
    documents = [json.loads(path.read_text("utf-8")) for path in sorted((RESULTS / machine).glob("*.json"))]
    return [document for document in documents if "conditions" in document]


def result(machine: str, name: str) -> Document | None:
    """A committed result; None where there is none."""
    path = RESULTS / machine / f"{name}.json"
    document: Document | None = json.loads(path.read_text("utf-8")) if path.exists() else None
    return document


def plot_of(machine: str) -> Path:
    """Where a machine's growth is drawn."""
    return PAGE.with_name(f"growth-{machine}.png")


def draw(document: Document, out: Path) -> None:
    """The growth as a picture; wants matplotlib (``saccade[benchmarks]``)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in document["systems"]:
        points = sorted((int(count), ms[0] / 1e3) for count, ms in row["first_token_ms"].items())
        style = "-" if row["name"].startswith("saccade") else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=row["name"])
    axes.set(xscale="log", yscale="log", xlabel="visual tokens", ylabel="seconds to the first token")
    counts = sorted({int(count) for row in document["systems"] for count in row["first_token_ms"]})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xticks([], minor=True)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=120, metadata={"Software": None})


def number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def cell(spread: Sequence[float] | None) -> str:
    """Median (minimum–maximum)."""
    if not spread:
        return ""
    return f"{number(spread[0])} ({number(spread[1])}–{number(spread[2])})"


def main() -> None:
    """Write them."""
    PAGE.write_text(page(), "utf-8")
    (ROOT / "README.md").write_text(readme_with(block()), "utf-8")
    for machine in machines():
        if document := result(machine, "growth"):
            draw(document, plot_of(machine))
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
