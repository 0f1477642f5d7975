"""One model of a bundle for a CPU, packed: stages and weights in a folder of their own, laid out or quantised."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx_ir as ir

from engines.bundles.jobs import BuiltMember
from engines.bundles.losses import losses_in_words, losses_of
from engines.bundles.manifest import Loss
from engines.sessions.session import open_session
from engines.targets import TARGETS
from graphs.console import say, step
from graphs.lowering.export import interface_of
from graphs.lowering.in_place import grouped
from graphs.lowering.packing import BITS, HostPrecision, Packing
from graphs.spec import SPEC_FILE, CacheForm, ExportSpec, FloatType, StageSpec, WeightFile


def pack_member(
    name: str,
    source: Path,
    spec: ExportSpec,
    out: Path,
    precision: HostPrecision,
    target: str = "cpu",
    computed_in: FloatType | None = None,
) -> BuiltMember:
    """Write an export's stages and weights into the new folder ``out``, which lies in the model's.

    computed_in: of weights in fp32, where that is narrower. Quantised ones are replayed on the target against the
    golden tensors of ``source``; the errors are told and returned.
    """
    out.mkdir()
    packing = Packing(precision, out, target)
    dtype = TARGETS[target].packed_dtype if precision in BITS else computed_in or "float32"
    stages: dict[str, StageSpec] = {}
    form: CacheForm = "concat"
    with step(f"packing the {name} model as {precision} for {target}"):
        for stage, interface in sorted(spec.stages.items(), key=lambda item: item[0] == "decoder"):
            model = ir.load(source / interface.file)
            packing.apply(model)
            if "in_place" in TARGETS[target].takes and stage == "decoder" and grouped(model):
                form = "in-place"
            ir.save(model, out / interface.file)
            typed = interface_of(interface, model)
            stages[stage] = typed.model_copy(update={"file": f"{out.name}/{interface.file}"})
        packing.write()
    weights = packing.weights
    size = (out / weights.file).stat().st_size
    packed = spec.model_copy(
        update={
            "stages": {stage: stages[stage] for stage in spec.stages},
            "dtype": dtype,
            "weights": (WeightFile(name=f"{out.name}/{weights.file}", bytes=size),),
            "weights_are": "converted",
            "cache": form,
        }
    )
    (out / SPEC_FILE).write_text(packed.dumps(), "utf-8")
    losses: tuple[Loss, ...] = ()
    if precision in BITS:
        with step(f"measuring what {precision} costs the {name} model on {target}"):
            losses = losses_of(source, packed, out.parent, partial(open_session, target=target, dtype=dtype))
        for line in losses_in_words(losses):
            say(f"{name} in {precision} on {target}, golden tensors: {line}")
    return BuiltMember(packed, size, "bf16" if computed_in == "bfloat16" else precision, losses)
