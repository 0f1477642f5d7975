"""The verbs that ask many questions: calibrate and eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engines.evaluation.asked import FORMATS_HELP, Layers, Questions, Several, data_options
from engines.options import KeepRatios, bundle_argument, keep_option, target_option, threads_option, tokens_option
from graphs.talk import emit_json, percent, warn

if TYPE_CHECKING:
    from engines.calibration.record import Baseline


@click.command()
@bundle_argument
@click.argument("data", metavar="DATA")
@click.option(
    "--max-loss",
    type=float,
    default=0.02,
    show_default=True,
    metavar="A",
    help="Largest share of questions that may be lost, in (0, 1).",
)
@click.option(
    "--confidence",
    type=float,
    default=0.95,
    show_default=True,
    metavar="C",
    help="Probability that the bound holds, in (0, 1).",
)
@click.option(
    "--baseline",
    type=click.Choice(("pruned", "full")),
    default="pruned",
    show_default=True,
    help="Large model to compare with: pruned as it will run, or unpruned.",
)
@keep_option
@tokens_option
@data_options
@click.option("--json", "as_json", is_flag=True, help="Print one document, saccade.calibration/1.")
@target_option
@threads_option
@click.pass_context
def calibrate(
    ctx: click.Context,
    /,
    bundle: Path,
    data: str,
    max_loss: float,
    confidence: float,
    baseline: Baseline,
    keep: tuple[float, ...] | None,
    max_new_tokens: int | None,
    as_json: bool,
    target: str | None,
    threads: int | None,
    **asked: Any,
) -> None:
    """Find the exit threshold of BUNDLE whose loss is bounded on questions like those of DATA, and write it there.

    DATA is a JSONL file, one question per line, {"image": "a.png", "question": "…", "answers": ["…"]}, a benchmark's
    file with --format, or `glyphs`, the questions of the shipped pair (a file of that name: ./glyphs). With answers a
    question is lost where it exits, the large model is right and the small one is wrong; without, where it exits and
    their answers differ. `run` then uses the threshold wherever it asks under the same conditions.
    """
    from engines.calibration.calibrate import Wanted, calibrate_bundle
    from engines.calibration.learn import checked_promise
    from graphs.errors import UsageError

    checked_promise(max_loss, confidence)
    questions = Questions(**asked)
    read = questions.read(data, ctx.obj or {})
    if asked["metric"] and not read.answered:
        raise UsageError(
            f"--metric {asked['metric']} has no effect, because {data} has no answers; leave it out or add answers"
        )
    for line in read.bad:
        warn(f"left out: {line}")
    wanted = Wanted(max_loss, confidence, questions.worth if read.answered else None, baseline, keep, max_new_tokens)
    document = calibrate_bundle(bundle, read, wanted, target, threads)
    if as_json:
        emit_json(document)
    else:
        for line in in_words(document):
            click.echo(line)


def in_words(document: dict[str, Any]) -> list[str]:
    """What a calibration found, on stdout."""
    found, ms, worth = document["calibration"], document["ms_per_question"], document["accuracy"]
    if document["never_exit"]:
        return [
            f"never exit: no threshold below 1 keeps the loss below {found['max_loss']:g} with confidence "
            f"{found['confidence']:g} on these {found['questions']} questions; threshold 1 was written"
        ]
    differ, wrong = "exit with an answer that differs", "exit wrongly where the large model is right"
    lost = differ if found["metric"] == "agreement" else wrong
    lines = [
        f"threshold {found['threshold']:g}: at most {percent(found['max_loss'])} of questions like these {lost}, "
        f"with confidence {found['confidence']:g} ({found['losses']:g} lost of {found['questions']}, "
        f"p {found['p_value']:.3g})",
        f"exits {found['exit_rate']:.1%}; {ms['cascade']:.1f} ms a question instead of {ms['never_exit']:.1f}, "
        f"{document['saved']:.0%} saved, sessions open",
    ]
    if worth:
        systems = ", ".join(f"{name} {value:.1%}" for name, value in worth.items())
        lines.append(f"{found['metric']} on these questions: {systems} (baseline: the {found['baseline']} large model)")
    if found["baseline"] == "full":
        lines.append("what pruning loses where the large model answers is not part of the promise")
    return lines


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
@click.option("--json", "as_json", is_flag=True, help="Print one document, saccade.eval/2.")
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
    from graphs.errors import UsageError

    names = ("format", "images", "annotations", "prompt", "metric", "questions", "skip_bad")
    questions = Questions(**{name: asked.pop(name) for name in names})
    read = questions.read(data, ctx.obj or {})
    if not read.answered:
        raise UsageError(f"{data} has no answers, so nothing can be said about accuracy; add them to every line")
    for line in read.bad:
        warn(f"left out: {line}")
    document = evaluate_bundles(bundles, read, out, questions.worth, data_name=data, **asked)
    if as_json:
        emit_json(document)
    else:
        for line in table_of(document):
            click.echo(line)


@click.command("formats")
@click.option("--json", "as_json", is_flag=True, help="Print one document, saccade.formats/1.")
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
