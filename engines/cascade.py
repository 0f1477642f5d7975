"""The cascade: the small model looks at everything and answers; the large one looks where it pointed, if it must.

Source: SGL (arXiv 2412.03324). The published code always runs both models; here the large one's
sessions are not even opened before a question needs them.
Legend: V visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np

from engines.answer import Answer, Memories, SmallPass, Turn, answer_of, answer_of_small, times_of
from engines.budgets import Keep, keep_ratios
from engines.clock import Clock
from engines.confidence import Confidence, confidence_of, consistency_of
from engines.draft import takes_draft, tokens_that_differ
from engines.guidance import drawn_priority, priority_of
from engines.images import Picture
from engines.model import Model
from engines.one_at_a_time import lock_of, one_at_a_time
from engines.processing import load_ahead
from engines.sampling import OptionKeywords, Options
from engines.stream import Stream, pieces_of
from engines.talk.memory import Memory, Sights
from engines.talk.messages import Content, Talk, asked
from graphs.console import say, step
from graphs.errors import BadArtefact, UsageError
from graphs.spec import spec_from_folder

if TYPE_CHECKING:
    from engines.calibration.promise import Promises
    from engines.talk.conversation import Conversation


class Cascade:
    """A pair of models, or one alone, ready to be asked; from several threads too, which take turns.

    reuses_beginnings: whether a conversation may begin with text that was computed for those before it; to be switched
    off where what a question costs, or gives to the last bit, must not hang on them.
    """

    def __init__(
        self, small: Model | None, large: Model | None, threshold: float = 1.0, reuses_beginnings: bool = True
    ) -> None:
        """Take members that are known to fit; ``large`` is also the place of a model alone."""
        if not small and not large:
            raise BadArtefact("the bundle holds no model; build it again")
        if small and not small.spec.plan.guidance:
            raise UsageError(
                f"the small model was exported with plan {small.spec.plan.name}, which gives no guidance; "
                "export it with: --policy sgl --role small"
            )
        self.small, self.large = small, large
        self.threshold = checked_threshold(threshold)
        self.promises: Promises | None = None
        self.reuses_beginnings = reuses_beginnings
        self.lock = lock_of(model for model in (small, large) if model)

    @classmethod
    def open(
        cls,
        path: str | PathLike[str],
        target: str | None = None,
        threads: int | None = None,
        preload: bool = False,
        reuses_beginnings: bool = True,
    ) -> Cascade:
        """Open a bundle; sessions open when a question needs them, and stay open.

        target: this one of the bundle's; None: the best that this machine can run. threads: CPU threads of a run at
        most, None for the runtime's choice; a model of few weights takes one. preload: open every session now, the
        large model's too, and run each once. reuses_beginnings: see the class. Raises BadArtefact for a bundle that is
        broken or tampered with, UsageError for a target that it does not hold, BackendMissing where it cannot be run
        here, OperationFailed where its weights are more than the memory that is free.
        """
        from engines.bundles.bundle import open_bundle
        from engines.bundles.footprint import refuse_what_cannot_fit
        from engines.calibration.promise import promises_of

        load_ahead()
        bundle = open_bundle(Path(path), target=target, check="used")
        refuse_what_cannot_fit(bundle)
        models = {
            name: Model(m.folder, m.spec, bundle.target, threads, m.engines) for name, m in bundle.members.items()
        }
        opened = cls._of(models, bundle.threshold, reuses_beginnings)
        opened.promises = promises_of(bundle)
        if preload:
            opened.preload()
        return opened

    @classmethod
    def from_exports(
        cls,
        *folders: str | PathLike[str],
        threshold: float = 1.0,
        target: str = "cpu",
        threads: int | None = None,
        reuses_beginnings: bool = True,
    ) -> Cascade:
        """Run one export, or a small and a large one, where they lie; UsageError where they do not fit.

        For what has no bundle yet: nothing is checked against a manifest.
        """
        from engines.bundles.pair import Source, members_from_sources

        sources = [Source(Path(folder), spec_from_folder(Path(folder))) for folder in folders]
        models = {name: Model(s.folder, s.spec, target, threads) for name, s in members_from_sources(sources).items()}
        return cls._of(models, threshold, reuses_beginnings)

    @classmethod
    def _of(cls, models: dict[str, Model], threshold: float, reuses_beginnings: bool) -> Cascade:
        if "alone" in models:
            alone = models["alone"]
            small, large = (alone, None) if alone.spec.role == "small" else (None, alone)
            return cls(small, large, reuses_beginnings=reuses_beginnings)
        return cls(models["small"], models["large"], threshold, reuses_beginnings)

    @cached_property
    @one_at_a_time
    def drafts(self) -> bool:
        """Whether the small model's answer is a draft of the large one's; where tokenizers forbid it, that is said."""
        if not self.small or not self.large or not takes_draft(self.large):
            return False
        if differs := tokens_that_differ(self.small, self.large):
            say(f"the small model's answer cannot be the large one's draft: their {differs} differ")
        return not differs

    @cached_property
    def _sees_alike(self) -> bool:
        """Whether an image is prepared once for both models."""
        return bool(self.small and self.large and self.small.processor.sees_like(self.large.processor))

    @one_at_a_time
    def preload(self, runs: bool = True) -> None:
        """Open every session of every model and run it once, so that no question has to wait for either.

        runs: whether to run them, where that helps (``engines.targets.Target.runs_ahead``); BadArtefact where the
        golden tensors, on which it is done, cannot be read.
        """
        _ = self.drafts
        models = {"small": self.small, "large": self.large}
        for name, model in ((name, model) for name, model in models.items() if model):
            called = f"the {name} model" if self.small and self.large else "the model"
            with step(f"opening {called}"):
                model.open()
            if runs and model.runs_ahead:
                with step(f"running {called} once"):
                    model.run_once()

    def ask(
        self,
        image: Picture | Sequence[Picture] | None,
        question: Content,
        keep: Keep = None,
        threshold: float | None = None,
        guidance: np.ndarray | None = None,
        **options: Unpack[OptionKeywords],
    ) -> Answer:
        """Return the answer to a question about an image, about several, or about none.

        question: text, or parts as in a chat message, where text may stand between images. keep: share of
        visual tokens the large model keeps at its prune point, in (0, 1], None for its plan's. threshold: exit
        when the small model's S is above it; 1 never exits, None for the bundle's: the calibrated one where it
        holds. guidance: [V] scores to prune the large model by instead of the small model's, for comparisons.
        options: the fields of ``engines.sampling.Options``. Raises UsageError and BadArtefact, each naming what
        to change.
        """
        return self.stream(image, question, keep, threshold, guidance, **options).finish()

    def stream(
        self,
        image: Picture | Sequence[Picture] | None,
        question: Content,
        keep: Keep = None,
        threshold: float | None = None,
        guidance: np.ndarray | None = None,
        **options: Unpack[OptionKeywords],
    ) -> Stream:
        """Return an iterator over the answer's text, piece by piece; ``.answer`` holds the rest at its end.

        The arguments are those of ``ask``. With a pair nothing is said before the small model has
        been judged, and an answer of its own comes as one piece.
        """
        self.refuse_unservable(keep, threshold, options.get("draft", True), guidance)
        turn = self.turn((asked(question, image),), **options)
        if threshold is None and self.promises:
            return Stream(self.promises.parts(self, turn, keep, guidance), self.lock)
        return Stream(self.parts(turn, keep, threshold, guidance), self.lock)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] = (),
        keep: Keep = None,
        threshold: float | None = None,
        **options: Unpack[OptionKeywords],
    ) -> Conversation:
        """Return a conversation that goes on behind ``messages`` ({"role": …, "content": …}), each side's cache kept.

        keep, threshold and options hold for every answer; see ``ask``.
        """
        from engines.talk.conversation import Conversation

        return Conversation(self, messages, keep, threshold, **options)

    def look(
        self, image: Picture | Sequence[Picture] | None, question: Content, **options: Unpack[OptionKeywords]
    ) -> SmallPass:
        """Run the small model alone: its answer, its guidance, and how sure it is."""
        return self.look_at(self.turn((asked(question, image),), **options))

    def turn(self, talk: Talk, memories: Memories | None = None, **options: Unpack[OptionKeywords]) -> Turn:
        """Return a conversation that waits for an answer; with empty memories where none are given.

        Where tokens are drawn it has one seed, for both models.
        """
        return Turn(talk, Options(**options).seeded(), memories or self.memories())

    @one_at_a_time
    def memories(self) -> Memories:
        """Return what each model holds of a conversation that has not begun."""
        models = {"small": self.small, "large": self.large}
        seen: Sights | None = {} if self._sees_alike else None
        return {
            name: Memory(model, seen, model.beginnings if self.reuses_beginnings else None, self._sees_last(model))
            for name, model in models.items()
            if model
        }

    def _sees_last(self, model: Model) -> bool:
        """Whether an image's pixels are of no use any more once a model has seen it.

        They are while the large model may see it too, or once more: a pass with another share for its vision stage.
        """
        waits = self._sees_alike and model is self.small
        return not waits and not (self.small and model.spec.plan.vision)

    def refuse_unservable(
        self, keep: Keep, threshold: float | None, draft: bool = True, guidance: np.ndarray | None = None
    ) -> None:
        """UsageError for an option that this bundle cannot serve."""
        if threshold is not None and not (self.small and self.large):
            raise UsageError("this bundle holds one model, so a threshold has no effect; leave it out")
        if guidance is not None and not (self.large and self.large.spec.plan.uses_priority):
            raise UsageError("this bundle prunes by no guidance, so guidance has no effect; leave it out")
        if not draft and not self.drafts:
            raise UsageError("the large model takes no draft here, so turning drafts off has no effect; leave it out")
        if self.large:
            keep_ratios(self.large.spec.plan, keep)
        elif keep is not None:
            raise UsageError("this bundle's only model is not pruned, so keep has no effect; leave it out")
        if threshold is not None:
            checked_threshold(threshold)

    @one_at_a_time
    def look_at(self, turn: Turn) -> SmallPass:
        """Run the small model on a turn; its memory is brought up to the question and its own answer."""
        if not self.small:
            raise UsageError("this bundle has no small model to look first; build one from a pair")
        memory = turn.memories["small"]
        prompt = memory.prompt(turn.talk)
        run = self.small.generate(prompt, turn.options).finish()
        clock = Clock()
        guidance_V = cast(np.ndarray, run.guidance)
        guiding = clock.lap()  # nothing, but where a session makes it only now
        memory.remember(prompt, run, ())
        clock.lap()
        if len(guidance_V):
            consistency = consistency_of(self.small, prompt, run.tokens, guidance_V)
        else:  # without an image nothing can be cut, and the pass would repeat the run
            consistency = float(np.exp(np.sum(run.log_prob)))
        times = {**times_of("small", prompt, run), "small_guidance": guiding, "small_consistency": clock.lap()}
        return SmallPass(
            turn=turn,
            prompt=prompt,
            text=run.text,
            tokens=tuple(run.tokens),
            stopped=run.stopped,
            seed=run.seed,
            guidance=guidance_V,
            confidence=Confidence(confidence_of(np.asarray(run.log_prob)), consistency),
            milliseconds=times,
        )

    def answer_small(self, looked: SmallPass, threshold: float | None = None) -> Answer:
        """Return the small model's own answer, whatever its score."""
        return answer_of_small(looked, self.large is not None, threshold)

    def answer_large(
        self,
        looked: SmallPass,
        keep: Keep = None,
        guidance: np.ndarray | None = None,
        threshold: float | None = None,
        **options: Unpack[OptionKeywords],
    ) -> Answer:
        """Return the large model's answer, pruned by the small pass (or by ``guidance`` [V] instead).

        options: other ones than the small pass had, where any are given.
        """
        turn = looked.turn
        if options:
            turn = replace(turn, options=Options(**options).seeded(turn.options.seed))
        return Stream(self._pruned_parts(turn, keep, guidance, looked, threshold), self.lock).finish()

    def parts(
        self, turn: Turn, keep: Keep, threshold: float | None, guidance: np.ndarray | None = None
    ) -> Iterator[str | Answer]:
        """Yield the pieces of a turn's answer, then the answer. threshold: None for the bundle's own.

        For a ``Stream``, which takes ``lock`` for each.
        """
        if not self.small:
            yield from self._pruned_parts(turn, keep, guidance)
            return
        looked, bar = self.look_at(turn), self.threshold if threshold is None else float(threshold)
        if not self.large or looked.confidence.score > bar:
            yield looked.text
            yield self.answer_small(looked, bar)
            return
        yield from self._pruned_parts(turn, keep, guidance, looked, bar)

    def _pruned_parts(
        self,
        turn: Turn,
        keep: Keep,
        guidance: np.ndarray | None,
        looked: SmallPass | None = None,
        threshold: float | None = None,
    ) -> Iterator[str | Answer]:
        """Run the large model behind the small one's pass, or the only one, pruned by ``guidance`` [V] where given."""
        large, memory = self._large(), turn.memories["large"]
        plan, prompts = large.spec.plan, looked.shared if looked else {}
        shared = f"large, vision stage {keep}" if plan.vision else "large"
        if shared not in prompts:
            prompts[shared] = memory.prompt(turn.talk, keep)
        prompt = prompts[shared]
        if guidance is None:
            drawn = drawn_priority(plan, prompt.all_visual_tokens)
            guidance = looked.guidance if looked and drawn is None else drawn
        priority_S = priority_of(prompt, guidance) if plan.uses_priority and guidance is not None else None
        draft = looked.tokens if looked and turn.options.draft and self.drafts else ()
        run = large.generate(prompt, turn.options, keep, priority_S, draft)
        yield from pieces_of(run)
        answer = answer_of(large, prompt, run, keep, guidance, looked, threshold)
        memory.remember(prompt, run, answer.kept or ())
        yield answer

    def _large(self) -> Model:
        if not self.large:
            raise UsageError("this bundle has no large model; build one from a pair")
        return self.large


def checked_threshold(threshold: float) -> float:
    """Return the threshold, or UsageError where it is no score."""
    if not 0 <= threshold <= 1:
        raise UsageError(
            f"threshold is {threshold:g}, but the score that it is compared with is in [0, 1]; "
            "0 always exits early, 1 never does"
        )
    return float(threshold)
