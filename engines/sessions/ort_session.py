"""A graph in ONNX Runtime, bound by name so that device values are handed on without copies; here on the CPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np
import onnxruntime as ort

from engines.sessions.heap import give_back
from engines.sessions.host_buffers import Bound, HostBuffer, Shelf
from engines.sessions.session import GRAPH_DISAGREES, NOTHING, Value, refuse_misfed
from graphs.errors import BadArtefact, OperationFailed, SaccadeError, first_line
from graphs.packed import packed_as
from graphs.spec import CacheForm, form_of
from graphs.versions import require_once

ERRORS_ONLY = 3
SPIN_US = "1000"  # how long a thread waits for the next operator before it sleeps
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
AS_STORED = "session.disable_prepacking"
GIVE_BACK = "memory.enable_memory_arena_shrinkage"
LARGE = 1 << 18  # values of one fed tensor, caches apart, from which a run's memory is given back at its end
ONE_ARENA = "session.use_env_allocators"
ARENA = Lock()  # stages are opened side by side, and a second arena would take the place of the first


class OrtSession:
    """An ``engines.sessions.session.Session`` over onnxruntime.InferenceSession.

    device: where outputs named as ``device`` stay, as IOBinding calls it. in_place: let a canonical decoder write its
    caches in place, by a lowering in memory.
    """

    device = "cpu"

    def __init__(self, file: Path, threads: int | None = None, in_place: bool = False) -> None:
        require_once("onnxruntime")
        self._file, self._in_place = Path(file), in_place
        if not self._file.is_file():
            raise BadArtefact(f"{self._file} is missing; build the bundle again")
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # Six sessions take turns: one that spins after its run takes the cores of the next. One pool for all of them
        # would forbid every other session of this process to have threads of its own.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # A thread spins from its start on: by default for 2**20 pauses, 48 ms or more on a core that imports could use.
        options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
        # What is written for others (DequantizeLinear) is computed as it says: activations are not rounded too.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            self._session = self._opened(options)
        except SaccadeError:
            raise
        except Exception as e:  # the binding's exceptions share no base class
            raise BadArtefact(
                f"ONNX Runtime cannot open {self._file} ({first_line(e, 300)}); "
                "replay its golden tensors with: saccade verify, or build the bundle again"
            ) from None
        self._inputs = {i.name for i in self._session.get_inputs()}
        self.form: CacheForm = form_of(self._inputs)
        self._shelf = Shelf()

    def _opened(self, options: ort.SessionOptions) -> ort.InferenceSession:
        """Weights stay in their file, mapped: ONNX Runtime would transpose and pack them into memory of its own."""
        # A pattern holds all of a run's tensors for the next one of its lengths, on top of the arena; a buffer that the
        # plan reuses later is held until then.
        options.enable_mem_pattern = False
        options.enable_mem_reuse = False
        graph = self._file.read_bytes()
        packed = packed_as(graph)
        if packed is None:
            graph = self._lowered(graph, options)
        elif packed == "fp32":
            options.add_session_config_entry(AS_STORED, "1")
        options.add_session_config_entry(WEIGHTS_FOLDER, str(self._file.parent))
        _one_arena()
        options.add_session_config_entry(ONE_ARENA, "1")
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def _lowered(self, graph: bytes, options: ort.SessionOptions) -> bytes:
        """A canonical graph as this session runs it; no weight is read."""
        import onnx_ir as ir

        from graphs.lowering.host import mapped
        from graphs.lowering.in_place import grouped

        model = ir.load(self._file)
        changed = mapped(model)
        if changed:
            options.add_session_config_entry(AS_STORED, "1")
        changed = (self._in_place and grouped(model)) or changed
        return ir.serde.serialize_model(model).SerializeToString() if changed else graph

    def run(
        self,
        feeds: Mapping[str, Value],
        host: Collection[str] = (),
        device: Collection[str] = (),
        in_place: Mapping[str, str] = NOTHING,
    ) -> dict[str, Value]:
        """Run once; see ``engines.sessions.session.Session.run``."""
        refuse_misfed(self._file, self._inputs, feeds, GRAPH_DISAGREES)
        returned = tuple(name for name in (*host, *device) if name not in in_place)
        try:
            bound = self._bound(feeds, returned, in_place)
            for name in returned:
                bound.binding.bind_output(name, "cpu" if name in host else self.device)
            self._session.run_with_iobinding(bound.binding, *self._options_of(feeds))
            if not in_place:
                values = dict(zip(returned, bound.binding.get_outputs(), strict=True))
                return {name: value.numpy() if name in host else value for name, value in values.items()}
            # Of what is bound only what is returned becomes a Python object; its array stays when it is bound anew.
            outputs = bound.binding.get_outputs_as_ortvaluevector()
            arrays = {name: outputs[i].numpy() for i, name in enumerate(returned)}
        except Exception as e:
            raise OperationFailed(
                f"ONNX Runtime failed in {self._file.name} ({first_line(e, 300)}); {_remedy(e)}"
            ) from None
        results = {name: x if name in host else ort.OrtValue.ortvalue_from_numpy(x) for name, x in arrays.items()}
        # A buffer's memory is its feeder's.
        return results | {name: bound.buffers[in_place[name]].numpy().copy() for name in host if name in in_place}

    def _bound(self, feeds: Mapping[str, Value], returned: tuple[str, ...], in_place: Mapping[str, str]) -> Bound:
        """What is fed, and what is written in place, bound; of what is returned only the order."""
        written = {shared: feeds[shared] for shared in in_place.values()}
        first = next(iter(written.values()), None)
        piece = first.piece if isinstance(first, HostBuffer) else None
        bound = piece.bound.get(returned) if piece else None
        if not bound or not bound.serves(written):
            bound = Bound(self._session.io_binding(), {name: _value_of(value) for name, value in written.items()})
            for name, value in bound.buffers.items():
                bound.binding.bind_ortvalue_input(name, value)
            for name in returned:
                bound.binding.bind_output(name, self.device)
            for name, shared in in_place.items():
                bound.binding.bind_ortvalue_output(name, bound.buffers[shared])
            if piece:
                piece.bound[returned] = bound
        for name, value in feeds.items():
            if name not in written:
                bound.binding.bind_ortvalue_input(name, _value_of(value))
        return bound

    def _options_of(self, feeds: Mapping[str, Value]) -> tuple[ort.RunOptions, ...]:
        """A large run begins on a trimmed heap and gives back what it took; a decode step keeps its memory."""
        fed = (value for name, value in feeds.items() if not name.startswith("past_"))
        if self.device != "cpu" or all(_size(value) < LARGE for value in fed):
            return ()
        give_back()
        options = ort.RunOptions()
        options.add_run_config_entry(GIVE_BACK, "cpu:0")
        return (options,)

    def to_host(self, value: Value) -> np.ndarray:
        """Copy an OrtValue to numpy; arrays and buffers of the host pass through."""
        if isinstance(value, HostBuffer):
            return value.array
        # numpy() is a view of what may be freed
        return value if isinstance(value, np.ndarray) else value.numpy().copy()

    def largest(self, name: str) -> None:
        """Lengths are bounded by memory alone."""

    def buffers(self, sources: Mapping[str, Value], held: int, rows: int, wanted: int) -> dict[str, Value]:
        """Buffers of the host, one piece of memory; see ``engines.sessions.session.Session.buffers``."""
        like = self.to_host(next(iter(sources.values())))
        lent = self._shelf.lend(len(sources), like, rows, wanted)
        whole = lent[0].piece.whole
        if held:
            for new, source in zip(whole, sources.values(), strict=True):
                new[:, :, :held] = self.to_host(source)[:, :, :held]
        whole[:, :, :, rows:] = 0  # the next run fills the rows between
        return dict(zip(sources, lent, strict=True))


def _one_arena() -> None:
    """Make the memory that all CPU sessions of this process compute in, once: what one run leaves, the next one takes.

    Sessions take turns, and an arena of each would hold what its largest run needed. ONNX Runtime has one such place:
    an arena that the program registered there before is replaced for what it opens later, never for what is open.
    """
    with ARENA:
        _registered()


@cache
def _registered() -> None:
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, ort.OrtArenaCfg({}))


def _value_of(value: Value) -> ort.OrtValue:
    """A value that may be bound; it and an array's value share their memory, which a binding keeps."""
    if isinstance(value, HostBuffer):
        return value.value
    if isinstance(value, ort.OrtValue):
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))


def _size(value: Value) -> int:
    return prod(value.shape() if isinstance(value, ort.OrtValue) else value.shape)


def _remedy(error: Exception) -> str:
    if "allocate memory" in str(error):
        return "memory is full: keep fewer visual tokens, give smaller images, or begin a new conversation"
    return "check the bundle with: saccade verify"
