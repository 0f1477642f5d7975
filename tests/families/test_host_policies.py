"""DivPrune, CDPruner and random draws on every family: what is chosen, by formula, and the answer behind it.

The families' one export serves: these policies need no graph of their own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.model import Model
from engines.sampling import Options
from engines.talk.memory import Memory
from engines.talk.messages import asked
from engines.vision import features_of
from graphs.compare import TOLERANCES
from graphs.plan import VisionPoint
from tests.families.cases import PROMPTS, pictures
from tests.families.conftest import PLAN, Sample
from tests.families.reference import pruned_forward
from tests.policies.test_runtime import dpp_map, max_min

QUESTION, COUNT = "which digit is red ?", 8
SCORES = ("divprune", "cdpruner", "random")
pytestmark = pytest.mark.slow


def planned(sample: Sample, score: str) -> Model:
    """The family's export under a plan whose vision point is the host's; its decoder's points keep what is left."""
    points = tuple(p.model_copy(update={"keep": 1.0}) for p in PLAN.points)
    vision = VisionPoint(score=score, count=COUNT, per_image=True, seed=3)
    plan = PLAN.model_copy(update={"vision": vision, "points": points})
    return Model(sample.onnx.folder, sample.onnx.spec.model_copy(update={"plan": plan}), threads=1)


def chosen(score: str, embeds_VD: np.ndarray, text_GD: np.ndarray, image: int = 0) -> list[int]:
    """The formula."""
    count = min(COUNT, len(embeds_VD))
    if score == "divprune":
        return max_min(embeds_VD, count)
    if score == "cdpruner":
        return dpp_map(embeds_VD, text_GD, count)
    return sorted(np.random.default_rng([3, image]).permutation(len(embeds_VD))[:count].tolist())


@pytest.mark.parametrize("score", SCORES)
def test_a_host_policy_is_its_formula_and_the_answer_follows(sample: Sample, score: str) -> None:
    model = planned(sample, score)
    prompt = Memory(model).prompt((asked(QUESTION, pictures(PROMPTS[0])[0]),))
    inputs = sample.hf_inputs(PROMPTS[0])
    features, *deep = sample.hf_features(inputs)
    ids, language = inputs["input_ids"], sample.language
    is_visual = ids[0] == sample.onnx.spec.tokens.image
    embeds = language.embed_tokens(ids).detach()
    behind = embeds[0, int(is_visual.nonzero()[-1]) + 1 :].double().numpy()
    kept = chosen(score, features.double().numpy(), behind)
    assert prompt.kept_visual is not None
    assert prompt.kept_visual.tolist() == kept

    embeds[0, is_visual] = features
    stack = [torch.zeros_like(embeds).index_put((torch.tensor(0), is_visual.nonzero()[:, 0]), d) for d in deep]
    stays = ~is_visual
    stays[is_visual.nonzero()[kept, 0]] = True
    positions, head, rows = sample.hf_positions(inputs)[..., stays], sample.model.lm_head, int(stays.sum())
    nothing = PLAN.model_copy(update={"points": ()})
    wanted = pruned_forward(
        language,
        head,
        embeds[:, stays],
        positions,
        is_visual[stays],
        nothing,
        (),
        torch.zeros(rows),
        rows,
        deepstack=[d[:, stays] for d in stack],
    ).logits.numpy()
    got = model.generate(prompt, Options(max_new_tokens=1)).finish().first_logits
    np.testing.assert_allclose(got, wanted, atol=TOLERANCES["float32"] * float(np.abs(wanted).max()))


def test_each_image_keeps_its_own(sample: Sample) -> None:
    model = planned(sample, "divprune")
    seen = model.processor.look(*pictures(PROMPTS[2]))
    features = features_of(model, seen, np.zeros(1, np.int64))
    parts = np.split(sample.hf_features(sample.hf_inputs(PROMPTS[2]))[0].double().numpy(), np.cumsum(seen.tokens)[:-1])
    firsts = np.cumsum([0, *seen.tokens])
    wanted = [int(firsts[i]) + t for i, part in enumerate(parts) for t in chosen("divprune", part, part, i)]
    assert features.kept is not None
    assert features.kept.tolist() == wanted
