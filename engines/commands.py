"""The verbs that ask a bundle: run, chat and show kept; importing this file imports no runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from engines.options import (
    bundle_argument,
    document_option,
    images_option,
    keep_option,
    preload_option,
    target_option,
    threads_option,
    threshold_option,
    tokens_option,
    writing_options,
)
from graphs.console import emit_json


@click.command()
@bundle_argument
@click.argument("question")
@images_option
@keep_option
@threshold_option
@writing_options
@document_option("saccade.answer/1")
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
