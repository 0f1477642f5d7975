"""One or two exports → a bundle for a target: check that they fit, copy, digest, write the manifest last."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.bundle import files_below
from engines.manifest import MANIFEST_FILE, EngineEntry, FileEntry, Manifest, MemberEntry, Served
from engines.pair import Source, members_from_sources, prunes_nothing
from graphs.errors import UsageError
from graphs.files import atomic_folder, clone_or_copy, path_inside, sha256_of
from graphs.ops import DOMAIN
from graphs.rules import Export, refuse_findings
from graphs.rules.rule import nodes_of
from graphs.spec import GOLDEN_FILE, PROCESSOR_FOLDER, SPEC_FILE, ExportSpec
from graphs.talk import say, step, warn
from graphs.versions import installed_version

if TYPE_CHECKING:
    from engines.trt.member import EngineOptions

TARGETS = ("cpu", "cuda", "ort-tensorrt", "ort-rtx", "rtx")
DEFAULT_THRESHOLD = 0.9  # none is published; ``calibrate`` finds one for a wanted agreement
TOOLS = ("saccade", "onnx", "onnxruntime", "tensorrt-rtx", "transformers", "numpy")


def build_bundle(
    folders: Sequence[Path | str],
    out: Path | str,
    *,
    target: str = "cpu",
    threshold: float | None = None,
    overwrite: bool = False,
    engines: EngineOptions | None = None,
) -> Manifest:
    """Build a bundle from one export, or from a small and a large one in any order; return its manifest.

    threshold: the score S above which the small model's answer stands, in [0, 1]. overwrite: replace an
    older bundle at ``out``. engines: how a target's engines are built (``engines.trt.member.EngineOptions``), for rtx.
    Errors: BadArtefact for an export that breaks a rule, UsageError for a pair that does not fit,
    OperationFailed for a full disk or a failed build; nothing is left under the final name then.
    """
    if target not in TARGETS:
        raise UsageError(f"target {target!r} cannot be built for here; known are {', '.join(TARGETS)}")
    options = _engine_options(target, engines)
    chosen = DEFAULT_THRESHOLD if threshold is None else threshold
    if not 0 <= chosen <= 1:
        raise UsageError(f"threshold is {chosen:g}, but must lie in [0, 1]; 1 never exits early, 0 always")
    with step("checking the exports"):
        exports = [refuse_findings(Path(folder)) for folder in folders]
        by_folder = {export.folder: export for export in exports}
        members = members_from_sources([Source(export.folder, export.spec) for export in exports])
    for name, source in members.items():
        if name != "small" and prunes_nothing(source.spec):
            warn(f"the {name} model prunes nothing, as its plan {source.spec.plan.name} asks")
    with atomic_folder(Path(out), overwrite, holds=MANIFEST_FILE) as work:
        entries: dict[str, MemberEntry] = {}
        for name, source in members.items():
            if options:
                from engines.trt.member import build_member

                built = build_member(name, source.folder, source.spec, work / name, options)
                entries[name] = _entry(name, built.spec, built.ops, built.weight_bytes, built.engines)
                continue
            with step(f"copying the {name} model"):
                how = copy_export(source, work / name)
            say(f"{name}: {_in_words(how)} of {source.folder}")
            export = by_folder[source.folder]
            weight_bytes = sum(weight.bytes for weight in source.spec.weights)
            entries[name] = _entry(name, source.spec, ops_served(export), weight_bytes)
        with step("computing digests"):
            manifest = Manifest(
                schema="saccade.bundle/1",
                created_by=f"saccade {installed_version('saccade') or '0+source'}",
                tools=_tools(),
                target=target,
                threshold=chosen,
                members=entries,  # type: ignore[arg-type]
                files=tuple(_file(work, path) for path in sorted(files_below(work))),
            ).signed()
        (work / MANIFEST_FILE).write_text(manifest.dumps(), "utf-8")
    return manifest


def copy_export(source: Source, folder: Path) -> str:
    """Copy what spec.json names, each weight file once; returns how: clone or copy."""
    folder.mkdir()
    names = [SPEC_FILE, GOLDEN_FILE, *(stage.file for stage in source.spec.stages.values())]
    how = "clone"
    for name in (*names, *(weight.name for weight in source.spec.weights)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if clone_or_copy(_inside(source.folder, name), folder / name) == "copy":
            how = "copy"
    processor = _inside(source.folder, PROCESSOR_FOLDER)
    if not processor.is_dir():
        raise UsageError(f"{processor} is missing; export the checkpoint again")
    shutil.copytree(processor, folder / PROCESSOR_FOLDER, copy_function=shutil.copyfile)
    return how


def ops_served(export: Export) -> dict[str, Served]:
    """Each op of ours in an export, and what serves it; on the CPU always its body."""
    graphs = [stage.model.graph for stage in export.stages.values()]
    used = {node.op_type for graph in graphs for node in nodes_of(graph) if node.domain == DOMAIN}
    return dict.fromkeys(sorted(used), "body")


def _inside(folder: Path, name: str) -> Path:
    path = path_inside(folder, name)
    if path is None:
        raise UsageError(f"{folder}: {name!r} leaves the folder or is a symbolic link; export the checkpoint again")
    return path


def _engine_options(target: str, engines: EngineOptions | None) -> EngineOptions | None:
    """Options for a target that has engines; UsageError for options that the target does not read."""
    if target == "rtx":
        from engines.trt.member import EngineOptions

        return (engines or EngineOptions()).checked()
    if engines is not None:
        raise UsageError(
            f"the target {target} has no engines to build, so options of engines do nothing; leave them out"
        )
    return None


def _entry(
    name: str,
    spec: ExportSpec,
    ops: dict[str, Served],
    weight_bytes: int,
    engines: dict[str, EngineEntry] | None = None,
) -> MemberEntry:
    same = {
        k: getattr(spec, k) for k in ("family", "architecture", "role", "dtype", "plan", "language", "grid", "stages")
    }
    return MemberEntry(folder=name, ops=ops, weight_bytes=weight_bytes, engines=engines or {}, **same)


def _file(work: Path, path: str) -> FileEntry:
    return FileEntry(path=path, bytes=(work / path).stat().st_size, sha256=sha256_of(work / path))


def _tools() -> dict[str, str]:
    found = {name: installed_version(name) for name in TOOLS}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def _in_words(how: str) -> str:
    return "a copy-on-write clone" if how == "clone" else "a plain copy"
