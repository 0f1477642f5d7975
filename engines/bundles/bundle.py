"""Opening a bundle: nothing of it is used before format, files, digests and paths are checked.

What the chosen target uses is hashed on opening (about 1.8 GB/s on one core, several files, and pieces of large ones,
in parallel), graphs and weights only where they are not the files that were hashed before
(``engines.bundles.remembered``); of the rest presence and size are checked.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from engines.bundles.manifest import MANIFEST_FILE, REBUILD, EngineEntry, EngineFile, FileEntry, Manifest, manifest_of
from engines.bundles.remembered import is_remembered, marks_of, remember
from engines.targets import choose
from graphs.console import say
from graphs.errors import BadArtefact
from graphs.files import path_inside, sha256_of, sha256_of_piece, unreadable
from graphs.spec import GOLDEN_FILE, ExportSpec, spec_from_folder

ENGINE_SUFFIX = ".engine"
HEAVY = (".safetensors", ENGINE_SUFFIX)  # what holds weights
THREADS = 4
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes, linux/limits.h

Engines: TypeAlias = Mapping[Path, EngineFile]  # engine file → what its session must know


@dataclass(frozen=True)
class Member:
    """One model of a bundle: the folder of its stages, what spec.json says there, and the manifest of its engines."""

    folder: Path
    spec: ExportSpec
    engines: Engines


@dataclass(frozen=True)
class Bundle:
    """An opened bundle on one of its targets; ``members`` has the keys small and large, or alone."""

    path: Path
    manifest: Manifest
    target: str
    members: dict[str, Member]

    @property
    def threshold(self) -> float:
        """The default exit threshold."""
        return self.manifest.threshold

    @property
    def engines(self) -> list[EngineEntry]:
        """The engines of all members for the target; none where it runs the graphs themselves."""
        return self.manifest.engines(self.target)


def open_bundle(path: Path | str, *, target: str | None = None, check: Literal["full", "used"] = "full") -> Bundle:
    """Open a bundle on a target, or raise BadArtefact with the reason and the command that mends it.

    target: this one and no other; None: the best that this machine can run, named on stderr where there is a choice.
    check: ``full`` hashes every file, ``used`` those that the target uses and that are not remembered. Errors:
    UsageError for a target that the bundle does not hold, BackendMissing with the reasons where it cannot be run here;
    both before a file is read.
    """
    path = Path(path)
    manifest = manifest_of(path)
    chosen, passed = choose({name: manifest.engines(name) for name in manifest.targets}, target, str(path))
    if len(manifest.targets) > 1 and target is None:
        why = "; ".join(f"not {name}: {reasons}" for name, reasons in passed.items())
        say(f"{path} runs on target {chosen}" + (f" ({why})" if why else ""))
    hashed = {file.path for file in manifest.files if check == "full" or _used(manifest, chosen, file.path)}
    marks = marks_of(path, hashed)
    known = check == "used" and not manifest.engines(chosen) and is_remembered(path, manifest, chosen, marks)
    check_files(path, manifest, () if known else hashed)
    members = _members(path, manifest, chosen)
    if not known:
        _check_external_data(path, members, hashed)
        if not manifest.engines(chosen):
            remember(path, manifest, chosen, marks, marks_of(path, hashed))
    return Bundle(path, manifest, chosen, members)


def checked_manifest(path: Path | str, check: Literal["full", "size"] = "full") -> Manifest:
    """The manifest of a bundle whose every target was checked as ``open_bundle`` does, whatever this machine can run.

    check: ``size`` trusts the sizes of weights and engines and hashes everything else. Errors: BadArtefact.
    """
    path = Path(path)
    manifest = manifest_of(path)
    files = {file.path for file in manifest.files}
    check_files(path, manifest, {file for file in files if check == "full" or not file.endswith(HEAVY)})
    for target in manifest.targets:
        _check_external_data(path, _members(path, manifest, target), files)
    return manifest


def _members(path: Path, manifest: Manifest, target: str) -> dict[str, Member]:
    """One target's members, as their spec.json says."""
    members: dict[str, Member] = {}
    for name, entry in manifest.members.items():
        folder = path_inside(path, entry.folder)
        spec_file = path_inside(path, f"{entry.folder}/{entry.targets[target].spec}")
        if folder is None or spec_file is None:
            raise BadArtefact(
                f"{path}: model {name} is recorded at {entry.folder!r}, outside the bundle; do not use it"
            )
        engines = {folder / file: said for file, said in manifest.engine_files(name, target).items()}
        members[name] = Member(folder, spec_from_folder(spec_file.parent), engines)
    if set(members) not in ({"small", "large"}, {"alone"}):
        raise BadArtefact(f"{path} holds {', '.join(members) or 'no model'}, not a pair or one model; {REBUILD}")
    return members


