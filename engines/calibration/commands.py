"""The verb calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engines.evaluation.asked import Questions, data_options
from engines.options import bundle_argument, document_option, keep_option, target_option, threads_option, tokens_option
from graphs.console import emit, percent

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
@document_option("saccade.calibration/1")
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

    checked_promise(max_loss, confidence)
    questions = Questions.taken_from(asked)
    read = questions.read(data, ctx.obj or {}, scored=False)
    wanted = Wanted(max_loss, confidence, questions.worth if read.answered else None, baseline, keep, max_new_tokens)
    document = calibrate_bundle(bundle, read, wanted, target, threads)
    emit(document, as_json, in_words)


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
