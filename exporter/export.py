"""checkpoint → ONNX stages, their spec and golden tensors: the exporter's one page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter import golden
from exporter.checkpoint import (
    DTYPES,
    Checkpoint,
    checkpoint_from_folder,
    language_of,
    skeleton_of,
    slices_of_parameters,
)
from exporter.parameters import once_each
from exporter.processor import copy_processor, processor_files, tokens_of
from exporter.program import DecoderProgram, EmbedProgram, Program, VisionProgram
from exporter.stages import bind, examples_of, weights_used, write_stage
from exporter.towers import with_tower
from exporter.trace import finish, onnx_from_program
from exporter.weights import PlacedWeights, place_weights, streamed
from graphs.atomic import atomic_folder, refuse_overlap
from graphs.console import say, step
from graphs.errors import UsageError
from graphs.plan import PruningPlan, Role
from graphs.plan_file import PlanDocument, plan_from_file
from graphs.policies import plan_of_policy
from graphs.spec import GOLDEN_FILE, PROCESSOR_FOLDER, SPEC_FILE, STAGES, ExportSpec, FloatType, WeightFile
from graphs.versions import installed_version, require

PINNED = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def export_checkpoint(
    checkpoint: Path | str,
    out: Path | str | None = None,
    *,
    policy: str = "sgl",
    role: Role = "large",
    plan: PruningPlan | PlanDocument | Path | str | None = None,
    dtype: FloatType | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    fraction: float | None = None,
    keep: float | None = None,
) -> ExportSpec:
    """Export a local checkpoint under a pruning plan into the folder ``out``.

    dtype: "float32" or "float16" of weights and activations; default float16 where the checkpoint is, else float32.
    in_place: write the graphs into the checkpoint's own folder and no weight at all (``out`` stays None).
    fraction, keep: options of the named policy (None: its defaults).
    plan: a plan file, or a plan, instead of all three.
    Errors: BadArtefact for the checkpoint, UsageError for the request, OperationFailed for a full disk or NaN.
    """
    require(*PINNED)
    if (out is None) != in_place:
        raise UsageError(
            "give an output folder, or --in-place to write into the checkpoint's own; not both, not neither"
        )
    source = checkpoint_from_folder(Path(checkpoint))
    wanted = _dtype_for(source, dtype, in_place)
    layers = source.text.num_hidden_layers
    options = {k: v for k, v in (("fraction", fraction), ("keep", keep)) if v is not None}
    fitted = fitted_plan(plan, layers) if plan else plan_of_policy(policy, role, layers, **options)
    with _workplace(source, out, overwrite) as work:
        return _export(source, work, fitted, role, wanted, in_place)


def fitted_plan(plan: PruningPlan | PlanDocument | Path | str, layers: int) -> PruningPlan:
    """A plan, or a plan file, for a model of ``layers`` layers; UsageError where it does not fit."""
    if isinstance(plan, PruningPlan):
        return plan.validated(layers)
    return (plan if isinstance(plan, PlanDocument) else plan_from_file(Path(plan))).resolved(layers)


def _export(
    source: Checkpoint, work: Path, plan: PruningPlan, role: Role, dtype: FloatType, in_place: bool
) -> ExportSpec:
    tokens = tokens_of(source)
    processor = processor_files(source.folder)
    with step("reading the checkpoint"):
        model = skeleton_of(source, DTYPES[dtype])
        language, grid = language_of(source), source.family.grid(source.config)
        slices = slices_of_parameters(model, source)
    plan = with_tower(plan, model, source.family)
    vision = VisionProgram(model, source.family, grid, language, plan.vision)
    embed = EmbedProgram(model, source.family, tokens.image, language)
    decoder = DecoderProgram(model, source.family, plan, language)
    programs: dict[str, Program] = {"vision": vision, "embed": embed, "decoder": decoder}
    examples = examples_of(vision, decoder, language, grid, DTYPES[dtype])
    traced = {}
    for name, program in programs.items():
        with step(f"tracing {name}"):
            feed, dims = examples[name]
            traced[name] = onnx_from_program(program, feed, dims)
            RemoveUnusedNodesPass()(traced[name])
    names = {id(p): name for name, p in model.named_parameters()}
    used = {stage: weights_used(traced[stage], programs[stage], names) for stage in programs}
    needed = {name for table in used.values() for name in table.values()}
    with step("placing the weights"):
        stored = once_each({n: s for n, s in slices.items() if n in needed})
        placed = place_weights(stored, dtype, work, in_place=in_place)
    base = source.folder if in_place else work
    stages = {}
    for name in programs:
        with step(f"writing {name}"):
            bind(traced[name], used[name], placed, base)
            stages[name] = write_stage(finish(traced[name]), work, name)
    with step("computing golden tensors"), streamed(model, placed.slices), golden.wide_products(model):
        seen = golden.vision_cases(vision)
        merged = golden.embed_cases(embed, seen["one"][1], tokens, language.vocab)
        written = golden.decoder_cases(decoder, merged["one"][1], language)
        golden.save_golden(work / GOLDEN_FILE, {"vision": seen, "embed": merged, "decoder": written})
    copy_processor(processor, work / PROCESSOR_FOLDER)
    spec = ExportSpec(
        family=source.family.name,
        architecture=source.family.architecture,
        role=role,
        dtype=dtype,
        plan=plan,
        language=language,
        grid=grid,
        tokens=tokens,
        stages=stages,
        weights=tuple(WeightFile(name=f.name, bytes=f.stat().st_size) for f in placed.files),
        weights_are=placed.how,
        tools={name: installed_version(name) or "unknown" for name in ("saccade", *PINNED)},
    )
    (work / SPEC_FILE).write_text(spec.dumps(), "utf-8")
    say(f"weights: {_placing_in_words(placed)}")
    return spec


@contextmanager
def _workplace(source: Checkpoint, out: Path | str | None, overwrite: bool) -> Iterator[Path]:
    """The folder to write into; it appears under its name only when all of it is there."""
    if out is not None:
        refuse_overlap(Path(out), source.folder, "the checkpoint", within=True)
        with atomic_folder(Path(out), overwrite, holds=SPEC_FILE) as work:
            yield work
        return
    names = (SPEC_FILE, GOLDEN_FILE, PROCESSOR_FOLDER, *(f"{stage}.onnx" for stage in STAGES))
    if (there := [name for name in names if (source.folder / name).exists()]) and not overwrite:
        raise UsageError(f"{source.folder} already has {', '.join(there)}; give --overwrite to replace what is there")
    parts = source.folder / ".saccade-parts"
    with atomic_folder(parts, overwrite=True) as work:
        yield work
    (source.folder / SPEC_FILE).unlink(missing_ok=True)
    for item in sorted(parts.iterdir(), key=lambda p: p.name == SPEC_FILE):
        target = source.folder / item.name
        if target.is_dir():
            shutil.rmtree(target)
        item.replace(target)
    parts.rmdir()


def _dtype_for(source: Checkpoint, dtype: FloatType | None, in_place: bool) -> FloatType:
    stored = {s.dtype for s in source.tensors.values() if s.dtype in DTYPES}
    wanted = dtype or ("float16" if stored == {"float16"} else "float32")
    if wanted not in ("float32", "float16"):
        raise UsageError(f"dtype {wanted!r} is not supported; choose float32 or float16")
    if in_place and stored != {wanted}:
        raise UsageError(
            f"--in-place needs weights stored as {wanted}, {source.folder} has "
            f"{', '.join(sorted(stored)) or 'others'}; export with -o instead"
        )
    return wanted


def _placing_in_words(placed: PlacedWeights) -> str:
    size = sum(f.stat().st_size for f in placed.files) / 1e6
    what = {
        "clone": "a copy-on-write clone of the checkpoint's files",
        "copy": "a plain copy of the checkpoint's files (this file system cannot clone)",
        "in-place": "the checkpoint's own files, in place",
        "converted": "converted into one new file",
    }[placed.how]
    return f"{what}, {size:.1f} MB"
