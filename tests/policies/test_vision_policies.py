"""Policies of the vision stage, each against its formula in plain float64 torch, at three budgets and two images.

Every vision-stage export also has a decoder policy behind it, so that the chain pixels → pruned embeddings → pruned
decoder is held to the reference with the original positions.
"""

import numpy as np
import pytest
import torch

from graphs.errors import UsageError
from graphs.merging import merge_schedule
from graphs.rules import export_from_folder, findings_in
from tests.policies.plain import PlainDecoder, share
from tests.policies.test_decoder_policies import all_text_mean, last_row_mean
from tests.policies.tower import Merging, PlainTower, best, contextual, received

ZIP_AND_FASTV = """
schema = "saccade.plan/1"
name = "visionzip, fastv"
[[point]]
where = "vision"
score = "zip"
keep = 0.5
merge = 0.15625  # 10 of 64
per_image = true
[[point]]
where = 2
score = "attention"
rows = "last"
keep = 0.25
"""
PLANS = {
    "star": ("star", "alone"),
    "fastervlm+sgl": ("fastervlm+sgl", "large"),
    "visionzip, fastv": (ZIP_AND_FASTV, "alone"),
    "tome": ("tome", "alone"),
}
SHARES = [0.75, 0.5, 0.4]
TOKENS = 16


@pytest.fixture(scope="session")
def tower(llava_model):
    return PlainTower(llava_model)


@pytest.fixture(scope="session")
def plain(llava_model):
    return PlainDecoder(llava_model.model.language_model, llava_model.lm_head, llava_model.config.text_config)


