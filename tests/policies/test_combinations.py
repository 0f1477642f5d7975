"""Named policies joined by ``+``, and star, from pixels to logits on families of every kind of image.

The reference is the eager model: its visual tokens pruned by formula, the rows that are left through its own layers.
"""

import numpy as np
import pytest
import torch

from engines.cascade import Cascade
from engines.guidance import random_guidance
from exporter.export import export_checkpoint
from graphs.rules import export_from_folder, findings_in
from tests.families.cases import pictures
from tests.families.reference import pruned_forward
from tests.policies.plain import share
from tests.policies.test_vision_families import CLASSED, SHAPES, expected, groups_of

QUESTION = "which digit is red ?"
# family, policy, role, share at the vision stage and behind
CASES = [
    ("internvl", "visionzip+sgl", "large", (0.75, 0.25)),
    ("qwen3_vl", "visionzip+sgl", "large", (0.5, 0.2)),
    ("qwen2_5_vl", "star", "alone", (0.5, 0.2)),
]
SCORE = {"visionzip": "zip", "star": "received"}
pytestmark = pytest.mark.slow


@torch.no_grad()
@pytest.mark.parametrize(("name", "policy", "role", "keep"), CASES)
def test_a_combination_is_its_parts_in_turn(case_of, tmp_path, name, policy, role, keep):
    case = case_of(name)
    spec = export_checkpoint(case.folder, tmp_path / "x", policy=policy, role=role)
    assert not findings_in(export_from_folder(tmp_path / "x"))
    cascade = Cascade.from_exports(tmp_path / "x", threads=1) if role == "alone" else None
    if cascade is None:
        from engines.model import Model

        cascade = Cascade(None, Model(tmp_path / "x", spec, threads=1))
    (picture,) = pictures(SHAPES[0])
    seen, reference = case.seen(SHAPES[0]), case.reference(SHAPES[0])
    guidance = random_guidance(sum(seen.tokens), 4)
    given = {"guidance": guidance} if cascade.large.spec.plan.uses_priority else {}
    answer = cascade.ask(picture, QUESTION, keep=keep, max_new_tokens=1, **given)

    tokens = {}
    for group in groups_of(case, seen):
        found, clear = expected(SCORE[policy.partition("+")[0]], reference, group, keep[0], name in CLASSED)
        assert clear == 0 or clear > 1e-6
        tokens |= {int(group[t]): row for t, row in found.items()}
    assert answer.kept[0].tolist() == list(tokens)

    language, inputs = case.sample.language, reference.inputs
    is_visual = inputs["input_ids"][0] == spec.tokens.image
    stays = ~is_visual
    stays[is_visual.nonzero()[list(tokens), 0]] = True
    values = torch.stack(list(tokens.values())).split(reference.outputs[0].shape[1], 1)
    embeds = language.embed_tokens(inputs["input_ids"]).detach()[:, stays]
    visual = is_visual[stays]
    places = torch.tensor(0), visual.nonzero()[:, 0]
    stack = [torch.zeros_like(embeds).index_put(places, value) for value in values[1:]]
    embeds = embeds.index_put(places, values[0])
    priority = torch.zeros(len(visual), dtype=torch.float64)
    priority[visual] = torch.from_numpy(guidance[list(tokens)]).double()
    count = min(len(tokens), share(sum(seen.tokens), keep[1]))
    positions = case.sample.hf_positions(inputs)[..., stays]
    wanted = pruned_forward(
        language,
        case.hf.lm_head,
        embeds,
        positions,
        visual,
        spec.plan,
        (count,),
        priority,
        len(visual),
        deepstack=stack,
    )
    ordinal = np.cumsum(visual.numpy()) - 1
    left = [list(tokens)[int(ordinal[t])] for t in wanted.kept[0] if visual[t]]
    assert answer.kept[1].tolist() == left
    assert answer.tokens[0] == int(wanted.logits.argmax())
