"""A graph in ONNX Runtime, bound by name so that device values are handed on without copies; here on the CPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from engines.sessions.session import Value
from graphs.errors import BadArtefact, OperationFailed, SaccadeError

ERRORS_ONLY = 3
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OrtSession:
    """An ``engines.sessions.session.Session`` over onnxruntime.InferenceSession.

    device: where outputs named as ``device`` stay, as IOBinding calls it.
    """

    device = "cpu"

    def __init__(self, file: Path, threads: int | None = None) -> None:
        self._file = Path(file)
        if not self._file.is_file():
            raise BadArtefact(f"{self._file} is missing; build the bundle again")
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # Six sessions take turns: one that spins after its run takes the cores of the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = self._opened(options)
        except SaccadeError:
            raise
        except Exception as e:  # the binding's exceptions share no base class
            raise BadArtefact(
                f"ONNX Runtime cannot open {self._file} ({_first_line(e)}); "
                "replay its golden tensors with: saccade verify, or build the bundle again"
            ) from None
        self._inputs = {i.name for i in self._session.get_inputs()}

    def _opened(self, options: ort.SessionOptions) -> ort.InferenceSession:
        """Weights stay in their file, mapped: ONNX Runtime would transpose and pack them into memory of its own."""
        import onnx_ir as ir

        from graphs.lowering.host import PACKED, mapped

        model = ir.load(self._file)
        source: str | bytes = str(self._file)
        if PACKED in model.metadata_props:
            in_place = model.metadata_props[PACKED] == "fp32"
        elif in_place := mapped(model):
            options.add_session_config_entry(WEIGHTS_FOLDER, str(self._file.parent))
            source = ir.serde.serialize_model(model).SerializeToString()
        if in_place:
            options.add_session_config_entry("session.disable_prepacking", "1")
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def run(
        self, feeds: Mapping[str, Value], host: Collection[str] = (), device: Collection[str] = ()
    ) -> dict[str, Value]:
        """Run once; see ``engines.sessions.session.Session.run``."""
        if set(feeds) != self._inputs:
            missing, unknown = sorted(self._inputs - set(feeds)), sorted(set(feeds) - self._inputs)
            raise OperationFailed(
                f"{self._file.name} was fed wrongly: missing {missing}, unknown {unknown}; "
                "spec.json and the graph disagree, export the checkpoint again"
            )
        binding = self._session.io_binding()
        # An OrtValue over an array shares its memory, so both must live until the run is over.
        values = {name: _value_of(value) for name, value in feeds.items()}
        try:
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            for name in host:
                binding.bind_output(name, "cpu")
            for name in device:
                binding.bind_output(name, self.device)
            self._session.run_with_iobinding(binding)
        except Exception as e:
            raise OperationFailed(
                f"ONNX Runtime failed in {self._file.name} ({_first_line(e)}); {_remedy(e)}"
            ) from None
        results = dict(zip((*host, *device), binding.get_outputs(), strict=True))
        return {name: value.numpy() if name in host else value for name, value in results.items()}

    def to_host(self, value: Value) -> np.ndarray:
        """Copy an OrtValue to numpy; arrays pass through."""
        return value if isinstance(value, np.ndarray) else value.numpy()


def _value_of(value: Value) -> ort.OrtValue:
    if isinstance(value, ort.OrtValue):
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))


def _remedy(error: Exception) -> str:
    if "allocate memory" in str(error):
        return "memory is full: keep fewer visual tokens, give smaller images, or begin a new conversation"
    return "check the bundle with: saccade verify"


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
