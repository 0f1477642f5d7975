"""One or two exports → a bundle for targets: check that they fit, copy, build, digest, write the manifest last."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.bundles.bundle import files_below
from engines.bundles.footprint import footprint_of
from engines.bundles.manifest import MANIFEST_FILE, FileEntry, Manifest, MemberEntry, Served, TargetEntry
from engines.bundles.pair import Source, members_from_sources, prunes_nothing
from engines.targets import TARGETS, checked_targets, refuse_unrunnable
from graphs.errors import UsageError
from graphs.files import atomic_folder, clone_or_copy, digests_of, path_inside, refuse_overlap
from graphs.ops import DOMAIN
from graphs.rules import Export, refuse_findings
from graphs.rules.rule import nodes_of
from graphs.spec import GOLDEN_FILE, PROCESSOR_FOLDER, SPEC_FILE, ExportSpec, FloatType
from graphs.talk import say, step, warn
from graphs.versions import installed_version

if TYPE_CHECKING:
    from engines.trt.options import EngineOptions
    from graphs.lowering.packing import HostPrecision

DEFAULT_THRESHOLD = 0.9  # none is published; ``calibrate`` finds one for a wanted agreement
TOOLS = (
    "saccade",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "polygraphy",
    "transformers",
    "numpy",
)


def build_bundle(
    folders: Sequence[Path | str],
    out: Path | str,
    *,
    target: str | Sequence[str] = "cpu",
    threshold: float | None = None,
    overwrite: bool = False,
    engines: EngineOptions | None = None,
    precision: str | None = None,
) -> Manifest:
    """Build a bundle from one export, or from a small and a large one in any order; return its manifest.

    target: one of ``engines.targets.TABLE``, or several: those that run graphs share the stages, engines lie
    beside.
    threshold: the score S above which the small model's answer stands, in [0, 1]. overwrite: replace an
    older bundle at ``out``. engines: how engines are built (``engines.trt.options.EngineOptions``).
    precision: of a target that has ``precisions``. fp32, int8 or int4 for cpu, int8 or int4 for openvino: files of its
    own, packed for it, int8 and int4 with the error they cost in the manifest; bf16 or fp32 for openvino, which
    computes the same graphs in it; None: the canonical graphs in the export's own.
    Errors: BadArtefact for an export that breaks a rule, UsageError for a pair that does not fit, BackendMissing where
    what quantised files are measured with is not installed, OperationFailed for a full disk or a failed build; nothing
    is left under the final name then.
    """
    targets = checked_targets(target)
    options = _engine_options(targets, engines)
    chosen_precision = _graph_precision(targets, precision)
    for packing in (target for target in targets if _packed_as(target, precision)):
        refuse_unrunnable(packing)
    chosen = DEFAULT_THRESHOLD if threshold is None else threshold
    if not 0 <= chosen <= 1:
        raise UsageError(f"threshold is {chosen:g}, but must lie in [0, 1]; 1 never exits early, 0 always")
    for folder in folders:
        refuse_overlap(Path(out), Path(folder), f"the export {folder}")
    with step("checking the exports"):
        exports = [refuse_findings(Path(folder)) for folder in folders]
        by_folder = {export.folder: export for export in exports}
        members = members_from_sources([Source(export.folder, export.spec) for export in exports])
    if threshold is not None and "alone" in members:
        raise UsageError("a bundle of one model has no early exit, so a threshold has no effect; leave it out")
    for name, source in members.items():
        if name != "small" and prunes_nothing(source.spec):
            warn(f"the {name} model prunes nothing, as its plan {source.spec.plan.name} asks")
    with atomic_folder(Path(out), overwrite, holds=MANIFEST_FILE) as work:
        entries = {
            name: _member(name, by_folder[source.folder], work / name, targets, options, chosen_precision)
            for name, source in members.items()
        }
        with step("computing digests"):
            manifest = Manifest(
                schema="saccade.bundle/1",
                created_by=f"saccade {installed_version('saccade') or '0+source'}",
                tools=_tools(),
                targets=targets,
                threshold=chosen,
                members=entries,  # type: ignore[arg-type]
                files=tuple(_file(work, path) for path in sorted(files_below(work))),
            ).signed()
        (work / MANIFEST_FILE).write_text(manifest.dumps(), "utf-8")
    return manifest


def split_precision(targets: Sequence[str], precision: str | None) -> tuple[str | None, str | None]:
    """What of a precision asked for on the command line is that of graphs and what the engines'."""
    known = [TARGETS[target] for target in targets if target in TARGETS]
    of_engines = any(target.runs == "engines" for target in known)
    of_graphs = not of_engines or any(precision in target.precisions for target in known)
    return precision if of_graphs else None, precision if of_engines else None


def copy_shared(source: Path, folder: Path) -> None:
    """Copy what every target of a model needs: golden tensors, processor."""
    clone_or_copy(_inside(source, GOLDEN_FILE), folder / GOLDEN_FILE)
    processor = _inside(source, PROCESSOR_FOLDER)
    if not processor.is_dir():
        raise UsageError(f"{processor} is missing; export the checkpoint again")
    shutil.copytree(processor, folder / PROCESSOR_FOLDER, copy_function=shutil.copyfile)


def copy_graphs(source: Path, spec: ExportSpec, folder: Path) -> str:
    """Copy the stages that spec.json names, each weight file once; returns how: clone or copy."""
    names = [SPEC_FILE, *(stage.file for stage in spec.stages.values()), *(weight.name for weight in spec.weights)]
    how = "clone"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if clone_or_copy(_inside(source, name), folder / name) == "copy":
            how = "copy"
    return how


