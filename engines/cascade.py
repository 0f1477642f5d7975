"""The cascade: the small model looks at everything and answers; the large one looks where it pointed, if it must.

Source: SGL (arXiv 2412.03324). The published code always runs both models; here the large one's
sessions are not even opened before a question needs them.
Legend: V visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import cast

import numpy as np

from engines.answer import Answer, SmallPass
from engines.clock import Clock
from engines.confidence import Confidence, confidence_of, consistency_of
from engines.decoder import Keep, keep_ratios
from engines.generate import Generation
from engines.guidance import drawn_priority, priority_of_rows
from engines.images import Picture, image_from
from engines.model import Model, Prompt
from engines.stream import Stream, pieces_of
from graphs.errors import BadArtefact, UsageError
from graphs.plan import retention_of
from graphs.spec import ExportSpec, spec_from_folder


class Cascade:
    """A pair of models, or one alone, ready to be asked."""

    def __init__(self, small: Model | None, large: Model | None, threshold: float = 1.0) -> None:
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

    @classmethod
    def open(cls, path: str | PathLike[str], target: str | None = None, threads: int | None = None) -> Cascade:
        """Open a bundle; sessions open when a question needs them, and stay open.

        target: refuse a bundle built for another one. threads: CPU threads of a run, None for the
        runtime's choice. Raises BadArtefact for a bundle that is broken or tampered with, UsageError
        for one that was built for another target, BackendMissing where the runtime is not installed.
        """
        from engines.bundle import open_bundle
        from engines.session import refuse_unrunnable

        bundle = open_bundle(Path(path), target=target)
        refuse_unrunnable(bundle.target, bundle.engines)
        members = {name: (member.folder, member.spec) for name, member in bundle.members.items()}
        return cls._of(members, bundle.threshold, bundle.target, threads)

    @classmethod
    def from_exports(
        cls, *folders: str | PathLike[str], threshold: float = 1.0, target: str = "cpu", threads: int | None = None
    ) -> Cascade:
        """Run one export, or a small and a large one, where they lie; UsageError where they do not fit.

        For what has no bundle yet: nothing is checked against a manifest.
        """
        from engines.pair import Source, members_from_sources

        sources = [Source(Path(folder), spec_from_folder(Path(folder))) for folder in folders]
        members = {name: (s.folder, s.spec) for name, s in members_from_sources(sources).items()}
        return cls._of(members, threshold, target, threads)

    @classmethod
    def _of(
        cls, members: dict[str, tuple[Path, ExportSpec]], threshold: float, target: str, threads: int | None
    ) -> Cascade:
        models = {name: Model(folder, spec, target, threads) for name, (folder, spec) in members.items()}
        if "alone" in models:
            alone = models["alone"]
            return cls(alone, None) if alone.spec.role == "small" else cls(None, alone)
        return cls(models["small"], models["large"], threshold)

    def ask(
        self,
        image: Picture,
        question: str,
        keep: Keep = None,
        threshold: float | None = None,
        max_new_tokens: int | None = None,
        guidance: np.ndarray | None = None,
    ) -> Answer:
        """Return the answer to a question about an image.

        keep: share of visual tokens the large model keeps at its prune point, in (0, 1], None for
        its plan's. threshold: exit when the small model's S is above it, None for the bundle's;
        1 never exits. guidance: [V] scores to prune the large model by instead of the small
        model's, for comparisons. Raises UsageError and BadArtefact, each naming what to change.
        """
        return self.stream(image, question, keep, threshold, max_new_tokens, guidance).finish()

    def stream(
        self,
        image: Picture,
        question: str,
        keep: Keep = None,
        threshold: float | None = None,
        max_new_tokens: int | None = None,
        guidance: np.ndarray | None = None,
    ) -> Stream:
        """Return an iterator over the answer's text, piece by piece; ``.answer`` holds the rest at its end.

        The arguments are those of ``ask``. With a pair nothing is said before the small model has
        been judged, and an answer of its own comes as one piece.
        """
        bar = self.threshold if threshold is None else checked_threshold(threshold)
        if self.large:
            keep_ratios(self.large.spec.plan, keep)
        elif keep is not None:
            raise UsageError("this bundle's only model sees everything and keep prunes nothing; leave it out")
        return Stream(self._parts(image, question, keep, bar, max_new_tokens, guidance))

    def look(self, image: Picture, question: str, max_new_tokens: int | None = None) -> SmallPass:
        """Run the small model alone: its answer, its guidance, and how sure it is."""
        if not self.small:
            raise UsageError("this bundle has no small model to look first; build one of a pair")
        picture = image_from(image)
        prompt = self.small.prompt(picture, question)
        run = self.small.generate(prompt, max_new_tokens).finish()
        guidance_V = cast(np.ndarray, run.guidance)
        clock = Clock()
        consistency = consistency_of(self.small, prompt, run.tokens, guidance_V)
        times = {**_times("small", prompt, run), "small_consistency": clock.lap()}
        return SmallPass(
            image=picture,
            question=question,
            prompt=prompt,
            text=self.small.processor.text(run.tokens),
            tokens=tuple(run.tokens),
            stopped=run.stopped,
            guidance=guidance_V,
            confidence=Confidence(confidence_of(np.asarray(run.log_prob)), consistency),
            milliseconds=times,
        )

    def answer_small(self, looked: SmallPass, threshold: float | None = None) -> Answer:
        """Return the small model's own answer, whatever its score."""
        return Answer(
            text=looked.text,
            tokens=looked.tokens,
            model="small",
            stopped=looked.stopped,
            exited=True if self.large else None,
            threshold=threshold if self.large else None,
            confidence=looked.confidence,
            keep=(),
            kept=None,
            average_retention=None,
            guidance=looked.guidance,
            prompt_tokens=len(looked.prompt),
            visual_tokens=len(looked.guidance),
            milliseconds=dict(looked.milliseconds),
        )

    def answer_large(
        self,
        looked: SmallPass,
        keep: Keep = None,
        guidance: np.ndarray | None = None,
        max_new_tokens: int | None = None,
        threshold: float | None = None,
    ) -> Answer:
        """Return the large model's answer, pruned by the small pass (or by ``guidance`` [V] instead)."""
        parts = self._large_parts(looked, keep, guidance, max_new_tokens, threshold)
        return Stream(parts).finish()

    def _parts(
        self,
        image: Picture,
        question: str,
        keep: Keep,
        threshold: float,
        max_new_tokens: int | None,
        guidance: np.ndarray | None,
    ) -> Iterator[str | Answer]:
        if not self.small:
            yield from self._alone_parts(image, question, keep, max_new_tokens, guidance)
            return
        looked = self.look(image, question, max_new_tokens)
        if not self.large or looked.confidence.score > threshold:
            yield looked.text
            yield self.answer_small(looked, threshold)
            return
        yield from self._large_parts(looked, keep, guidance, max_new_tokens, threshold)

    def _large_parts(
        self,
        looked: SmallPass,
        keep: Keep,
        guidance: np.ndarray | None,
        max_new_tokens: int | None,
        threshold: float | None,
    ) -> Iterator[str | Answer]:
        large = self._large()
        shared = f"large, vision stage {keep}" if large.spec.plan.vision else "large"
        if shared not in looked.shared:
            looked.shared[shared] = large.prompt(looked.image, looked.question, keep)
        prompt = looked.shared[shared]
        scores_V = looked.guidance if guidance is None else guidance
        if guidance is None and (drawn := drawn_priority(large.spec.plan, prompt.visual_tokens)) is not None:
            scores_V = drawn
        run = large.generate(prompt, max_new_tokens, keep, _priority(large, prompt, scores_V))
        yield from pieces_of(run, large.processor)
        times = {**looked.milliseconds, **_times("large", prompt, run)}
        yield _answer("large", large, prompt, run, keep, looked.confidence, scores_V, threshold, times)

    def _alone_parts(
        self, image: Picture, question: str, keep: Keep, max_new_tokens: int | None, guidance: np.ndarray | None
    ) -> Iterator[str | Answer]:
        alone = self._large()
        prompt = alone.prompt(image_from(image), question, keep)
        if guidance is None:
            guidance = drawn_priority(alone.spec.plan, prompt.visual_tokens)
        priority_S = _priority(alone, prompt, guidance) if guidance is not None else None
        run = alone.generate(prompt, max_new_tokens, keep, priority_S)
        yield from pieces_of(run, alone.processor)
        yield _answer("alone", alone, prompt, run, keep, None, guidance, None, _times("alone", prompt, run))

    def _large(self) -> Model:
        if not self.large:
            raise UsageError("this bundle has no large model; build one of a pair")
        return self.large


