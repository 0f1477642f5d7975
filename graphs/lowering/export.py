"""A whole export, lowered: every stage's file beside one set of weights, and the spec that describes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from graphs.errors import BadArtefact
from graphs.files import clone_or_copy, path_inside
from graphs.lowering import Lowering
from graphs.lowering.weights import ConvertedWeights
from graphs.spec import DType, ExportSpec, StageSpec, TensorSpec, WeightFile

DTYPES: dict[ir.DataType, DType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.BOOL: "bool",
}


@dataclass(frozen=True)
class LoweredExport:
    """``folder`` holds the stages' files and their weights, or links to them; ``spec`` has the lowered types.

    weights_at: the folder that the weights themselves lie in, for readers that follow no link.
    weight_bytes: per stage, what its graph reads of the weight files. ops: per stage, node name → op of ours.
    """

    folder: Path
    spec: ExportSpec
    weights_at: Path
    weight_bytes: dict[str, int]
    ops: dict[str, dict[str, str]]

    def file(self, stage: str) -> Path:
        """A stage's lowered file."""
        return self.folder / self.spec.stages[stage].file


def lowered_export(
    folder: Path, spec: ExportSpec, out: Path, lowering: Lowering, *, link: bool = False
) -> LoweredExport:
    """Lower the export in ``folder`` into the existing folder ``out``; its weights lie there once.

    Weights that have the wanted type are cloned or copied, the others converted into one new file. link: a symbolic
    link instead of a copy, which TensorRT follows and the export does not notice; ONNX Runtime and onnx's own loaders
    refuse it, so it is for folders that do not stay.
    """
    weights = ConvertedWeights(out)
    stages: dict[str, StageSpec] = {}
    weight_bytes: dict[str, int] = {}
    ops: dict[str, dict[str, str]] = {}
    kept: set[str] = set()
    for name, stage in spec.stages.items():
        model = lowering.apply(ir.load(folder / stage.file), weights.rebind)
        external = [
            v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
        ]
        kept |= {str(t.location) for t in external if Path(t.base_dir) != out}
        weight_bytes[name] = sum(int(t.nbytes) for t in external)
        ops[name] = {str(n.name): n.op_type for n in model.graph.all_nodes() if n.domain}
        ir.save(model, out / stage.file)
        stages[name] = retyped(stage, model)
    link = link and not weights.is_needed  # one folder has all of them
    for location in sorted(kept):
        _place(folder, location, out, link)
    if weights.is_needed:
        weights.write()
    files = sorted({*kept, *([weights.file] if weights.is_needed else [])})
    listed = tuple(WeightFile(name=f, bytes=(out / f).stat().st_size) for f in files)
    lowered = spec.model_copy(update={"stages": stages, "dtype": lowering.precision, "weights": listed})
    return LoweredExport(out, lowered, folder if link else out, weight_bytes, ops)


def retyped(stage: StageSpec, model: ir.Model) -> StageSpec:
    """A stage's interface with the types of its lowered graph."""
    types = {v.name: DTYPES[v.dtype] for v in (*model.graph.inputs, *model.graph.outputs) if v.dtype in DTYPES}

    def of(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(t.model_copy(update={"dtype": types.get(t.name, t.dtype)}) for t in tensors)

    return stage.model_copy(update={"inputs": of(stage.inputs), "outputs": of(stage.outputs)})


def _place(folder: Path, location: str, out: Path, link: bool) -> None:
    source = path_inside(folder, location)
    if source is None or not source.is_file():
        raise BadArtefact(f"{folder}: the graphs read {location!r}, which is no file of the export; export it again")
    target = out / location
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        target.symlink_to(source.resolve())
    else:
        clone_or_copy(source, target)
