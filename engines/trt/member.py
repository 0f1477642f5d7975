"""An export → one model of an rtx bundle: lowered, guarded, built; the lowered files and their weights do not stay."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from engines.bundles.manifest import EngineEntry, Served
from engines.bundles.overflow import guard_against_overflow
from engines.trt.bounds import BODY_ROWS, Bounds, profiles_of
from engines.trt.engine import SMS, checked_sms, engine_from_onnx, refuse_too_large
from engines.trt.reading import Reading, reading_from
from graphs.errors import OperationFailed, UsageError
from graphs.files import atomic_folder
from graphs.lowering import PARSERS, Lowering
from graphs.lowering.export import LoweredExport, lowered_export
from graphs.lowering.in_place import refusal
from graphs.rules import refuse_findings
from graphs.spec import SPEC_FILE, ExportSpec, FloatType
from graphs.talk import say, step, warn

PRECISIONS: dict[str, FloatType] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
OPS_CHOICES = ("plugin", "body")
HEAD_WIDTHS = 8
IN_PLACE = "KV_CACHE_UPDATE"  # TensorRT's kind of layer that writes a chunk into a cache's buffer
RANKING = {"KeepTopK", "KeepPerImage", "MergeDropped"}  # ops whose bodies hold a TopK over a chunk's rows
SIZE_LIMIT = 1.1  # engine bytes per weight byte, above what an engine of no weights takes
EMPTY_ENGINE_BYTES = 24 << 20


@dataclass(frozen=True)
class EngineOptions:
    """What ``saccade build --target rtx`` is told.

    sms: compute capabilities, as 89. precision: fp16, bf16 or fp32; None: the export's own. ops: whether plugins are
    asked to serve the ops that have a kernel, or the bodies serve all.
    """

    sms: tuple[int, ...] = ()
    precision: str | None = None
    ops: str = "body"
    bounds: Bounds = field(default_factory=Bounds)

    def checked(self) -> EngineOptions:
        """The same; UsageError for a value that is not known."""
        if self.precision is not None and self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r} is not known; choose fp16, bf16 or fp32")
        if self.ops not in OPS_CHOICES:
            raise UsageError(f"ops {self.ops!r} is neither plugin nor body; choose one")
        checked_sms(self.sms)
        return self

    def lowering(self, spec: ExportSpec, capacity: int | None = None) -> Lowering:
        """The passes that these options ask for. capacity: rows of caches that are written in place."""
        precision = PRECISIONS[self.precision] if self.precision else spec.dtype
        if self.ops == "body":
            return Lowering(precision, capacity=capacity)
        from plugins.registry import NODE_ATTRIBUTES, ops_with_kernels

        return Lowering(precision, frozenset(ops_with_kernels()), NODE_ATTRIBUTES, capacity=capacity)


def lower_for_others(
    folder: Path, out: Path, precision: str | None, ops: str, parser: str, overwrite: bool = False
) -> ExportSpec:
    """Write the lowered files of an export into the folder ``out``, with their weights and spec.json; return that.

    Errors: UsageError for a value that is not known, or a graph that the parser cannot take; BadArtefact for an export
    that breaks a rule.
    """
    if parser not in PARSERS:
        raise UsageError(f"parser {parser!r} is not known; choose {' or '.join(PARSERS)}")
    if parser == "10.3" and (ops == "plugin" or precision == "bf16"):
        raise UsageError("TensorRT 10.3 takes no plugins of ours and no bf16 graph; choose --ops body and fp16 or fp32")
    export = refuse_findings(folder)
    lowering = replace(EngineOptions(SMS[:1], precision, ops).checked().lowering(export.spec), parser=parser)
    with atomic_folder(out, overwrite, holds=SPEC_FILE) as work:
        lowered = lowered_export(folder, export.spec, work, lowering)
        if lowered.spec.dtype == "float16":
            # What is written out for an older parser holds infinities of its own, so another form is replayed.
            (work / "guarded").mkdir()
            newest = replace(lowering, parser="current")
            guard_against_overflow(lowered_export(folder, export.spec, work / "guarded", newest, link=True), folder)
            shutil.rmtree(work / "guarded")
        (work / SPEC_FILE).write_text(lowered.spec.dumps(), "utf-8")
    return lowered.spec


@dataclass(frozen=True)
class BuiltMember:
    """One model as it lies in the bundle."""

    spec: ExportSpec
    engines: dict[str, EngineEntry]
    ops: dict[str, Served]
    weight_bytes: int


def build_member(name: str, source: Path, spec: ExportSpec, out: Path, options: EngineOptions) -> BuiltMember:
    """Build the engines of the export ``source`` into the new folder ``out``, which lies in the model's.

    The spec's files are told from the model's folder, where golden tensors and processor lie.

    Errors: UsageError for an option that does not fit the model, BackendMissing where a library is missing,
    OperationFailed where memory is short, fp16 overflows, or TensorRT refuses.
    """
    options = options.checked()
    lowering = options.lowering(spec, capacity=_capacity(name, spec, options.bounds))
    _refuse_width(name, spec, lowering)
    out.mkdir()
    held = out / "lowered"
    held.mkdir()
    with step(f"lowering the {name} model"):
        lowered = lowered_export(source, spec, held, lowering, link=True)
    for stage, weight_bytes in lowered.weight_bytes.items():
        refuse_too_large(weight_bytes, f"{stage} of the {name} model")
    if lowered.spec.dtype == "float16":
        with step(f"replaying the {name} model for overflow"):
            guard_against_overflow(lowered, source)
    bounds = options.bounds.fitted(lowered.spec, _most_rows(lowered, options.ops))
    say(f"{name}: {bounds.in_words()}")
    if _most_rows(lowered, options.ops) == BODY_ROWS:
        say(f"{name}: a body ranks at most {BODY_ROWS} rows, and breaks ties as TensorRT likes")
    engines = {stage: _engine(name, lowered, stage, out, options, bounds) for stage in lowered.spec.stages}
    shutil.rmtree(held)
    stages = {s: i.model_copy(update={"file": engines[s].file}) for s, i in lowered.spec.stages.items()}
    built = lowered.spec.model_copy(update={"stages": stages, "weights": ()})
    (out / SPEC_FILE).write_text(built.dumps(), "utf-8")
    served: dict[str, Served] = {}
    for stage, entry in engines.items():
        for node, by in entry.served.items():
            # One node left to its body is what a reader must know of the op.
            op = lowered.ops[stage][node]
            served[op] = by if served.get(op, by) == by else "body"
    return BuiltMember(built, engines, dict(sorted(served.items())), sum(lowered.weight_bytes.values()))


def _capacity(name: str, spec: ExportSpec, bounds: Bounds) -> int | None:
    """Rows of the caches that an engine writes in place; None, and said, for a plan that cannot have it so."""
    if why := refusal(spec.plan):
        say(f"{name}: each step copies its caches, and no step is captured as a CUDA graph, for {why}")
        return None
    return bounds.fitted(spec, None).max_length


def _refuse_width(name: str, spec: ExportSpec, lowering: Lowering) -> None:
    """UsageError for narrow heads of a width that TensorRT-RTX 1.7.1's compiler fails on (tried: 12 and 20)."""
    width = spec.language.head_dim
    if lowering.precision != "float32" and width % HEAD_WIDTHS:
        raise UsageError(
            f"the {name} model's heads are {width} wide, and TensorRT-RTX compiles {lowering.precision} attention of "
            f"multiples of {HEAD_WIDTHS} only; build with --precision fp32"
        )


