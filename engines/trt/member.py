"""An export → one model of a bundle with engines: lowered, guarded, built; the lowered files do not stay."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from engines.bundles.jobs import BuiltMember
from engines.bundles.losses import losses_in_words, losses_of
from engines.bundles.manifest import Compatibility, EngineEntry, Loss, Served
from engines.sessions.machine import here
from engines.sessions.session import open_session
from engines.trt.bounds import BODY_ROWS, Bounds, Room, profiles_of
from engines.trt.engine import engine_from_onnx, refuse_too_large
from engines.trt.flavour import FLAVOURS, RTX, Flavour
from engines.trt.full import TensorrtOptions, refuse_for_parser
from engines.trt.options import EngineOptions
from engines.trt.overflow import guard_against_overflow
from engines.trt.photos import misfits_in_words, photos_seen, room_for
from engines.trt.reading import Reading, reading_from
from graphs.console import say, step, warn
from graphs.errors import OperationFailed, UsageError
from graphs.files import atomic_folder, refuse_overlap
from graphs.lowering import Lowering
from graphs.lowering.export import LoweredExport, lowered_export
from graphs.lowering.in_place import refusal
from graphs.ops import RANKING
from graphs.rules import refuse_findings
from graphs.spec import SPEC_FILE, ExportSpec, Parser
from graphs.versions import require

IN_PLACE = "KV_CACHE_UPDATE"  # TensorRT's kind of layer that writes a chunk into a cache's buffer
SIZE_LIMIT = 1.1  # engine bytes per weight byte, above what an engine of no weights takes
EMPTY_ENGINE_BYTES = 24 << 20
PLAINER = "plainer"  # the folder of a second form, beside the files for an older parser


def lower_for_others(
    folder: Path, out: Path, precision: str | None, ops: str, parser: Parser, overwrite: bool = False
) -> ExportSpec:
    """Write the lowered files of an export into the folder ``out``, with their weights and spec.json; return that.

    Errors: UsageError for a value that is not known, or a graph that the parser cannot take; BadArtefact for an export
    that breaks a rule.
    """
    refuse_for_parser(parser, ops, precision)
    options = EngineOptions(RTX.sms[:1], precision, ops, tensorrt=TensorrtOptions(parser=parser))
    replace(options, tensorrt=None).checked(())
    refuse_overlap(out, folder, f"the export {folder}")
    export = refuse_findings(folder)
    lowering = options.lowering(export.spec, FLAVOURS["tensorrt"])
    with atomic_folder(out, overwrite, holds=SPEC_FILE) as work:
        lowered = lowered_export(folder, export.spec, work, lowering)
        if lowered.spec.dtype == "float16":
            guard_against_overflow(_plainer(folder, export.spec, lowered, lowering), folder)
            if (work / PLAINER).exists():
                shutil.rmtree(work / PLAINER)
        (work / SPEC_FILE).write_text(lowered.spec.dumps(), "utf-8")
    return lowered.spec


def _plainer(source: Path, spec: ExportSpec, lowered: LoweredExport, lowering: Lowering) -> LoweredExport:
    """The form in which nodes of ours are still there, for the guard and the bounds.

    What is written out for an older parser has none, and holds infinities of its own.
    """
    if lowering.parser == "current":
        return lowered
    (lowered.folder / PLAINER).mkdir()
    return lowered_export(source, spec, lowered.folder / PLAINER, replace(lowering, parser="current"), link=True)


def build_member(
    name: str, source: Path, spec: ExportSpec, out: Path, options: EngineOptions, flavour: Flavour = RTX
) -> BuiltMember:
    """Build the engines of the export ``source`` into the new folder ``out``, which lies in the model's.

    The spec's files are told from the model's folder, where golden tensors and processor lie.

    Errors: UsageError for an option that does not fit the model, BackendMissing where a library is missing,
    OperationFailed where memory is short, fp16 overflows, or TensorRT refuses.
    """
    lowering = options.lowering(spec, flavour)
    if lowering.precision == "float16":
        require("onnxruntime")  # replays the golden tensors
    _refuse_width(name, spec, lowering, flavour)
    sms = options.sms_for(flavour)
    photos = photos_seen(source, spec)
    room = room_for(photos)
    lowering = replace(lowering, capacity=_capacity(name, spec, options.bounds, room, lowering.parser))
    out.mkdir()
    held = out / "lowered"
    held.mkdir()
    with step(f"lowering the {name} model"):
        lowered = lowered_export(source, spec, held, lowering, link=True)
        plainer = _plainer(source, spec, lowered, lowering)
    for stage, weight_bytes in lowered.weight_bytes.items():
        refuse_too_large(weight_bytes, f"{stage} of the {name} model", flavour, lowering.bits)
    if lowered.spec.dtype == "float16":
        with step(f"replaying the {name} model for overflow"):
            guard_against_overflow(plainer, source)
    losses: tuple[Loss, ...] = ()
    if lowering.bits:
        with step(f"measuring what {options.precision} costs the {name} model on {flavour.target}"):
            losses = losses_of(source, plainer.spec, plainer.folder, open_session)
        for line in losses_in_words(losses):
            say(f"{name} in {options.precision} on {flavour.target}, golden tensors, by ONNX Runtime: {line}")
    bounds = options.bounds.fitted(lowered.spec, _most_rows(plainer, options.ops), room)
    say(f"{name}: {bounds.in_words()}")
    for line in misfits_in_words(photos, spec, bounds):
        warn(f"{name}: {line}")
    if _most_rows(plainer, options.ops) == BODY_ROWS:
        say(f"{name}: without plugins, pruning ranks at most {BODY_ROWS} tokens, and the order of ties is TensorRT's")
    if flavour is not RTX and options.full.form(options.ops) == "aot":
        lowered = _split(lowered)
    build = _Build(name, lowered, out, options, bounds, flavour, sms)
    engines = {stage: build.engine(stage) for stage in lowered.spec.stages}
    build.say_warnings()
    shutil.rmtree(held)
    stages = {s: i.model_copy(update={"file": engines[s].file}) for s, i in lowered.spec.stages.items()}
    built = lowered.spec.model_copy(update={"stages": stages, "weights": ()})
    (out / SPEC_FILE).write_text(built.dumps(), "utf-8")
    # What is written out for an older parser is a body.
    written_out = plainer.ops if lowering.parser != "current" else {}
    served: dict[str, Served] = {op: "body" for ops in written_out.values() for op in ops.values()}
    for stage, entry in engines.items():
        for node, by in entry.served.items():
            # One node left to its body is what a reader must know of the op.
            op = lowered.ops[stage][node]
            served[op] = by if served.get(op, by) == by else "body"
    precision = options.precision or "" if losses else ""
    return BuiltMember(
        built, sum(lowered.weight_bytes.values()), precision, losses, dict(sorted(served.items())), engines
    )


def _split(lowered: LoweredExport) -> LoweredExport:
    """The same files with a node per ahead-of-time plugin, and the nodes' ops told anew."""
    import onnx

    from plugins.aot import split_attention

    ops = {}
    for stage, known in lowered.ops.items():
        model = onnx.load(lowered.file(stage), load_external_data=False)
        split = split_attention(model)
        onnx.save(model, lowered.file(stage))
        nodes = {node.name for node in model.graph.node}
        ops[stage] = {node: op for node, op in known.items() if node in nodes} | split
    return replace(lowered, ops=ops)


