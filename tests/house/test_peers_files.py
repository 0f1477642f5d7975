"""What the benchmark beside peers makes on disk: plans of one retention at every depth, equal weights once."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.peers import making
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
        making.share_weights(tmp_path / "made", tmp_path / "checkpoint")
        making.share_weights(tmp_path / "checkpoint", tmp_path / "checkpoint")
    assert same.samefile(own)
    assert not other.samefile(own)
    assert [path.name for path in sorted((tmp_path / "made").rglob("*.*"))] == ["model.safetensors"] * 2
    assert (same.read_bytes(), other.read_bytes()) == (b"weights", b"narrow!")


def test_exports_go_with_the_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one they stay beside the systems, and are not made again."""
    ran = stood_in(monkeypatch)
    scratch, work = tmp_path / "scratch", tmp_path / "work"
    scratch.mkdir()
    for name in ("none", "none-int4"):
        assert making.made(name, work, "no shape", "python", scratch) == ""
        assert making.made(name, work, "no shape", "python", scratch) == ""
    assert [words[3] for words in ran] == ["export", "build"] * 2
    assert not list(scratch.iterdir())
    assert not (work / "none-export").exists()
    ran.clear()
    for name in ("none-int8", "none-openvino-int8"):
        assert making.made(name, work, "no shape", "python") == ""
    assert [words[3] for words in ran] == ["export", "build", "build"]
    assert (work / "none-export").is_dir()


def test_what_failed_on_the_way_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a build whose calibration failed is no bundle to measure."""
    monkeypatch.setitem(MADE, "pair", ("mkdir -p {work}/pair", "false"))
    for _ in range(2):
        assert making.made("pair", tmp_path, "no shape", "python") == "false failed: it said nothing"
    monkeypatch.setitem(MADE, "pair", ("mkdir {work}/pair", "true"))
    assert making.made("pair", tmp_path, "no shape", "python") == ""
    assert len(json.loads((tmp_path / "pair.seconds.json").read_text())) == 2


def test_another_source_makes_ours_again_and_leaves_a_peers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = stood_in(monkeypatch)
    monkeypatch.setitem(MADE, "peer", ("{python} convert -o {work}/peer",))
    for source in ("one", "one", "two"):
        monkeypatch.setattr(making, "of_code", lambda source=source: source)
        for name in ("peer", "none", "none-int8"):
            assert making.made(name, tmp_path, "no shape", "python") == ""
            # The second bundle's export is the first one's, and its seconds count for both.
            assert len(json.loads((tmp_path / f"{name}.seconds.json").read_text())) == len(MADE[name])
    kinds = [words[3] if "saccade" in words else words[1] for words in ran]
    assert kinds == ["convert", "export", "build", "build", "export", "build", "build"]
    told = [line for line in capsys.readouterr().err.splitlines() if "made again" in line]
    assert told == [f"{n} was made from another source; it is made again" for n in ("none", "none-export", "none-int8")]


def test_the_source_is_the_packages_python_and_the_plan(tmp_path: Path) -> None:
    alone, plan = MADE["none"], MADE["fastv"]
    assert making.source_of(MADE["genai-fp32"], tmp_path) == ""
    before = making.source_of(alone, tmp_path), making.source_of(plan, tmp_path)
    (tmp_path / "fastv.toml").write_text("another")
    assert making.source_of(alone, tmp_path) == before[0]
    assert making.source_of(plan, tmp_path) != before[1]


@pytest.mark.parametrize("name", [name for name in MADE if MADE[name] and "build" in MADE[name][-1]])
def test_every_bundle_makes_the_exports_it_is_built_from(name: str) -> None:
    words = [command.split() for command in MADE[name]]
    made = {command[command.index("-o") + 1] for command in words if command[1] == "export"}
    built = next(command for command in words if command[1] == "build")
    assert {word for word in built if word.startswith("{exports}")} == made


def stood_in(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands make their folder and nothing else; the list of those that ran."""
    ran: list[list[str]] = []

    def run(words: list[str], **_: object) -> SimpleNamespace:
        ran.append(words)
        Path(words[words.index("-o") + 1]).mkdir()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(making.subprocess, "run", run)
    return ran


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
