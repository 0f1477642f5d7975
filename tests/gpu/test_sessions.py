"""Golden replay and the cascade through every session that this machine can open, the shipped pair and all families.

The tolerance is the export's own (graphs/compare.py); the CPU is one of the sessions, as what the others are held to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engines.bundles.build import build_bundle
from engines.bundles.golden import refuse_disagreement, replay
from engines.cascade import Cascade
from engines.sessions.session import open_session
from engines.targets import TARGETS, why_not
from engines.trt.device import capability
from engines.trt.flavour import FLAVOURS
from engines.trt.full import FORMS, TensorrtOptions
from engines.trt.member import build_member
from engines.trt.options import EngineOptions
from exporter.export import export_checkpoint
from glyphs.checkpoint import PAIR
from graphs.spec import GOLDEN_FILE, ExportSpec, spec_from_folder
from tests.tiny_families import TINY

QUESTIONS = 12
# role, dtype: the exit needs the small model's guidance, pruning the large model's points
PAIRS = [("small", "float32"), ("large", "float32"), ("small", "float16"), ("large", "float16")]


@pytest.fixture(scope="module", params=list(TARGETS))
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


def engine_options(target: str, spec: ExportSpec, plugins: str = "none") -> EngineOptions:
    """For the GPU that is here; skips what TensorRT-RTX does not build.

    plugins: none where bodies serve, ``python``, or ``aot`` of full TensorRT.
    """
    flavour, here = FLAVOURS[target], capability()
    if flavour.sms and here not in flavour.sms:
        pytest.skip(f"{flavour.title} builds no engine for SM {here}")
    if spec.dtype != "float32" and spec.language.head_dim % flavour.head_widths:
        pytest.skip(f"{flavour.title} compiles no narrow attention of heads {spec.language.head_dim} wide")
    full = TensorrtOptions(plugins=plugins) if target == "tensorrt" and plugins != "none" else None
    ops = "body" if plugins == "none" else "plugin"
    return EngineOptions((here,) if flavour.sms else (), ops=ops, tensorrt=full)


def replayed(folder: Path, target: str, work: Path, plugins: str = "none") -> None:
    """Every golden case agrees, and nothing but arithmetic on shapes was left to the CPU."""
    if TARGETS[target].runs == "engines":
        spec = spec_from_folder(folder)
        options = engine_options(target, spec, plugins)
        shutil.copy(folder / GOLDEN_FILE, work / GOLDEN_FILE)
        built = build_member(spec.role, folder, spec, work / target, options, FLAVOURS[target])
        assert set(built.ops.values()) == {"body" if plugins == "none" else "kernel"}
        refuse_disagreement(
            replay(work, built.spec, partial(open_session, target=target)), f"{folder.name} on {target}"
        )
        return
    opened = []

    def open_stage(file: Path) -> Any:
        opened.append(open_session(file, target))
        return opened[-1]

    replays = list(replay(folder, spec_from_folder(folder), open_stage))
    refuse_disagreement(replays, f"{folder.name} on {target}")
    assert len(replays) >= 5
    if TARGETS[target].memory == "device":
        assert {str(session.placement.work) for session in opened} == {"()"}


@pytest.mark.parametrize(("role", "dtype"), PAIRS)
def test_the_pair_replays(exported, target, role, dtype, tmp_path):
    replayed(exported("glyphs", lambda: PAIR / role, role, dtype), target, tmp_path)


@pytest.mark.parametrize("plugins", FORMS)
@pytest.mark.parametrize(("role", "dtype"), PAIRS)
def test_the_pair_replays_by_its_kernels(exported, target, role, dtype, plugins, tmp_path):
    if TARGETS[target].runs != "engines" or (plugins == "aot" and target != "tensorrt"):
        pytest.skip(f"target {target} takes no kernels as {plugins}")
    replayed(exported("glyphs", lambda: PAIR / role, role, dtype), target, tmp_path, plugins)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", list(TINY))
def test_every_family_replays(exported, target, family, dtype, tmp_path, tmp_path_factory):
    checkpoint = partial(TINY[family], tmp_path_factory.mktemp(family) / "checkpoint")
    replayed(exported(family, checkpoint, "alone", dtype), target, tmp_path)


def test_the_cascade_answers_as_on_the_cpu(exported, target, tmp_path):
    from glyphs.data import held_out_questions

    folders = [exported("glyphs", partial(PAIR.joinpath, role), role, "float32") for role in ("small", "large")]
    answers = {}
    for on in {"cpu", target}:
        engines = engine_options(on, spec_from_folder(folders[0])) if TARGETS[on].runs == "engines" else None
        build_bundle(folders, tmp_path / on, target=on, engines=engines)
        cascade = Cascade.open(tmp_path / on)
        answers[on] = [
            (answer.text, answer.exited)
            for question in held_out_questions(QUESTIONS)
            for answer in [cascade.ask(question.image, question.question, keep=0.4, threshold=0.6)]
        ]
    assert answers[target] == answers["cpu"]
