"""A float16 checkpoint of every family is exported as float16 and replays within float16's tolerance."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.golden import replay
from exporter.export import export_checkpoint
from tests.families.cases import CASES
from tests.families.conftest import PLAN


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_golden_tensors_replay(name: str, tmp_path: Path) -> None:
    checkpoint = CASES[name].checkpoint(tmp_path / "checkpoint", dtype="float16")
    spec = export_checkpoint(checkpoint, tmp_path / "export", plan=PLAN, role="alone")
    assert spec.dtype == "float16"
    replays = list(replay(tmp_path / "export", spec))
    assert {r.stage for r in replays} == {"vision", "embed", "decoder"}
    assert all(r.overlap in (None, 1.0) for r in replays)
