"""Policies of the vision stage on the other families: every score that serves one, against its formula in float64.

One image and several of different shapes, at three budgets, image by image (or tile by tile where tiles are alike).
LLaVA-1.5 itself is in test_vision_policies.
"""

import numpy as np
import pytest
import torch

from exporter.towers import check_tower
from graphs.errors import UsageError
from graphs.families import KNOWN, refusal
from graphs.merging import merge_schedule
from graphs.plan import VisionPoint
from tests.policies.plain import share
from tests.policies.tower import Merging, best, contextual, received

SCORES = {"received": 0.0, "cls": 0.0, "zip": 0.15625}
FAMILIES = [f.name for f in KNOWN if f.name != "llava"]
# SmolVLM's tower and Idefics3's are one code, as are those of Qwen2-VL and Qwen2.5-VL but for its windows.
# Qwen2.5-VL's "received" is in test_combinations.
SIBLINGS = [("smolvlm", "received"), ("smolvlm", "tome"), ("qwen2_vl", "received"), ("qwen2_5_vl", "received")]
CASES = [(f, s) for f in FAMILIES for s in SCORES if not refusal(f, s) and (f, s) not in SIBLINGS]
MERGING = [f for f in FAMILIES if not refusal(f, "tome") and (f, "tome") not in SIBLINGS]
CLASSED = ("llava", "llava_next", "internvl")
SHAPES = [[(40, 64)], [(50, 50), (30, 90), (96, 33)]]
KEEPS = [0.75, 0.5, 0.3]
pytestmark = pytest.mark.slow


