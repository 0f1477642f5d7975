"""The main job on the shipped pair: export, build, and the cascade beside everything it must beat.

A user of the front door only: what it does with ``saccade`` anyone can do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

PAIR = Path(__file__).parent / "pair"
QUESTIONS = 200
FRACTION = 0.05  # of the depth, before the cut: SGL's own
SCHEMA = "saccade.demo/1"


@click.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("saccade-demo"),
    show_default=True,
    help="Folder for the bundle and the picture; an earlier demo's is replaced.",
)
@click.option(
    "--questions",
    type=click.IntRange(1, 1000),
    default=QUESTIONS,
    show_default=True,
    help="Held-out questions to ask every system.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one document, saccade.demo/1, and the table to stderr.")
def demo_command(out: Path, questions: int, as_json: bool) -> None:
    """Export, build and run the shipped pair of small models on held-out questions."""
    from graphs.versions import require

    require("torch", "transformers", "onnxruntime")
    from graphs.console import emit_json

    document = run_demo(out, questions)
    click.echo(table_of(document), err=as_json)
    click.echo(f"picture: {document['picture']}", err=as_json)
    if as_json:
        emit_json(document)


def run_demo(out: Path, questions: int = QUESTIONS) -> dict[str, Any]:
    """Do all of it into the folder ``out`` and return the document ``saccade.demo/1``."""
    import saccade
    from glyphs.data import held_out_questions
    from glyphs.systems import Comparison
    from graphs.console import say, track
    from graphs.files import refuse_foreign_folder
    from graphs.plan import Guidance, PruningPlan, keep_for_retention, layer_of

    chosen = json.loads((PAIR / "threshold.json").read_text("utf-8"))
    refuse_foreign_folder(out, "exports", "pair.bundle")
    out.mkdir(parents=True, exist_ok=True)
    exports = {name: out / "exports" / name for name in ("small", "large", "one-layer")}
    say("exporting the pair, and the small model once more listening to one layer only")
    small = saccade.export(PAIR / "small", exports["small"], policy="sgl", role="small", overwrite=True)
    layers = json.loads((PAIR / "large" / "config.json").read_text("utf-8"))["text_config"]["num_hidden_layers"]
    keep = keep_for_retention(layers, layer_of(FRACTION, layers), chosen["average_retention"])
    saccade.export(
        PAIR / "large", exports["large"], policy="sgl", role="large", fraction=FRACTION, keep=keep, overwrite=True
    )
    middle = PruningPlan(name="one-layer", guidance=Guidance(layers=(small.language.layers // 2,)))
    saccade.export(PAIR / "small", exports["one-layer"], plan=middle, role="small", overwrite=True)
    bundle = out / "pair.bundle"
    threshold = chosen["threshold"]
    saccade.build([exports["small"], exports["large"]], bundle, threshold=threshold, overwrite=True)
    saccade.build([exports["one-layer"]], out / "one-layer.bundle", overwrite=True)
    # Each question from its beginning: what one leaves to the next is no part of its time.
    cascade = saccade.Cascade.open(bundle, reuses_beginnings=False)
    compared = Comparison(
        cascade,
        saccade.Cascade.open(out / "one-layer.bundle", reuses_beginnings=False),
        {name: saccade.Reference(PAIR / name) for name in ("small", "large")},
        threshold,
        chosen["average_retention"],
    )
    asked = held_out_questions(questions)
    for _ in track(compared.run(asked), f"asking {questions} held-out questions of every system", questions):
        pass
    picture = out / "kept.png"
    shown = next((q for q in asked if q.kind == "read"), asked[0])
    saccade.show_kept_tokens(cascade, shown.image, shown.question, picture, keep=compared.keep[0.35])
    return {
        "schema": SCHEMA,
        "questions": questions,
        "threshold": threshold,
        "systems": [tally.document() for tally in compared.tallies.values()],
        "parity": compared.parity.document(),
        "picture": str(picture),
    }


def table_of(document: dict[str, Any]) -> str:
    """Return the document's table as text."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "system", "accuracy", "retention", "K, r", "exits", "ms", title=f"{document['questions']} held-out questions"
    )
    for row in document["systems"]:
        cut = "" if row["keep"] is None else f"{row['prune_layer']}, {row['keep']:.3f}"
        kept = "" if row["average_retention"] is None else f"{row['average_retention']:.1%}"
        exits = "" if row["exit_rate"] is None else f"{row['exit_rate']:.0%}"
        table.add_row(row["name"], f"{row['accuracy']:.1%}", kept, cut, exits, f"{row['ms_per_question']:.1f}")
    parity = document["parity"]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
        console.print(
            f"unpruned answers equal to HF generate: {parity['tokens_equal']:.1%} of {parity['answers_compared']}, "
            f"logits of first tokens at most {parity['max_abs_logit_diff']:.1e} apart",
            f"\nthreshold {document['threshold']}; ms: median per question, sessions open; K: layer of the cut, "
            "r: share of tokens kept behind it",
        )
    return captured.get()
