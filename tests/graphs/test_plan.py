"""Pruning plans: the published retention table, the roundings, and what a plan may not say."""

from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from graphs.errors import UsageError
from graphs.plan import (
    Guidance,
    PrunePoint,
    PruningPlan,
    VisionPoint,
    average_retention,
    keep_for_retention,
    kept_count,
    layer_of,
)
from graphs.policies import POLICIES, plan_of_policy

# (layers, share of layers and of tokens) → K and the average retention in per cent: the SGL paper's three
# settings for InternVL2 26B, 40B and 76B (PAPERS.md).
RETENTION = [
    (48, 0.4, 19, 63.75),
    (60, 0.4, 24, 64.0),
    (80, 0.4, 32, 64.0),
    (48, 0.2, 9, 35.0),
    (60, 0.2, 12, 36.0),
    (80, 0.2, 16, 36.0),
    (48, 0.05, 2, 8.96),
    (60, 0.05, 3, 9.75),
    (80, 0.05, 4, 9.75),
]


def point(layer, keep=0.5, score="priority"):
    return PrunePoint(layer=layer, score=score, keep=keep)


def counted(layer, count):
    return PrunePoint(layer=layer, score="priority", count=count)


def plan_with(*points, **more):
    return PruningPlan(name="mine", points=points, **more)


@pytest.mark.parametrize(("layers", "share", "layer", "percent"), RETENTION)
def test_the_published_retention_table(layers, share, layer, percent):
    assert layer_of(share, layers) == layer
    assert round(100 * average_retention(layers, layer, share), 2) == percent
    (cut,) = plan_of_policy("sgl", "large", layers, fraction=share, keep=share).points
    assert (cut.layer, cut.keep) == (layer, share)


@given(st.integers(1, 100), st.data())
def test_keep_for_retention_is_the_inverse(layers, data):
    layer = data.draw(st.integers(0, layers - 1))
    keep = data.draw(st.floats(1e-3, 1))
    retention = average_retention(layers, layer, keep)
    assert layer / layers < retention <= 1 + 1e-12
    back = keep_for_retention(layers, layer, min(1.0, retention))
    assert back == pytest.approx(keep, abs=1e-9 * layers)


@given(st.integers(1, 100), st.data())
def test_a_retention_below_the_first_layers_is_refused(layers, data):
    layer = data.draw(st.integers(0, layers - 1))
    retention = data.draw(st.floats(0, layer / layers))
    assume(retention * layers <= layer)
    with pytest.raises(UsageError, match="cannot be reached with a cut before layer"):
        keep_for_retention(layers, layer, retention)
    with pytest.raises(UsageError, match="cannot be reached"):
        keep_for_retention(layers, layer, 1.2)


@pytest.mark.parametrize(
    ("tokens", "keep", "kept"),
    [
        (144, 0.05, 7),
        (100, 0.29, 29),  # 0.29 * 100 is 28.999999999999996
        (1000, 0.001, 1),
        (50, 0.58, 29),
        (10, 0.7, 7),
        (576, 0.5, 288),
        (576, 1, 576),
        (3, 0.05, 1),  # never an image without a token
        (1, 1e-9, 1),
        (0, 0.5, 0),
    ],
)
def test_kept_count(tokens, keep, kept):
    assert kept_count(tokens, keep) == kept


@given(st.integers(1, 5000), st.integers(1, 1000), st.integers(1, 1000))
def test_kept_count_of_a_fraction_is_its_floor(tokens, numerator, denominator):
    assume(numerator <= denominator)
    wanted = max(1, int(Fraction(numerator, denominator) * tokens))
    assert kept_count(tokens, numerator / denominator) == wanted
    assert 1 <= wanted <= tokens


@given(st.integers(1, 2000), st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_more_keep_never_keeps_less(tokens, a, b):
    assert kept_count(tokens, min(a, b)) <= kept_count(tokens, max(a, b)) <= tokens
    assert kept_count(tokens, 1) == tokens


@pytest.mark.parametrize("budget", [counted(1, 8), VisionPoint(score="received", count=8)], ids=["decoder", "vision"])
@pytest.mark.parametrize(("tokens", "kept"), [(0, 0), (5, 5), (8, 8), (16, 8)])
def test_a_count_keeps_at_most_what_is_there(budget, tokens, kept):
    assert budget.kept_of(tokens) == kept
    assert budget.share_of(tokens) == (kept / tokens if tokens else 1)


@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, 5, float("nan"), float("inf")])
def test_keep_outside_its_range(keep):
    with pytest.raises(UsageError, match=r"must lie in \(0, 1\]"):
        kept_count(10, keep)
    for role in ("large", "alone", "small"):
        with pytest.raises(UsageError, match="keep"):
            plan_of_policy("sgl", role, 12, keep=keep)
    with pytest.raises(ValidationError):
        point(1, keep)


