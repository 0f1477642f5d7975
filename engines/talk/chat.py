"""A conversation over standard input and output: a line is a turn, the answers alone go to stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from engines.images import image_from
from engines.stream import Stream
from engines.talk.conversation import Conversation
from graphs.console import emit_json
from graphs.errors import SaccadeError, UsageError

HELP = "/image FILE shows an image with the next question, /reset starts over, /quit ends"


def say(stream: Stream, as_json: bool = False) -> None:
    """Print an answer as it is made, or as one line of JSON when it is complete."""
    if as_json:
        emit_json(stream.finish().document())
        return
    for piece in stream:
        click.echo(piece, nl=False)
    click.echo()


def talk_in_lines(conversation: Conversation, images: Sequence[Path], as_json: bool) -> None:
    """Answer line after line until the input ends or says so.

    On a terminal a refused turn is said and the conversation goes on as it was; else it is raised.
    """
    told = len(conversation.talk)
    if told and conversation.talk[-1].role == "user":
        if images:
            raise UsageError(
                "--image goes with the first line, but the messages end with a question; put the image into "
                "that message"
            )
        say(conversation.stream_answer(), as_json)
    shown = [image_from(path) for path in images]
    for line in _lines():
        try:
            word, _, rest = line.partition(" ")
            if word == "/quit":
                return
            if word == "/reset":
                conversation.reset(told)
                shown = []
            elif word == "/image":
                shown.append(image_from(rest.strip()))
            elif word.startswith("/"):
                raise UsageError(f"no command {word}; {HELP}")
            else:
                say(conversation.stream(line, shown), as_json)
                shown = []
        except SaccadeError as error:
            if not sys.stdin.isatty():
                raise
            click.echo(f"saccade: {error}", err=True)


def _lines() -> Iterator[str]:
    """The lines of standard input that say something, asked for where somebody types them."""
    typed = sys.stdin.isatty()
    if typed:
        click.echo(HELP, err=True)
    while True:
        if typed:
            click.echo("> ", nl=False, err=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as e:
            raise UsageError(f"a line of standard input is not UTF-8 text ({e.reason}); write it in UTF-8") from None
        if not line:
            return
        if line.strip():
            yield line.strip()
