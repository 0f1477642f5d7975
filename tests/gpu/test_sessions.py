"""Golden replay and the cascade through every session that this machine can open, the shipped pair and all families.

The tolerance is the export's own (graphs/compare.py); the CPU is one of the sessions, as what the others are held to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engines.bundles.build import build_bundle
from engines.bundles.golden import refuse_disagreement, replay
from engines.bundles.targets import why_not
from engines.cascade import Cascade
from engines.sessions.session import SESSIONS, open_session
from exporter.export import export_checkpoint
from glyphs.checkpoint import PAIR
from graphs.spec import spec_from_folder
from tests.tiny_families import TINY

QUESTIONS = 12
# role, dtype: the exit needs the small model's guidance, pruning the large model's points
PAIRS = [("small", "float32"), ("large", "float32"), ("small", "float16"), ("large", "float16")]


@pytest.fixture(scope="module", params=list(SESSIONS))
def target(request: pytest.FixtureRequest) -> str:
    if reasons := why_not(request.param):
        pytest.skip(f"target {request.param}: {'; '.join(reasons)}")
    return str(request.param)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``exported(name, checkpoint, role, dtype)``: an export, made once."""
    home, made = tmp_path_factory.mktemp("exports"), {}

    def export(name: str, checkpoint: Callable[[], Path], role: Any, dtype: Any) -> Path:
        key = f"{name}-{role}-{dtype}"
        if key not in made:
            made[key] = home / key
            export_checkpoint(checkpoint(), made[key], policy="sgl", role=role, dtype=dtype)
        return made[key]

    return export


def replayed(folder: Path, target: str) -> None:
    """Every golden case agrees, and nothing but arithmetic on shapes was left to the CPU."""
    opened = []

    def open_stage(file: Path) -> Any:
        opened.append(open_session(file, target))
        return opened[-1]

    replays = list(replay(folder, spec_from_folder(folder), open_stage))
    refuse_disagreement(replays, f"{folder.name} on {target}")
    assert len(replays) >= 5
    if target != "cpu":
        assert {str(session.placement.work) for session in opened} == {"()"}


@pytest.mark.parametrize(("role", "dtype"), PAIRS)
def test_the_pair_replays(exported, target, role, dtype):
    replayed(exported("glyphs", lambda: PAIR / role, role, dtype), target)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", list(TINY))
def test_every_family_replays(exported, target, family, dtype, tmp_path_factory):
    checkpoint = partial(TINY[family], tmp_path_factory.mktemp(family) / "checkpoint")
    replayed(exported(family, checkpoint, "alone", dtype), target)


def test_the_cascade_answers_as_on_the_cpu(exported, target, tmp_path):
    from glyphs.data import held_out_questions

    folders = [exported("glyphs", partial(PAIR.joinpath, role), role, "float32") for role in ("small", "large")]
    answers = {}
    for on in {"cpu", target}:
        build_bundle(folders, tmp_path / on, target=on)
        cascade = Cascade.open(tmp_path / on)
        answers[on] = [
            (answer.text, answer.exited)
            for question in held_out_questions(QUESTIONS)
            for answer in [cascade.ask(question.image, question.question, keep=0.4, threshold=0.6)]
        ]
    assert answers[target] == answers["cpu"]