@pytest.mark.parametrize("fraction", [1, 1.5, -0.1, float("nan")])
def test_a_layer_fraction_outside_its_range(fraction):
    for role in ("large", "alone", "small"):
        with pytest.raises(UsageError, match="fraction"):
            plan_of_policy("sgl", role, 12, fraction=fraction)


@given(st.integers(1, 200), st.integers(0, 999))
@example(100, 290)
@example(50, 580)
def test_layer_of_is_the_floor(layers, thousandths):
    assert layer_of(thousandths / 1000, layers) == layers * thousandths // 1000


@given(st.integers(1, 40), st.data())
def test_segments_are_the_layers_in_order(layers, data):
    cuts = data.draw(st.lists(st.integers(0, layers - 1), unique=True, max_size=4).map(sorted))
    plan = plan_with(*(point(layer) for layer in cuts)).validated(layers)
    segments = plan.segments(layers)
    assert len(segments) == len(cuts) + 1
    assert [i for segment in segments for i in segment] == list(range(layers))
    assert [segment.start for segment in segments[1:]] == cuts
    assert (len(segments[0]) == 0) == (cuts[:1] == [0])


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (plan_with(point(3), point(2)), "before layer 2, but it must lie after layer 3"),
        (plan_with(point(2), point(2)), "before layer 2, but it must lie after layer 2"),
        (plan_with(point(6)), "below the model's 6 layers"),
        (plan_with(point(0, score="attention")), "before layer 0 has no attention"),
        (plan_with(guidance=Guidance(layers=(0, 6, 7))), r"layers \[6, 7\] do not exist"),
        (plan_with(guidance=Guidance(layers=(-1,))), r"layers \[-1\] do not exist"),
        (plan_with(guidance=Guidance(layers=())), "guidance"),
        (plan_with(guidance=Guidance(layers=(1, 1))), "guidance"),
        (plan_with(point(2), guidance=Guidance(layers=(0,))), "cannot prune inside"),
        (plan_with(counted(1, 3), counted(2, 4)), r"keep \[3, 4\] .* list them in decreasing order"),
    ],
)
def test_what_a_plan_may_not_say(plan, says):
    with pytest.raises(UsageError, match=says) as refused:
        plan.validated(6)
    assert "plan mine" in str(refused.value)


@pytest.mark.parametrize("layers", [1, 2, 6, 48])
@pytest.mark.parametrize("role", ["small", "large", "alone"])
def test_the_named_plans(role, layers):
    nothing = plan_of_policy("none", role, layers)
    assert not nothing.points
    assert not nothing.uses_guide
    assert not nothing.uses_priority
    assert nothing.segments(layers) == (range(layers),)
    if role == "alone" and layers == 1:
        with pytest.raises(UsageError, match="layer"):
            plan_of_policy("sgl", role, layers)
        return
    plan = plan_of_policy("sgl", role, layers)
    assert plan.uses_guide == (role in ("small", "alone"))
    assert plan.uses_priority == (role == "large")
    assert (plan.guidance is not None) == (role == "small")
    if plan.guidance:
        assert plan.guidance.layers == tuple(range(layers))
        assert plan.guidance.rows == "text"


def test_an_unknown_policy_lists_the_known():
    with pytest.raises(UsageError) as refused:
        plan_of_policy("fastw", "large", 12)
    assert all(name in str(refused.value) for name in ("'fastw'", *POLICIES))
    with pytest.raises(UsageError, match="none takes no keep"):
        plan_of_policy("none", "large", 12, keep=0.5)


def test_a_record_cannot_be_changed_and_knows_its_keys():
    with pytest.raises(ValidationError):
        point(1).layer = 2
    with pytest.raises(ValidationError):
        PrunePoint(layer=1, score="priority", keep=0.5, kep=0.5)
    with pytest.raises(ValidationError):
        point(-1)
