"""checkpoint → ONNX stages, their spec and golden tensors: the exporter's one page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter import golden
from exporter.checkpoint import DTYPES, Checkpoint, checkpoint_from_folder, skeleton_of, slices_of_parameters
from exporter.program import DecoderProgram, EmbedProgram, Program, Tensors, VisionProgram
from exporter.trace import finish, onnx_from_program
from exporter.weights import PlacedWeights, place_weights, streamed
from graphs.atomic import atomic_folder
from graphs.errors import BadArtefact, UsageError
from graphs.plan import PruningPlan, Role, plan_of_policy
from graphs.spec import (
    GOLDEN_FILE,
    PROCESSOR_FOLDER,
    SPEC_FILE,
    ExportSpec,
    LanguageModel,
    StageSpec,
    TensorSpec,
    Tokens,
    WeightFile,
)
from graphs.talk import say, step
from graphs.versions import installed_version, require
from graphs.weights import TensorSlice

PROCESSOR_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
CARRIERS = ("guide", "tail", "keep_")
PINNED = ("torch", "transformers", "onnx-ir", "onnxscript")


def export_checkpoint(
    checkpoint: Path | str,
    out: Path | str | None = None,
    *,
    policy: str = "sgl",
    role: Role = "large",
    plan: PruningPlan | None = None,
    dtype: str | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    **policy_options: float,
) -> ExportSpec:
    """Export a local checkpoint under a pruning plan into the folder ``out``.

    dtype: "float32" or "float16" of weights and activations; default float16 where the checkpoint is, else float32.
    in_place: write the graphs into the checkpoint's own folder and no weight at all (``out`` stays None).
    policy_options: of the named policy, as ``fraction`` and ``keep`` of sgl; ``plan`` overrides both.
    Errors: BadArtefact for the checkpoint, UsageError for the request, OperationFailed for a full disk or NaN.
    """
    require(*PINNED)
    if (out is None) != in_place:
        raise UsageError("give an output folder, or --in-place to write into the checkpoint's own; not both, not none")
    source = checkpoint_from_folder(Path(checkpoint))
    wanted = _dtype_for(source, dtype, in_place)
    layers = source.text.num_hidden_layers
    plan = plan.validated(layers) if plan else plan_of_policy(policy, role, layers, **policy_options)
    with _workplace(source, out, overwrite) as work:
        return _export(source, work, plan, role, wanted, in_place)


def _export(
    source: Checkpoint, work: Path, plan: PruningPlan, role: Role, dtype: str, in_place: bool
) -> ExportSpec:
    language = _language_of(source.text)
    tokens = _tokens_of(source)
    grid = source.family.grid(source.config)
    with step("reading the checkpoint"):
        model = skeleton_of(source, DTYPES[dtype])
        slices = slices_of_parameters(model, source)
    vision = VisionProgram(model, source.family)
    embed = EmbedProgram(model, source.family, tokens.image)
    decoder = DecoderProgram(model, source.family, plan)
    programs: dict[str, Program] = {"vision": vision, "embed": embed, "decoder": decoder}
    examples = _examples(decoder, language, grid, DTYPES[dtype])
    traced = {}
    for name, program in programs.items():
        with step(f"tracing {name}"):
            feed, dims = examples[name]
            traced[name] = onnx_from_program(program, feed, dims)
            RemoveUnusedNodesPass()(traced[name])
    names = {id(p): name for name, p in model.named_parameters()}
    used = {stage: _weights_used(traced[stage], programs[stage], names) for stage in programs}
    needed = {name for table in used.values() for name in table.values()}
    with step("placing the weights"):
        placed = place_weights({n: s for n, s in slices.items() if n in needed}, dtype, work, in_place=in_place)
    base = source.folder if in_place else work
    stages = {}
    for name in programs:
        with step(f"writing {name}"):
            _bind(traced[name], used[name], placed, base)
            stages[name] = _write_stage(finish(traced[name]), work, name)
    with step("computing golden tensors"), streamed(model, placed.slices):
        seen = golden.vision_cases(vision, grid)
        merged = golden.embed_cases(embed, seen["one"][1]["visual_embeds"], tokens, language.vocab)
        written = golden.decoder_cases(decoder, merged["one"][1], language)
        golden.save_golden(work / GOLDEN_FILE, {"vision": seen, "embed": merged, "decoder": written})
    _copy_processor(source.folder, work / PROCESSOR_FOLDER)
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
        with atomic_folder(Path(out), overwrite, holds=SPEC_FILE) as work:
            yield work
        return
    if (source.folder / SPEC_FILE).exists() and not overwrite:
        raise UsageError(f"{source.folder} already holds an export; give --overwrite to replace it")
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


def _dtype_for(source: Checkpoint, dtype: str | None, in_place: bool) -> str:
    stored = {s.dtype for s in source.tensors.values() if s.dtype in DTYPES}
    wanted = dtype or ("float16" if stored == {"float16"} else "float32")
    if wanted not in ("float32", "float16"):
        raise UsageError(f"dtype {wanted!r} is not exported; choose float32 or float16")
    if in_place and stored != {wanted}:
        raise UsageError(
            f"--in-place needs weights stored as {wanted}, {source.folder} has {', '.join(sorted(stored)) or 'others'}; "
            "export with -o instead"
        )
    return wanted


def _language_of(text: Any) -> LanguageModel:
    heads = text.num_attention_heads
    return LanguageModel(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        max_positions=text.max_position_embeddings,
    )


def _tokens_of(source: Checkpoint) -> Tokens:
    """Special tokens, from generation_config.json where it says more than config.json."""
    from tokenizers import Tokenizer
    from transformers import GenerationConfig

    path = source.folder / "tokenizer.json"
    if not path.is_file():
        raise BadArtefact(f"{path} is missing; save the checkpoint's fast tokenizer with transformers and export again")
    try:
        text = Tokenizer.from_file(str(path)).id_to_token(source.config.image_token_id)
    except Exception as e:
        raise BadArtefact(f"{path} is no tokenizer ({e}); download the checkpoint again") from None
    if text is None:
        raise BadArtefact(
            f"{path} has no token with the image token's id {source.config.image_token_id}; "
            "the tokenizer does not belong to this config.json"
        )
    eos = source.text.eos_token_id
    if (source.folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(source.folder).eos_token_id or eos
    listed = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not listed:
        raise BadArtefact(f"{source.folder} names no end-of-sequence token; add eos_token_id to generation_config.json")
    return Tokens(image=source.config.image_token_id, image_text=text, eos=listed, pad=source.text.pad_token_id)


def _examples(
    decoder: DecoderProgram, language: LanguageModel, grid: Any, dtype: torch.dtype
) -> dict[str, tuple[Tensors, dict[str, tuple[int | str, ...]]]]:
    """Example inputs and dimension names per stage; no two dimensions of one stage share a size by chance."""
    width, rows = language.width, 23
    points = len(decoder.plan.points)
    past = golden.empty_past(decoder, language, dtype, [3 + 2 * j for j in range(points + 1)])
    feed = golden.decoder_feed(
        decoder,
        torch.zeros(1, rows, width, dtype=dtype),
        torch.zeros(1, rows, dtype=torch.bool),
        past,
        start=0,
        guide=6,
        keep=tuple(rows - 2 - i for i in range(points)),
        tail=2,
    )
    dims: dict[str, tuple[int | str, ...]] = {
        "inputs_embeds": (1, "S", width),
        "position_ids": (1, "S"),
        "is_visual": (1, "S"),
        "priority": (1, "S"),
        "guide": ("G",),
        "tail": ("R",),
        **{f"keep_{i}": (f"S_{i + 1}",) for i in range(points)},
    }
    for j, segment in enumerate(decoder.segments):
        for i in segment:
            dims |= dict.fromkeys(golden.past_names(i), (1, language.kv_heads, f"P_{j}", language.head_dim))
    pixels = torch.zeros(2, 3, grid.image_height, grid.image_width)
    embed_feed = {"input_ids": torch.zeros(1, 7, dtype=torch.int64), "visual_embeds": torch.zeros(5, width, dtype=dtype)}
    return {
        "vision": ({"pixel_values": pixels}, {"pixel_values": ("N", 3, grid.image_height, grid.image_width)}),
        "embed": (embed_feed, {"input_ids": (1, "S"), "visual_embeds": ("V", width)}),
        "decoder": (feed, {name: dims[name] for name in feed}),
    }


def _weights_used(model: ir.Model, program: Program, names: dict[int, str]) -> dict[str, str]:
    """Initialiser name → the model's name of that parameter, for those that are parameters."""
    parameters = dict(program.named_parameters(remove_duplicate=False))
    return {name: names[id(parameters[name])] for name in model.graph.initializers if name in parameters}


