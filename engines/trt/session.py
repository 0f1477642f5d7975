"""A TensorRT engine as a session: device-resident values, one execution context per optimisation profile.

Not yet run on a GPU. Values stay on the device from run to run; only ``host`` outputs are copied, with one wait for
all. A model's stages share one stream, and two models have two, so a small and a large one may overlap. A decoder that
writes its caches in place has one shape of decode step, so from the third on these are replayed as a CUDA graph
(``replay``; SACCADE_CUDA_GRAPHS=0 turns it off); where one cannot be captured it is said and the steps run as before.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from engines.bundles.manifest import EngineFile
from engines.sessions.session import NOTHING, Value, refuse_misfed
from engines.trt.device import Device, DeviceTensor, device_of
from engines.trt.flavour import FULL, RTX, Flavour
from engines.trt.jit_cache import JitCache
from engines.trt.replay import Step, wanted
from graphs.console import say
from graphs.errors import BadArtefact, OperationFailed, OutOfBounds, UsageError
from graphs.spec import CacheForm, StageSpec, form_of, spec_from_folder

MOST_STEPS = 2  # captured at once: of the conversation that runs, and of one beside it

# TensorRT's name of a type → numpy's; numpy itself has no bfloat16
TYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT64": np.int64,
    "INT32": np.int32,
    "BOOL": np.bool_,
}


class TrtSession:
    """An ``engines.sessions.session.Session`` over one engine file.

    trt: ``tensorrt`` or ``tensorrt_rtx``. engine: what the bundle's manifest says of the file, which ``checked_bytes``
    holds its bytes against. None: a file of no bundle, which may have plugins. Raises BadArtefact where the bytes are
    others or TensorRT cannot read them, BackendMissing where a plugin it needs cannot be registered.
    """

    def __init__(self, file: Path, trt: Any, device: Device, engine: EngineFile | None = None) -> None:
        self._file, self._device = Path(file), device
        if engine is None or engine.plugins == "python":
            from plugins.registry import register

            register(trt)
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        if engine is not None and engine.versions:
            self._runtime.engine_host_code_allowed = True  # the runtime that a version-compatible engine brings
        with checked_bytes(self._file, engine) as data:
            self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise BadArtefact(
                f"TensorRT {trt.__version__} cannot open {self._file}, see its message above; "
                "build the bundle again for this GPU, this system and this version"
            )
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = trt.TensorIOMode.INPUT
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == mode]
        self._outputs = [name for name in names if self._engine.get_tensor_mode(name) != mode]
        self._dtype = {name: np.dtype(TYPES[self._engine.get_tensor_dtype(name).name]) for name in names}
        # Of a carrier only the length is read, so its bytes are never copied.
        stage = spec_from_folder(self._file.parent).stages[self._file.stem]
        self._carriers = {tensor.name for tensor in stage.inputs if tensor.carrier}
        self._bounds = [
            {name: tuple(map(tuple, self._engine.get_tensor_profile_shape(name, i))) for name in self._inputs}
            for i in range(self._engine.num_optimization_profiles)
        ]
        self.form: CacheForm = form_of(self._inputs)
        self._refuse_copied_caches(stage)
        self._contexts: dict[int, Any] = {}
        self._jit = JitCache(trt, self._engine, engine)
        self._steps: dict[tuple[Any, ...], Step] = {}
        self._warm: Step | None = None  # the step that its context ran last
        self._replays = wanted()

    def _refuse_copied_caches(self, stage: StageSpec) -> None:
        """BadArtefact where a decoder that is to write in place has an output that is no input's memory."""
        aliased = getattr(self._engine, "get_aliased_input_tensor", None)  # not in every TensorRT that has the layer
        if self.form == "concat" or aliased is None:
            return
        for tensor in stage.outputs:
            if tensor.name.startswith("present_") and aliased(tensor.name) != tensor.name.replace("present_", "past_"):
                raise BadArtefact(
                    f"{self._file} does not write {tensor.name} where it reads the past, as spec.json says; "
                    "build the bundle again"
                )

    def run(
        self,
        feeds: Mapping[str, Value],
        host: Collection[str] = (),
        device: Collection[str] = (),
        in_place: Mapping[str, str] = NOTHING,
    ) -> dict[str, Value]:
        """Run once, as ``engines.sessions.session.Session``; OperationFailed for a shape outside of every profile."""
        refuse_misfed(self._file, self._inputs, feeds, "spec.json and the engine disagree, build the bundle again")
        profile = self._profile({name: tuple(value.shape) for name, value in feeds.items()})
        context = self._context(profile)
        buffered = all(isinstance(feeds[name], DeviceTensor) for name in in_place.values())
        if in_place and buffered and self._replays and self._decodes(profile):
            held = self._stepped(profile, feeds, in_place)
        else:
            self._rebinds(context)
            held = self._run(context, feeds, in_place)
            self._warm = None
        copied = dict(zip(host, self._device.to_host(*(held[name] for name in host)), strict=True)) if host else {}
        return {**copied, **{name: held[name] for name in device}}

    def _run(self, context: Any, feeds: Mapping[str, Value], in_place: Mapping[str, str]) -> dict[str, DeviceTensor]:
        """An ordinary run; every output is a new tensor but those that are written in place."""
        # A tensor that is dropped is freed behind the work that reads it, so these may go when the run is enqueued.
        held = {name: self._on_device(name, value) for name, value in feeds.items()}
        for name, tensor in held.items():
            self._ask(context.set_input_shape(name, tensor.shape), f"the shape {tensor.shape} of {name}")
            self._ask(context.set_tensor_address(name, tensor.pointer), f"the address of {name}")
        for name in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise OperationFailed(
                    f"{self._file.name}: the shape of {name} is not known before the run; report this"
                )
            held[name] = held[in_place[name]] if name in in_place else self._device.empty(shape, self._dtype[name])
            self._ask(context.set_tensor_address(name, held[name].pointer), f"the address of {name}")
        self._ask(context.execute_async_v3(self._device.stream), "the run")
        return held

    def _stepped(
        self, profile: int, feeds: Mapping[str, Value], in_place: Mapping[str, str]
    ) -> dict[str, DeviceTensor]:
        """A run at fixed addresses, captured when it comes again; its outputs are copied: the next overwrites them."""
        buffers = set(in_place.values())
        given = {name: self._given(name, value) for name, value in feeds.items()}
        key = tuple((n, given[n].pointer) if n in buffers else tuple(v.shape) for n, v in feeds.items())
        step, context = self._steps.get(key), self._context(profile)
        if step is None or not step.captured:
            self._rebinds(context, step)
        if step is None:
            while len(self._steps) >= MOST_STEPS:
                del self._steps[next(iter(self._steps))]
            step = self._steps[key] = Step(self._device, context, feeds, self._dtype, self._outputs, in_place)
            self._warm = None
        step.take({n: None if n in self._carriers else value for n, value in given.items()})
        if not step.captured and self._warm is step and self._replays:
            self._capture(step)
        if step.captured:
            step.launch()
        else:
            step.run()
        self._warm = step
        held = {output: given[buffer] for output, buffer in in_place.items()}
        for name in step.given_out:
            held[name] = self._device.empty(step.tensors[name].shape, self._dtype[name])
            self._device.copy(step.tensors[name], held[name])
        return held

    def _rebinds(self, context: Any, step: Step | None = None) -> None:
        """A context is about to get other shapes and addresses than the other steps of it were captured with."""
        for other in self._steps.values():
            if other is not step and other.context is context:
                other.forget()

    def _capture(self, step: Step) -> None:
        """Capture a step that has just run; where it cannot be, say so once and never try again."""
        try:
            step.capture()
        except OperationFailed as e:
            self._replays = False
            say(f"{self._file.name}: no CUDA graph could be made of a step ({e}); its kernels are launched one by one")

    def to_host(self, value: Value) -> np.ndarray:
        """Copy a device tensor to numpy; arrays pass through."""
        return value if isinstance(value, np.ndarray) else self._device.to_host(value)[0]

    def largest(self, name: str) -> tuple[int, ...]:
        """The largest shape of an input that any profile takes."""
        return self._bounds[0][name][2]

    def buffers(self, sources: Mapping[str, Value], held: int, rows: int, wanted: int) -> dict[str, Value]:
        """Buffers as large as the engine was built for; see ``engines.sessions.session.Session.buffers``."""
        return {name: self._buffer(name, source, held, rows) for name, source in sources.items()}

    def _buffer(self, name: str, source: Value, held: int, rows: int) -> DeviceTensor:
        shape = self._bounds[0][name][2]
        if rows > shape[2]:
            raise OperationFailed(
                f"the conversation would take {rows} rows of a cache, and {self._file.name} was built for {shape[2]}; "
                "begin a new one, keep fewer tokens (--keep), or build with a larger --max-length"
            )
        # What a mask hides is multiplied by zero, so rows that are not filled must hold numbers.
        tensor = self._device.zeros(shape, self._dtype[name])
        if held:
            self._device.copy_rows(self._on_device(name, source), tensor, held)
        return tensor

    def _on_device(self, name: str, value: Value) -> DeviceTensor:
        """The input on the device."""
        value = self._given(name, value)
        if isinstance(value, DeviceTensor):
            return value
        if name in self._carriers:
            return self._device.empty(value.shape, value.dtype)
        return self._device.from_host(value)

    def _given(self, name: str, value: Value) -> Value:
        """The input in the engine's type, where it lies; floats of the host, such as pixels, are converted."""
        if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
            value = value.astype(self._dtype[name], copy=False)
        if value.dtype != self._dtype[name]:
            raise OperationFailed(
                f"{self._file.name} takes {name} in {self._dtype[name]}, and got {value.dtype}; "
                "spec.json and the engine disagree, build the bundle again"
            )
        return value

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The last profile that takes these shapes: decode, where it does."""
        for i in reversed(range(len(self._bounds))):
            if not any(_outside(shape, self._bounds[i][name]) for name, shape in shapes.items()):
                return i
        name = next(name for name, shape in shapes.items() if _outside(shape, self._bounds[0][name]))
        least, _, most = self._bounds[0][name]
        raise OutOfBounds(
            f"{self._file.name} takes {name} from {list(least)} to {list(most)}, and got {list(shapes[name])}; "
            "ask less, or build with other bounds (--max-prompt, --max-length, --max-guide, --max-tail, --max-images)"
        )

    def _decodes(self, profile: int) -> bool:
        """Whether a profile is the decoder's of decode steps."""
        return profile == len(self._bounds) - 1 > 0

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            steady = self.form == "in-place" and self._decodes(profile)  # over whole buffers, so of one shape
            context = self._engine.create_execution_context(self._jit.how(steady=steady))
            if context is None:
                raise OperationFailed(f"TensorRT has no memory for running {self._file.name}; end what else runs there")
            self._ask(context.set_optimization_profile_async(profile, self._device.stream), f"profile {profile}")
            self._contexts[profile] = context
            self._jit.save()
        return self._contexts[profile]

    def _ask(self, took: bool, what: str) -> None:
        if not took:
            raise OperationFailed(f"TensorRT refused {what} in {self._file.name}; see its message above")