def _engine(
    name: str, lowered: LoweredExport, stage: str, out: Path, options: EngineOptions, bounds: Bounds
) -> EngineEntry:
    file = out / f"{stage}.engine"
    sms = checked_sms(options.sms)
    profiles = profiles_of(stage, lowered.spec, bounds)
    answer = engine_from_onnx(
        lowered.file(stage), file, sms=sms, profiles=profiles, ops=lowered.ops[stage], plugins=options.ops == "plugin"
    )
    reading = reading_from(answer["reading"])
    _refuse_misread(lowered, stage, reading)
    weights = lowered.weight_bytes[stage]
    if answer["bytes"] > SIZE_LIMIT * weights + EMPTY_ENGINE_BYTES:
        warn(f"{name}: {file.name} has {answer['bytes'] / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights")
    return EngineEntry(
        file=f"{out.name}/{file.name}",
        target="rtx",
        tensorrt=answer["tensorrt"],
        sms=tuple(sms),
        precision=lowered.spec.dtype,
        profiles=profiles,
        served=reading.served,
        bytes=answer["bytes"],
        weight_bytes=weights,
    )


def _refuse_misread(lowered: LoweredExport, stage: str, reading: Reading) -> None:
    """What was read back is what was asked for; OperationFailed where the parser made something else of the file."""
    carriers = {t.name for t in lowered.spec.stages[stage].inputs if t.carrier}
    if lost := sorted(set(reading.unused) - carriers):
        raise OperationFailed(f"the parser left input {lost[0]} of {stage} unread, so the engine would ignore it")
    if stage != "decoder":
        return
    layers = lowered.spec.language.layers
    if len(reading.attentions) != layers:
        raise OperationFailed(f"the parser made {len(reading.attentions)} attentions of a decoder of {layers} layers")
    for attention in reading.attentions:
        if not attention.mask or not attention.cache:
            lacking = "mask" if not attention.mask else "cache"
            raise OperationFailed(f"the parser left {attention.node} without its {lacking}, so decoding would be wrong")
        if lowered.spec.cache == "in-place" and attention.grown != IN_PLACE:
            raise OperationFailed(
                f"the parser made {attention.grown} of {attention.cache}, where {IN_PLACE} was asked for"
            )


def _most_rows(lowered: LoweredExport, ops: str) -> int | None:
    """The longest chunk that what serves the ranking ops takes, None where nothing is ranked in the decoder."""
    ranking = RANKING & set(lowered.ops["decoder"].values())
    if not ranking:
        return None
    if ops == "body" or ranking != {"KeepTopK"}:
        return BODY_ROWS
    from plugins.registry import MOST_ROWS

    return MOST_ROWS
