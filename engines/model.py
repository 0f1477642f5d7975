"""One model of a bundle: its processor and its three sessions, opened on first use and kept open.

Legend: S prompt rows, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from engines.clock import Clock
from engines.decoder import Chunk, Decoder, Keep, keep_ratios
from engines.families import Seen
from engines.generate import Generation
from engines.processing import Processor
from engines.session import Session, Value, open_session
from engines.vision import features_of
from graphs.layouts.budgets import image_of as image_of_tokens
from graphs.spec import ExportSpec, deepstack_names, visual_names

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Prompt:
    """An image and a question, ready for the decoder.

    input_ids: int64 [1, S]. visual: the image as the vision stage took it. inputs_embeds: [1, S, D] on
    the device. is_visual: bool [S]. positions: int64 [S] or [3, S], the original ones, with gaps where the
    vision stage dropped tokens. deepstack: features by input name, [1, S, D] on the device. ms: what each step
    took. kept_visual: int64, which of the original visual tokens are there; None: all.
    """

    input_ids: np.ndarray
    visual: Seen
    inputs_embeds: Value
    is_visual: np.ndarray
    positions: np.ndarray
    deepstack: Mapping[str, Value]
    ms: dict[str, float]
    visual_tokens: int
    kept_visual: np.ndarray | None = None

    @property
    def chunk(self) -> Chunk:
        """All of it, as the decoder takes it."""
        image_of = self.of_visual(image_of_tokens(self.visual.tokens))
        return Chunk(
            self.inputs_embeds,
            self.is_visual,
            self.positions,
            self.deepstack,
            self.visual_tokens,
            self.visual.tokens,
            image_of,
        )

    def __len__(self) -> int:
        return self.input_ids.shape[1]

    @property
    def next_position(self) -> int:
        """The position of the first token of the answer."""
        return int(self.positions.max()) + 1

    def of_visual(self, values_V: np.ndarray) -> np.ndarray:
        """Of one value per original visual token, those of the tokens that are there."""
        return values_V if self.kept_visual is None else values_V[self.kept_visual]


class Model:
    """A member of a bundle, or an export folder, on one target."""

    def __init__(self, folder: Path, spec: ExportSpec, target: str = "cpu", threads: int | None = None) -> None:
        self.folder, self.spec = Path(folder), spec
        self.processor = Processor(folder, spec)
        self._target, self._threads = target, threads
        self._sessions: dict[str, Session] = {}

    @property
    def opened(self) -> frozenset[str]:
        """The stages whose sessions are open."""
        return frozenset(self._sessions)

    def session(self, stage: str) -> Session:
        """Return a stage's session, opening it the first time."""
        if stage not in self._sessions:
            file = self.folder / self.spec.stages[stage].file
            self._sessions[stage] = open_session(file, self._target, self._threads)
        return self._sessions[stage]

    def open(self) -> None:
        """Load the processor and open every stage now, so that no question has to wait for it."""
        self.processor.load()
        for stage in self.spec.stages:
            self.session(stage)

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder with the host's rules around it."""
        return Decoder(self.session("decoder"), self.spec)

    def prompt(self, image: Image.Image, question: str, keep: Keep = None) -> Prompt:
        """See the image and merge it with the question; the first stages of every answer.

        keep: as for ``generate``; the vision stage's share is its first, where the plan prunes there.
        """
        vision_keep = keep_ratios(self.spec.plan, keep)[0] if self.spec.plan.vision and keep is not None else None
        self.processor.checked(question)
        clock, ms = Clock(), {}
        self.open()
        ms["open"] = clock.lap()
        visual = self.processor.look(image)
        input_ids = self.processor.prompt(question, visual)
        is_visual_S = input_ids[0] == self.spec.tokens.image
        positions = squeezed(self.processor.family.positions(is_visual_S, visual, 0))
        ms["prepare"] = clock.lap()
        features = features_of(self, visual, input_ids[0], vision_keep)
        ms["vision"] = clock.lap()
        rows = features.rows(is_visual_S)
        embeds, deepstack = self._embeds(input_ids[:, rows], features.values)
        ms["embed"] = clock.lap()
        return Prompt(
            input_ids[:, rows],
            visual,
            embeds,
            is_visual_S[rows],
            positions[..., rows],
            deepstack,
            ms,
            int(is_visual_S.sum()),
            features.kept,
        )

    def embed_text(self, tokens: Sequence[int]) -> Value:
        """Return inputs_embeds [1, S, D] of text alone.

        A placeholder that a model writes stands for an image that is not there: a row of zeros.
        """
        dtype = next(t.dtype for t in self.spec.stages["embed"].inputs if t.name == "visual_embeds")
        rows = max(1, list(tokens).count(self.spec.tokens.image))
        no_image = np.zeros((rows, self.spec.language.width), dtype=dtype)
        nothing = dict.fromkeys(visual_names(self.spec.language), no_image)
        return self._embeds(np.asarray([tokens], np.int64), nothing)[0]

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        keep: Keep = None,
        priority_S: np.ndarray | None = None,
    ) -> Generation:
        """Return a greedy generation that has not begun; ``max_new_tokens`` defaults to the checkpoint's."""
        limit = self.processor.max_new_tokens or DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        return Generation(self, prompt, limit, keep, priority_S)

    def to_host(self, value: Value) -> np.ndarray:
        """Copy a device value to the host."""
        return self.session("decoder").to_host(value)

    def _embeds(self, input_ids: np.ndarray, features: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
        device = ("inputs_embeds", *deepstack_names(self.spec.language))
        out = self.session("embed").run({"input_ids": input_ids, **features}, device=device)
        return out.pop("inputs_embeds"), out


def squeezed(positions: np.ndarray) -> np.ndarray:
    """Positions without the batch axis: [1, S] → [S], [3, 1, S] → [3, S]."""
    return positions[0] if positions.ndim == 2 else positions[:, 0]
