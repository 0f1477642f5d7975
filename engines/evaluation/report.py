"""One page that shows an evaluation: conditions, table, charts, kept tokens of the best and worst cases, bad lines.

It holds everything itself (charts as SVG, pictures as base64), has no script, and asks for nothing from a network. What
comes from data is escaped by the template engine.
"""

from __future__ import annotations

import base64
import io
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engines.evaluation.charts import MOST_SERIES, Chart, Point, Series, number_axis, percent, score_axis, share_axis
from engines.evaluation.contenders import Contender
from engines.evaluation.data import Data
from engines.evaluation.metrics import METRICS
from engines.evaluation.settings import RANDOM, Setting
from engines.evaluation.sweep import Row, from_bits
from engines.evaluation.systems import Worths
from engines.picture import views_of
from graphs.files import atomic_file
from graphs.versions import installed_version

TEMPLATE = Path(__file__).with_name("report.html.jinja")
CASES = 3  # best, and worst
TOOLS = ("saccade", "onnxruntime", "transformers", "numpy")
# What XML has no place for, though a tokenizer can write it.
UNWRITABLE = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Case:
    """A question with its picture. said: who → the answer."""

    number: int
    question: str
    truths: tuple[str, ...]
    said: dict[str, str]
    score: float | None
    kept: int
    tokens: int
    pictures: tuple[str, ...]


def write_report(
    path: Path,
    document: dict[str, Any],
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    data: Data,
    worths: Worths,
    settings: Sequence[Setting],
) -> None:
    """Write the page of an evaluation's document and journal."""
    import jinja2

    shown = focus_of(contenders, rows, settings)
    best, worst = cases_of(contenders, rows, data, worths, settings, shown) if shown else ((), ())
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = percent
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        document=document,
        metric=METRICS[document["metric"]],
        charts=charts_of(document),
        shown=shown,
        cases={"Best": best, "Worst": worst},
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        machine=f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        tools={name: version for name in TOOLS if (version := installed_version(name))},
    )
    with atomic_file(path) as partial:
        partial.write_text(UNWRITABLE.sub("\ufffd", page), "utf-8")


def charts_of(document: dict[str, Any]) -> list[Chart]:
    """The charts that the document has numbers for."""
    systems, metric = document["systems"], document["metric"]
    charts = [_over_retention(systems, metric), _over_cost(systems, metric, "ms_per_question", "ms a question", 1)]
    if any(system["estimated_flops_per_question"] for system in systems):
        label = "estimated GFLOPs a question"
        charts.append(_over_cost(systems, metric, "estimated_flops_per_question", label, 1e-9))
    if curves := document["over_threshold"]:
        charts += _over_threshold(curves, metric)
    charts += [_reliability(found, metric) for found in document["reliability"]]
    return charts


def label_of(system: dict[str, Any], several: bool = False) -> str:
    """A series of systems: how their models are pruned, where, and in which bundle."""
    if not system["policy"]:
        name = {"small": "small model", "alone": "model, everything"}.get(system["system"], "large model, everything")
    else:
        name = system["policy"] + (f" before layer {':'.join(map(str, system['layers']))}" if system["layers"] else "")
    return f"{name} ({Path(system['bundle']).name})" if several else name


def _over_retention(systems: Sequence[dict[str, Any]], metric: str) -> Chart:
    several = len({system["bundle"] for system in systems}) > 1
    series: dict[str, list[Point]] = {}
    for system in systems:
        if system["system"] == "cascade":
            continue
        retention = 1.0 if system["average_retention"] is None else system["average_retention"]
        title = f"{label_of(system)}: retention {percent(retention)}, {metric} {percent(system['accuracy'])}"
        point = Point(retention, system["accuracy"], title, system["accuracy_standard_error"])
        series.setdefault(label_of(system, several), []).append(point)
    made = tuple(Series(name, tuple(sorted(points, key=lambda p: p.x))) for name, points in series.items())
    note = "Average retention: visual tokens over the layers of the pruned model. Bars: one standard error."
    return _cut(Chart("Accuracy over retention", share_axis("average retention"), share_axis(metric), made, note))


def _over_cost(systems: Sequence[dict[str, Any]], metric: str, key: str, label: str, scale: float) -> Chart:
    several = len({system["bundle"] for system in systems}) > 1
    series: dict[str, list[Point]] = {}
    for system in systems:
        if system[key] is None:
            continue
        cost = system[key] * scale
        bar = "" if system["threshold"] is None else f", threshold {system['threshold']:g}"
        kind = f"cascade, {label_of(system, several)}" if bar else label_of(system, several)
        title = f"{kind}{bar}: {cost:.4g} {label}, {metric} {percent(system['accuracy'])}"
        series.setdefault(kind, []).append(Point(cost, system["accuracy"], title, system["accuracy_standard_error"]))
    axis = number_axis(label, [point.x for points in series.values() for point in points])
    made = tuple(Series(name, tuple(points), line=False) for name, points in series.items())
    note = "A guided large model takes the small one's pass too; bars: one standard error."
    return _cut(Chart(f"Accuracy over {label}", axis, share_axis(metric), made, note))


