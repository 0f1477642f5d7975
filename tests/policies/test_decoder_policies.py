"""Policies that prune inside the decoder, each against its formula in plain float64 torch, at three budgets.

The export is made once per policy; budgets are run-time choices. After each prefill one decode step shows that
every segment's cache holds the kept rows and nothing else.
"""

import numpy as np
import pytest
import torch

from graphs.policies import plan_of_policy
from graphs.rules import export_from_folder, findings_in
from tests.policies.plain import PlainDecoder, Rows, share

RATERS = """
schema = "saccade.plan/1"
name = "raters"
[[point]]
where = 1
score = "attention"
rows = "raters"
keep = 0.5
[[point]]
where = 3
score = "attention"
rows = "raters"
keep = 0.25
"""


def last_row_mean(rows: Rows) -> torch.Tensor:
    """FastV: layer K−1, mean over heads, last row."""
    return rows.attention.mean(0)[-1]


def all_text_mean(rows: Rows) -> torch.Tensor:
    """STAR stage 2, and SGL alone: layer K−1, mean over heads and all text rows behind the image."""
    return rows.attention.mean(0)[rows.text_after].mean(0)


def last_row_of_the_next_layer(rows: Rows) -> torch.Tensor:
    """PyramidDrop: softmax(q·k) of the layer behind the cut, mean over heads, last row."""
    q, k, _ = rows.plain.qkv(rows.layer, rows.hidden, rows.positions[rows.alive])
    return rows.plain.attention_map(q, k).mean(0)[-1]


def raters_mean(rows: Rows) -> torch.Tensor:
    """SparseVLM: rows whose relevance is at least the mean, on the decoder's input; mean over heads and raters."""
    last = int(rows.is_visual.nonzero().max())
    image, text = rows.embeds[rows.is_visual], rows.embeds[last + 1 :]
    relevance = (image @ text.T).softmax(1).mean(0)
    raters = last + 1 + (relevance >= relevance.mean()).nonzero()[:, 0]
    assert 0 < len(raters) < len(text)
    return rows.attention.mean(0)[torch.isin(rows.alive, raters)].mean(0)


# name → plan, its prune layers in a model of 4, the score by formula
POLICIES = {
    "fastv": ("fastv", [2], last_row_mean),
    "star stage 2": ("star", [1], all_text_mean),
    "pyramiddrop": ("pyramiddrop", [1, 2, 3], last_row_of_the_next_layer),
    "sparsevlm": (RATERS, [1, 3], raters_mean),
}
BUDGETS = {
    1: [(0.75,), (0.4,), (0.05,)],
    2: [(0.75, 0.5), (0.5, 0.2), (0.1, 0.1)],
    3: [(0.9, 0.6, 0.3), (0.5, 0.25, 0.125), (0.2, 0.1, 0.05)],
}
TALKS = {"one image": "tt vvvvvvvvvvvvvvvv ttttttt", "two images": "t vvvvvvvv tt vvvvvvvv ttttt"}
CASES = [(name, talk, b) for name in POLICIES for talk in TALKS for b in range(3)]


@pytest.fixture(scope="session")
def plain(llava_model):
    return PlainDecoder(llava_model.model.language_model, llava_model.lm_head, llava_model.config.text_config)


def a_talk(kind, width, seed):
    rows = TALKS[kind].replace(" ", "")
    is_visual = np.array([r == "v" for r in rows])
    embeds = np.random.default_rng(seed).standard_normal((1, len(rows), width)).astype(np.float32)
    return embeds, is_visual


