"""README's table of policies and families is made from the registry and from what the tests really cover."""

from graphs.families import KNOWN
from graphs.policies import POLICIES
from graphs.support import policy_refusal
from tests.policies.coverage import BEGIN, END, README, cases_held, table


def test_readme_has_the_table_of_the_registry_and_the_tests():
    text = README.read_text("utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    shown = text.partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == table().strip(), "run: python -m tests.policies.coverage"


def test_every_policy_is_held_to_its_formula_on_two_families():
    cases = cases_held()
    for policy in POLICIES.keys() - {"none"}:
        assert len({family for name, family in cases if name == policy}) >= 2, policy
    assert not [case for case in cases if policy_refusal(*case)]
    assert {family for _, family in cases} == {f.name for f in KNOWN}


def test_show_families_says_what_is_refused(saccade_cli):
    shown = saccade_cli("show", "families").stdout
    for family in KNOWN:
        for score, why in family.refuses.items():
            assert f"{family.name}: no score '{score}' ({why})" in shown
