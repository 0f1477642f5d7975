"""An answer's text while it grows."""

from __future__ import annotations

from collections.abc import Iterator

from engines.generate import Generation
from engines.processing import Processor

UNFINISHED = "\ufffd"  # what a tokenizer decodes part of a character to


def pieces_of(run: Generation, processor: Processor) -> Iterator[str]:
    """Yield the text that each token adds; what a later token could still change is held back.

    The pieces joined are the whole text, wherever decoding more tokens only ever adds to it.
    """
    said = ""
    for _ in run:
        text = processor.text(run.tokens)
        if text.startswith(said) and not text.endswith(UNFINISHED) and text != said:
            yield text[len(said) :]
            said = text
    text = processor.text(run.tokens)
    if text.startswith(said) and text != said:
        yield text[len(said) :]
