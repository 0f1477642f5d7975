"""Training: packing several questions changes nothing, stopping and going on changes nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from glyphs import packed
from glyphs.plan import PLANS, Stage
from glyphs.tower_start import position_code, turn
from glyphs.train import Trainer, train
from glyphs.train_data import IGNORE, pack, training_batch

TINY = replace(
    PLANS["small"],
    stages=(Stage(1, 0, 1e-3, 1e-3, images=2), Stage(2, 2, 1e-3, 1e-3, images=2), Stage(3, 1, 1e-3, 0.0, images=2)),
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trainer(tmp_path):
    return Trainer(TINY, tmp_path)


def batch_of(trainer, n=2):
    return training_batch(np.random.Generator(np.random.PCG64(5)), n, trainer.encode, trainer.keywords)


def test_a_block_in_a_pack_gives_the_logits_of_its_question_alone(trainer):
    for parameter in trainer.parameters:
        if parameter.ndim > 1:
            parameter.data.mul_(2)  # else attention is too flat for the test to notice a wrong mask
    model, batch = trainer.model.eval(), batch_of(trainer)
    pixels = packed.pixels_from_images(batch.pixels)
    with torch.inference_mode():
        ours = model.lm_head(
            packed.packed_hidden(model, packed.visual_tokens(model, pixels), trainer.prefix_ids, batch)
        )
        model.set_attn_implementation("sdpa")
        for b in range(batch.tail_block[0].max() + 1):
            at = np.flatnonzero(batch.tail_block[0] == b)
            ids = torch.cat((trainer.prefix_ids, torch.from_numpy(batch.tail_ids[0][at])))[None]
            alone = model(input_ids=ids, pixel_values=pixels[:1]).logits[0, len(trainer.prefix_ids) :]
            torch.testing.assert_close(ours[0, at], alone, atol=2e-5, rtol=1e-4)


def test_labels_are_the_answers_and_their_ends(trainer):
    batch, tokenizer = batch_of(trainer), trainer.tokenizer
    for ids, labels, block in zip(batch.tail_ids, batch.tail_labels, batch.tail_block, strict=False):
        assert block.max() >= 5
        for b in range(block.max() + 1):
            answer = labels[(block == b) & (labels != IGNORE)]
            assert answer[-1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in ids[block == b]
            text = tokenizer.decode(ids[block == b])
            assert text.split(" : ")[-1] == tokenizer.decode(answer[:-1]) or text.endswith("ASSISTANT :")


def test_pack_shifts_labels_by_one():
    ids, labels, hints, keywords, offsets, block = pack([([5, 6], [7, 2]), ([8], [9, 9, 2])], {5: 3, 8: 12}, tail=8)
    assert ids.tolist() == [5, 6, 7, 8, 9, 9, 0, 0]
    assert labels.tolist() == [IGNORE, 7, 2, 9, 9, 2, IGNORE, IGNORE]
    assert keywords.tolist() == [3, 3, 3, 12, 12, 12, -1, -1]
    assert hints.tolist() == [7, *[IGNORE] * 7]
    assert offsets.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert block.tolist() == [0, 0, 0, 1, 1, 1, -1, -1]


def test_going_on_gives_the_same_weights_as_never_stopping(tmp_path):
    straight = Trainer(TINY, tmp_path / "straight")
    for _ in range(6):
        straight.train_step()
    first = Trainer(TINY, tmp_path / "stopped")
    for _ in range(3):
        first.train_step()
    first.save()
    second = Trainer(TINY, tmp_path / "stopped")
    assert second.restore()
    assert second.step == 3
    for _ in range(3):
        second.train_step()
    for a, b in zip(straight.parameters, second.parameters, strict=False):
        assert torch.equal(a, b)


def test_what_stopped_early_stays_stopped(tmp_path):
    """The same command again trains no step more and writes the same weights."""
    plan = replace(TINY, enough=0.0, validate_every=2, validate_on=4)
    runs = []
    for _ in range(2):
        train(plan, tmp_path / "run", tmp_path / "out")
        record = json.loads((tmp_path / "out" / "small" / "training.json").read_text())
        runs.append((record["steps"], (tmp_path / "out" / "small" / "model.safetensors").read_bytes()))
    assert runs[0] == runs[1]
    assert runs[0][0] < plan.steps


def test_a_late_layer_starts_as_the_identity(trainer):
    batch = batch_of(trainer)
    with torch.inference_mode():
        visual = packed.visual_tokens(trainer.model, packed.pixels_from_images(batch.pixels))
        half, full = (
            packed.packed_hidden(trainer.model, visual, trainer.prefix_ids, batch, stride) for stride in (2, 1)
        )
    assert torch.equal(half, full)


def test_the_learning_rate_warms_up_and_falls():
    plan = replace(PLANS["small"], stages=(Stage(100, 0, 1e-3, 1e-4), Stage(200, 1, 5e-4, 0.0)))
    rates = [plan.at(i)[1] for i in range(plan.steps)]
    assert rates[0] < 1e-4 < rates[60] <= 1e-3
    assert rates[99] < 2e-4
    assert rates[100] < 1e-5
    assert rates[-1] < 1e-6
    with pytest.raises(ValueError, match="past the plan"):
        plan.at(plan.steps)


def test_the_position_code_turns():
    x, y = torch.tensor(3.0), torch.tensor(5.0)
    torch.testing.assert_close(turn(1, -2) @ position_code(x, y), position_code(x + 1, y - 2))
