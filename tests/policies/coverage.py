"""Which policy is held to its formula on which family: read from the parameters of the tests themselves.

``python -m tests.policies.coverage`` writes the table into README.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from graphs.support import support_table

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- policies: python -m tests.policies.coverage -->\n", "<!-- end -->\n"
OF_SCORE = {"received": "star", "cls": "fastervlm", "zip": "visionzip"}


def parameters(module: str, test: str) -> Iterator[dict[str, Any]]:
    """What a parametrised test is called with: every combination of the values of its marks."""
    marks = [m for m in getattr(import_module(f"tests.{module}"), test).pytestmark if m.name == "parametrize"]
    names = [[m.args[0]] if isinstance(m.args[0], str) else list(m.args[0]) for m in marks]
    values = [[[v] if len(n) == 1 else v for v in m.args[1]] for n, m in zip(names, marks, strict=True)]
    for chosen in product(*values):
        yield {k: v for n, c in zip(names, chosen, strict=True) for k, v in zip(n, c, strict=True)}


def cases_held() -> set[tuple[str, str]]:
    """(policy, family), where every kind of prune point of the policy is tested on the family."""
    vision = list(parameters("policies.test_vision_families", "test_a_score_is_its_formula"))
    found = {(OF_SCORE[p["score"]], p["name"]) for p in vision}
    merging = parameters("policies.test_vision_families", "test_tome_merges_whole_visual_tokens")
    found |= {("tome", p["name"]) for p in merging}
    for p in parameters("policies.test_family_decoders", "test_a_policy_is_its_formula"):
        found |= {(policy, p["name"]) for policy in p["policies"]}
    for p in parameters("policies.test_combinations", "test_a_combination_is_its_parts_in_turn"):
        found |= {(part, p["name"]) for part in p["policy"].split("+")}
    return found | on_the_first_two() | on_every_export()


def on_the_first_two() -> set[tuple[str, str]]:
    """LLaVA-1.5 and InternVL have tests of their own, with caches and several images."""
    names = {p["name"] for p in parameters("policies.test_vision_policies", "test_a_vision_policy_is_its_formula")}
    found = {(name.split(",")[0].split("+")[0], "llava") for name in names}
    decoder = {p["name"] for p in parameters("policies.test_decoder_policies", "test_a_policy_is_its_formula")}
    found |= {(name, "llava") for name in decoder & {"fastv", "pyramiddrop"}}
    second = {p["name"] for p in parameters("policies.test_second_family", "test_a_decoder_policy_is_its_formula")}
    found |= {(part, "internvl") for name in second for part in name.split(", ") if part != "sparsevlm"}
    return found | {("sparsevlm", family) for family in import_module("tests.policies.test_budgets").MAKERS}


def on_every_export() -> set[tuple[str, str]]:
    """Every family's export is held to attention received, to guidance from outside and to what a host chooses."""
    families = import_module("tests.families.conftest")
    assert {point.score for point in families.PLAN.points} == {"attention", "priority"}
    test = "test_a_host_policy_is_its_formula_and_the_answer_follows"
    hosts = {p["score"] for p in parameters("families.test_host_policies", test)}
    return set(product(hosts | {"sgl"}, families.CASES))


def table() -> str:
    """The table as README has it."""
    return "\n".join(support_table(cases_held())) + "\n"


def main() -> None:
    """Write the table between its marks."""
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
