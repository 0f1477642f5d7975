"""The verb tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from engines.evaluation.asked import FORMATS_HELP, Questions, Several, data_options
from engines.options import KeepRatios, bundle_argument, document_option, target_option, threads_option, tokens_option
from graphs.console import emit, percent, warn


@click.command(epilog=FORMATS_HELP)
@bundle_argument
@click.argument("data", metavar="DATA")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where results go.")
@click.option(
    "--max-loss",
    type=float,
    default=0.01,
    show_default=True,
    metavar="A",
    help="Accuracy that may be lost against the unpruned large model; 0.01 is one point.",
)
@click.option(
    "--keep",
    "keeps",
    type=Several(KeepRatios(), "R"),
    default=None,
    metavar="R[,R…]",
    help="Shares of visual tokens to try, each in (0, 1]; for several prune points write 0.5:0.25. [0.8 to 0.05]",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="LARGE",
    help="The large model's checkpoint, to try other layers too by exporting again (needs saccade[export]).",
)
@click.option(
    "--layer",
    "layers",
    type=Several(click.IntRange(min=0), "K"),
    default=None,
    metavar="K[,K…]",
    help="Layers to prune before. [the bundle's; with --checkpoint 5, 12.5, 25 and 50 % of the depth]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the split into the two halves.",
)
@tokens_option
@data_options
@document_option("saccade.tune/1")
@target_option
@threads_option
@click.pass_context
def tune(
    ctx: click.Context,
    /,
    bundle: Path,
    data: str,
    out: Path,
    as_json: bool,
    target: str | None,
    threads: int | None,
    keeps: list[tuple[float, ...]] | None,
    layers: list[int] | None,
    **asked: Any,
) -> None:
    """Find where and how much to prune the large model of BUNDLE for the least time, and when the small one may answer.

    DATA is as for `eval`. Every layer, share and threshold is tried on one half of it; the choice is measured on the
    other half. DIR gets tune.json, the chosen plan.toml for `saccade export --plan`, and journals from which a search
    that was interrupted continues when the same command is given again.
    """
    from engines.tuning.tune import Wanted, doubts, tune_bundle

    questions = Questions.taken_from(asked)
    read = questions.read(data, ctx.obj or {}, scored=True)
    wanted = Wanted(metric=questions.worth, keeps=keeps or (), layers=layers or (), **asked)
    document = tune_bundle(bundle, read, out, wanted, target, threads)
    for doubt in doubts(document):
        warn(doubt)
    emit(document, as_json, in_words)


def in_words(document: dict[str, Any]) -> list[str]:
    """What a search found, on stdout: the front, the choice, and what it is worth on the other questions."""
    from engines.words import columns

    chosen, baseline, told = document["chosen"], document["baseline"], document["reported"]
    metric, bound = document["metric"], document["max_loss"]
    marked = [("*" if one == chosen else "", one) for one in document["front"]]
    rows = [("", "layer", "keep", "threshold", metric, "exits", "ms"), *(_cells(*one) for one in marked)]
    lines = [f"on {document['tuned_on']} questions, the fastest first; no other is both faster and better:"]
    lines += columns([*rows, _cells("all", baseline)])
    if not told:
        return [
            *lines,
            f"nothing that loses at most {percent(bound)} is faster than the large model alone; no plan is written",
        ]
    return [
        *lines,
        f"chosen (*): {_said(chosen)}",
        f"on {document['reported_on']} other questions: {metric} {_worth(told['chosen'])}, the large model that sees "
        f"everything {_worth(told['baseline'])}; lost {told['loss']:.1%} ± {told['loss_standard_error']:.1%}",
        f"written: {document['plan']}",
    ]


def _cells(mark: str, one: dict[str, Any]) -> tuple[str, ...]:
    return (
        mark,
        "" if one["layer"] is None else str(one["layer"]),
        ":".join(f"{share:g}" for share in one["keep"]),
        "" if one["threshold"] is None else f"{one['threshold']:g}",
        f"{one['accuracy']:.1%}",
        "" if one["exit_rate"] is None else f"{one['exit_rate']:.0%}",
        f"{one['ms_per_question']:.1f}",
    )


def _said(one: dict[str, Any]) -> str:
    where = "nothing is pruned"
    if one["policy"]:
        where = "pruned where the plan says" if one["layer"] is None else f"cut before layer {one['layer']}"
    shares = ":".join(f"{share:g}" for share in one["keep"])
    return f"{where}, keep {shares}, " + (
        "nothing exits" if one["threshold"] is None else f"exit threshold {one['threshold']:g}"
    )


def _worth(one: dict[str, Any]) -> str:
    return f"{one['accuracy']:.1%} in {one['ms_per_question']:.1f} ms"