def checked_threshold(threshold: float) -> float:
    """Return the threshold, or UsageError where it is no score."""
    if not 0 <= threshold <= 1:
        raise UsageError(
            f"threshold is {threshold:g}, but the score it is held against lies in [0, 1]; "
            "0 always exits early, 1 never does"
        )
    return float(threshold)


def _priority(model: Model, prompt: Prompt, guidance_V: np.ndarray) -> np.ndarray | None:
    if not model.spec.plan.uses_priority:
        return None
    if np.shape(guidance_V) != (prompt.visual_tokens,):
        raise UsageError(
            f"guidance has shape {np.shape(guidance_V)}, but the image has {prompt.visual_tokens} visual tokens"
        )
    if not np.isfinite(guidance_V).all():
        raise UsageError("guidance holds values that are not finite numbers; give one score per visual token")
    return priority_of_rows(prompt.of_visual(guidance_V), prompt.is_visual)


def _answer(
    name: str,
    model: Model,
    prompt: Prompt,
    run: Generation,
    keep: Keep,
    confidence: Confidence | None,
    guidance: np.ndarray | None,
    threshold: float | None,
    times: dict[str, float],
) -> Answer:
    plan = model.spec.plan
    ratios = keep_ratios(plan, keep, prompt.visual_tokens)
    original_S = np.zeros(len(prompt), np.int64)
    original_S[prompt.is_visual] = prompt.of_visual(np.arange(prompt.visual_tokens))
    at_vision = () if prompt.kept_visual is None else (prompt.kept_visual,)
    return Answer(
        text=model.processor.text(run.tokens),
        tokens=tuple(run.tokens),
        model="large" if name == "large" else "alone",
        stopped=run.stopped,
        exited=False if name == "large" else None,
        threshold=threshold,
        confidence=confidence,
        keep=ratios,
        kept=(*at_vision, *(original_S[rows[prompt.is_visual[rows]]] for rows in run.kept)),
        average_retention=retention_of(plan, model.spec.language.layers, ratios),
        guidance=guidance,
        prompt_tokens=len(prompt),
        visual_tokens=prompt.visual_tokens,
        milliseconds=times,
    )


def _times(name: str, prompt: Prompt, run: Generation) -> dict[str, float]:
    stages = {**prompt.ms, "prefill": run.prefill_ms, "decode": run.decode_ms}
    return {f"{name}_{stage}": ms for stage, ms in stages.items()}
