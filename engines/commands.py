"""The verbs of this room as a table; each command is thin and calls one function.

``build``, ``verify``, ``check``, ``lower``, ``pack``, ``unpack`` and what ``show`` tells about artefacts live in
``engines/bundles/commands.py``; importing this file imports no runtime.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from engines.options import (
    bundle_argument,
    images_option,
    keep_option,
    preload_option,
    target_option,
    threads_option,
    threshold_option,
    tokens_option,
    writing_options,
)
from graphs.talk import emit_json

# subcommand of show → where its click command lives, its line in `saccade show --help`
SHOWS = {
    "kept": ("engines.commands:show_kept", "Draw what the large model keeps of an image, and the guidance."),
    "bundle": ("engines.bundles.commands:show_bundle", "Show what a bundle holds (also: saccade show BUNDLE)."),
    "families": ("engines.bundles.commands:show_families", "List the model families, supported and not."),
    "policies": ("engines.bundles.commands:show_policies", "List the pruning policies."),
    "formats": ("engines.evaluation.commands:show_formats", "List the benchmarks that `eval --format` reads."),
    "ops": ("engines.bundles.commands:show_ops", "List Saccade's custom ONNX ops."),
    "machine": ("engines.bundles.commands:show_machine", "Show what this machine can run."),
}

ELSEWHERE = ("build", "check", "lower", "verify", "pack", "unpack")


def __getattr__(name: str) -> Any:
    """Find the verbs that live in ``bundles.commands`` on first use (PEP 562)."""
    if name in ELSEWHERE:
        return getattr(import_module("engines.bundles.commands"), name)
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
    """Show a bundle, kept tokens, families, policies, formats, ops or this machine."""


@click.command()
@bundle_argument
@click.argument("question")
@images_option
@keep_option
@threshold_option
@writing_options
@click.option("--json", "as_json", is_flag=True, help="Print one document, saccade.answer/1.")
@target_option
@preload_option
@threads_option
def run(
    bundle: Path,
    question: str,
    images: tuple[Path, ...],
    keep: tuple[float, ...] | None,
    threshold: float | None,
    as_json: bool,
    target: str | None,
    threads: int | None,
    preload: bool,
    **options: Any,
) -> None:
    """Ask BUNDLE a QUESTION about an image, several, or none; the answer alone goes to stdout, as it is made."""
    from engines.cascade import Cascade
    from engines.talk.chat import say

    stream = Cascade.open(bundle, target, threads, preload).stream(images, question, keep, threshold, **options)
    if as_json:
        emit_json(stream.finish().document())
        return
    say(stream)


@click.command()
@bundle_argument
@images_option
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
@click.option(
    "--messages",
    type=click.Path(path_type=Path),
    metavar="JSON",
    help='Earlier messages, a JSON list of {"role", "content"}; if the last is the user\'s, it is answered first.',
)
@keep_option
@threshold_option
@writing_options
@click.option("--json", "as_json", is_flag=True, help="Print each answer as one line, saccade.answer/1.")
@target_option
@preload_option
@threads_option
def chat(
    bundle: Path,
    images: tuple[Path, ...],
    system: str | None,
    messages: Path | None,
    keep: tuple[float, ...] | None,
    threshold: float | None,
    as_json: bool,
    target: str | None,
    threads: int | None,
    preload: bool,
    **options: Any,
) -> None:
    """Talk with BUNDLE: each line of standard input is a turn; images given here go with the first.

    A line /image FILE shows an image with the next question, /reset starts over, /quit ends.
    """
    from engines.cascade import Cascade
    from engines.talk.chat import talk_in_lines
    from engines.talk.messages import documents_from_file

    said = [{"role": "system", "content": system}] if system else []
    said += documents_from_file(messages) if messages else []
    conversation = Cascade.open(bundle, target, threads, preload).chat(said, keep, threshold, **options)
    talk_in_lines(conversation, images, as_json)


@click.command("kept")
@bundle_argument
@click.argument("question")
@images_option
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
    images: tuple[Path, ...],
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
    show_kept_tokens(cascade, images, question, output, keep=keep, max_new_tokens=max_new_tokens)
    click.echo(output)
