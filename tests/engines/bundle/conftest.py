"""A hand-made pair, its bundle, and copies of it to break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.bundles.build import build_bundle
from engines.bundles.manifest import MANIFEST_FILE, digest_of
from tests.hand_made import write_export


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One export per role, and a large one that prunes nothing."""
    home = tmp_path_factory.mktemp("exports")
    made = {role: write_export(home / role, role, seed=i) for i, role in enumerate(("small", "large", "alone"))}
    return made | {"unpruned": write_export(home / "unpruned", "large", "none", seed=1)}


@pytest.fixture(scope="session")
def pair(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of small and large; not to be written to."""
    out = tmp_path_factory.mktemp("bundles") / "pair.bundle"
    build_bundle([exports["small"], exports["large"]], out)
    return out


@pytest.fixture
def bundle(pair: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may break."""
    return Path(shutil.copytree(pair, tmp_path / "pair.bundle"))


@pytest.fixture
def copy_of(exports: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of an export that a test may break."""
    return lambda role: Path(shutil.copytree(exports[role], tmp_path / role))


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Change a manifest in place, as someone would who knows how to sign it."""
    path = bundle / MANIFEST_FILE
    document = json.loads(path.read_text())
    change(document)
    if sign:
        document["sha256"] = digest_of(document)
    path.write_text(json.dumps(document))