def _capacity(name: str, spec: ExportSpec, bounds: Bounds, room: Room, parser: Parser) -> int | None:
    """Rows of the caches that an engine writes in place; None, and said, where a plan or a parser cannot have it so."""
    older = f"TensorRT {parser} knows no layer that writes in place" if parser != "current" else ""
    if why := older or refusal(spec.plan):
        say(f"{name}: each step copies its caches, and no CUDA graph is captured, because {why}")
        return None
    return bounds.fitted(spec, None, room).max_length


def _refuse_width(name: str, spec: ExportSpec, lowering: Lowering, flavour: Flavour) -> None:
    """UsageError for narrow heads of a width that TensorRT-RTX 1.7.1's compiler fails on (tried: 12 and 20)."""
    width = spec.language.head_dim
    if lowering.precision != "float32" and width % flavour.head_widths:
        raise UsageError(
            f"the {name} model's heads are {width} wide, and {flavour.title} compiles {lowering.precision} attention "
            f"only for multiples of {flavour.head_widths}; build with --precision fp32"
        )


@dataclass
class _Build:
    """The engines of one model in the making; ``warned``: TensorRT's warning → the stages in whose build it stood."""

    name: str
    lowered: LoweredExport
    out: Path
    options: EngineOptions
    bounds: Bounds
    flavour: Flavour
    sms: list[int]
    warned: dict[str, list[str]] = field(default_factory=dict)

    def engine(self, stage: str) -> EngineEntry:
        """Build a stage."""
        lowered, full, ops = self.lowered, self.options.full, self.options.ops
        file = self.out / f"{stage}.engine"
        profiles = profiles_of(stage, lowered.spec, self.bounds)
        # TensorRT-RTX has neither ahead-of-time plugins nor anything to time.
        of_full = self.flavour is not RTX
        form = full.form(ops) if of_full else TensorrtOptions().form(ops)
        answer = engine_from_onnx(
            lowered.file(stage),
            file,
            sms=self.sms,
            profiles=profiles,
            ops=lowered.ops[stage],
            plugins=form,
            flavour=self.flavour,
            settings=full.settings(self.sms[0], ops) if of_full else None,
            timing_cache=full.timing_cache if of_full else None,
        )
        for warning in answer["warnings"]:
            self.warned.setdefault(warning, []).append(stage)
        reading = reading_from(answer["reading"])
        _refuse_misread(lowered, stage, reading, full.parser if of_full else "current")
        weights = lowered.weight_bytes[stage]
        if answer["bytes"] > SIZE_LIMIT * weights + EMPTY_ENGINE_BYTES:
            warn(f"{self.name}: {file.name} has {answer['bytes'] / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights")
        return EngineEntry(
            file=f"{self.out.name}/{file.name}",
            target=self.flavour.target,
            tensorrt=answer["tensorrt"],
            sms=tuple(self.sms),
            precision=lowered.spec.dtype,
            profiles=profiles,
            served=reading.served,
            bytes=answer["bytes"],
            weight_bytes=weights,
            compatibility=full.compatibility if of_full else Compatibility(),
            plugins=form if "kernel" in reading.served.values() else "none",
            parser=full.parser if of_full else "current",
            platform=here(),
        )

    def say_warnings(self) -> None:
        """What TensorRT warned of, each once."""
        for warning, stages in self.warned.items():
            warn(f"{self.name}: {self.flavour.title} on {', '.join(stages)}: {warning}")