@contextmanager
def checked_bytes(file: Path, engine: EngineFile | None) -> Iterator[mmap.mmap | bytes]:
    """An engine's bytes, mapped: the system may drop them while TensorRT copies them into what may be the same memory.

    Those of an engine that brings host code are read instead, for what is hashed must be what may run. BadArtefact
    where they cannot be read, are not those of the manifest, or were changed while they were used.
    """
    changed = BadArtefact(
        f"{file} was changed after the bundle was opened (its digest does not match); build the bundle again"
    )
    with ExitStack() as held:
        try:
            opened = held.enter_context(file.open("rb"))
            before = _state(opened)
            mapped = held.enter_context(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
            data = mapped[:] if engine is not None and engine.versions else mapped
        except (OSError, ValueError) as e:  # ValueError: an empty file
            reason = getattr(e, "strerror", None) or e
            raise BadArtefact(f"{file} cannot be read ({reason}); build the bundle again") from None
        if engine is not None and hashlib.sha256(data).hexdigest() != engine.sha256:
            raise changed
        yield data
        if _state(opened) != before:
            raise changed


def _state(opened: BinaryIO) -> tuple[int, int, int]:
    """What differs where a file was written to: its length and its times, in ns."""
    found = os.fstat(opened.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def rtx_session(file: Path, threads: int | None = None, engine: EngineFile | None = None) -> TrtSession:
    """Open an engine with TensorRT-RTX; the stages of one folder share a stream."""
    return _session(RTX, file, threads, engine)


def tensorrt_session(file: Path, threads: int | None = None, engine: EngineFile | None = None) -> TrtSession:
    """Open an engine with full TensorRT; the stages of one folder share a stream."""
    return _session(FULL, file, threads, engine)


def _session(flavour: Flavour, file: Path, threads: int | None, engine: EngineFile | None) -> TrtSession:
    from plugins.trt import imported, load

    if threads is not None:
        raise UsageError("threads are a CPU runtime's, and the engine runs on the GPU; leave them out")
    found = load if engine is None or engine.plugins == "python" else imported
    return TrtSession(file, found(flavour.module), device_of(Path(file).parent), engine)


def _outside(shape: tuple[int, ...], bounds: tuple[tuple[int, ...], ...]) -> bool:
    least, _, most = bounds
    return len(shape) != len(least) or any(not a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
