"""What was hashed once is not hashed again while it is the same file, and only then."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import notes
from engines.bundles import bundle as opening
from engines.bundles.bundle import open_bundle
from graphs.errors import BadArtefact
from tests.engines.bundle.conftest import edit_manifest
from tests.engines.bundle.test_open_bundle import flip, relist
from tests.hand_made import WEIGHTS


@pytest.fixture
def hashed(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of files as they are hashed; notes lie in a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(notes, "SETTLED", 0.0)
    names: list[str] = []
    digest = opening.sha256_of

    def noted(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(opening, "sha256_of", noted)
    return names


def opened_twice(bundle: Path, hashed: list[str]) -> None:
    open_bundle(bundle, check="used")
    assert WEIGHTS in hashed
    hashed.clear()
    open_bundle(bundle, check="used")
    assert hashed == []


def test_the_same_files_are_hashed_once(bundle: Path, hashed: list[str]) -> None:
    opened_twice(bundle, hashed)
    open_bundle(bundle, check="full")
    assert hashed.count(WEIGHTS) == 2, "who asks for a full check gets one"


def written_with_old_times(bundle: Path) -> None:
    path = bundle / "large" / WEIGHTS
    times = path.stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def renamed_into_its_place(bundle: Path) -> None:
    path, other = bundle / "small" / "decoder.onnx", bundle.parent / "other"
    shutil.copy2(path, other)
    flip(other)
    other.replace(path)


@pytest.mark.parametrize("change", [written_with_old_times, renamed_into_its_place])
def test_a_change_is_seen_whatever_the_times_say(
    bundle: Path, hashed: list[str], change: Callable[[Path], None]
) -> None:
    opened_twice(bundle, hashed)
    change(bundle)
    with pytest.raises(BadArtefact, match="was changed after the build"):
        open_bundle(bundle, check="used")


def test_another_manifest_is_another_bundle(bundle: Path, hashed: list[str]) -> None:
    opened_twice(bundle, hashed)
    edit_manifest(bundle, lambda document: document.update(threshold=0.5))
    open_bundle(bundle, check="used")
    assert WEIGHTS in hashed


def test_what_the_graphs_read_is_looked_at_again_with_them(bundle: Path, hashed: list[str]) -> None:
    opened_twice(bundle, hashed)
    decoder = bundle / "small" / "decoder.onnx"
    decoder.write_bytes(decoder.read_bytes().replace(WEIGHTS.encode(), b"/" * len(WEIGHTS)))
    relist(bundle, "small/decoder.onnx")
    with pytest.raises(BadArtefact, match="not a file of the bundle"):
        open_bundle(bundle, check="used")


def test_a_change_of_just_now_is_not_remembered(
    bundle: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "SETTLED", 3600.0)
    open_bundle(bundle, check="used")
    hashed.clear()
    open_bundle(bundle, check="used")
    assert WEIGHTS in hashed


def test_a_note_that_is_no_note_is_passed_over(bundle: Path, hashed: list[str], tmp_path: Path) -> None:
    opened_twice(bundle, hashed)
    notes = list((tmp_path / "cache").rglob("*.json"))
    assert len(notes) == 1
    notes[0].write_text("[]")
    open_bundle(bundle, check="used")
    assert WEIGHTS in hashed


def test_without_a_cache_every_opening_hashes(bundle: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    open_bundle(bundle, check="used")
    hashed.clear()
    open_bundle(bundle, check="used")
    assert WEIGHTS in hashed