def _used(manifest: Manifest, target: str, file: str) -> bool:
    """Whether a target reads a file: a model's own engines, own files or shared graphs and weights, and all that is
    small or golden.
    """
    if not file.endswith(HEAVY):
        return True
    for member in manifest.members.values():
        inside, entry = file.removeprefix(f"{member.folder}/"), member.targets[target]
        if inside == file:
            continue
        if inside == GOLDEN_FILE:
            return True
        if entry.precision:
            return inside.startswith(f"{target}/")
        others = tuple(f"{name}/" for name in manifest.targets if name != target)
        return not inside.startswith(others) and (not entry.engines or inside.endswith(ENGINE_SUFFIX))
    return True


def check_files(path: Path, manifest: Manifest, hashed: Container[str]) -> None:
    """Exactly the files of the manifest are there, none through a link, each with its size, those ``hashed`` as built.

    Errors: BadArtefact, with the file and what does not hold.
    """
    for entry in manifest.files:
        if path_inside(path, entry.path) is None:
            why = "leaves the bundle or is a symbolic link"
            name = entry.path.encode("utf-8", "replace")
            if len(name) >= LONGEST_PATH or max(map(len, name.split(b"/"))) > LONGEST_NAME:
                why = "is too long for a file name"
            raise BadArtefact(f"{path}: the manifest's file {entry.path[:200]!r} {why}; do not use it, or {REBUILD}")
    found, listed = files_below(path), {entry.path for entry in manifest.files}
    if missing := sorted(listed - found):
        raise BadArtefact(f"{path}: {missing[0]} is missing{_and_more(missing)}; {REBUILD}")
    if extra := sorted(found - listed - {MANIFEST_FILE}):
        raise BadArtefact(f"{path}: {extra[0]} is not in the manifest{_and_more(extra)}; remove it or {REBUILD}")
    for entry in manifest.files:
        size = (path / entry.path).stat().st_size
        if size != entry.bytes:
            what = "truncated" if size < entry.bytes else "changed"
            raise BadArtefact(
                f"{path}: {entry.path} was {what}: it has {size} bytes, the manifest says {entry.bytes}; {REBUILD}"
            )
    entries = [entry for entry in manifest.files if entry.path in hashed]
    parts = [(entry, i) for entry in entries for i in (range(len(entry.pieces)) if entry.pieces else [None])]
    with ThreadPoolExecutor(THREADS) as pool:
        for (entry, i), digest in zip(parts, pool.map(lambda part: _digest(path, *part), parts), strict=True):
            if digest != (entry.sha256 if i is None else entry.pieces[i]):
                raise BadArtefact(
                    f"{path}: {entry.path} was changed after the build (its digest does not match); {REBUILD}"
                )


def files_below(folder: Path) -> set[str]:
    """Every file below a folder as a relative path; a symbolic link, even to a folder, counts as one."""
    found = set()
    for here, folders, names in os.walk(folder):
        links = [name for name in folders if Path(here, name).is_symlink()]
        found |= {Path(here, name).relative_to(folder).as_posix() for name in (*names, *links)}
    return found


def _digest(path: Path, entry: FileEntry, piece: int | None = None) -> str:
    try:
        return sha256_of(path / entry.path) if piece is None else sha256_of_piece(path / entry.path, piece)
    except OSError as e:
        raise unreadable(path / entry.path, e, REBUILD) from None


def _check_external_data(path: Path, members: dict[str, Member], readable: set[str]) -> None:
    """Nothing is opened that is not among the files ``readable``: engines and the files that graphs read."""
    from graphs.rules.rule import stage_from_folder
    from graphs.rules.tensors import constants_of

    for member in members.values():
        for name, interface in member.spec.stages.items():
            if not interface.file.endswith(".onnx"):
                if f"{member.folder.relative_to(path).as_posix()}/{interface.file}" not in readable:
                    raise BadArtefact(
                        f"{path}: stage {name} is recorded at {interface.file!r}, not a file of the bundle; "
                        f"do not use it, or {REBUILD}"
                    )
                continue  # an engine holds its weights
            stage = stage_from_folder(member.folder, member.spec, name)
            for location in {c.location for c in constants_of(stage) if c.location is not None}:
                at = path_inside(member.folder, (PurePosixPath(interface.file).parent / location).as_posix())
                if at is None or at.relative_to(path).as_posix() not in readable:
                    raise BadArtefact(
                        f"{member.folder / stage.interface.file} reads {location!r}, not a file of the bundle; "
                        f"do not use it, or {REBUILD}"
                    )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
