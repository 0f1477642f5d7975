"""The verbs that ask many questions: calibrate and eval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engines.options import KeepRatios, bundle_argument, keep_option, target_option, threads_option, tokens_option
from graphs.talk import emit_json, warn

if TYPE_CHECKING:
    from engines.calibration.record import Baseline
    from engines.evaluation.data import Data

METRIC_NAMES = ("exact", "contains", "vqa", "anls", "relaxed")
BUILT_IN_QUESTIONS = 1000


questions_option = click.option(
    "--questions", type=click.IntRange(min=1), metavar="N", help="Only the first. [all; 1000 of a built-in set]"
)
skip_option = click.option("--skip-bad", is_flag=True, help="Leave bad lines out and list them, instead of stopping.")


@click.command()
@bundle_argument
@click.argument("data", metavar="DATA")
@click.option("--max-loss", type=float, default=0.02, show_default=True, metavar="A", help="Largest risk to allow.")
@click.option("--confidence", type=float, default=0.95, show_default=True, metavar="C", help="How sure to be of it.")
@click.option(
    "--metric", type=click.Choice(METRIC_NAMES), help="What an answer is worth, where answers are known. [exact]"
)
@click.option(
    "--baseline",
    type=click.Choice(("pruned", "full")),
    default="pruned",
    show_default=True,
    help="The large model that the small one is held against: pruned as it will run, or seeing everything.",
)
@keep_option
@tokens_option
@questions_option
@skip_option
@click.option("--json", "as_json", is_flag=True, help="Print one document, saccade.calibration/1.")
@target_option
@threads_option
@click.pass_context
def calibrate(
    ctx: click.Context,
    bundle: Path,
    data: str,
    max_loss: float,
    confidence: float,
    metric: str | None,
    baseline: Baseline,
    keep: tuple[float, ...] | None,
    max_new_tokens: int | None,
    questions: int | None,
    skip_bad: bool,
    as_json: bool,
    target: str | None,
    threads: int | None,
) -> None:
    """Find the exit threshold of BUNDLE whose loss is bounded on questions like those of DATA, and write it there.

    DATA is a JSONL file, a question a line, {"image": "a.png", "question": "…", "answers": ["…"]}, or `glyphs`, the
    questions of the shipped pair (a file of that name: ./glyphs). With answers a question is lost where it exits, the
    large model is right and the small one is wrong; without, where it exits and their answers differ. `run` then uses
    the threshold wherever it asks under the same conditions.
    """
    from engines.calibration.calibrate import Wanted, calibrate_bundle
    from engines.calibration.learn import checked_promise
    from graphs.errors import UsageError

    checked_promise(max_loss, confidence)
    read = questions_from(data, ctx.obj or {}, metric, questions, skip_bad)
    if metric and not read.answered:
        raise UsageError(f"--metric {metric} does nothing, because {data} has no answers; leave it out or add answers")
    for line in read.bad:
        warn(f"left out: {line}")
    wanted = Wanted(
        max_loss, confidence, (metric or "exact") if read.answered else None, baseline, keep, max_new_tokens
    )
    document = calibrate_bundle(bundle, read, wanted, target, threads)
    if as_json:
        emit_json(document)
    else:
        for line in in_words(document):
            click.echo(line)


def questions_from(
    data: str, built_in: Mapping[str, str], metric: str | None, limit: int | None, skip_bad: bool
) -> Data:
    """Read DATA: one of the front door's ``built_in`` sets (name → ``module:function(n)``), or a JSONL file."""
    from engines.evaluation.data import data_from_file, data_from_records

    if data in built_in:
        module, _, name = built_in[data].partition(":")
        make: Callable[[int], Iterable[Mapping[str, Any]]] = getattr(import_module(module), name)
        return data_from_records(make(limit or BUILT_IN_QUESTIONS), data, metric)
    return data_from_file(Path(data), metric, limit, skip_bad)


def in_words(document: dict[str, Any]) -> list[str]:
    """What a calibration found, on stdout."""
    found, ms, worth = document["calibration"], document["ms_per_question"], document["accuracy"]
    if document["never_exit"]:
        return [
            f"never exit: no threshold below 1 keeps the loss below {found['max_loss']:g} with confidence "
            f"{found['confidence']:g} on these {found['questions']} questions; threshold 1 was written"
        ]
    lost = "answers that differ" if found["metric"] == "agreement" else "answers that the large model had right"
    lines = [
        f"threshold {found['threshold']:g}: {lost} are at most {found['max_loss']:.1%} of questions like these, with "
        f"confidence {found['confidence']:g} ({found['losses']:g} lost of {found['questions']}, "
        f"p {found['p_value']:.3g})",
        f"exits {found['exit_rate']:.1%}; {ms['cascade']:.1f} ms a question instead of {ms['never_exit']:.1f}, "
        f"{document['saved']:.0%} saved, sessions open",
    ]
    if worth:
        systems = ", ".join(f"{name} {value:.1%}" for name, value in worth.items())
        lines.append(f"{found['metric']} on these questions: {systems} (baseline: the {found['baseline']} large model)")
    if found["baseline"] == "full":
        lines.append("what pruning loses where the large model answers is no part of the promise")
    return lines


class Several(click.ParamType):
    """Values separated by commas; ``of`` reads each."""

    def __init__(self, of: click.ParamType, name: str) -> None:
        self.of, self.name = of, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """Return the values."""
        return [self.of.convert(part.strip().replace(":", ","), param, ctx) for part in str(value).split(",")]


@click.command("eval")
@bundle_argument
@click.argument("data", metavar="DATA")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Where results go.")
@click.option(
    "--keep",
    "keeps",
    type=Several(KeepRatios(), "R"),
    default=None,
    metavar="R[,R…]",
    help="Shares of visual tokens to try; one that has several prune points is written 0.5:0.25. [the export's]",
)
@click.option(
    "--policy",
    "policies",
    type=Several(click.STRING, "P"),
    default=None,
    metavar="P[,P…]",
    help="The bundle's own by its name, and random. [the bundle's own]",
)
@click.option(
    "--threshold",
    "thresholds",
    type=Several(click.FloatRange(0, 1), "S"),
    default=None,
    metavar="S[,S…]",
    help="Exit thresholds to try. [the bundle's own]",
)
@click.option(
    "--metric", type=click.Choice(METRIC_NAMES), default="exact", show_default=True, help="An answer's worth."
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the random tokens.")
@tokens_option
@questions_option
@skip_option
@click.option("--json", "as_json", is_flag=True, help="Print one document, saccade.eval/1.")
@target_option
@threads_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    bundle: Path,
    data: str,
    out: Path,
    metric: str,
    questions: int | None,
    skip_bad: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Ask BUNDLE every question of DATA under every keep ratio, policy and threshold, and tell what each is worth.

    DATA is as for `calibrate`, with answers. DIR gets results.json, results.csv and answers.jsonl, from which a run
    that was interrupted goes on when the same command is given again.
    """
    from engines.evaluation.results import evaluate_bundle, table_of
    from graphs.errors import UsageError

    read = questions_from(data, ctx.obj or {}, metric, questions, skip_bad)
    if not read.answered:
        raise UsageError(f"{data} has no answers, so nothing can be said about accuracy; add them to every line")
    for line in read.bad:
        warn(f"left out: {line}")
    document = evaluate_bundle(bundle, read, out, metric, **asked)
    if as_json:
        emit_json(document)
    else:
        for line in table_of(document):
            click.echo(line)
