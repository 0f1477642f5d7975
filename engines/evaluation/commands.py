"""The verb eval, and what show tells of its formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from engines.evaluation.asked import FORMATS_HELP, Layers, Questions, Several, data_options
from engines.options import KeepRatios, document_option, target_option, threads_option, tokens_option
from graphs.console import emit, emit_json


@click.command("eval", epilog=FORMATS_HELP)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE…")
@click.argument("data", metavar="DATA")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where results go.")
@click.option(
    "--keep",
    "keeps",
    type=Several(KeepRatios(), "R"),
    default=None,
    metavar="R[,R…]",
    help="Shares of visual tokens to try, each in (0, 1]; for several prune points write 0.5:0.25. [the exports']",
)
@click.option(
    "--policy",
    "policies",
    type=Several(click.STRING, "P"),
    default=None,
    metavar="P[,P…]",
    help="Policies to try: a bundle's own, or random where the small model guides. [every bundle's own]",
)
@click.option(
    "--layer",
    "layers",
    type=Several(Layers(), "K"),
    default=None,
    metavar="K[,K…]",
    help="Only bundles that prune before these layers; for several prune points write 8:16:24. [all]",
)
@click.option(
    "--threshold",
    "thresholds",
    type=Several(click.FloatRange(0, 1), "S"),
    default=None,
    metavar="S[,S…]",
    help="Exit thresholds to try, in [0, 1]. [each bundle's own, or its calibrated one where that applies]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Seed of the policy random.",
)
@tokens_option
@data_options
@document_option("saccade.eval/2")
@target_option
@threads_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    bundles: tuple[Path, ...],
    data: str,
    out: Path,
    as_json: bool,
    **asked: Any,
) -> None:
    """Ask every BUNDLE every question of DATA under every keep ratio, policy, layer and threshold.

    DATA is as for `calibrate`, with answers. Other policies and layers need other exports: give several bundles, and
    what is the same in them is asked once. DIR gets report.html, results.json, results.csv and answers.jsonl, from
    which an interrupted run continues when the same command is given again. FLOPs are estimated.
    """
    from engines.evaluation.results import evaluate_bundles, table_of

    questions = Questions.taken_from(asked)
    read = questions.read(data, ctx.obj or {}, scored=True)
    document = evaluate_bundles(bundles, read, out, questions.worth, data_name=data, **asked)
    emit(document, as_json, table_of)


@click.command("formats")
@document_option("saccade.formats/1")
def show_formats(as_json: bool) -> None:
    """List the benchmarks that --format reads: their files, how they are asked, and how an answer counts."""
    from engines.evaluation.metrics import METRICS
    from engines.evaluation.readers import REFUSED, TABLE

    if as_json:
        keys = ("name", "layout", "source", "metric", "prompt")
        documents = [{key: getattr(made, key) for key in keys} for made in TABLE]
        emit_json({"schema": "saccade.formats/1", "formats": documents, "refused": REFUSED})
        return
    for made in TABLE:
        click.echo(f"{made.name}: {made.layout} ({made.source})")
        click.echo(f"  asked as {made.prompt!r}; metric {made.metric}: {METRICS[made.metric].meaning}")
    for name, why in REFUSED.items():
        click.echo(f"{name}: not read. {why}")
