"""FastV, PyramidDrop and SparseVLM in decoders with three position axes, traced alone, at three budgets.

Llama's and Qwen2's decoders, which all other families have, are in test_decoder_policies, test_second_family and
test_budgets, with their caches. These are fed equal positions on all axes, where rotary angles are those of one.
"""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from engines.budgets import cuts_of
from exporter.program import DecoderProgram, VisionProgram
from exporter.stages import examples_of
from exporter.trace import finish, onnx_from_program
from graphs.plan import PrunePoint, PruningPlan
from tests.policies.plain import PlainDecoder
from tests.policies.test_budgets import Recycling
from tests.policies.test_decoder_policies import (
    a_talk,
    last_row_mean,
    last_row_of_the_next_layer,
    raters_mean,
)

FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
# policies that the plan is made of → its points, the score of each by formula
PLANS = {
    ("fastv", "pyramiddrop"): (
        (
            PrunePoint(layer=1, score="attention", rows="last", keep=0.5),
            PrunePoint(layer=2, score="preview", rows="last", keep=0.2),
        ),
        (last_row_mean, last_row_of_the_next_layer),
    ),
    ("sparsevlm",): (
        (
            PrunePoint(layer=1, score="attention", rows="raters", keep=0.5, merge=0.3),
            PrunePoint(layer=2, score="attention", rows="raters", keep=0.2),
        ),
        (raters_mean, raters_mean),
    ),
}
BUDGETS = [(0.8, 0.6), (0.5, 0.25), (0.2, 0.1)]
pytestmark = pytest.mark.slow


@torch.no_grad()
@pytest.mark.parametrize("policies", PLANS, ids="+".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy_is_its_formula(case_of, name, policies):
    case, (points, scores) = case_of(name), PLANS[policies]
    plan = PruningPlan(name="x", points=points).validated(3)
    family = case.source.family
    program = DecoderProgram(case.skeleton, family, plan, case.language)
    vision = VisionProgram(case.skeleton, family, case.grid, case.language)
    feed, dims = examples_of(vision, program, case.language, case.grid, torch.float32)["decoder"]
    model = onnx_from_program(program, feed, dims)
    RemoveUnusedNodesPass()(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(finish(model)).SerializeToString(), options)
    plain = PlainDecoder(case.sample.language, case.hf.lm_head, case.hf.config.get_text_config())

    for ratios in BUDGETS:
        embeds, is_visual = a_talk("two images", case.language.width, seed=int(100 * ratios[0]))
        rows, visual = len(is_visual), int(is_visual.sum())
        text = rows - visual
        cuts = cuts_of(plan, text, [visual], [visual], ratios)
        lengths = {n: len(v) for cut in cuts for n, v in cut.feeds.items()}
        by = {
            point.layer: (
                score,
                Recycling(cut.rows - text, lengths[f"merge_{i}"], lengths[f"recycle_{i}"], rows)
                if point.merge
                else cut.rows - text,
            )
            for i, (point, score, cut) in enumerate(zip(points, scores, cuts, strict=True))
        }
        wanted, kept = plain.run(torch.from_numpy(embeds[0]), torch.from_numpy(is_visual), by)
        position = np.arange(rows)
        behind = rows - 1 - int(np.flatnonzero(is_visual).max())
        known = {
            "inputs_embeds": embeds,
            "position_ids": np.tile(position, (3, 1, 1)),
            "is_visual": is_visual[None],
            "guide": np.zeros(1 if points[0].rows == "last" else behind, np.int32),
            "tail": np.zeros(1, np.int32),
            **{n: np.zeros(size, np.int32) for n, size in lengths.items()},
        }
        empty = np.zeros((1, case.language.kv_heads, 0, case.language.head_dim), np.float32)
        nothing = np.zeros_like(embeds)
        fed = {n: known.get(n, nothing if n.startswith("deepstack") else empty) for n in program.inputs}
        out = dict(zip(program.outputs, session.run(None, fed), strict=True))
        assert out["kept_0"][0].tolist() == kept[0].tolist()
        assert out["kept_0"][0][out["kept_1"][0]].tolist() == kept[1].tolist()
        assert np.abs(out["logits"][0, -1] - wanted[-1].numpy()).max() < 1e-4 * float(wanted.abs().max())
