"""Opening a model ahead of its first question: stages side by side, and the first failure in their order told."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

import engines.model
from engines.model import Model
from engines.sessions.session import open_session
from graphs.errors import BadArtefact
from graphs.spec import spec_from_folder
from tests.engines.run.conftest import TinyPair


def test_two_stages_are_opened_side_by_side(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one core too: what no other thread has begun is opened by the one that waits."""
    model = tiny_pair.model("small")
    both_there, begun = Barrier(2, timeout=60), count()

    def opened(*arguments: Any, **options: Any) -> Any:
        if next(begun) < 2:
            both_there.wait()
        return open_session(*arguments, **options)

    monkeypatch.setattr(engines.model, "open_session", opened)
    model.open()
    assert model.opened == set(model.spec.stages)
    assert next(begun) == len(model.spec.stages), "each of them once"


def test_a_broken_stage_is_told_before_a_broken_processor(tiny_pair: TinyPair, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_pair.exports["small"], tmp_path / "export")
    spec = spec_from_folder(folder)
    (folder / "processor" / "tokenizer.json").write_text("no tokenizer")
    with pytest.raises(BadArtefact, match="AutoTokenizer cannot read"):
        Model(folder, spec).open()
    (folder / spec.stages["decoder"].file).write_bytes(b"no graph")
    with pytest.raises(BadArtefact, match=r"ONNX Runtime cannot open .*decoder\.onnx"):
        Model(folder, spec).open()


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_of_several_broken_stages_the_first_is_told(tiny_pair: TinyPair, tmp_path: Path, target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    folder = shutil.copytree(tiny_pair.exports["small"], tmp_path / "export")
    spec = spec_from_folder(folder)
    stages = list(spec.stages)
    for stage in stages[1:]:
        (folder / spec.stages[stage].file).write_bytes(b"no graph")
    with pytest.raises(BadArtefact) as alone:
        Model(folder, spec, target).session(stages[1])
    model = Model(folder, spec, target)
    with pytest.raises(BadArtefact) as at_once:
        model.open()
    assert str(at_once.value) == str(alone.value)
    assert spec.stages[stages[1]].file in str(at_once.value)
