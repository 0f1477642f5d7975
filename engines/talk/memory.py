"""What one model holds of a conversation: its cache, brought up to what was shown whenever it is its turn.

The conversation is rendered as a whole before every answer. What the cache holds of turns that have ended and the new
rendering begin with alike stays; the rest (another model's answer, a re-tokenised end of its own, what a turn left that
failed) is fed as one chunk. So an answer is that of a fresh run over the whole conversation in which the same visual
tokens were kept.
An image is pruned when it is first fed, by what guides that turn. Images are processed message by message, and their
pixels dropped once nobody is to see them any more: of a pruned image they take several times the cache's memory.
A new one may begin with what the model's last ones began with alike (``engines/talk/beginning.py``).
Legend: L tokens of the line, S rows of the chunk, V visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from engines.budgets import Keep, keep_ratios
from engines.cache import cut
from engines.clock import Clock
from engines.decoder import Chunk
from engines.families import Seen
from engines.talk.beginning import WORTH, Beginnings, Held, alike
from engines.talk.messages import Message, Talk
from engines.talk.prompt import Prompt
from engines.vision import Features, features_of
from graphs.spec import visual_names

if TYPE_CHECKING:
    from engines.generate import Generation
    from engines.model import Model


Sights: TypeAlias = dict[int, tuple[Message, Seen]]  # by place in the conversation


@dataclass(frozen=True, eq=False)
class Group:
    """The images of one message: their visual tokens stand in ``line[start:end]``."""

    start: int
    end: int
    message: Message
    seen: Seen


class Memory:
    """One model's side of one conversation."""

    def __init__(
        self, model: Model, seen: Sights | None = None, beginnings: Beginnings | None = None, sees_last: bool = True
    ) -> None:
        """Begin a conversation. seen: what its images became, shared with a model that sees them alike.

        beginnings: what the model's conversations begin with alike; None: this one begins with nothing. sees_last:
        whether nobody is to see an image once this model has.
        """
        self.model = model
        self._sees_last = sees_last
        self._held: Held | None = beginnings.held if beginnings else None
        self._sure = len(self._held.line) if self._held else 0  # of its line: tokens of turns that have ended
        self._beginnings = beginnings  # until this conversation has begun
        self._seen: Sights = {} if seen is None else seen
        self._asked: Talk | None = None  # what the last prompt was of

    def prompt(self, talk: Talk, keep: Keep = None) -> Prompt:
        """See new images and lay out what is to be fed before the talk's last message can be answered.

        keep: as for ``Model.generate``; the vision stage's share is its first, where the plan prunes there.
        """
        model = self.model
        self._asked = talk
        model.processor.checked(talk)
        clock, ms = Clock(), {}
        model.open()
        ms["open"] = clock.lap()
        shown = self._looked(talk)
        seen = [seen for _, seen in shown]
        line = model.processor.prompt(talk, seen)[0]
        is_visual_L = line == model.spec.tokens.image
        positions = squeezed(model.processor.family.positions(is_visual_L, joined(seen), 0))
        groups = image_groups(is_visual_L, shown)
        begins = self._sure = self._common(line, groups)
        new = [self._with_pixels(group) for group in groups if group.start >= begins]
        ms["prepare"] = clock.lap()
        features = self._features(line, new, keep)
        if self._sees_last:
            self._drop_pixels()
        ms["vision"] = clock.lap()
        rows = features.rows(is_visual_L[begins:]) + begins
        embeds, deepstack = model.embed(line[None, rows], features.values)
        there = np.zeros(len(line), bool)
        there[rows] = True
        prompt = Prompt(
            line=line,
            there=there,
            begins=begins,
            inputs_embeds=embeds,
            is_visual=is_visual_L[rows],
            positions=positions[..., rows],
            deepstack=deepstack,
            ms=ms,
            visual_tokens=int(is_visual_L[begins:].sum()),
            visual_before=int(is_visual_L[:begins].sum()),
            images=tuple(n for group in new for n in group.seen.tokens),
            kept_visual=features.kept,
            shown=tuple(group.message for group in groups),
        )
        if begins:
            prompt = self._behind_cache(prompt, is_visual_L, positions)
        if model.spec.plan.guidance:
            prompt = replace(prompt, whole=self._whole(prompt, positions))
        ms["embed"] = clock.lap()
        return prompt

    def _behind_cache(self, prompt: Prompt, is_visual_L: np.ndarray, positions: np.ndarray) -> Prompt:
        """The same chunk on top of what is held."""
        held, begins = self._held, prompt.begins
        assert held
        there = np.concatenate([held.there[:begins], prompt.there[begins:]])
        first = positions[..., begins].max()
        return replace(
            prompt,
            there=there,
            past=cut(held.cache, self.model.spec, int(first), self.model.to_host),
            past_visual=is_visual_L[:begins][held.there[:begins]],
            kept_before=tuple(kept[kept < prompt.visual_before] for kept in held.kept),
        )

    def remember(self, prompt: Prompt, run: Generation, kept: tuple[np.ndarray, ...]) -> None:
        """Take over a finished run. kept: per prune point the conversation's visual tokens that stayed."""
        assert run.cache
        fed = np.asarray(run.tokens[:-1], np.int64)
        line = np.concatenate([prompt.line, fed])
        there = np.concatenate([prompt.there, np.ones(len(fed), bool)])
        self._held = Held(line, there, run.cache, kept, prompt.whole, prompt.shown)
        if self._beginnings:
            images = np.flatnonzero(prompt.line == self.model.spec.tokens.image)
            self._beginnings.learn(self._held, text=int(images[0]) if len(images) else len(prompt.line))
        self._beginnings = None

    def settle(self, talk: Talk) -> None:
        """A turn has ended: the next one goes on behind it, where this model was asked in it.

        Until then every prompt begins where the turn did.
        """
        if self._held and self._asked is talk:
            self._sure = len(self._held.line)

    def _looked(self, talk: Talk) -> list[tuple[Message, Seen]]:
        """The images of every message that has some, each processed once; a turn that failed left another message."""
        for i, message in enumerate(talk):
            if message.images and (i not in self._seen or self._seen[i][0] is not message):
                self._seen[i] = message, self.model.processor.look(*message.images)
        return [self._seen[i] for i, message in enumerate(talk) if message.images]

    def _with_pixels(self, group: Group) -> Group:
        """The same, looked at again where its pixels were dropped: a turn failed, or the text before it has changed."""
        if group.seen.feeds:
            return group
        place = next(i for i, (message, _) in self._seen.items() if message is group.message)
        self._seen[place] = group.message, self.model.processor.look(*group.message.images)
        return replace(group, seen=self._seen[place][1])

    def _drop_pixels(self) -> None:
        """Keep of every image what later lines need: how many tokens it is, and where."""
        for i, (message, seen) in self._seen.items():
            if seen.feeds:
                self._seen[i] = message, seen.without_pixels()

    def _common(self, line: np.ndarray, groups: Sequence[Group]) -> int:
        """How many tokens of the line the cache serves: one is left to feed, no message's images are cut."""
        if not self._held:
            return 0
        common = alike(line[:-1], self._held.line[: self._sure])
        if self._beginnings and common < WORTH:
            return 0
        for i, group in reversed(list(enumerate(groups))):
            # Every image's placeholders are alike, so whose they are is asked of the message.
            if common < group.end or self._held.shown[i : i + 1] != (group.message,):
                common = min(common, group.start)
        return common

    def _features(self, line: np.ndarray, groups: Sequence[Group], keep: Keep) -> Features:
        """The vision stage over each message's images, joined."""
        plan = self.model.spec.plan
        share = keep_ratios(plan, keep)[0] if plan.vision and keep is not None else None
        ends = [*(group.start for group in groups[1:]), len(line)]
        parts = [
            features_of(self.model, group.seen, line[group.start : end], share)
            for group, end in zip(groups, ends, strict=False)
        ]
        if len(parts) < 2:
            return parts[0] if parts else Features(self.model.no_image())
        values = {
            name: np.concatenate([self.model.to_host(part.values[name]) for part in parts])
            for name in visual_names(self.model.spec.language)
        }
        before = np.cumsum([0, *(sum(group.seen.tokens) for group in groups[:-1])])
        kept = [part.kept + start for part, start in zip(parts, before, strict=True) if part.kept is not None]
        return Features(values, np.concatenate(kept) if kept else None)

    def _whole(self, prompt: Prompt, positions: np.ndarray) -> Chunk:
        """Every row from the first, on the host: those held, the answer's own tokens between, the chunk's."""
        held = self._held.whole if self._held and prompt.past else None
        before = prompt.cached
        embeds = [self.model.to_host(prompt.inputs_embeds)]
        deepstack = {name: [self.model.to_host(value)] for name, value in prompt.deepstack.items()}
        if held:
            text = max(before - len(held), 0)
            tokens = prompt.line[prompt.begins - text : prompt.begins].tolist()
            between = [self.model.to_host(self.model.embed_text(tokens))] if text else []
            embeds = [held.inputs_embeds[:, :before], *between, *embeds]
            for name, parts in deepstack.items():
                deepstack[name] = [held.deepstack[name][:, :before], *map(np.zeros_like, between), *parts]
        past = prompt.is_visual[:0] if prompt.past_visual is None else prompt.past_visual
        return Chunk(
            inputs_embeds=_in_row(embeds),
            is_visual=np.concatenate([past, prompt.is_visual]),
            positions=positions[..., np.flatnonzero(prompt.there)],
            deepstack={name: _in_row(parts) for name, parts in deepstack.items()},
        )


def joined(seen: Sequence[Seen]) -> Seen | None:
    """What several messages show, as far as positions depend on it."""
    if not seen:
        return None
    tokens = tuple(count for images in seen for count in images.tokens)
    shapes = tuple(shape for images in seen for shape in images.shapes)
    return replace(seen[0], tokens=tokens, shapes=shapes)


def image_groups(is_visual_L: np.ndarray, shown: Sequence[tuple[Message, Seen]]) -> list[Group]:
    """Where each message's images stand in the line."""
    at = np.flatnonzero(is_visual_L)
    counts = [sum(seen.tokens) for _, seen in shown]
    ends = np.cumsum(counts)
    return [
        Group(int(at[end - count]), int(at[end - 1]) + 1, *one)
        for end, count, one in zip(ends, counts, shown, strict=True)
    ]


def squeezed(positions: np.ndarray) -> np.ndarray:
    """Positions without the batch axis: [1, S] → [S], [3, 1, S] → [3, S]."""
    return positions[0] if positions.ndim == 2 else positions[:, 0]


def _in_row(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows [1, S_i, D] behind each other; a first turn has one part, which is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
