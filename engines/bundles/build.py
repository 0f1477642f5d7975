"""One or two exports → a bundle for targets: check that they fit, copy, build, digest, write the manifest last."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.bundles.bundle import files_below
from engines.bundles.footprint import footprint_of
from engines.bundles.given import exports_in
from engines.bundles.jobs import BuiltMember, Job, resolved
from engines.bundles.manifest import MANIFEST_FILE, FileEntry, Manifest, MemberEntry, Served, TargetEntry
from engines.bundles.pair import Source, members_from_sources, prunes_nothing
from engines.targets import TARGETS
from graphs.console import say, step, warn
from graphs.errors import UsageError
from graphs.files import atomic_folder, clone_or_copy, digests_of, path_inside, refuse_overlap
from graphs.ops import DOMAIN
from graphs.rules import Export, refuse_findings
from graphs.rules.rule import nodes_of
from graphs.spec import GOLDEN_FILE, PROCESSOR_FOLDER, SPEC_FILE, ExportSpec
from graphs.versions import installed_version

if TYPE_CHECKING:
    from engines.trt.options import EngineOptions

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
    """Build a bundle from one export, from a small and a large one in any order, or from a bundle; return its manifest.

    folders: the exports, or a bundle alone that holds canonical graphs, which brings its threshold.
    target: one of ``engines.targets.TABLE``, or several: those that run graphs share the stages, engines lie beside.
    threshold: the score S above which the small model's answer stands, in [0, 1]. overwrite: replace an
    older bundle at ``out``. engines: how engines are built (``engines.trt.options.EngineOptions``).
    precision: of a target that has ``precisions``. fp32, int8 or int4 for cpu, int8 or int4 for openvino: files of its
    own, packed for it, int8 and int4 with the error they cost in the manifest; bf16 or fp32 for openvino, which
    computes the same graphs in it, or of an fp16 export files of its own, in fp32; None: the canonical graphs in the
    export's own.
    Errors: BadArtefact for an export that breaks a rule, UsageError for a pair that does not fit, BackendMissing where
    what quantised files are measured with is not installed, OperationFailed for a full disk or a failed build; nothing
    is left under the final name then.
    """
    jobs = resolved(target, precision, engines)
    if threshold is not None and not 0 <= threshold <= 1:
        raise UsageError(f"threshold is {threshold:g}, but must lie in [0, 1]; 1 never exits early, 0 always")
    for folder in folders:
        what = "the bundle" if (Path(folder) / MANIFEST_FILE).is_file() else "the export"
        refuse_overlap(Path(out), Path(folder), f"{what} {folder}")
    sources, brought = exports_in([Path(folder) for folder in folders])
    chosen = next(value for value in (threshold, brought, DEFAULT_THRESHOLD) if value is not None)
    if brought is not None and threshold is None:
        say(f"the threshold of {folders[0]}, {brought:g}, is kept")
    with step("checking the exports"):
        exports = [refuse_findings(source) for source in sources]
        by_folder = {export.folder: export for export in exports}
        members = members_from_sources([Source(export.folder, export.spec) for export in exports])
    if threshold is not None and "alone" in members:
        raise UsageError("a bundle of one model has no early exit, so a threshold has no effect; leave it out")
    for name, source in members.items():
        if name != "small" and prunes_nothing(source.spec):
            warn(f"the {name} model prunes nothing, as its plan {source.spec.plan.name} asks")
    with atomic_folder(Path(out), overwrite, holds=MANIFEST_FILE) as work:
        entries = {name: _member(name, by_folder[source.folder], work / name, jobs) for name, source in members.items()}
        with step("computing digests"):
            manifest = Manifest(
                schema="saccade.bundle/1",
                created_by=f"saccade {installed_version('saccade') or '0+source'}",
                tools=_tools(),
                targets=tuple(job.target for job in jobs),
                threshold=chosen,
                members=entries,  # type: ignore[arg-type]
                files=tuple(_file(work, path) for path in sorted(files_below(work))),
            ).signed()
        (work / MANIFEST_FILE).write_text(manifest.dumps(), "utf-8")
    return manifest


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


def _member(name: str, export: Export, folder: Path, jobs: Sequence[Job]) -> MemberEntry:
    """One model in the new folder ``folder``, for every target."""
    spec = export.spec
    folder.mkdir()
    with step(f"copying the {name} model"):
        copy_shared(export.folder, folder)
        how = copy_graphs(export.folder, spec, folder) if any(job.shares(spec) for job in jobs) else ""
    if how:
        say(f"{name}: {_in_words(how)} of {export.folder}")
    on = {job.target: _target(name, export, folder, job) for job in jobs}
    same = {k: getattr(spec, k) for k in ("family", "architecture", "role", "plan", "language", "grid")}
    return MemberEntry(folder=name, targets=on, **same)


def _target(name: str, export: Export, folder: Path, job: Job) -> TargetEntry:
    """What a model is on one target, made in its folder; its spec.json is the export's where it is the same."""
    made = _made(name, export, folder / job.target, job)
    return TargetEntry(
        spec=SPEC_FILE if made.spec == export.spec else f"{job.target}/{SPEC_FILE}",
        dtype=made.spec.dtype,
        stages=made.spec.stages,
        ops=ops_served(export) if made.ops is None else made.ops,
        weight_bytes=made.weight_bytes,
        engines=made.engines,
        precision=made.precision,
        losses=made.losses,
        footprint=footprint_of(export, job.target, made.spec.dtype, made.weight_bytes, made.engines),
    )


def _made(name: str, export: Export, out: Path, job: Job) -> BuiltMember:
    """Do a job; what a target has of its own lies in the new folder ``out``, which lies in the model's."""
    source, spec = export.folder, export.spec
    if job.engines:
        from engines.trt.flavour import FLAVOURS
        from engines.trt.member import build_member

        return build_member(name, source, spec, out, job.engines, FLAVOURS[job.target])
    if packed := job.packed_from(spec):
        from engines.bundles.packed import pack_member

        return pack_member(name, source, spec, out, packed, job.target, job.dtype)
    if TARGETS[job.target].memory == "host" and spec.dtype == "float16":
        choices = ", ".join(TARGETS[job.target].precisions)
        say(
            f"{name} on {job.target}: its fp16 weights are converted to fp32 whenever the bundle is opened, which "
            f"takes time and memory; --precision (for {job.target} one of {choices}) does that once, now"
        )
    own = spec.model_copy(update={"dtype": job.dtype or spec.dtype})
    if own != spec:
        out.mkdir()
        (out / SPEC_FILE).write_text(own.dumps(), "utf-8")
    return BuiltMember(own, spec.weight_bytes)


def _inside(folder: Path, name: str) -> Path:
    path = path_inside(folder, name)
    if path is None:
        raise UsageError(f"{folder}: {name!r} leaves the folder or is a symbolic link; export the checkpoint again")
    return path


def _file(work: Path, path: str) -> FileEntry:
    whole, pieces = digests_of(work / path)
    return FileEntry(path=path, bytes=(work / path).stat().st_size, sha256=whole, pieces=pieces)


def _tools() -> dict[str, str]:
    found = {name: installed_version(name) for name in TOOLS}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def _in_words(how: str) -> str:
    return "a copy-on-write clone" if how == "clone" else "a plain copy"