@pytest.mark.parametrize(("name", "talk", "budget"), CASES)
def test_a_policy_is_its_formula(exported, plain, name, talk, budget):
    plan, layers, score = POLICIES[name]
    stages = exported(plan)
    assert [p.layer for p in stages.spec.plan.points] == layers
    embeds, is_visual = a_talk(talk, stages.spec.language.width, seed=budget)
    visual, text = int(is_visual.sum()), int((~is_visual).sum())
    counts = [share(visual, keep) for keep in BUDGETS[len(layers)][budget]]
    wide, seen = torch.from_numpy(embeds[0]), torch.from_numpy(is_visual)
    wanted, kept = plain.run(wide, seen, {i: (score, n) for i, n in zip(layers, counts, strict=True)})
    out, got = stages.decode(embeds, is_visual, [text + n for n in counts])
    for g, k in zip(got, kept, strict=True):
        assert g.tolist() == k.tolist()
    assert len(kept[-1]) == text + counts[-1] < len(is_visual)
    tail = out["logits"].shape[1]
    assert np.abs(out["logits"][0] - wanted.numpy()[-tail:]).max() < 1e-4 * wanted.abs().max()

    more = a_talk(talk, stages.spec.language.width, seed=99)[0][:, :1]
    nothing = np.zeros(1, bool)
    step, _ = stages.decode(more, nothing, [1] * len(layers), past=out, start=len(is_visual))
    longer = torch.cat([wide, torch.from_numpy(more[0])])
    forced = [torch.cat([k, torch.tensor([len(is_visual)])]) for k in kept]
    then, _ = plain.run(
        longer, torch.cat([seen, torch.tensor([False])]), dict.fromkeys(layers, (None, 0)), forced=forced
    )
    assert np.abs(step["logits"][0, -1] - then.numpy()[-1]).max() < 1e-4 * then.abs().max()


def test_random_goes_by_the_priority_it_is_given(exported, plain):
    stages = exported("random")
    embeds, is_visual = a_talk("one image", stages.spec.language.width, seed=5)
    priority = np.random.default_rng(3).random(len(is_visual), dtype=np.float32)
    for count in (12, 6, 1):
        text = int((~is_visual).sum())
        cut = {0: (lambda rows: torch.from_numpy(priority)[rows.alive], count)}
        wanted, kept = plain.run(torch.from_numpy(embeds[0]), torch.from_numpy(is_visual), cut)
        out, got = stages.decode(embeds, is_visual, [text + count], priority=priority)
        assert got[0].tolist() == kept[0].tolist()
        assert np.abs(out["logits"][0] - wanted.numpy()[-out["logits"].shape[1] :]).max() < 1e-4 * wanted.abs().max()


def test_original_positions_may_have_gaps(exported, plain):
    """As where the vision stage dropped rows before."""
    stages = exported("fastv")
    embeds, is_visual = a_talk("one image", stages.spec.language.width, seed=6)
    positions = np.cumsum(np.random.default_rng(0).integers(1, 4, len(is_visual))).astype(np.int64)
    text = int((~is_visual).sum())
    wanted, kept = plain.run(
        torch.from_numpy(embeds[0]), torch.from_numpy(is_visual), {2: (last_row_mean, 5)}, positions=positions
    )
    out, got = stages.decode(embeds, is_visual, [text + 5], positions=positions)
    assert got[0].tolist() == kept[0].tolist()
    assert np.abs(out["logits"][0] - wanted.numpy()[-out["logits"].shape[1] :]).max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", [*POLICIES, "random"])
def test_graph_rules_hold(exported, name):
    assert not findings_in(export_from_folder(exported(POLICIES.get(name, ("random",))[0]).folder))


def test_a_preview_computes_no_attention(exported):
    """PyramidDrop's extra q·k must not drag the attention of its layer, nor its values, in twice."""
    stage = export_from_folder(exported("pyramiddrop").folder).stages["decoder"]
    ops = [node.op_type for node in stage.model.graph.node]
    assert ops.count("Attention") == 4
    assert ops.count("AttentionReceived") == 3


def test_sgl_alone_is_the_decoder_half_of_star():
    """So what holds of the one graph holds of the other."""
    (sgl,), star = plan_of_policy("sgl", "alone", 4).points, plan_of_policy("star", "alone", 4).points
    assert (sgl,) == star