def _refuse_misread(lowered: LoweredExport, stage: str, reading: Reading, parser: Parser) -> None:
    """What was read back is what was asked for; OperationFailed where the parser made something else of the file."""
    carriers = {t.name for t in lowered.spec.stages[stage].inputs if t.carrier}
    if lost := sorted(set(reading.unused) - carriers):
        raise OperationFailed(
            f"the parser left input {lost[0]} of {stage} unread, so the engine would ignore it; report this with "
            "the file"
        )
    if stage != "decoder" or parser != "current":
        return  # written out there is no attention to read
    layers = lowered.spec.language.layers
    shapes = {tensor.name: tensor.shape for tensor in lowered.spec.stages[stage].inputs}
    if len(reading.attentions) != layers:
        raise OperationFailed(
            f"the parser made {len(reading.attentions)} attentions of a decoder of {layers} layers; report this with "
            "the file"
        )
    for attention in reading.attentions:
        if not attention.mask or not attention.cache:
            lacking = "mask" if not attention.mask else "cache"
            raise OperationFailed(
                f"the parser left {attention.node} without its {lacking}, so decoding would be wrong; report this with "
                "the file"
            )
        if lowered.spec.cache != "in-place":
            continue
        wanted = (IN_PLACE, shapes[attention.cache][2])
        if (attention.grown, attention.rows) != wanted:
            raise OperationFailed(
                f"the parser made {attention.grown} over {attention.rows} rows of {attention.cache}, where {wanted[0]} "
                f"over {wanted[1]} was asked for; report this with the file"
            )


def _most_rows(lowered: LoweredExport, ops: str) -> int | None:
    """The longest chunk that what serves the ranking ops takes, None where nothing is ranked.

    A vision stage ranks what one chunk may hold of images; its KeepTopK ranks them all and is bound by what stays.
    """
    ranking = RANKING & set(lowered.ops["decoder"].values())
    ranking |= (RANKING - {"KeepTopK"}) & set(lowered.ops["vision"].values())
    if not ranking:
        return None
    if ops == "body" or ranking != {"KeepTopK"}:
        return BODY_ROWS
    from plugins.registry import MOST_ROWS

    return MOST_ROWS
