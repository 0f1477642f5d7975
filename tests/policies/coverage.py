"""Which policy is held to its formula on which family: read from the parameters of the tests themselves.

``python -m tests.policies.coverage`` writes the table into README.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphs.families import KNOWN
from graphs.policies import POLICIES
from graphs.support import policy_refusal, support_table

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- policies: python -m tests.policies.coverage -->\n", "<!-- end -->\n"


def parameters(test: Any) -> Iterator[dict[str, Any]]:
    """What a parametrised test is called with, one dictionary per value of each of its marks."""
    for mark in test.pytestmark:
        if mark.name == "parametrize":
            names, values = mark.args
            names = [names] if isinstance(names, str) else list(names)
            for value in values:
                yield dict(zip(names, [value] if len(names) == 1 else value, strict=True))


def tested_cases() -> set[tuple[str, str]]:
    """(policy, family), a policy whose points are all tested on the family."""
    by_score = {"received": "star", "cls": "fastervlm", "zip": "visionzip"}
    seen = {(by_score[score], family) for family, score in _on_families()}
    seen |= {
        ("tome", p["name"]) for p in _parameters_of("test_vision_families", "test_tome_merges_whole_visual_tokens")
    }
    for policies, family in _in_decoders():
        seen |= {(policy, family) for policy in policies}
    seen |= _on_the_first_two()
    return seen


def _parameters_of(module: str, test: str) -> list[dict[str, Any]]:
    from importlib import import_module

    return list(parameters(getattr(import_module(f"tests.policies.{module}"), test)))


def _on_families() -> Iterator[tuple[str, str]]:
    for p in _parameters_of("test_vision_families", "test_a_score_is_its_formula"):
        yield p["name"], p["score"]


def _in_decoders() -> Iterator[tuple[tuple[str, ...], str]]:
    values = _parameters_of("test_family_decoders", "test_a_policy_is_its_formula")
    for policies in (p["policies"] for p in values if "policies" in p):
        for family in (p["name"] for p in values if "name" in p):
            yield policies, family


def _on_the_first_two() -> set[tuple[str, str]]:
    """LLaVA-1.5 and InternVL have tests of their own; every family's export is held to attention and guidance."""
    from tests.families import test_host_policies
    from tests.families.cases import CASES
    from tests.families.conftest import PLAN
    from tests.policies import test_budgets

    vision = {p["name"] for p in _parameters_of("test_vision_policies", "test_a_vision_policy_is_its_formula")}
    decoder = {p["name"] for p in _parameters_of("test_decoder_policies", "test_a_policy_is_its_formula")}
    second = {
        p["name"] for p in _parameters_of("test_second_family", "test_a_decoder_policy_is_its_formula") if "name" in p
    }
    found = {(name.split(",")[0].split("+")[0], "llava") for name in vision}
    found |= {(name.removesuffix(" stage 2"), "llava") for name in decoder if name != "sparsevlm"}
    found |= {(policy, "internvl") for name in second for policy in name.split(", ") if policy != "sparsevlm"}
    found |= {("sparsevlm", family) for family in test_budgets.MAKERS}
    hosts = {
        p["score"] for p in parameters(test_host_policies.test_a_host_policy_is_its_formula_and_the_answer_follows)
    }
    assert {p.score for p in PLAN.points} == {"attention", "priority"}
    return found | {(policy, family) for policy in hosts | {"sgl"} for family in CASES}


def table() -> str:
    """The table as README has it."""
    return "\n".join(support_table(tested_cases())) + "\n"


def main() -> None:
    """Write the table between its marks."""
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()

__all__ = ["BEGIN", "END", "KNOWN", "POLICIES", "policy_refusal", "table", "tested_cases"]
