"""The policies on InternVL (tiles, pixel shuffle, a Qwen2 decoder), by the same formulas."""

import numpy as np
import pytest
import torch

from exporter.export import export_checkpoint
from graphs.plan_file import plan_from_toml
from graphs.rules import export_from_folder, findings_in
from tests.policies.onnx_run import Stages
from tests.policies.plain import PlainDecoder, share
from tests.policies.test_decoder_policies import (
    a_talk,
    all_text_mean,
    last_row_mean,
    last_row_of_the_next_layer,
    raters_mean,
)
from tests.policies.tower import best, received
from tests.tiny_families import tiny_internvl

HEAD = 'schema = "saccade.plan/1"\nname = "x"\n'
POINT = '[[point]]\nwhere = {}\nscore = "{}"\nrows = "{}"\nkeep = {}\n'
VISION = '[[point]]\nwhere = "vision"\nscore = "received"\nper_image = true\nkeep = 0.75\n'
PLANS = {
    "star": (HEAD + VISION + POINT.format(1, "attention", "text", 0.5), [(1, all_text_mean)]),
    "fastv, pyramiddrop": (
        HEAD + POINT.format(1, "attention", "last", 0.5) + POINT.format(2, "preview", "last", 0.25),
        [(1, last_row_mean), (2, last_row_of_the_next_layer)],
    ),
    "sparsevlm": (
        HEAD + POINT.format(1, "attention", "raters", 0.5) + POINT.format(2, "attention", "raters", 0.25),
        [(1, raters_mean), (2, raters_mean)],
    ),
}
TILE = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its projector scaled down: with embeddings this wide each token attends to itself only, and all scores tie."""
    from transformers import InternVLForConditionalGeneration

    folder = tiny_internvl(tmp_path_factory.mktemp("internvl"))
    model = InternVLForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.linear_2.parameters():
            parameter.mul_(0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hf(checkpoint):
    from transformers import InternVLForConditionalGeneration

    return InternVLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def plain(hf):
    return PlainDecoder(hf.model.language_model, hf.lm_head, hf.config.get_text_config())


@pytest.fixture(scope="module")
def exports(checkpoint, tmp_path_factory):
    made = {}

    def export(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("internvl_export") / "x"
            export_checkpoint(checkpoint, folder, plan=plan_from_toml(PLANS[name][0]), role="alone")
            made[name] = Stages(folder)
        return made[name]

    return export


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.1])
@pytest.mark.parametrize("name", PLANS)
def test_a_decoder_policy_is_its_formula(exports, plain, name, budget):
    stages, cuts = exports(name), PLANS[name][1]
    embeds, is_visual = a_talk("two images", stages.spec.language.width, seed=int(100 * budget))
    visual, text = int(is_visual.sum()), int((~is_visual).sum())
    counts = [max(1, share(visual, budget) - 2 * i) for i in range(len(cuts))]
    wanted, kept = plain.run(
        torch.from_numpy(embeds[0]),
        torch.from_numpy(is_visual),
        {layer: (score, n) for (layer, score), n in zip(cuts, counts, strict=True)},
    )
    out, got = stages.decode(embeds, is_visual, [text + n for n in counts])
    assert [g.tolist() for g in got] == [k.tolist() for k in kept]
    tail = out["logits"].shape[1]
    assert np.abs(out["logits"][0] - wanted.numpy()[-tail:]).max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("tiles", [1, 3])
def test_star_at_the_vision_stage_works_tile_by_tile(exports, hf, keep, tiles):
    pixels = np.random.default_rng(tiles).standard_normal((tiles, 3, 32, 32)).astype(np.float32)
    stages = exports("star")
    lengths = stages.spec.plan.vision.carriers(TILE * tiles, tiles, keep)
    out = stages("vision", pixel_values=pixels, **{n: np.zeros(k, np.int32) for n, k in lengths.items()})
    with torch.no_grad():
        whole = hf.model.get_image_features(pixel_values=torch.from_numpy(pixels).double()).pooler_output
    scores = torch.stack([received(tile) for tile in whole]).sort(1).values
    assert scores.diff(dim=1).min() > 1e-4
    wanted = [TILE * i + t for i, tile in enumerate(whole) for t in best(received(tile), share(TILE, keep))]
    assert out["kept_vision"].tolist() == wanted
    rows = whole.flatten(0, 1)[wanted].numpy()
    assert np.abs(out["visual_embeds"] - rows).max() < 1e-4 * np.abs(rows).max()


@pytest.mark.parametrize("name", PLANS)
def test_graph_rules_hold(exports, name):
    assert not findings_in(export_from_folder(exports(name).folder))
