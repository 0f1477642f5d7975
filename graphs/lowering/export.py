"""A whole export, lowered: every stage's file beside one set of weights, and the spec that describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from graphs.errors import BadArtefact
from graphs.files import clone_or_copy, path_inside
from graphs.lowering import Lowering
from graphs.lowering.derived import DerivedWeights
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
RESHAPED = ("past_", "present_", "attention_received")  # their lengths are a matter of the cache's form


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
    weights, derived = ConvertedWeights(out), DerivedWeights(out, "quantised.safetensors")
    stages: dict[str, StageSpec] = {}
    weight_bytes: dict[str, int] = {}
    ops: dict[str, dict[str, str]] = {}
    kept: set[str] = set()
    for name, stage in spec.stages.items():
        model = lowering.apply(ir.load(folder / stage.file), weights.rebind, derived)
        external = [
            v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
        ]
        kept |= {str(t.location) for t in external if Path(t.base_dir) != out}
        weight_bytes[name] = sum(int(t.nbytes) for t in external)
        ops[name] = {str(n.name): n.op_type for n in model.graph.all_nodes() if n.domain}
        ir.save(model, out / stage.file)
        stages[name] = interface_of(stage, model)
    link = link and not (weights.is_needed or derived.is_needed)  # one folder has all of them
    for location in sorted(kept):
        _place(folder, location, out, link)
    if derived.is_needed:
        derived.write()
    if weights.is_needed:
        weights.write()
    files = sorted({*kept, *(made.file for made in (weights, derived) if made.is_needed)})
    listed = tuple(WeightFile(name=f, bytes=(out / f).stat().st_size) for f in files)
    update = {"stages": stages, "dtype": lowering.precision, "weights": listed, "cache": lowering.cache}
    lowered = spec.model_copy(update=update)
    return LoweredExport(out, lowered, folder if link else out, weight_bytes, ops)


def interface_of(stage: StageSpec, model: ir.Model) -> StageSpec:
    """A stage's interface with the types of its lowered graph, and with the inputs that a lowering added."""

    def of(tensors: tuple[TensorSpec, ...], values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
        known = {tensor.name: tensor for tensor in tensors}
        found = []
        for value in values:
            name, shape = str(value.name), value.shape
            assert value.dtype is not None
            dtype = DTYPES[value.dtype]
            if name in known and not name.startswith(RESHAPED):
                found.append(known[name].model_copy(update={"dtype": dtype}))
            else:
                dims = [d if isinstance(d, int) else str(getattr(d, "value", None)) for d in shape or ()]
                found.append(TensorSpec(name=name, dtype=dtype, shape=tuple(dims)))
        return tuple(found)

    inputs, outputs = of(stage.inputs, model.graph.inputs), of(stage.outputs, model.graph.outputs)
    return stage.model_copy(update={"inputs": inputs, "outputs": outputs})


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