def pictures(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


def vision(stages, pixels, keep):
    point = stages.spec.plan.vision
    carriers = point.carriers(TOKENS * len(pixels), len(pixels), keep)
    return stages("vision", pixel_values=pixels, **{n: np.zeros(size, np.int32) for n, size in carriers.items()})


def star(tower, image, keep):
    embeds = tower.embeds(image)
    kept = best(received(embeds), share(TOKENS, keep))
    return {t: embeds[t] for t in kept}


def fastervlm(tower, image, keep):
    hidden, maps, _ = tower.run(image)
    kept = best(maps[-1].mean(0)[0, 1:], share(TOKENS, keep))
    return {t: tower.project(hidden[-1][1 + t]) for t in kept}


def visionzip(tower, image, keep):
    hidden, maps, keys = tower.run(image)
    count = share(TOKENS, keep)
    merged = max(1, round(count * 10 / 64))
    dominant = best(maps[-1].sum(0)[0, 1:], count - merged)
    features = hidden[-1][1:]
    tokens = {t: features[t] for t in dominant} | contextual(features, keys[-1].mean(0)[1:], dominant, merged)
    assert len(tokens) == count
    return {t: tower.project(tokens[t]) for t in sorted(tokens)}


def tome(tower, image, keep):
    merging = Merging(TOKENS, merge_schedule(TOKENS, share(TOKENS, keep), tower.used))
    hidden, _, _ = tower.run(image, merging)
    tokens = {leader: hidden[-1][i] for i, leader in enumerate(merging.leader) if leader >= 0}
    assert len(tokens) == share(TOKENS, keep)
    return {t: tower.project(tokens[t]) for t in sorted(tokens)}


FORMULAS = {"star": star, "fastervlm+sgl": fastervlm, "visionzip, fastv": visionzip, "tome": tome}


@pytest.mark.parametrize("keep", SHARES)
@pytest.mark.parametrize("name", PLANS)
def test_a_vision_policy_is_its_formula(exported, tower, name, keep):
    stages = exported(*PLANS[name])
    for images in (1, 2):
        pixels = pictures(images, seed=images)
        out = vision(stages, pixels, keep)
        wanted = [FORMULAS[name](tower, torch.from_numpy(image), keep) for image in pixels]
        assert out["kept_vision"].tolist() == [i * TOKENS + t for i, tokens in enumerate(wanted) for t in tokens]
        embeds = torch.stack([row for tokens in wanted for row in tokens.values()]).detach().numpy()
        assert out["visual_embeds"].shape == embeds.shape
        assert np.abs(out["visual_embeds"] - embeds).max() < 1e-4 * np.abs(embeds).max()


@pytest.mark.parametrize("name", PLANS)
def test_keeping_all_is_the_whole_image(exported, tower, name):
    if "visionzip" in name:
        pytest.skip("a target of nothing merged is itself, but dominant and contextual still split")
    out = vision(exported(*PLANS[name]), pictures(1), 1.0)
    assert out["kept_vision"].tolist() == list(range(TOKENS))
    whole = tower.embeds(torch.from_numpy(pictures(1)[0])).detach().numpy()
    assert np.abs(out["visual_embeds"] - whole).max() < 1e-4 * np.abs(whole).max()


BEHIND = {
    "star": (1, all_text_mean),
    "visionzip, fastv": (2, last_row_mean),
    "fastervlm+sgl": (0, None),
}


@pytest.mark.parametrize("keep", SHARES)
@pytest.mark.parametrize("name", BEHIND)
def test_a_decoder_policy_behind_the_vision_stage(exported, tower, plain, llava_model, name, keep):
    """Dropped placeholders leave the prompt, the rest keep their positions, and guidance goes by original index."""
    stages = exported(*PLANS[name])
    layer, score = BEHIND[name]
    assert [p.layer for p in stages.spec.plan.points] == [layer]
    image, spec = stages.spec.tokens.image, stages.spec
    ids = np.array([1, 9, *[image] * TOKENS, 10, 11, 12, 13], np.int64)
    pixels = pictures(1, seed=7)
    seen = vision(stages, pixels, keep)
    visual_at = np.flatnonzero(ids == image)
    rows = np.sort(np.concatenate([np.flatnonzero(ids != image), visual_at[seen["kept_vision"]]]))
    merged = stages("embed", input_ids=ids[rows][None], visual_embeds=seen["visual_embeds"])
    is_visual = merged["is_visual"][0]
    guidance = np.random.default_rng(1).random(TOKENS).astype(np.float32)
    priority = np.zeros(len(rows), np.float32)
    priority[is_visual] = guidance[seen["kept_vision"]]
    count = max(1, len(seen["kept_vision"]) // 2)
    text = int((~is_visual).sum())
    out, got = stages.decode(merged["inputs_embeds"], is_visual, [text + count], positions=rows, priority=priority)

    tokens = FORMULAS[name](tower, torch.from_numpy(pixels[0]), keep)
    look = llava_model.get_input_embeddings().double()
    wide = look(torch.from_numpy(ids[rows])).clone()
    wide[torch.from_numpy(is_visual)] = torch.stack(list(tokens.values()))
    by = score or (lambda alive: torch.from_numpy(priority)[alive.alive])
    wanted, kept = plain.run(wide.detach(), torch.from_numpy(is_visual), {layer: (by, count)}, positions=rows)
    assert got[0].tolist() == kept[0].tolist()
    tail = out["logits"].shape[1]
    assert np.abs(out["logits"][0] - wanted.numpy()[-tail:]).max() < 1e-4 * wanted.abs().max()
    assert spec.plan.vision is not None


@pytest.mark.parametrize("name", PLANS)
def test_graph_rules_hold(exported, name):
    assert not findings_in(export_from_folder(exported(*PLANS[name]).folder))


def test_golden_tensors_replay(exported):
    from engines.bundles.golden import replay

    for plan in PLANS.values():
        stages = exported(*plan)
        assert all(r.agrees for r in replay(stages.folder, stages.spec))


def test_merging_more_than_half_of_a_layer_is_refused(exported):
    point = exported("tome").spec.plan.vision
    assert point.tower_layers == 2
    assert point.carriers(TOKENS, 1, 0.4) == {"keep_vision": 6}
    with pytest.raises(UsageError, match=r"merging 16 tokens down to 1 in 2 layers.*keep at least 6"):
        point.carriers(TOKENS, 1, 0.05)


def test_of_a_zipped_image_two_tokens_stay_at_least(exported):
    point = exported(*PLANS["visionzip, fastv"]).spec.plan.vision
    assert point.carriers(TOKENS, 1, 0.05) == {"keep_vision": 1, "merge_vision": 1}
    assert point.carriers(2 * TOKENS, 2, 0.05) == {"keep_vision": 1, "merge_vision": 1}
    assert point.carriers(2, 1, 0.05) == {"keep_vision": 1, "merge_vision": 1}
    with pytest.raises(UsageError, match="image of 1 visual token is too small"):
        point.carriers(1, 1)