def groups_of(case, seen):
    """The tokens that share one budget: an image's, or a tile's."""
    total = sum(seen.tokens)
    sizes = [case.grid.tokens] * (total // case.grid.tokens) if case.grid.tokens_alike else seen.tokens
    return np.split(np.arange(total), np.cumsum(sizes)[:-1])


def expected(score, reference, group, keep, by_class):
    """{token: row of features} of one group, by the formula; and how clear the cut is."""
    embeds = torch.cat(reference.outputs, 1)[group]
    count = share(len(group), keep)
    if score == "received":
        values = received(reference.outputs[0][group])
        merged = 0
    else:
        values, keys = (x[group] for x in reference.of_tokens(by_class))
        merged = min(max(1, round(count * SCORES["zip"])), count - 1) if score == "zip" else 0
    dominant = best(values, count - merged)
    down = values.sort(descending=True).values
    clear = float(down[count - merged - 1] - down[count - merged]) if count - merged < len(group) else 1.0
    if not merged:
        return {t: embeds[t] for t in dominant}, clear / float(down[0])
    before = reference.features()[group] if reference.case.name == "internvl" else embeds
    tokens = {t: before[t] for t in dominant} | contextual(before, keys, dominant, merged)
    if reference.case.name == "internvl":
        project = reference.case.hf.model.multi_modal_projector
        tokens = {t: project(row) for t, row in tokens.items()}
    return {t: tokens[t] for t in sorted(tokens)}, clear / float(down[0])


@torch.no_grad()
@pytest.mark.parametrize(("name", "score"), CASES)
def test_a_score_is_its_formula(case_of, name, score):
    case = case_of(name)
    stage = case.stage(VisionPoint(score=score, keep=0.5, per_image=True, merge=SCORES[score]))
    for shapes in SHAPES:
        seen, reference = case.seen(shapes), case.reference(shapes)
        assert len(reference.outputs[0]) == sum(seen.tokens)
        for keep in KEEPS:
            if score == "zip" and min(len(g) for g in groups_of(case, seen)) * keep < 2:
                continue
            kept, rows = [], []
            for group in groups_of(case, seen):
                tokens, clear = expected(score, reference, group, keep, name in CLASSED)
                # An exact tie is one of newlines, which are all alike: the first stay.
                assert clear == 0 or clear > 1e-6, "a near-tie decides nothing; draw other pictures"
                kept += [int(group[t]) for t in tokens]
                rows += list(tokens.values())
            out = stage(seen, keep)
            assert out["kept_vision"].tolist() == kept
            wanted = torch.stack(rows).numpy()
            got = np.concatenate([out[n] for n in stage.outputs if n != "kept_vision"], 1)
            assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_vl"])
def test_the_best_of_all_images_together(case_of, name):
    """Not per image: scores stay those of each image, as sums, whose average is 1 in each; the budget is one."""
    case = case_of(name)
    stage = case.stage(VisionPoint(score="received", keep=0.5))
    seen, reference = case.seen(SHAPES[1]), case.reference(SHAPES[1])
    scores = torch.cat([received(reference.outputs[0][group]) * len(group) for group in groups_of(case, seen)])
    for keep in (0.6, 0.25):
        count = share(len(scores), keep)
        down = scores.sort(descending=True).values
        assert down[count - 1] - down[count] > 1e-6
        assert stage(seen, keep)["kept_vision"].tolist() == best(scores, count)


class InPatches:
    """A tower of tiles by its own modules, visual tokens as rows of whole patches, for ToMe."""

    def __init__(self, case):
        self.case, self.tower = case, case.tower_of(case.hf)
        self.classed = case.name in CLASSED
        self.layers = self.tower.encoder.layer if self.classed else self.tower.encoder.layers

    def start(self, pixels):
        """[c+P, C] in the order of the image."""
        if self.classed:
            return self.tower.embeddings(pixels)[0]
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)[0]
        return patches + embeddings.position_embedding.weight

    def norms(self, layer):
        return (
            (layer.layernorm_before, layer.layernorm_after) if self.classed else (layer.layer_norm1, layer.layer_norm2)
        )

    def run(self, pixels, keep):
        """{token: row of visual_embeds} of one tile."""
        grid = self.case.grid
        side = grid.rows * 2
        patch = np.arange(side**2).reshape(grid.rows, 2, grid.columns, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
        x = self.start(pixels)
        beside, units = x[: int(self.classed)], x[int(self.classed) :][torch.from_numpy(patch)]
        merging = Merging(grid.tokens, merge_schedule(grid.tokens, keep, len(self.layers)), classed=False)
        for i, layer in enumerate(self.layers):
            first, second = self.norms(layer)
            attention = layer.attention if self.classed else layer.self_attn
            x = torch.cat([beside, units.flatten(0, 1)])
            sizes = torch.cat([torch.ones(len(beside)), merging.size.repeat_interleave(4)]).double()
            y = first(x)
            heads = self.case.hf.config.vision_config.num_attention_heads
            q, k, v = (p(y).view(len(y), heads, -1).transpose(0, 1) for p in projections(attention))
            shares = (q @ k.transpose(1, 2) * attention.scale + sizes.log()).softmax(-1)
            out = (shares @ v).transpose(0, 1).flatten(1)
            out = attention.projection_layer(out) if self.classed else attention.out_proj(out)
            x = x + (layer.lambda_1 * out if self.classed else out)
            beside, units = x[: len(beside)], x[len(beside) :].unflatten(0, (-1, 4))
            key = k.mean(0)[len(beside) :].unflatten(0, (-1, 4)).flatten(1)[None]
            units = merging(i, units.flatten(1), key).unflatten(1, (4, -1))
            x = torch.cat([beside, units.flatten(0, 1)])
            more = layer.mlp(second(x))
            x = x + (layer.lambda_2 * more if self.classed else more)
            beside, units = x[: len(beside)], x[len(beside) :].unflatten(0, (-1, 4))
        return {leader: self.finish(units[i]) for i, leader in sorted(enumerate(merging.leader), key=lambda p: p[1])}

    def finish(self, patches):
        """One token of its four patches (upper left, upper right, lower left, lower right)."""
        model = self.case.hf.model
        if self.classed:
            return model.multi_modal_projector(self.shuffled(self.tower.layernorm(patches)))
        return model.connector.modality_projection(self.shuffled(self.tower.post_layernorm(patches)))

    def shuffled(self, patches):
        """The order of a pixel shuffle of one 2×2 map."""
        model = self.case.hf.model
        if self.classed:
            return model.pixel_shuffle(patches.view(1, 2, 2, -1), scale_factor=0.5).flatten()
        return model.connector.pixel_shuffle(patches[None], 2).flatten()


def projections(attention):
    return attention.q_proj, attention.k_proj, attention.v_proj


@torch.no_grad()
@pytest.mark.parametrize("name", MERGING)
def test_tome_merges_whole_visual_tokens(case_of, name):
    case = case_of(name)
    stage = case.stage(VisionPoint(score="tome", keep=0.5, per_image=True))
    tiles = case.seen(SHAPES[0])
    plain = InPatches(case)
    for keep in (1.0, 0.75, 0.5):
        out = stage(tiles, keep)
        wanted = [
            plain.run(torch.from_numpy(p)[None].double(), share(case.grid.tokens, keep))
            for p in tiles.feeds["pixel_values"]
        ]
        assert out["kept_vision"].tolist() == [case.grid.tokens * i + t for i, w in enumerate(wanted) for t in w]
        rows = torch.stack([row for w in wanted for row in w.values()]).numpy()
        assert np.abs(out["visual_embeds"] - rows).max() < 1e-4 * np.abs(rows).max()


@pytest.mark.parametrize("family", KNOWN, ids=lambda f: f.name)
def test_what_does_not_serve_is_refused_with_the_reason(family):
    from exporter.families import FAMILIES as RECORDS

    record = next(r for r in RECORDS if r.name == family.name)
    for score, reason in family.refuses.items():
        with pytest.raises(UsageError, match=reason):
            check_tower(record, None, VisionPoint(score=score))
    assert (record.merging is None) == ("tome" in family.refuses)
    assert record.look is not None
