"""What a decoder is fed for one answer: the rows of a conversation that its cache does not hold yet.

Legend: S rows of the chunk, P_0 rows in the cache, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.cache import Cache
from engines.decoder import Chunk
from engines.sessions.session import Value
from engines.talk.messages import Message
from graphs.layouts.budgets import image_of


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation up to where the answer begins; it can be answered any number of times.

    line: int64 [L], the token ids of all of it, one placeholder per visual token. there: bool [L], False where
    the vision stage dropped a visual token. begins: where in the line the chunk begins.
    The chunk, without what was dropped: inputs_embeds [1, S, D] on the device. is_visual: bool [S]. positions:
    int64 [S] or [3, S], the original ones. deepstack: features by input name, [1, S, D] on the device.
    images: visual tokens of each of the chunk's images, before any is dropped; visual_tokens: of all of them;
    visual_before: of images in front of the chunk.
    kept_visual: int64, which of the chunk's original visual tokens are there; None: all.
    past: the cache in front of the chunk; past_visual: bool [P_0]. kept_before: per prune point (vision stage
    first) the visual tokens in front of the chunk that stayed.
    whole: every row from the first, on the host, where the model gives guidance. shown: the messages
    that the line's images are from, in order. ms: what each step took.
    """

    line: np.ndarray
    there: np.ndarray
    begins: int
    inputs_embeds: Value
    is_visual: np.ndarray
    positions: np.ndarray
    deepstack: Mapping[str, Value]
    ms: dict[str, float]
    visual_tokens: int
    visual_before: int = 0
    images: tuple[int, ...] = ()
    kept_visual: np.ndarray | None = None
    past: Cache | None = None
    past_visual: np.ndarray | None = None
    kept_before: tuple[np.ndarray, ...] = ()
    whole: Chunk | None = None
    shown: tuple[Message, ...] = ()

    @property
    def chunk(self) -> Chunk:
        """What is fed, as the decoder takes it."""
        whose_V = image_of(self.images)
        return Chunk(
            self.inputs_embeds,
            self.is_visual,
            self.positions,
            self.deepstack,
            self.visual_tokens or None,
            self.images,
            whose_V if self.kept_visual is None else whose_V[self.kept_visual],
        )

    def __len__(self) -> int:
        """Rows of the whole conversation, those in the cache included."""
        return int(self.there.sum())

    @property
    def cached(self) -> int:
        """How many of them the cache holds."""
        return len(self) - len(self.is_visual)

    @property
    def next_position(self) -> int:
        """The position of the first token of the answer."""
        return int(self.positions.max()) + 1

    @property
    def all_visual_tokens(self) -> int:
        """Visual tokens of the conversation, before any is dropped; the chunk's are the last of them."""
        return self.visual_before + self.visual_tokens

    @property
    def visual_rows(self) -> np.ndarray:
        """The conversation's rows that are visual, int64, for a model without a prune point."""
        past = np.zeros(0, bool) if self.past_visual is None else self.past_visual
        return np.flatnonzero(np.concatenate([past, self.is_visual]))

    def of_visual(self, values_V: np.ndarray) -> np.ndarray:
        """Of one value per visual token of the conversation, those of the chunk's rows."""
        chunk_V = values_V[self.visual_before :]
        return chunk_V if self.kept_visual is None else chunk_V[self.kept_visual]
