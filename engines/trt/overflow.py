"""Which tensors of an fp16 export come near the end of fp16, found by replaying the golden tensors in ONNX Runtime.

Every fp16 value between two nodes is watched: its largest magnitude is computed in the graph, so one run holds one
number per tensor and no more activations than the model itself. What stands inside a body is not watched.
Golden inputs are small and of one image, so a finding is certain and silence is a good sign, not a proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from engines.bundles.golden import cases_of, fed
from graphs.console import warn
from graphs.errors import OperationFailed, first_line
from graphs.lowering.export import LoweredExport

LARGEST = 65504.0  # of fp16
FACTOR = 4.0
WATCH = "watch_"


@dataclass(frozen=True)
class Near:
    """A tensor's largest magnitude over the golden cases of its stage; ONNX Runtime computes wider, so it is known."""

    stage: str
    tensor: str
    magnitude: float

    @property
    def leaves(self) -> bool:
        """Whether fp16 cannot hold it."""
        return self.magnitude > LARGEST

    def __str__(self) -> str:
        return f"{self.stage}: {self.tensor} reaches {self.magnitude:.0f}"


def guard_against_overflow(lowered: LoweredExport, golden: Path) -> None:
    """Warn of every tensor within a factor of 4 of 65,504; OperationFailed where one leaves fp16 altogether.

    golden: the export folder whose golden tensors are replayed.
    """
    found = list(near_overflow(lowered, golden))
    for near in found:
        warn(f"{near}, and fp16 ends at {LARGEST:.0f}; --precision bf16 has the range of fp32")
    if over := [near for near in found if near.leaves]:
        raise OperationFailed(
            f"{len(over)} tensors leave the range of fp16 in the golden replay, first {over[0].stage}: "
            f"{over[0].tensor}; build with --precision bf16, or fp32"
        )


def near_overflow(lowered: LoweredExport, golden: Path, limit: float = LARGEST / FACTOR) -> Iterator[Near]:
    """Every fp16 tensor whose magnitude reaches ``limit`` in a golden case, stage by stage, the largest first."""
    cases = cases_of(golden, lowered.spec)
    for stage in lowered.spec.stages:
        session, names = _watching(lowered, stage)
        reached: dict[str, float] = {}
        for case in (case for case in cases if case.stage == stage):
            given = fed(case, lowered.spec)
            feeds = {t.name: given[t.name].astype(t.dtype) for t in lowered.spec.stages[stage].inputs}
            try:
                magnitudes = session.run([WATCH + name for name in names], feeds)
            except Exception as e:  # the binding's exceptions share no base class
                raise OperationFailed(
                    f"ONNX Runtime failed in the lowered {stage} ({first_line(e, 300)}); report this"
                ) from None
            for name, got in zip(names, magnitudes, strict=True):
                magnitude = float(got) if np.isfinite(got) else math.inf
                reached[name] = max(reached.get(name, 0.0), magnitude)
        for name, magnitude in sorted(reached.items(), key=lambda item: -item[1]):
            if magnitude >= limit:
                yield Near(stage, name, magnitude)


def _watching(lowered: LoweredExport, stage: str) -> tuple[Any, list[str]]:
    """A session over the stage with the magnitude of every fp16 value as a further output, and the values' names."""
    import onnxruntime as ort

    from engines.sessions.ort_session import ERRORS_ONLY, WEIGHTS_FOLDER

    model = ir.load(lowered.file(stage))
    names, watching = [], []
    for node in list(model.graph):
        for value in node.outputs:
            if value.dtype != ir.DataType.FLOAT16 or not value.name or _reads_weights_only(node):
                continue
            wide = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value}, num_outputs=1)
            size = ir.node("Abs", wide.outputs, num_outputs=1)
            largest = ir.node("ReduceMax", size.outputs, {"keepdims": 0}, num_outputs=1)
            watching.append([wide, size, largest])
            out = largest.outputs[0]
            out.name, out.type, out.shape = WATCH + value.name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
            model.graph.outputs.append(out)
            names.append(value.name)
    # ONNX Runtime runs what the last node needs first, so the earliest value is measured, and freed, before the next.
    for nodes in reversed(watching):
        model.graph.extend(nodes)
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # what is freed goes back at once: a build needs the memory next
    options.add_session_config_entry(WEIGHTS_FOLDER, str(lowered.weights_at.resolve()))
    try:
        watched = ir.to_proto(model).SerializeToString()
        return ort.InferenceSession(watched, options, providers=["CPUExecutionProvider"]), names
    except Exception as e:  # the binding's exceptions share no base class
        raise OperationFailed(
            f"ONNX Runtime cannot replay the lowered {stage} ({first_line(e, 300)}); report this"
        ) from None


def _reads_weights_only(node: ir.Node) -> bool:
    """Whether a value is a rearranged weight: its range was checked when it was converted."""
    return all(v is None or v.is_initializer() for v in node.inputs)
