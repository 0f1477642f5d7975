"""What the benchmark beside peers makes on disk: plans of one retention at every depth, equal weights once."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.peers import process
from benchmarks.peers.systems import MADE, plans
from benchmarks.shapes import LAYERS


@pytest.mark.parametrize("layers", sorted(set(LAYERS.values())))
@pytest.mark.parametrize("name", ["fastv", "star"])
def test_a_plan_keeps_nine_percent_on_average(layers: int, name: str) -> None:
    kept, begin, total = 1.0, 0, 0.0
    for point in tomllib.loads(plans(layers)[name])["point"]:
        at = 0 if point["where"] == "vision" else point["where"]
        total += kept * (at - begin)
        kept, begin = point["keep"], at
    assert (total + kept * (layers - begin)) / layers == pytest.approx(0.09, abs=0.005)


def test_a_repeated_weight_file_is_there_once(tmp_path: Path) -> None:
    """Files of the same name and other bytes, and files of other names, stay as they are."""
    own = written(tmp_path / "checkpoint" / "model.safetensors", b"weights")
    same = written(tmp_path / "made" / "alone" / "model.safetensors", b"weights")
    other = written(tmp_path / "made" / "cpu" / "model.safetensors", b"narrow!")
    for _ in range(2):
        process.share_weights(tmp_path / "made", tmp_path / "checkpoint")
        process.share_weights(tmp_path / "checkpoint", tmp_path / "checkpoint")
    assert same.samefile(own)
    assert not other.samefile(own)
    assert [path.name for path in sorted((tmp_path / "made").rglob("*.*"))] == ["model.safetensors"] * 2
    assert (same.read_bytes(), other.read_bytes()) == (b"weights", b"narrow!")


def test_exports_go_with_the_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one they stay beside the systems, and are not made again."""
    ran: list[list[str]] = []

    def run(words: list[str], **_: object) -> SimpleNamespace:
        ran.append(words)
        Path(words[words.index("-o") + 1]).mkdir()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(process.subprocess, "run", run)
    scratch, work = tmp_path / "scratch", tmp_path / "work"
    scratch.mkdir()
    for name in ("none", "none-int4"):
        assert process.made(name, work, "no shape", "python", scratch) == ""
        assert process.made(name, work, "no shape", "python", scratch) == ""
    assert [words[3] for words in ran] == ["export", "build"] * 2
    assert not list(scratch.iterdir())
    assert not (work / "none-export").exists()
    ran.clear()
    for name in ("none-int8", "none-openvino-int8"):
        assert process.made(name, work, "no shape", "python") == ""
    assert [words[3] for words in ran] == ["export", "build", "build"]
    assert (work / "none-export").is_dir()


@pytest.mark.parametrize("name", [name for name in MADE if MADE[name] and "build" in MADE[name][-1]])
def test_every_bundle_makes_the_exports_it_is_built_from(name: str) -> None:
    words = [command.split() for command in MADE[name]]
    made = {command[command.index("-o") + 1] for command in words if command[1] == "export"}
    built = next(command for command in words if command[1] == "build")
    assert {word for word in built if word.startswith("{exports}")} == made


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
