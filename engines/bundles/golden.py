"""Replaying the golden tensors that travel with an artefact, on any machine and without torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from engines.bundles.near_ties import KEPT, Case, Tensors, compared, kept_first
from engines.cache import form_of
from engines.sessions.session import Session, open_session
from graphs.compare import TOLERANCES, Comparison
from graphs.errors import BadArtefact, OperationFailed
from graphs.spec import GOLDEN_FILE, RECEIVED_BEFORE, ExportSpec, length_name, past_names, present_names
from graphs.weights import safetensors_file

SCHEMA = "saccade.golden/1"


@dataclass(frozen=True)
class Replay:
    """What came out of one case."""

    stage: str
    case: str
    tensors: tuple[Comparison, ...]

    @property
    def agrees(self) -> bool:
        """Whether every tensor agrees with its reference."""
        return all(tensor.agrees for tensor in self.tensors)

    @property
    def max_error(self) -> float:
        """The largest numeric error of the case."""
        return max((t.error for t in self.tensors if t.error is not None), default=0.0)

    def document(self) -> dict[str, object]:
        """As JSON writes it."""
        tensors = [tensor.document() for tensor in self.tensors]
        return {"stage": self.stage, "case": self.case, "agrees": self.agrees, "tensors": tensors}

    @property
    def uncompared(self) -> int:
        """How many tensors lie behind a near-tie, so that their numbers were not compared."""
        return sum(not tensor.compared for tensor in self.tensors)

    @property
    def overlap(self) -> float | None:
        """The smallest share of kept rows in common; None where nothing is pruned."""
        return self._least_overlap(kept=True)

    @property
    def merged(self) -> float | None:
        """The smallest share of a tower's rows whose features agree; None where none are merged."""
        return self._least_overlap(kept=False)

    def _least_overlap(self, kept: bool) -> float | None:
        told = (t.overlap for t in self.tensors if t.name.startswith(KEPT) is kept and t.overlap is not None)
        return min(told, default=None)


def replay(folder: Path, spec: ExportSpec, open_stage: Callable[[Path], Session] = open_session) -> Iterator[Replay]:
    """Run every golden case of a folder and yield how it compares.

    The tolerance is that of what the stages compute in, or of what the golden tensors were computed in if that is
    wider; where that is wider than fp32's, near-ties may keep other rows (``engines.bundles.near_ties``). open_stage:
    opens a stage's file. Errors: BadArtefact where the golden file is missing, broken or does not fit spec.json,
    OperationFailed where the runtime fails.
    """
    cases = cases_of(folder, spec)
    allowed = max(TOLERANCES[spec.dtype], TOLERANCES[_reference_dtype(cases)])
    for case, got in _runs(cases, spec, folder, open_stage):
        yield Replay(case.stage, case.name, tuple(compared(case, got, spec, allowed)))


def runs(
    golden: Path, spec: ExportSpec, stages: Path, open_stage: Callable[[Path], Session]
) -> Iterator[tuple[Case, Tensors]]:
    """Run every golden case, in its stage's own types, and yield it with what came out; errors as for ``replay``.

    golden: the folder of the golden tensors. stages: the folder that ``spec``'s files are relative to.
    Kept rows come first: where they differ, that is the reason for every number behind them.
    """
    return _runs(cases_of(golden, spec), spec, stages, open_stage)


def _runs(
    cases: Sequence[Case], spec: ExportSpec, stages: Path, open_stage: Callable[[Path], Session]
) -> Iterator[tuple[Case, Tensors]]:
    for of_stage, some in groupby(cases, key=lambda case: case.stage):
        session = open_stage(stages / spec.stages[of_stage].file)
        for case in (in_types_of(case, spec) for case in some):
            got = ran(case, session, spec)
            names = sorted(case.outputs, key=kept_first)
            yield case, {name: got[name] for name in names}


def refuse_disagreement(replays: Iterable[Replay], model: str) -> None:
    """Raise OperationFailed for the first replay that disagrees; ``model`` is how the message calls it."""
    for replayed in replays:
        if not replayed.agrees:
            raise _disagrees(replayed, model)


def cases_of(folder: Path, spec: ExportSpec) -> list[Case]:
    """All cases of ``golden.safetensors``, stage by stage, in the order of spec.json."""
    path = Path(folder) / GOLDEN_FILE
    sides: dict[tuple[str, str], dict[str, Tensors]] = defaultdict(lambda: {"in": {}, "out": {}})
    for key, value in _tensors(path).items():
        parts = key.split("/")
        if len(parts) != 4 or parts[2] not in ("in", "out") or parts[0] not in spec.stages:
            raise _bad(path, f"key {key!r} is not {{stage}}/{{case}}/{{in|out}}/{{tensor}} of this export")
        stage, run, side, name = parts
        sides[stage, run][side][name] = value
    cases = [Case(stage, name, found["in"], found["out"]) for (stage, name), found in sorted(sides.items())]
    for case in cases:
        _check_names(path, case, spec)
    if missing := [stage for stage in spec.stages if stage not in {case.stage for case in cases}]:
        raise _bad(path, f"it has no case for {', '.join(missing)}")
    return sorted(cases, key=lambda case: list(spec.stages).index(case.stage))


