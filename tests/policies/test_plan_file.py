"""Plan files: what they may say, what each mistake is answered with, and that they come back as they were."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.errors import BadArtefact, UsageError
from graphs.plan import Guidance, PrunePoint, VisionPoint
from graphs.plan_file import (
    GuidanceDocument,
    PlanDocument,
    PointDocument,
    document_of,
    plan_from_file,
    plan_from_toml,
)
from graphs.policies import POLICIES, plan_of_policy, policy_document

HEAD = 'schema = "saccade.plan/1"\nname = "mine"\n'


def a_point(where, score, **more):
    said = {"where": where, "score": score, **more}
    return "[[point]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in said.items())


def test_a_file_fits_models_of_any_depth():
    text = (
        HEAD
        + a_point("vision", "received", keep=0.5, per_image=True)
        + a_point(0.25, "attention", keep=0.2)
        + a_point(30, "attention", count=8)
    )
    plan = plan_from_toml(text).resolved(32)
    assert plan.vision == VisionPoint(score="received", keep=0.5, per_image=True)
    assert plan.points == (
        PrunePoint(layer=8, score="attention", keep=0.2),
        PrunePoint(layer=30, score="attention", count=8),
    )
    assert plan_from_toml(text).resolved(40).points[0].layer == 10
    with pytest.raises(UsageError, match="below the model's 24 layers"):
        plan_from_toml(text).resolved(24)


def test_where_0_is_a_layer_and_a_share_of_nothing_is_too():
    for where in (0, 0.0, 0.1):
        plan = plan_from_toml(HEAD + a_point(where, "priority", keep=0.5)).resolved(4)
        assert plan.points[0].layer == 0
    assert plan_from_toml(HEAD + a_point(0.1, "attention", keep=0.5)).resolved(4).points[0].layer == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            HEAD + a_point("vision", "cls", keep=0.1) + a_point(2, "attention", keep=0.5),
            "dropped tokens do not come back",
        ),
        ("name = = 1", "is not TOML.*line 1"),
        ("name = " + "[" * 100_000, "nests too deep"),
        ('name = "mine"', 'names no schema; begin it with: schema = "saccade.plan/1"'),
        ('schema = "saccade.plan/2"\nname = "x"', "schema.*saccade.plan/1.*saccade.plan/2"),
        ('schema = "saccade.plan/1"', "name is missing"),
        (HEAD, "prunes nothing"),
        (HEAD + a_point(2, "attention", keep=1.0), "prunes nothing"),
        (HEAD + a_point(2, "attention"), "point 0 needs keep .* or count"),
        (HEAD + a_point(2, "attention", keep=0.5, count=3), "point 0 needs keep .* or count; give one of them"),
        (HEAD + a_point(2, "attention", keep=1.5), "keep.*1.5"),
        (HEAD + a_point(2, "attention", keep=0.0), "keep.*0.0"),
        (HEAD + a_point(2, "attention", count=0), "count.*0"),
        (HEAD + a_point(1.0, "attention", keep=0.5), r"where is 1.0; give \"vision\""),
        (HEAD + a_point(-1, "attention", keep=0.5), "where is -1"),
        (HEAD + a_point("late", "attention", keep=0.5), "where is 'late'"),
        (HEAD + a_point(True, "attention", keep=0.5), "where is True"),
        (HEAD + a_point(2, "atention", keep=0.5), "score is 'atention'; known are attention, cdpruner"),
        (HEAD + a_point(2, "cls", keep=0.5), "before a decoder layer, where there is no score 'cls'"),
        (HEAD + a_point("vision", "attention", keep=0.5), "at the vision stage, where there is no score 'attention'"),
        (HEAD + a_point(2, "attention", keep=0.5, recycle=0.5), "recycles but merges nothing"),
        (HEAD + a_point("vision", "cls", keep=0.5, recycle=0.5), "has no recycle"),
        (HEAD + a_point(2, "attention", keep=0.5, merge=0.5, per_image=True), "give merge or per_image, not both"),
        (
            HEAD + a_point(2, "attention", keep=0.5) + a_point(3, "attention", keep=0.2, per_image=True),
            "put points per image first",
        ),
        (HEAD + a_point("vision", "cls", keep=0.5, rows="last"), "has no rows"),
        (HEAD + a_point("vision", "cls", keep=0.5, merge=0.5), "merge belongs to score 'zip'"),
        (HEAD + a_point("vision", "zip", keep=0.5, merge=0.1), "say per_image = true"),
        (HEAD + a_point("vision", "tome", keep=0.5), "say per_image = true"),
        (HEAD + a_point(2, "attention", keep=0.5, rows="first"), "rows"),
        (
            HEAD + a_point(2, "attention", keep=0.5, sede=1),
            "there is no point.0.sede; known are count, keep, merge, per_image, recycle, rows, score, seed, where$",
        ),
        (HEAD + "[guidance]\nlayer = [0]\n", "there is no guidance.layer; known are layers, rows$"),
        (HEAD + "poin = 1\n", "there is no poin; known are allow_nothing, guidance, name, point, schema$"),
        (HEAD + '[[point]]\nscore = "attention"\nkeep = 0.5\n', 'point.0.where is missing; give "vision", a layer'),
        (HEAD + "[[point]]\nwhere = 2\nkeep = 0.5\n", "point.0.score is missing; known are attention, cdpruner"),
        (HEAD + "[guidance]\nlayers = [0, 1.5]\n", r'guidance.layers is \[0, 1.5\]; give "all", or layers'),
        (HEAD + '[guidance]\nlayers = "some"\n', """guidance.layers is 'some'; give "all", or layers"""),
        (HEAD + a_point(2, "priority", keep=0.5, rows="last"), "point 0 is of score 'priority', and has no rows"),
        (HEAD + a_point(2, "attention", keep=0.5, seed=5), "point 0 is of score 'attention', and has no seed"),
        (HEAD + a_point("vision", "received", keep=0.5, seed=4), "point 0 is of score 'received', and has no seed"),
        (HEAD + a_point(2, "attention", keep=0.5) * 2, "before layer 2, but it must lie after layer 2"),
        (HEAD + a_point(3, "attention", keep=0.5) + a_point(2, "attention", keep=0.2), "order the points"),
        (
            HEAD + a_point(2, "attention", keep=0.2) + a_point(3, "attention", keep=0.5),
            "dropped tokens do not come back",
        ),
        (HEAD + a_point(7, "attention", keep=0.2), "below the model's 6 layers"),
        (HEAD + a_point(0, "attention", keep=0.2), "before layer 0 has no attention"),
        (HEAD + a_point(2, "attention", keep=0.2) + a_point("vision", "cls", keep=0.2), "put one such point first"),
        (HEAD + a_point("vision", "cls", keep=0.2) * 2, "put one such point first"),
        (HEAD + a_point(2, "attention", keep=0.5) + a_point(3, "attention", keep=0.2, rows="last"), "same rows"),
        (HEAD + a_point(2, "priority", keep=0.5) + a_point(3, "random", keep=0.2), "one input priority"),
        (HEAD + a_point("vision", "cls", keep=0.5) + "[guidance]\n", "cannot prune inside"),
        (HEAD + "[guidance]\nlayers = [7]\n", r"guidance layers \[7\] do not exist"),
        (HEAD + '[guidance]\nrows = "raters"\n', "raters rank prune points only"),
    ],
)
def test_each_mistake_is_one_sentence(text, says):
    with pytest.raises(UsageError, match=says) as refused:
        plan_from_toml(text).resolved(6)
    assert "\n" not in str(refused.value)


def test_nothing_may_be_asked_for():
    assert not plan_from_toml(HEAD + "allow_nothing = true\n").resolved(6).points
    assert plan_of_policy("none", "large", 6).allow_nothing


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BadArtefact, match="is missing; give a plan file"):
        plan_from_file(tmp_path / "no.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        plan_from_file(tmp_path / "bytes.toml")
    (tmp_path / "good.toml").write_text(HEAD + a_point(2, "random", keep=0.5, seed=7))
    assert plan_from_file(tmp_path / "good.toml").resolved(6).points[0].seed == 7


shares = st.floats(0.001, 0.999).map(lambda x: round(x, 3))
documents = st.builds(
    PlanDocument,
    name=st.text(min_size=1),
    allow_nothing=st.booleans(),
    point=st.lists(
        st.builds(
            PointDocument,
            where=st.one_of(st.just("vision"), st.integers(0, 99), st.floats(0, 0.999)),
            score=st.sampled_from(["attention", "priority", "random", "received", "zip"]),
            rows=st.sampled_from(["text", "last", "raters"]),
            keep=st.one_of(st.none(), st.floats(1e-9, 1)),
            count=st.one_of(st.none(), st.integers(1, 5000)),
            per_image=st.booleans(),
            merge=st.floats(0, 0.99),
            recycle=st.floats(0.01, 1),
            seed=st.integers(0, 2**31),
        ),
        max_size=3,
    ).map(tuple),
    guidance=st.one_of(
        st.none(),
        st.builds(GuidanceDocument, layers=st.one_of(st.just("all"), st.lists(st.integers(0, 9)).map(tuple))),
    ),
)


@given(documents)
def test_what_is_written_is_read_back(document):
    assert plan_from_toml(document.dumps()) == document


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("role", ["small", "large", "alone"])
def test_named_plans_are_plan_files(name, role):
    document = policy_document(name, role)
    assert plan_from_toml(document.dumps()) == document
    plan = document.resolved(32)
    assert plan == plan_of_policy(name, role, 32)
    assert plan.prunes or plan.guidance or plan.allow_nothing
    assert plan.prunes == (name != "none" and not (name == "sgl" and role == "small"))


@pytest.mark.parametrize("name", [*POLICIES, "visionzip+random"])
@pytest.mark.parametrize("role", ["small", "large", "alone"])
def test_a_fitted_plan_becomes_a_file_with_other_shares(name, role):
    plan = plan_of_policy(name, role, 32)
    shares = [0.9 / (i + 1) for i in range(len(plan.budgets))]
    again = plan_from_toml(document_of(plan, "other", shares).dumps()).resolved(32, refuse_nothing=False)
    fitted = again.model_copy(update={"name": plan.name, "allow_nothing": plan.allow_nothing})
    wanted = [b.model_copy(update={"keep": s, "count": None}) for b, s in zip(plan.budgets, shares, strict=True)]
    vision = wanted.pop(0) if plan.vision else None
    assert fitted == plan.model_copy(update={"vision": vision, "points": tuple(wanted)})
    if len(plan.points) == 1:
        moved = document_of(plan, "other", shares, layer=7).resolved(32)
        assert (moved.points[0].layer, moved.vision) == (7, vision)


def test_the_defaults_are_the_papers():
    def cuts(name):
        return [(p.layer, p.keep, p.rows) for p in plan_of_policy(name, "alone", 32).points]

    assert cuts("fastv") == [(2, 0.5, "last")]
    assert cuts("pyramiddrop") == [(8, 0.5, "last"), (16, 0.25, "last"), (24, 0.125, "last")]
    assert cuts("sgl") == [(1, 0.05, "text")]
    sparsevlm, before = plan_of_policy("sparsevlm", "alone", 32).points, 576
    for point, (layer, kept, clusters, recycled) in zip(
        sparsevlm, [(3, 66, 16, 154), (7, 30, 2, 16), (16, 17, 1, 5)], strict=True
    ):
        assert (point.layer, point.kept_of(576), point.rows) == (layer, kept + clusters, "raters")
        assert point.merging(before, kept + clusters) == (clusters, recycled)
        before = kept + clusters
    at_vision = {name: plan_of_policy(name, "alone", 32).vision.carriers(576) for name in ("fastervlm", "visionzip")}
    assert at_vision == {"fastervlm": {"keep_vision": 144}, "visionzip": {"keep_vision": 54, "merge_vision": 10}}
    assert plan_of_policy("divprune", "alone", 32).vision.kept_of(576) == 56
    assert plan_of_policy("cdpruner", "alone", 32).vision.kept_of(576) == 64
    assert plan_of_policy("sgl", "small", 3).guidance == Guidance(layers=(0, 1, 2))


def test_options_of_a_named_plan():
    (point,) = plan_of_policy("fastv", "alone", 32, fraction=0.25, keep=0.3).points
    assert (point.layer, point.keep, point.rows) == (8, 0.3, "last")
    with pytest.raises(UsageError, match="pyramiddrop has 3 prune points, so one keep says too little; write a plan"):
        plan_of_policy("pyramiddrop", "alone", 32, keep=0.3)
    with pytest.raises(UsageError, match=r"known are .*did you mean fastv"):
        plan_of_policy("fastw", "alone", 32)
