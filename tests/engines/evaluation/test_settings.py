"""Which settings are tried where bundles differ in their plans; and bundles whose layers cannot be read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engines.bundles.manifest import Manifest
from engines.evaluation.contenders import Contender
from engines.evaluation.flops import costs_of
from engines.evaluation.settings import Setting, settings_of
from graphs.errors import UsageError
from graphs.plan import PruningPlan
from graphs.policies import plan_of_policy

DEPTH = 32


def bundle(plan: PruningPlan, whole: int = 0) -> Any:
    model = SimpleNamespace(spec=SimpleNamespace(language=SimpleNamespace(layers=DEPTH)))
    return SimpleNamespace(plan=plan, whole=whole, model=model)


SGL, PYRAMID, FASTV = (plan_of_policy(name, "large", DEPTH) for name in ("sgl", "pyramiddrop", "fastv"))
THREE = cast(list[Contender], [bundle(SGL), bundle(PYRAMID), bundle(FASTV)])
STEPS = (0.5, 0.25, 0.125)


def test_shares_go_to_the_plans_that_have_as_many_points() -> None:
    found = settings_of(THREE, [(1.0,), (0.3,), STEPS], [], [])
    assert found == (
        Setting((1.0,), None),
        Setting((0.3,), "sgl", (1,), 0),
        Setting(STEPS, "pyramiddrop", (8, 16, 24), 1),
        Setting((0.3,), "fastv", (2,), 2),
    )
    assert len({setting.name for setting in found}) == 4


def test_large_models_of_other_weights_are_asked_whole_each() -> None:
    apart = cast(list[Contender], [bundle(SGL), bundle(FASTV, whole=1)])
    assert [s.name for s in settings_of(apart, [(1.0,)], [], [])] == ["1", "1 #2"]


def test_layers_and_policies_choose_bundles() -> None:
    assert [s.policy for s in settings_of(THREE, [(0.3,)], ["random", "fastv"], [])] == ["random", "fastv"]
    assert [s.policy for s in settings_of(THREE, [], [], [(2,), (8, 16, 24)])] == ["pyramiddrop", "fastv"]
    assert [s.keep for s in settings_of(THREE, [], [], [])] == [(0.05,), STEPS, (0.5,)]


@pytest.mark.parametrize(
    ("keeps", "policies", "layers", "said"),
    [
        (
            [(0.3,)],
            ["pyramiddrop"],
            [],
            "has 3 prune points and no --keep has as many; add one, such as 0.5:0.25:0.125",
        ),
        ([(0.3,), (0.5, 0.2)], [], [], "no --keep has as many"),
        ([(0.3,), STEPS, (0.5, 0.2)], [], [], "--keep 0.5:0.2 has 2 shares, and no bundle"),
        ([], ["divprune"], [], "--policy divprune, then saccade build SMALL LARGE"),
        ([], [], [(7,)], "before layer 7, these do before layer 1 and layer 8:16:24 and layer 2; make one"),
        ([], [], [(7, 9)], "--plan FILE"),
        ([], ["sgl"], [(2,)], "no bundle prunes before these layers by these policies"),
        ([(0.3,)], ["sgl", "fastv"], [(2,)], "that prunes before these layers can be run with sgl"),
    ],
)
def test_what_would_do_nothing_is_refused(keeps: Any, policies: Any, layers: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings_of(THREE, keeps, policies, layers)
    assert said in str(caught.value)


def test_engines_alone_tell_no_flops(tmp_path: Path) -> None:
    stage = SimpleNamespace(file="rtx/decoder.engine")
    target = SimpleNamespace(spec="rtx/spec.json", stages={"decoder": stage})
    manifest = SimpleNamespace(members={"large": SimpleNamespace(folder="large", targets={"rtx": target})})
    assert costs_of(tmp_path, cast(Manifest, manifest), "large") is None


def test_shares_that_differ_in_the_seventh_digit_have_names_of_their_own() -> None:
    names = {Setting((share,), "sgl").name for share in (0.35, 0.3333333, 0.33333334, 1 / 3)}
    assert len(names) == 4
    assert "0.35 sgl" in names
