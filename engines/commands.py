"""The verbs of this room as a table; each command is thin and calls one function.

``build``, ``verify``, ``check``, ``lower`` and what ``show`` tells about artefacts live in
``engines/bundle_commands.py``; importing this file imports no runtime.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from graphs.talk import emit_json

# subcommand of show → where its click command lives, its line in `saccade show --help`
SHOWS = {
    "kept": ("engines.commands:show_kept", "Draw what the large model keeps of an image, and the guidance."),
    "bundle": ("engines.bundle_commands:show_bundle", "Tell what a bundle holds (also: saccade show BUNDLE)."),
    "families": ("engines.bundle_commands:show_families", "List the model families and what is not taken."),
    "policies": ("engines.bundle_commands:show_policies", "List the pruning policies."),
    "ops": ("engines.bundle_commands:show_ops", "List the ops of domain saccade."),
    "machine": ("engines.bundle_commands:show_machine", "Tell what this machine can run."),
}

ELSEWHERE = ("build", "check", "lower", "verify")


def __getattr__(name: str) -> Any:
    """Find the verbs that live in ``bundle_commands`` on first use (PEP 562)."""
    if name in ELSEWHERE:
        return getattr(import_module("engines.bundle_commands"), name)
    raise AttributeError(f"module 'engines.commands' has no attribute {name!r}")


class ShowGroup(click.Group):
    """The table ``SHOWS``; a first argument that stands in no table is a bundle's path."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the subcommands."""
        return list(SHOWS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a subcommand when it is called."""
        if cmd_name not in SHOWS:
            return None
        module, _, name = SHOWS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Read ``show PATH`` as ``show bundle PATH``."""
        if args and args[0] not in SHOWS and not args[0].startswith("-"):
            args = ["bundle", *args]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without importing anything."""
        with formatter.section("What to show"):
            formatter.write_dl([(name, line) for name, (_, line) in SHOWS.items()])


@click.group(cls=ShowGroup)
def show() -> None:
    """Show a bundle, kept tokens, families, policies, ops or this machine."""


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
image_option = click.option(
    "--image", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The image the question is about."
)
keep_option = click.option(
    "--keep",
    type=KeepRatios(),
    metavar="R[,R…]",
    help="Share of visual tokens kept at each prune point, in (0, 1]. [the export's]",
)
target_option = click.option("--target", metavar="NAME", help="Refuse a bundle that was built for another target.")
threads_option = click.option("--threads", type=int, metavar="N", help="CPU threads of a run. [the runtime's choice]")
tokens_option = click.option("--max-new-tokens", type=int, metavar="N", help="Longest answer. [the checkpoint's]")


@click.command()
@bundle_argument
@click.argument("question")
@image_option
@keep_option
@click.option(
    "--threshold", type=float, metavar="S", help="Exit early above this score; 0 always, 1 never. [the bundle's]"
)
@tokens_option
@click.option("--json", "as_json", is_flag=True, help="Print one document, saccade.answer/1.")
@target_option
@threads_option
def run(
    bundle: Path,
    question: str,
    image: Path,
    keep: tuple[float, ...] | None,
    threshold: float | None,
    max_new_tokens: int | None,
    as_json: bool,
    target: str | None,
    threads: int | None,
) -> None:
    """Ask BUNDLE a QUESTION about an image; the answer alone goes to stdout, as it is made."""
    from engines.cascade import Cascade

    stream = Cascade.open(bundle, target, threads).stream(image, question, keep, threshold, max_new_tokens)
    if as_json:
        emit_json(stream.finish().document())
        return
    for piece in stream:
        click.echo(piece, nl=False)
    click.echo()


@click.command("kept")
@bundle_argument
@click.argument("question")
@image_option
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PNG",
    help="The picture to write.",
)
@keep_option
@tokens_option
@target_option
@threads_option
def show_kept(
    bundle: Path,
    question: str,
    image: Path,
    output: Path,
    keep: tuple[float, ...] | None,
    max_new_tokens: int | None,
    target: str | None,
    threads: int | None,
) -> None:
    """Draw what the large model of BUNDLE keeps of an image for a QUESTION, and the guidance beside it."""
    from engines.cascade import Cascade
    from engines.picture import show_kept_tokens

    cascade = Cascade.open(bundle, target, threads)
    show_kept_tokens(cascade, image, question, output, keep=keep, max_new_tokens=max_new_tokens)
    click.echo(output)
