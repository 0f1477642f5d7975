"""Progress goes to stderr, the document to stdout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graphs import console


def test_a_document_is_one_line_of_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"path": Path("a/b"), "score": np.float32(0.5), "kept": np.array([1, 2]), "text": "é"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "a/b", "score": 0.5, "kept": [1, 2], "text": "é"}
    assert (out.count("\n"), err) == (1, "")


def test_a_number_json_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match="JSON"):
        console.emit_json({"score": float("nan")})


def test_in_a_log_a_step_is_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(console.track([1, 2], "asking")) == [1, 2]
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert (out, first) == ("", "asking …")
    assert last.startswith("asking: done in ")


def test_a_long_step_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    list(console.track([1, 2], "asking"))
    assert "asking: 1 of 2, about 0 s left\n" in capsys.readouterr().err


def test_on_a_terminal_a_bar_is_drawn_and_closed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with console.step("exporting", 2) as step:
        step.note("vision")
        step.advance(2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "exporting: done in " in err


def test_a_step_that_fails_does_not_claim_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), console.step("exporting"):
        raise ZeroDivisionError
    assert "done" not in capsys.readouterr().err