def _bind(model: ir.Model, used: dict[str, str], placed: PlacedWeights, base: Path) -> None:
    """Point the initialisers into the weight files."""
    for name, parameter in used.items():
        where: TensorSlice = placed.slices[parameter]
        value = model.graph.initializers[name]
        assert value.dtype is not None
        value.const_value = ir.ExternalTensor(
            where.file.name,
            where.offset,
            where.length,
            value.dtype,
            shape=ir.Shape(where.shape),
            name=name,
            base_dir=base,
        )


def _write_stage(model: ir.Model, work: Path, name: str) -> StageSpec:
    ir.save(model, work / f"{name}.onnx")
    return StageSpec(
        file=f"{name}.onnx",
        inputs=tuple(_tensor_spec(v) for v in model.graph.inputs),
        outputs=tuple(_tensor_spec(v) for v in model.graph.outputs),
    )


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name and value.dtype is not None and value.shape is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    dtype = {"FLOAT": "float32", "FLOAT16": "float16"}.get(value.dtype.name, value.dtype.name.lower())
    return TensorSpec(name=value.name, dtype=dtype, shape=shape, carrier=value.name.startswith(CARRIERS))


def _copy_processor(folder: Path, target: Path) -> None:
    """Tokenizer, image processor and chat template as they are."""
    target.mkdir()
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if not (target / "preprocessor_config.json").exists() and not (target / "processor_config.json").exists():
        raise BadArtefact(
            f"{folder} has no preprocessor_config.json, so images cannot be prepared; download the whole checkpoint"
        )


def _placing_in_words(placed: PlacedWeights) -> str:
    size = sum(f.stat().st_size for f in placed.files) / 1e6
    what = {
        "clone": "a copy-on-write clone of the checkpoint's files",
        "copy": "a plain copy of the checkpoint's files (this file system cannot clone)",
        "in-place": "the checkpoint's own files, in place",
        "converted": "converted into one new file",
    }[placed.how]
    return f"{what}, {size:.1f} MB"
