"""The options that verbs of this room share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def stacked(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which the help lists them."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


class KeepRatios(click.ParamType):
    """One share of visual tokens, or one per prune point, comma-separated; ranges are the plan's business."""

    name = "R"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the shares as numbers."""
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"{value!r} is neither a number nor a list of numbers; write for example 0.4 or 0.5,0.25", param, ctx
            )


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
    "--threshold",
    type=float,
    metavar="S",
    help="Keep the small model's answer if its score is above S, in [0, 1]; 0: always, 1: never. [the bundle's]",
)
keep_option = click.option(
    "--keep",
    type=KeepRatios(),
    metavar="R[,R…]",
    help="Share of visual tokens kept, in (0, 1]; with several prune points one for each. [the export's]",
)
target_option = click.option(
    "--target",
    metavar="NAME",
    help="Which of the bundle's targets to run on. [the best that this machine can run]",
)
preload_option = click.option(
    "--preload", is_flag=True, help="Open every model and run it once before the first question."
)
threads_option = click.option(
    "--threads",
    type=int,
    metavar="N",
    help="CPU threads, at most; on cpu and openvino a model under 16 MiB takes 1. [the runtime's choice]",
)
tokens_option = click.option(
    "--max-new-tokens", type=int, metavar="N", help="Longest answer, in tokens. [the checkpoint's, else 128]"
)


def document_option(schema: str) -> Callable[[Command], Command]:
    """--json of a verb whose result is one document."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print one document, {schema}.")


# How an answer is written: the fields of ``engines.sampling.Options``.
writing_options = stacked(
    tokens_option,
    click.option("--temperature", type=float, default=0.0, metavar="T", help="Sampling temperature; 0 is greedy. [0]"),
    click.option("--top-k", type=int, metavar="K", help="Sample from the K most likely tokens. [all]"),
    click.option(
        "--top-p",
        type=float,
        metavar="P",
        help="Sample from the most likely tokens that together reach probability P. [all]",
    ),
    click.option(
        "--seed", type=int, metavar="N", help="Random seed for sampling. [a new one each time; --json reports it]"
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="Penalty on tokens already present; above 1 discourages repeats, 1 is off. [the checkpoint's]",
    ),
    click.option(
        "--no-draft",
        "draft",
        is_flag=True,
        callback=lambda _, __, given: not given,
        help="Don't use the small model's answer as a draft for the large one's; the tokens are the same.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
)