def _over_threshold(curves: Sequence[dict[str, Any]], metric: str) -> list[Chart]:
    several = len({curve["bundle"] for curve in curves}) > 1
    wanted = [("accuracy", metric, 1.0), ("exit_rate", "share of questions that exit", 1.0)]
    wanted.append(("ms_per_question", "ms a question", 1.0))
    if all("estimated_flops_per_question" in point for curve in curves for point in curve["points"]):
        wanted.append(("estimated_flops_per_question", "estimated GFLOPs a question", 1e-9))
    charts = []
    for key, label, scale in wanted:
        series = []
        for curve in curves:
            if key == "exit_rate" and curve["bundle"] in {before["bundle"] for before in curves[: curves.index(curve)]}:
                continue  # who exits does not depend on how the large model is pruned
            name = f"{curve['setting']} ({Path(curve['bundle']).name})" if several else curve["setting"]
            points = [(point["threshold"], point[key] * scale) for point in curve["points"]]
            made = tuple(Point(x, y, f"{name}: threshold {x:.4g}, {label} {y:.4g}") for x, y in points)
            series.append(Series(name, made))
        share = key in ("accuracy", "exit_rate")
        axis = share_axis(label) if share else number_axis(label, [p.y for one in series for p in one.points])
        title = f"{'Accuracy' if key == 'accuracy' else label[0].upper() + label[1:]} over threshold"
        note = "A question exits where S is above the threshold; 1 always asks the large model."
        charts.append(_cut(Chart(title, score_axis("threshold"), axis, tuple(series), note)))
    return charts


def _reliability(found: dict[str, Any], metric: str) -> Chart:
    points = tuple(
        Point(
            one["mean_score"],
            one["accuracy"],
            f"S {one['from']:g} to {one['to']:g}: {one['questions']} questions, mean S {one['mean_score']:.3f}, "
            f"{metric} {percent(one['accuracy'])}",
        )
        for one in found["bins"]
        if one["questions"]
    )
    counts = ", ".join(f"{one['from']:g}–{one['to']:g}: {one['questions']}" for one in found["bins"])
    note = f"Expected calibration error {found['expected_calibration_error']:.3f}. Questions by S: {counts}."
    title = f"Reliability of S ({Path(found['bundle']).name})"
    series = (Series("small model", points),)
    return Chart(title, score_axis("mean S of the answers in a tenth"), share_axis(metric), series, note, diagonal=True)


def _cut(chart: Chart) -> Chart:
    """What cannot be told apart is left out, and that is said."""
    left_out = len(chart.series) - MOST_SERIES
    if left_out <= 0:
        return chart
    note = f"{chart.note} {left_out} more series are in results.json."
    return Chart(chart.title, chart.x, chart.y, chart.series[:MOST_SERIES], note.strip(), chart.diagonal)


def focus_of(contenders: Sequence[Contender], rows: Sequence[Row], settings: Sequence[Setting]) -> Setting | None:
    """The setting whose kept tokens are shown: the fewest, by a policy that is no draw where there is one."""

    def kept(setting: Setting) -> tuple[bool, float]:
        return setting.policy == RANDOM, float(np.mean([row["large"][setting.name]["kept_tokens"] for row in rows]))

    pruned = [s for s in settings if s.policy and any(row["large"][s.name]["kept"] for row in rows)]
    return min(pruned, key=kept, default=None)


def cases_of(
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    data: Data,
    worths: Worths,
    settings: Sequence[Setting],
    shown: Setting,
) -> tuple[list[Case], list[Case]]:
    """The best and the worst questions of a setting.

    They are ordered by what its answer is worth less what the answer of the model that sees everything is worth, where
    that was asked, then by the worth itself, then as in the data.
    """
    one = contenders[shown.bundle]
    whole = next((s for s in settings if not s.policy and s.bundle == one.whole), None)
    worth_N = worths.large[shown.name]
    gain_N = worth_N - worths.large[whole.name] if whole else worth_N
    drawable = [i for i, row in enumerate(rows) if row["large"][shown.name]["kept"] and data.examples[i].sources]
    order = sorted(drawable, key=lambda i: (-gain_N[i], -worth_N[i], i))
    best = order[: min(CASES, (len(order) + 1) // 2)]
    worst = [i for i in reversed(order) if i not in best][:CASES]

    def case(i: int) -> Case:
        row, example = rows[i], data.examples[i]
        pruned, small = row["large"][shown.name], row["small"].get(str(one.small)) if one.pair else None
        said = {"small model": small["text"]} if small else {}
        said |= {"sees everything": row["large"][whole.name]["text"]} if whole else {}
        return Case(
            number=i + 1,
            question=example.question,
            truths=tuple(dict.fromkeys(example.answers)),
            said=said | {"pruned": pruned["text"]},
            score=small["score"] if small else None,
            kept=pruned["kept_tokens"],
            tokens=pruned["visual_tokens"],
            pictures=pictures_of(one, example.images, from_bits(pruned["kept"], pruned["visual_tokens"])),
        )

    return [case(i) for i in best], [case(i) for i in worst]


def pictures_of(one: Contender, images: Sequence[Image.Image], kept_V: np.ndarray) -> tuple[str, ...]:
    """Each image with its dropped tokens dimmed, as a data URI."""
    uris = []
    for panel, *_ in views_of(one.model, images, kept_V):
        encoded = io.BytesIO()
        panel.convert("RGB").save(encoded, format="JPEG", quality=85)
        uris.append("data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode())
    return tuple(uris)
