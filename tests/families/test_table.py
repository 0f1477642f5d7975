"""The table of families says what is there: exporter, host halves, tiny checkpoints and tests cover the same ones."""

from __future__ import annotations

import pytest

from engines.families import FAMILIES as HOST
from exporter.families import FAMILIES
from exporter.family import family_of
from graphs.errors import BadArtefact
from graphs.families import KNOWN, REFUSED
from tests.families.cases import CASES
from tests.tiny_families import TINY


def test_every_half_knows_the_same_families() -> None:
    known = {f.name: f.architecture for f in KNOWN}
    assert {f.name: f.architecture for f in FAMILIES} == known
    assert set(HOST) == set(TINY) == set(CASES) == set(known)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda r: r.architecture)
def test_what_is_not_taken_is_refused_with_the_reason(refused: object) -> None:
    with pytest.raises(BadArtefact, match="is not supported"):
        family_of([refused.architecture], FAMILIES)


def test_an_unknown_one_lists_the_known() -> None:
    with pytest.raises(BadArtefact, match="did you mean Qwen2VLForConditionalGeneration"):
        family_of(["Qwen2VLForConditionalGenerationX"], FAMILIES)
    with pytest.raises(BadArtefact, match="LlavaForConditionalGeneration"):
        family_of(None, FAMILIES)


def test_show_families(saccade_cli) -> None:
    shown = saccade_cli("show", "families")
    assert shown.code == 0
    assert "InternVLForConditionalGeneration" in shown.stdout
    assert "mPLUG-Owl2" in shown.stdout