def _tensors(path: Path) -> Tensors:
    from safetensors.numpy import load_file

    file = safetensors_file(path, remedy="export the checkpoint again")
    if file.metadata.get("schema") != SCHEMA:
        raise _bad(path, f"its schema is {file.metadata.get('schema')!r}, this version reads {SCHEMA!r}")
    return load_file(path)


def in_types_of(case: Case, spec: ExportSpec) -> Case:
    """A case in the types that its stage takes and gives; a packed stage's are others than the export's."""
    stage = spec.stages[case.stage]
    dtype = {tensor.name: tensor.dtype for tensor in (*stage.inputs, *stage.outputs)}

    def typed(tensors: Tensors) -> Tensors:
        return {name: value.astype(dtype[name], copy=False) for name, value in tensors.items()}

    return replace(case, inputs=typed(case.inputs), outputs=typed(case.outputs))


def _reference_dtype(cases: Sequence[Case]) -> str:
    """The float type that eager PyTorch computed golden tensors in."""
    names = {value.dtype.name for case in cases for value in case.outputs.values()}
    return "float16" if "float16" in names else "float32"


def fed(case: Case, spec: ExportSpec) -> Tensors:
    """A case's inputs as a stage takes them, in the case's own types.

    Golden caches are as long as they are filled; for a decoder that writes in place they are copied into buffers.
    """
    if case.stage != "decoder" or spec.cache == "concat":
        return case.inputs
    feeds = dict(case.inputs)
    sizes = {tensor.name: tensor.shape[2] for tensor in spec.stages["decoder"].inputs if len(tensor.shape) == 4}
    capacity = 0
    for j, segment in reversed(list(enumerate(spec.plan.segments(spec.language.layers)))):
        for layer in segment:
            for past, present in zip(past_names(layer), present_names(layer), strict=True):
                rows, size = case.inputs[past], sizes[past]
                capacity = size if isinstance(size, int) else case.outputs[present].shape[2]
                feeds[past] = np.zeros((*rows.shape[:2], capacity, rows.shape[3]), rows.dtype)
                feeds[past][:, :, : rows.shape[2]] = rows
                feeds[length_name(j)] = np.array([rows.shape[2]], np.int64)
    if spec.plan.guidance:
        feeds[RECEIVED_BEFORE] = np.zeros((1, capacity), np.float32)
    return feeds


def ran(case: Case, session: Session, spec: ExportSpec) -> Tensors:
    """What comes out of a session for a case, as golden tensors have it."""
    in_place = form_of(spec, session).in_place
    feeds = fed(case, spec.model_copy(update={"cache": session.form}))
    got = told(case, session.run(feeds, host=list(case.outputs), in_place=in_place))
    return {name: np.array(value) if name in in_place else value for name, value in got.items()}  # feeds' memory


def told(case: Case, got: Tensors) -> Tensors:
    """What came out, as golden tensors have it: of buffers the filled rows, and caches in the case's float type.

    OpenVINO holds fp16 caches in fp32.
    """
    grown = ("present_", "attention_received")
    cut = {name: tuple(map(slice, case.outputs[name].shape)) for name in got if name.startswith(grown)}
    filled = {name: value[cut[name]] if name in cut else value for name, value in got.items()}
    return {
        name: value.astype(case.outputs[name].dtype, copy=False) if name.startswith("present_") else value
        for name, value in filled.items()
    }


def _check_names(path: Path, case: Case, spec: ExportSpec) -> None:
    stage = spec.stages[case.stage]
    of_form = {RECEIVED_BEFORE, *(length_name(j) for j in range(len(spec.plan.points) + 1))}
    for side, found, wanted in (("inputs", case.inputs, stage.inputs), ("outputs", case.outputs, stage.outputs)):
        names = {tensor.name for tensor in wanted} - of_form
        if set(found) != names:
            differ = sorted(set(found) ^ names)
            raise _bad(path, f"{side} of {case.stage}/{case.name} and of spec.json differ in {', '.join(differ)}")


def _disagrees(replayed: Replay, model: str) -> OperationFailed:
    worst = next(tensor for tensor in replayed.tensors if not tensor.agrees)
    count = sum(not tensor.agrees for tensor in replayed.tensors)
    return OperationFailed(
        f"{model}: golden replay of {replayed.stage}/{replayed.case} disagrees in {count} of {len(replayed.tensors)} "
        f"tensors, first {worst.name}: {worst.problem}; this runtime or a changed file computes something else"
    )


def _bad(path: Path, why: str) -> BadArtefact:
    return BadArtefact(f"{path}: {why}; export the checkpoint again")