def ops_served(export: Export) -> dict[str, Served]:
    """Each op of ours in an export, and what serves it where graphs are run: always its body."""
    graphs = [stage.model.graph for stage in export.stages.values()]
    used = {node.op_type for graph in graphs for node in nodes_of(graph) if node.domain == DOMAIN}
    return dict.fromkeys(sorted(used), "body")


def _member(
    name: str,
    export: Export,
    folder: Path,
    targets: Sequence[str],
    options: EngineOptions | None,
    precision: str | None,
) -> MemberEntry:
    """One model in the new folder ``folder``, for every target."""
    spec, packed = export.spec, {target: _packed_as(target, precision) for target in targets}
    folder.mkdir()
    with step(f"copying the {name} model"):
        copy_shared(export.folder, folder)
        own = all(_has_engines(target) or packed[target] for target in targets)
        how = "" if own else copy_graphs(export.folder, spec, folder)
    if how:
        say(f"{name}: {_in_words(how)} of {export.folder}")
    on = {
        target: _packed(name, export, folder, target, form)
        if (form := packed[target])
        else _target(name, export, folder, target, options, precision)
        for target in targets
    }
    same = {k: getattr(spec, k) for k in ("family", "architecture", "role", "plan", "language", "grid")}
    return MemberEntry(folder=name, targets=on, **same)


def _target(
    name: str, export: Export, folder: Path, target: str, options: EngineOptions | None, precision: str | None
) -> TargetEntry:
    """What a model is on one target; engines, or a spec.json of its own, lie in a folder of the target's name."""
    if not _has_engines(target):
        weight_bytes = export.spec.weight_bytes
        dtype = _computed_in(target, export.spec, precision)
        at = SPEC_FILE
        if dtype != export.spec.dtype:
            at = f"{target}/{SPEC_FILE}"
            (folder / target).mkdir()
            (folder / at).write_text(export.spec.model_copy(update={"dtype": dtype}).dumps(), "utf-8")
        return TargetEntry(
            spec=at,
            dtype=dtype,
            stages=export.spec.stages,
            ops=ops_served(export),
            weight_bytes=weight_bytes,
            footprint=footprint_of(export, target, dtype, weight_bytes, {}),
        )
    from engines.trt.flavour import FLAVOURS
    from engines.trt.member import build_member

    assert options
    built = build_member(name, export.folder, export.spec, folder / target, options, FLAVOURS[target])
    return TargetEntry(
        spec=f"{target}/{SPEC_FILE}",
        precision=options.precision or "" if built.losses else "",
        losses=built.losses,
        dtype=built.spec.dtype,
        stages=built.spec.stages,
        ops=built.ops,
        weight_bytes=built.weight_bytes,
        engines=built.engines,
        footprint=footprint_of(export, target, built.spec.dtype, built.weight_bytes, built.engines),
    )


def _packed(name: str, export: Export, folder: Path, target: str, precision: HostPrecision) -> TargetEntry:
    """What a model is on a target for which it is packed, into a folder of the target's name."""
    from engines.bundles.packed import pack_member

    packed = pack_member(name, export.folder, export.spec, folder / target, precision, target)
    return TargetEntry(
        spec=f"{target}/{SPEC_FILE}",
        dtype=packed.spec.dtype,
        stages=packed.spec.stages,
        ops=ops_served(export),
        weight_bytes=packed.weight_bytes,
        precision=precision,
        losses=packed.losses,
        footprint=footprint_of(export, target, packed.spec.dtype, packed.weight_bytes, {}),
    )


def _inside(folder: Path, name: str) -> Path:
    path = path_inside(folder, name)
    if path is None:
        raise UsageError(f"{folder}: {name!r} leaves the folder or is a symbolic link; export the checkpoint again")
    return path


def _has_engines(target: str) -> bool:
    return TARGETS[target].runs == "engines"


def _packed_as(target: str, precision: str | None) -> HostPrecision | None:
    """How a target's files are packed; None for the canonical ones."""
    return precision if precision in TARGETS[target].packed else None


def _computed_in(target: str, spec: ExportSpec, precision: str | None) -> FloatType:
    """bf16 where it is asked for and the target can choose, else what the export is in."""
    return "bfloat16" if precision == "bf16" and precision in TARGETS[target].precisions else spec.dtype


def _engine_options(targets: Sequence[str], engines: EngineOptions | None) -> EngineOptions | None:
    """Options for targets that have engines.

    Errors: UsageError for options that no target reads, BackendMissing for a target that cannot be built here.
    """
    if of_engines := [target for target in targets if _has_engines(target)]:
        from engines.trt.options import EngineOptions

        return (engines or EngineOptions()).checked(of_engines)
    if engines is not None:
        raise UsageError(
            f"the target {' or '.join(targets)} has no engines to build, so options of engines have no effect; "
            "leave them out"
        )
    return None


def _graph_precision(targets: Sequence[str], precision: str | None) -> str | None:
    """The precision of what runs graphs; UsageError for one that no target can choose."""
    if precision is None or any(precision in TARGETS[target].precisions for target in targets):
        return precision
    known = {target: TARGETS[target].precisions for target in targets if TARGETS[target].precisions}
    if not known:
        raise UsageError(
            f"the targets {', '.join(targets)} run the graphs as they are, so a precision has no effect; leave it out"
        )
    choices = "; ".join(f"{target}: {', '.join(precisions)}" for target, precisions in known.items())
    raise UsageError(f"precision {precision!r} is not one that these targets have; choose one of {choices}")


def _file(work: Path, path: str) -> FileEntry:
    whole, pieces = digests_of(work / path)
    return FileEntry(path=path, bytes=(work / path).stat().st_size, sha256=whole, pieces=pieces)


def _tools() -> dict[str, str]:
    found = {name: installed_version(name) for name in TOOLS}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def _in_words(how: str) -> str:
    return "a copy-on-write clone" if how == "clone" else "a plain copy"
