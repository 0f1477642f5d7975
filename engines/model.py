"""One model of a bundle: its processor and its three sessions, opened on first use and kept open.

Legend: S rows, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.budgets import Keep
from engines.decoder import Decoder
from engines.generate import Generation
from engines.processing import Processor
from engines.sampling import Options
from engines.sessions.session import Session, Value, open_session
from engines.talk.beginning import Beginnings
from engines.targets import TARGETS
from graphs.console import say
from graphs.errors import OutOfBounds, SaccadeError
from graphs.spec import ExportSpec, deepstack_names, visual_names

if TYPE_CHECKING:
    from engines.bundles.bundle import Engines
    from engines.talk.prompt import Prompt


AHEAD = ("one", "prefill", "decode")  # golden cases, those of one image, that are run before the first question
FEW_WEIGHTS = 16 << 20  # bytes of a model that is done about as soon as a second thread has woken for each of its runs


class Model:
    """A member of a bundle, or an export folder, on one target.

    threads: CPU threads of a run, at most; None: the runtime's choice. engines: what the bundle's manifest says of
    them.
    """

    def __init__(
        self,
        folder: Path,
        spec: ExportSpec,
        target: str = "cpu",
        threads: int | None = None,
        engines: Engines | None = None,
    ) -> None:
        self.folder, self.spec = Path(folder), spec
        self.processor = Processor(folder, spec)
        self.target, self.threads, self._engines = target, threads, engines
        self._sessions: dict[str, Session] = {}
        self.beginnings = Beginnings(spec, self.to_host)
        # Takes a stage's name and its session when that is opened, and gives what is used instead.
        self.watch: Callable[[str, Session], Session] | None = None

    @property
    def opened(self) -> frozenset[str]:
        """The stages whose sessions are open."""
        return frozenset(self._sessions)

    def session(self, stage: str) -> Session:
        """Return a stage's session, opening it the first time."""
        if stage not in self._sessions:
            file = self.folder / self.spec.stages[stage].file
            session = open_session(
                file,
                self.target,
                self._threads,
                self._engines,
                in_place=stage == "decoder",
                dtype=self.spec.dtype,
            )
            self._sessions[stage] = self.watch(stage, session) if self.watch else session
        return self._sessions[stage]

    @property
    def _on_host(self) -> bool:
        target = TARGETS.get(self.target)
        return target is not None and target.memory == "host"

    @property
    def _threads(self) -> int | None:
        """CPU threads of a session: as many as were asked for, one for a model of few weights on the host."""
        if not self._on_host or self.spec.weight_bytes >= FEW_WEIGHTS:
            return self.threads
        return 1 if self.threads is None else min(1, self.threads)

    def open(self) -> None:
        """Open every stage and load the processor now, so that no question has to wait for it.

        On the host this is done side by side; of what fails, what would fail first one by one is told.
        """
        if self.opened < set(self.spec.stages):
            if self._on_host:
                self._open_at_once()
            for stage in self.spec.stages:
                self.session(stage)
        self.processor.load()

    def _open_at_once(self) -> None:
        # What reads processors is still being imported by a thread of its own, which takes about as long as a decoder.
        longest_first = sorted(self.spec.stages, key=lambda stage: stage != "decoder")
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1)) as threads:
            begun = {stage: threads.submit(self.session, stage) for stage in longest_first}
            with suppress(SaccadeError):  # which is told behind the stages'
                self.processor.load()
            for stage in self.spec.stages:
                if begun[stage].cancel():
                    self.session(stage)
                else:
                    begun[stage].result()

    @property
    def runs_ahead(self) -> bool:
        """Whether a first run before the first question saves that question time (``engines.targets.Target``)."""
        target = TARGETS.get(self.target)
        return target is None or target.runs_ahead

    def run_once(self) -> None:
        """Run every stage on its golden tensors, so that no question has to wait for what a runtime does in first runs:
        packing weights, compiling kernels, reading a mapped file.

        What an engine was built too narrow for is said and left out. Raises BadArtefact where the golden tensors cannot
        be read, OperationFailed where a run fails.
        """
        from engines.bundles.golden import cases_of, in_types_of, ran

        for case in cases_of(self.folder, self.spec):
            if case.name not in AHEAD:
                continue
            try:
                ran(in_types_of(case, self.spec), self.session(case.stage), self.spec)
            except OutOfBounds as e:
                say(f"{case.stage} was not run ahead ({e})")

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder with the host's rules around it."""
        return Decoder(self.session("decoder"), self.spec)

    def embed_text(self, tokens: Sequence[int]) -> Value:
        """Return inputs_embeds [1, S, D] of text alone.

        A placeholder that a model writes stands for an image that is not there: a row of zeros.
        """
        ids = np.asarray([tokens], np.int64)
        return self.embed(ids, self.no_image(int((ids == self.spec.tokens.image).sum())))[0]

    def no_image(self, rows: int = 1) -> dict[str, np.ndarray]:
        """Features that stand for no image at all, zeros [rows, D]; the graph wants one row at least."""
        dtype = next(t.dtype for t in self.spec.stages["embed"].inputs if t.name == "visual_embeds")
        zeros = np.zeros((max(1, rows), self.spec.language.width), dtype=dtype)
        return dict.fromkeys(visual_names(self.spec.language), zeros)

    def generate(
        self,
        prompt: Prompt,
        options: Options | None = None,
        keep: Keep = None,
        priority_S: np.ndarray | None = None,
        draft: Sequence[int] = (),
    ) -> Generation:
        """Return a generation that has not begun; greedy, and as long as the checkpoint asks, where nothing is said.

        draft: tokens that the answer may begin with (see ``engines/draft.py``); none for a plan whose chunk guides.
        """
        return Generation(self, prompt, options or Options(), keep, priority_S, draft)

    def to_host(self, value: Value) -> np.ndarray:
        """Copy a device value to the host."""
        return self.session("decoder").to_host(value)

    def embed(self, input_ids: np.ndarray, features: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
        """Return inputs_embeds [1, S, D] of int64 [1, S] ids, and deepstack features by input name."""
        device = ("inputs_embeds", *deepstack_names(self.spec.language))
        out = self.session("embed").run({"input_ids": input_ids, **features}, device=device)
        return out.pop("inputs_embeds"), out
