"""The options that verbs of this room share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class KeepRatios(click.ParamType):
    """One share of visual tokens, or one per prune point, comma-separated; ranges are the plan's business."""

    name = "R"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the shares as numbers."""
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no number and no list of numbers; write for example 0.4 or 0.5,0.25", param, ctx)


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
images_option = click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="An image the question is about; may be given several times.",
)
threshold_option = click.option(
    "--threshold", type=float, metavar="S", help="Exit early above this score; 0 always, 1 never. [the bundle's]"
)
keep_option = click.option(
    "--keep",
    type=KeepRatios(),
    metavar="R[,R…]",
    help="Share of visual tokens kept at each prune point, in (0, 1]. [the export's]",
)
target_option = click.option(
    "--target", metavar="NAME", help="Run on this one of the bundle's targets. [the best that this machine can run]"
)
preload_option = click.option("--preload", is_flag=True, help="Open every model before the first question.")
threads_option = click.option(
    "--threads",
    type=int,
    metavar="N",
    help="CPU threads of a run, at most. [the runtime's choice; 1 for a small model]",
)
tokens_option = click.option("--max-new-tokens", type=int, metavar="N", help="Longest answer. [the checkpoint's]")

_WRITING = (
    tokens_option,
    click.option("--temperature", type=float, default=0.0, metavar="T", help="Draw at this temperature. [0: greedy]"),
    click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest tokens. [all]"),
    click.option("--top-p", type=float, metavar="P", help="Draw from the likeliest that reach probability P. [all]"),
    click.option("--seed", type=int, metavar="N", help="Seed of the draws. [a fresh one, named with --json]"),
    click.option(
        "--repetition-penalty", type=float, metavar="X", help="Above 1: what was said is unlikelier. [the checkpoint's]"
    ),
    click.option(
        "--no-draft",
        "draft",
        is_flag=True,
        callback=lambda _, __, given: not given,
        help="Write the large model's answer without a look at the small one's; the tokens are the same.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
)


def writing_options(command: Command) -> Command:
    """How an answer is written: the fields of ``engines.sampling.Options``."""
    return reduce(lambda made, option: option(made), reversed(_WRITING), command)
