from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.cascade import Cascade
from engines.sessions.ort_session import OrtSession
from engines.targets import TARGETS
from graphs.errors import BadArtefact, OutOfBounds
from graphs.spec import GOLDEN_FILE, STAGES
from saccade import SHOWS
from tests.engines.run.conftest import IMAGE_SIZE, TinyPair, picture_of

QUESTION = "what colour is the 3 ?"
Cli = Callable[..., object]


def test_run_prints_the_answer_alone(saccade_cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    told = saccade_cli("run", tiny_bundle, "--image", image_file, QUESTION, "--max-new-tokens", 4, "--threshold", 0)
    wanted = Cascade.open(tiny_bundle).ask(image_file, QUESTION, threshold=0, max_new_tokens=4)
    assert (told.code, told.stdout) == (0, wanted.text + "\n")


def test_run_json_is_one_document_with_everything(saccade_cli: Cli, tiny_bundle: Path, image_file: Path) -> None:
    told = saccade_cli(
        "run", tiny_bundle, "--image", image_file, QUESTION, "--json", "--keep", 0.25, "--threshold", 1,
        "--max-new-tokens", 4, "--target", "cpu", "--threads", 1,
    )  # fmt: skip
    assert told.code == 0, told.stderr
    document = json.loads(told.stdout)
    assert document["schema"] == "saccade.answer/1"
    assert (document["model"], document["exited"], document["keep"]) == ("large", False, [0.25])
    assert document["score"] == pytest.approx(0.5 * (document["confidence"] + document["consistency"]))
    assert len(document["kept"][0]) == 16
    assert len(document["guidance"]) == document["visual_tokens"] == 64
    assert document["average_retention"] == pytest.approx((1 + 2 * 0.25) / 3)
    assert document["new_tokens"] == len(document["tokens"]) <= 4
    times = document["milliseconds"]
    stages = ("open", "prepare", "vision", "embed", "prefill", "decode")
    assert set(times) == {f"{m}_{s}" for m in ("small", "large") for s in stages} | {
        "small_guidance",
        "small_consistency",
        "total",
    }
    assert times["total"] == pytest.approx(sum(v for k, v in times.items() if k != "total"), abs=0.01)


def test_preload_opens_every_model_before_the_first_question(
    saccade_cli: Cli, tiny_bundle: Path, calls: list[Path]
) -> None:
    every = {tiny_bundle / role / f"{stage}.onnx" for role in ("small", "large") for stage in STAGES}
    Cascade.open(tiny_bundle)
    assert calls == []
    Cascade.open(tiny_bundle, preload=True)
    assert (len(calls), set(calls)) == (6, every)
    calls.clear()
    told = saccade_cli("run", tiny_bundle, QUESTION, "--preload", "--threshold", 0, "--max-new-tokens", 1)
    assert told.code == 0, told.stderr
    assert (len(calls), set(calls)) == (6, every)
    assert "opening the large model" in told.stderr
    assert "running the large model once" in told.stderr


def test_preload_runs_every_stage_before_the_first_question(
    tiny_bundle: Path, image_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = OrtSession.run

    def noted(self: OrtSession, *args: Any, **named: Any) -> dict[str, Any]:
        ran.append(self._file.stem)
        return run(self, *args, **named)

    plain = Cascade.open(tiny_bundle).ask(image_file, QUESTION, threshold=1, max_new_tokens=4)
    monkeypatch.setattr(OrtSession, "run", noted)
    opened = Cascade.open(tiny_bundle)
    opened.preload(runs=False)
    assert ran == []
    opened.preload()
    assert set(ran) == set(STAGES)
    assert opened.ask(image_file, QUESTION, threshold=1, max_new_tokens=4).tokens == plain.tokens


def test_preload_needs_golden_tensors(tiny_pair: TinyPair, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(tiny_pair.exports["small"], folder)
    (folder / GOLDEN_FILE).unlink()
    opened = Cascade.from_exports(folder)
    opened.preload(runs=False)
    with pytest.raises(BadArtefact, match=GOLDEN_FILE):
        opened.preload()


def test_what_cannot_be_run_ahead_is_said_and_left_out(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As engines are built for bounds that the golden tensors may lie outside of."""
    ran: list[str] = []

    def narrow(self: OrtSession, *_: Any, **__: Any) -> dict[str, Any]:
        ran.append(self._file.stem)
        raise OutOfBounds("the engine takes less")

    monkeypatch.setattr(OrtSession, "run", narrow)
    Cascade.open(tiny_bundle, preload=True)
    assert set(ran) == set(STAGES)
    assert "vision was not run ahead (the engine takes less)" in capsys.readouterr().err


def test_what_compiles_for_the_sizes_it_meets_is_not_run_ahead(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TARGETS, "cpu", replace(TARGETS["cpu"], runs_ahead=False))
    Cascade.open(tiny_bundle, preload=True)
    assert "once" not in capsys.readouterr().err
    assert [name for name, target in TARGETS.items() if not target.runs_ahead] == ["ort-tensorrt", "ort-rtx", "cpu"]


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("much", "is neither a number"),
        ("0.5,", "is neither a number"),
        ("0.5,0.25", "2 keep ratios were given"),
        ("0", "(0, 1]"),
    ],
)
def test_keep_is_a_share_per_prune_point(
    saccade_cli: Cli, tiny_bundle: Path, image_file: Path, keep: str, said: str
) -> None:
    told = saccade_cli("run", tiny_bundle, "--image", image_file, QUESTION, "--keep", keep)
    assert told.code == 2
    assert said in told.stderr


def test_show_kept_draws_both_panels(saccade_cli: Cli, tiny_bundle: Path, image_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "kept.png"
    told = saccade_cli(
        "show", "kept", tiny_bundle, "--image", image_file, QUESTION, "-o", out, "--keep", 0.25, "--max-new-tokens", 2
    )
    assert (told.code, told.stdout.strip()) == (0, str(out)), told.stderr
    with Image.open(out) as page:
        assert page.width > 2 * 480
        left = np.asarray(page.crop((16, 16, 16 + 512, 16 + 512)))
    answer = Cascade.open(tiny_bundle).ask(image_file, QUESTION, keep=0.25, threshold=1, max_new_tokens=2)
    assert answer.kept is not None
    bright = left.reshape(8, 64, 8, 64, 3).mean((1, 3, 4)).reshape(-1)
    assert sorted(np.argsort(-bright)[:16].tolist()) == answer.kept[0].tolist()
    assert [p.name for p in out.parent.iterdir()] == ["kept.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--keep", "0"), 2, "(0, 1]"),
        (("--keep", "1.5"), 2, "(0, 1]"),
        (("--keep", "nan"), 2, "(0, 1]"),
        (("--threshold", "2"), 2, "[0, 1]"),
        (("--threshold", "nan"), 2, "[0, 1]"),
        (("--max-new-tokens", "0"), 2, "at least 1"),
        (("--threads", "0"), 2, "at least 1"),
        (("--target", "rtx"), 2, "rtx"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    saccade_cli: Cli, tiny_bundle: Path, image_file: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    told = saccade_cli("run", tiny_bundle, "--image", image_file, QUESTION, *arguments)
    assert told.code == code
    assert told.stdout == ""
    assert words in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1


def test_a_picture_is_not_written_under_another_name(
    saccade_cli: Cli, tiny_bundle: Path, image_file: Path, tmp_path: Path
) -> None:
    told = saccade_cli("show", "kept", tiny_bundle, "--image", image_file, QUESTION, "-o", tmp_path / "kept.jpg")
    assert told.code == 2
    assert not (tmp_path / "kept.jpg").exists()


def test_a_full_disk_leaves_no_picture(
    saccade_cli: Cli, tiny_bundle: Path, image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    out = tmp_path / "pictures" / "kept.png"
    told = saccade_cli("show", "kept", tiny_bundle, "--image", image_file, QUESTION, "-o", out, "--max-new-tokens", 1)
    assert told.code == 1
    assert "disk is full" in told.stderr
    assert list(out.parent.iterdir()) == []


def test_show_help_lists_every_subcommand(saccade_cli: Cli) -> None:
    told = saccade_cli("show", "--help")
    assert told.code == 0
    assert all(f"  {name} " in told.stdout for name in SHOWS)


def test_members_alone_answer(tiny_pair: TinyPair) -> None:
    small = Cascade.from_exports(tiny_pair.exports["small"], threads=1)
    answer = small.ask(picture_of(0), QUESTION, max_new_tokens=3)
    assert (answer.model, answer.exited, answer.kept) == ("small", None, None)
    assert answer.score is not None
    assert answer.guidance is not None
    alone = Cascade.from_exports(tiny_pair.exports["alone"], threads=1).ask(picture_of(0), QUESTION, max_new_tokens=3)
    assert (alone.model, alone.keep, alone.score) == ("alone", (0.25,), None)
    assert IMAGE_SIZE == 64
