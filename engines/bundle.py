"""Opening a bundle: nothing of it is used before format, files, digests and paths are checked.

All files are hashed on opening (about 1.5 GB/s on one core, several in parallel). ``check="size"``
trusts the weights' sizes and hashes everything else, for a bundle that was opened fully before.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engines.manifest import MANIFEST_FILE, REBUILD, EngineEntry, FileEntry, Manifest, manifest_of
from graphs.errors import BadArtefact, UsageError
from graphs.files import path_inside, sha256_of, unreadable
from graphs.rules.rule import stage_from_folder
from graphs.rules.tensors import constants_of
from graphs.spec import ExportSpec, spec_from_folder

WEIGHT_SUFFIX = ".safetensors"
THREADS = 4


@dataclass(frozen=True)
class Member:
    """One model of a bundle: the folder of its stages and what spec.json says there."""

    folder: Path
    spec: ExportSpec


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; ``members`` has the keys small and large, or alone."""

    path: Path
    manifest: Manifest
    members: dict[str, Member]

    @property
    def threshold(self) -> float:
        """The default exit threshold."""
        return self.manifest.threshold

    @property
    def engines(self) -> list[EngineEntry]:
        """The engines of all members; none for a target that runs the graphs themselves."""
        return [engine for member in self.manifest.members.values() for engine in member.engines.values()]

    @property
    def target(self) -> str:
        """What the bundle was built for."""
        return self.manifest.target


def open_bundle(path: Path | str, *, target: str | None = None, check: Literal["full", "size"] = "full") -> Bundle:
    """Open a bundle, or raise BadArtefact with the reason and the command that mends it.

    target: refuse (UsageError) a bundle built for another one. check: ``size`` skips hashing the weights.
    """
    path = Path(path)
    manifest = manifest_of(path)
    if target is not None and target != manifest.target:
        raise UsageError(
            f"{path} was built for target {manifest.target}, not {target}; "
            f"{REBUILD} SMALL LARGE -o OTHER --target {target}"
        )
    _check_files(path, manifest, hash_weights=check == "full")
    members: dict[str, Member] = {}
    for name, entry in manifest.members.items():
        folder = path_inside(path, entry.folder)
        if folder is None:
            raise BadArtefact(f"{path}: model {name} lies at {entry.folder!r}, outside the bundle; do not use it")
        members[name] = Member(folder, spec_from_folder(folder))
    bundle = Bundle(path, manifest, members)
    _check_roles(bundle)
    _check_external_data(bundle)
    return bundle


def _check_files(path: Path, manifest: Manifest, *, hash_weights: bool) -> None:
    """Exactly the files of the manifest are there, none through a link, each with its size and digest."""
    if not all(path_inside(path, entry.path) for entry in manifest.files):
        escaping = next(entry.path for entry in manifest.files if not path_inside(path, entry.path))
        raise BadArtefact(
            f"{path}: the manifest's file {escaping!r} leaves the bundle or is a symbolic link; "
            f"do not use it, or {REBUILD}"
        )
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
    hashed = [e for e in manifest.files if hash_weights or not e.path.endswith(WEIGHT_SUFFIX)]
    with ThreadPoolExecutor(THREADS) as pool:
        for entry, digest in zip(hashed, pool.map(lambda e: _digest(path, e), hashed), strict=True):
            if digest != entry.sha256:
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


def _digest(path: Path, entry: FileEntry) -> str:
    try:
        return sha256_of(path / entry.path)
    except OSError as e:
        raise unreadable(path / entry.path, e, REBUILD) from None


def _check_roles(bundle: Bundle) -> None:
    if set(bundle.members) not in ({"small", "large"}, {"alone"}):
        raise BadArtefact(
            f"{bundle.path} holds {', '.join(bundle.members) or 'no model'}, not a pair or one; {REBUILD}"
        )


def _check_external_data(bundle: Bundle) -> None:
    """The graphs read no file that the manifest does not list."""
    listed = {entry.path for entry in bundle.manifest.files}
    for member in bundle.members.values():
        for name in member.spec.stages:
            if not member.spec.stages[name].file.endswith(".onnx"):
                continue  # an engine holds its weights
            stage = stage_from_folder(member.folder, member.spec, name)
            for location in {c.location for c in constants_of(stage) if c.location is not None}:
                at = path_inside(member.folder, location)
                if at is None or at.relative_to(bundle.path).as_posix() not in listed:
                    raise BadArtefact(
                        f"{member.folder / stage.interface.file} reads {location!r}, which is no file of the bundle; "
                        f"do not use it, or {REBUILD}"
                    )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
