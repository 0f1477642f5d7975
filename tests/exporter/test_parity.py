"""The exported graphs in ONNX Runtime against transformers, and against a decoder written by hand here.

Legend: S rows of the prompt, V visual rows, T rows of the whole sequence, G guide rows.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from graphs.compare import compare
from graphs.spec import past_names
from tests.exporter.conftest import EXPORTS
from tests.exporter.driver import Conversation, Exported
from tests.exporter.eager import best, forward

IMAGE, VISUAL = 4, 16  # the placeholder's id; tokens per image
WHOLE = ["small", "large", "mixed"]  # in float32


@dataclass(frozen=True)
class Prompt:
    """ids [1,S]; pixels [N,3,H,W] or None."""

    ids: np.ndarray
    pixels: np.ndarray | None

    def hf(self, dtype=torch.float32):
        feed = {
            "input_ids": torch.from_numpy(self.ids),
            "attention_mask": torch.ones(self.ids.shape, dtype=torch.int64),
        }
        if self.pixels is not None:
            feed["pixel_values"] = torch.from_numpy(self.pixels).to(dtype)
        return feed

    @property
    def is_visual(self):
        return self.ids[0] == IMAGE

    @property
    def text_after(self):
        """Text rows behind the last image."""
        return int(self.is_visual[::-1].argmax()) if self.is_visual.any() else len(self.is_visual)


def prompt_of(images: int, seed: int = 0) -> Prompt:
    rng = np.random.default_rng(seed)

    def words():
        return rng.integers(5, 30, rng.integers(1, 6)).tolist()

    ids = [1, *words()]
    for _ in range(images):
        ids += [IMAGE] * VISUAL + words()
    pixels = rng.standard_normal((images, 3, 32, 32)).astype(np.float32) if images else None
    return Prompt(np.array([ids], np.int64), pixels)


def merged(model: Exported, prompt: Prompt):
    return model.merge(prompt.ids, None if prompt.pixels is None else model.see(prompt.pixels))


def close(got, wanted, tolerance=1e-4):
    wanted = wanted.detach().numpy() if isinstance(wanted, torch.Tensor) else wanted
    result = compare("tensor", np.asarray(got), wanted.astype(got.dtype), tolerance)
    assert result.agrees, result.problem


@pytest.fixture(params=WHOLE)
def model(request, exported):
    return exported(request.param)


@pytest.fixture
def peer(model, hf):
    return hf(EXPORTS[model.folder.name][0])


# Vision and embed


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_vision_is_get_image_features(exported, hf, name, images):
    prompt = prompt_of(images, seed=images)
    with torch.no_grad():
        features = hf(EXPORTS[name][0]).model.get_image_features(torch.from_numpy(prompt.pixels)).pooler_output
    wanted = torch.cat(list(features)).reshape(images * VISUAL, -1)
    close(exported(name).see(prompt.pixels), wanted)


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("images", [0, 1, 2, 3])
def test_embed_is_the_merge_of_transformers(exported, hf, name, images):
    prompt, seen = prompt_of(images, seed=10 + images), {}
    peer = hf(EXPORTS[name][0])
    language = peer.model.language_model
    handle = language.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    with torch.no_grad():
        peer(**prompt.hf())
    handle.remove()
    embeds, is_visual = merged(exported(name), prompt)
    close(embeds, seen["inputs_embeds"])
    np.testing.assert_array_equal(is_visual[0], prompt.is_visual)


# The decoder with nothing pruned


@pytest.mark.parametrize("images", [0, 1, 2])
def test_logits_are_those_of_transformers(model, peer, images):
    prompt = prompt_of(images, seed=20 + images)
    with torch.no_grad():
        wanted = peer(**prompt.hf()).logits
    embeds, is_visual = merged(model, prompt)
    out = Conversation(model).feed(embeds, is_visual, guide=prompt.text_after)
    close(out["logits"], wanted)
    for i in range(len(model.spec.plan.points)):
        assert out[f"kept_{i}"][0].tolist() == list(range(embeds.shape[1]))
    last = Conversation(model).feed(embeds, is_visual, guide=prompt.text_after, tail=3)
    close(last["logits"], wanted[:, -3:])


@pytest.mark.parametrize("cuts", [(7, 25), (1, 2), (22, 23)])
def test_a_prompt_in_three_chunks_and_a_decode_step(model, peer, cuts):
    prompt, answer = prompt_of(2, seed=31), np.array([[9, 12]], np.int64)
    whole = Prompt(np.concatenate([prompt.ids, answer], 1), prompt.pixels)
    with torch.no_grad():
        wanted = peer(**whole.hf()).logits
    embeds, is_visual = merged(model, whole)
    talk, ends, parts = Conversation(model), [*cuts, prompt.ids.shape[1]], []
    for start, end in zip([0, *ends], [*ends, whole.ids.shape[1]], strict=True):
        parts.append(talk.feed(embeds[:, start:end], is_visual[:, start:end])["logits"])
    close(np.concatenate(parts, 1), wanted)


@pytest.mark.parametrize("name", ["small", "large"])
def test_greedy_tokens_are_those_of_generate(exported, hf, name):
    model, peer, answers = exported(name), hf(EXPORTS[name][0]), set()
    for seed in range(6):
        prompt = prompt_of(seed % 3, seed=40 + seed)
        out = peer.generate(**prompt.hf(), do_sample=False, max_new_tokens=6, pad_token_id=0)
        wanted = out[0, prompt.ids.shape[1] :].tolist()
        embeds, is_visual = merged(model, prompt)
        talk = Conversation(model)
        assert talk.greedy(talk.feed(embeds, is_visual, tail=1), most=6) == wanted
        answers.add(tuple(wanted))
    assert len(answers) > 3, "a model that always says the same would pass"


# Pruned


def test_the_decoder_by_hand_is_transformers(hf):
    prompt = prompt_of(1, seed=50)
    wide, plain = hf("untied", "float64"), hf("untied", "float64", "eager")
    with torch.no_grad():
        out = plain(**prompt.hf(torch.float64), output_attentions=True)
        logits, maps = forward(wide, embeds_of(wide, prompt))
    close(logits[None].numpy(), out.logits, 1e-6)
    for mine, theirs in zip(maps, out.attentions, strict=True):
        close(mine[None].numpy(), theirs, 1e-6)


def embeds_of(wide, prompt):
    """Merged embeddings [S,D] in float64."""
    x_SD = wide.get_input_embeddings()(torch.from_numpy(prompt.ids[0])).clone()
    if prompt.pixels is not None:
        features = wide.model.get_image_features(torch.from_numpy(prompt.pixels).double()).pooler_output
        x_SD[torch.from_numpy(prompt.is_visual)] = torch.cat(list(features)).reshape(-1, x_SD.shape[1])
    return x_SD


def pruned_by_hand(wide, prompt, answer, points, counts, priority):
    """Logits of prompt and answer [T,vocab] and the original rows that stay behind each point."""
    with torch.no_grad():
        x_TD = torch.cat([embeds_of(wide, prompt), wide.get_input_embeddings()(torch.tensor(answer))])
        rows, t = prompt.ids.shape[1], x_TD.shape[0]
        guides = slice(rows - prompt.text_after, rows)
        stays: list[list[int]] = []

        def dropped_before(layer, maps):
            for point, count in zip(points, counts, strict=True):
                if point.layer == layer:
                    score_T = torch.from_numpy(priority[0]).double()
                    if point.score == "attention":
                        score_T = maps[layer - 1][:, guides].sum((0, 1))
                    text = np.flatnonzero(~prompt.is_visual).tolist()
                    visual = [i for i in (stays[-1] if stays else range(rows)) if prompt.is_visual[i]]
                    stays.append(sorted(text + best(score_T, visual, count)))
            dropped_T = torch.ones(t, dtype=torch.bool)
            dropped_T[stays[-1] if stays else slice(None)] = False
            dropped_T[rows:] = False
            return dropped_T

        logits, _ = forward(wide, x_TD, dropped_before)
    return logits, stays


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("name", ["large", "mixed"])
def test_pruned_prefill_and_decode_at_any_budget_of_one_export(exported, hf, name, share, images):
    model, prompt, answer = exported(name), prompt_of(images, seed=60 + images), [9, 12, 7]
    wide, points = hf(EXPORTS[name][0], "float64"), exported(name).spec.plan.points
    visual, text = int(prompt.is_visual.sum()), int((~prompt.is_visual).sum())
    counts = [max(1, int(visual * share / (i + 1))) for i in range(len(points))]
    priority = np.random.default_rng(1).random(prompt.ids.shape).astype(np.float32)
    wanted, stays = pruned_by_hand(wide, prompt, answer, points, counts, priority)

    embeds, is_visual = merged(model, prompt)
    talk = Conversation(model)
    keep = tuple(text + n for n in counts)
    # Logits of the last rows only: those behind the images, which no pruning reaches.
    out = talk.feed(embeds, is_visual, keep=keep, guide=prompt.text_after, tail=prompt.text_after, priority=priority)
    rows = np.arange(prompt.ids.shape[1])
    for i, stay in enumerate(stays):
        rows = rows[out[f"kept_{i}"][0]]
        assert rows.tolist() == stay
    parts = [out["logits"]]
    for token in answer:
        step, _ = model.merge(np.array([[token]], np.int64))
        parts.append(talk.feed(step)["logits"])
    close(np.concatenate(parts, 1)[0], wanted[prompt.ids.shape[1] - prompt.text_after :])
    for j, segment in enumerate(model.spec.plan.segments(model.spec.language.layers)):
        length = (prompt.ids.shape[1], *keep)[j] + len(answer)
        assert {talk.past[n].shape[2] for i in segment for n in past_names(i)} <= {length}


def test_pruning_changes_the_answer_and_the_priority_decides(exported):
    model, prompt = exported("large"), prompt_of(1, seed=70)
    embeds, is_visual = merged(model, prompt)
    text = int((~prompt.is_visual).sum())

    def logits(priority, count):
        return Conversation(model).feed(embeds, is_visual, keep=(text + count,), tail=1, priority=priority)["logits"]

    up = np.arange(prompt.ids.shape[1], dtype=np.float32)[None]
    assert np.abs(logits(up, 1) - logits(-up, 1)).max() > 1e-2
    assert np.abs(logits(up, 1) - logits(up, VISUAL)).max() > 1e-2
    np.testing.assert_array_equal(logits(up, VISUAL), logits(-up, VISUAL))


# Guidance


@pytest.mark.parametrize("images", [1, 2])
def test_attention_received_is_the_sum_of_the_maps(exported, hf, images):
    model, prompt, answer = exported("small"), prompt_of(images, seed=80 + images), [9, 12]
    rows = prompt.ids.shape[1]
    whole = Prompt(np.concatenate([prompt.ids, [answer]], 1), prompt.pixels)
    with torch.no_grad():
        maps = hf("untied", attention="eager")(**whole.hf(), output_attentions=True).attentions
    summed_TT = torch.stack(maps).double().sum((0, 1, 2)).numpy()

    embeds, is_visual = merged(model, prompt)
    talk = Conversation(model)
    got = talk.feed(embeds, is_visual, guide=prompt.text_after)["attention_received"]
    assert got.dtype == np.float32
    close(got[0], summed_TT[rows - prompt.text_after : rows, :rows].sum(0))
    layers, heads = model.spec.language.layers, model.spec.language.heads
    assert got.sum() == pytest.approx(layers * heads * prompt.text_after, rel=1e-4)
    code = Conversation(model).feed(embeds, is_visual, guide=prompt.text_after + 1)["attention_received"]
    close(code[0], summed_TT[rows - prompt.text_after - 1 : rows, :rows].sum(0))
    for n, token in enumerate(answer, rows):
        step, _ = model.merge(np.array([[token]], np.int64))
        got = talk.feed(step)["attention_received"]
        assert got.shape == (1, n + 1)
        close(got[0], summed_TT[n, : n + 1])


# Dtypes, golden tensors


@pytest.mark.parametrize("name", ["half", "narrowed"])
def test_a_float16_export_is_float16_and_near_float32(exported, hf, name):
    model, prompt = exported(name), prompt_of(2, seed=90)
    assert model.spec.dtype == "float16"
    assert {t.dtype for t in model.spec.stages["decoder"].inputs if t.name.startswith("past")} == {"float16"}
    dtypes = {t.name: t.dtype for stage in model.spec.stages.values() for t in (*stage.inputs, *stage.outputs)}
    assert dtypes["inputs_embeds"] == dtypes["visual_embeds"] == dtypes["present_v_0"] == "float16"
    assert dtypes["logits"] == dtypes["pixel_values"] == "float32"
    with torch.no_grad():
        wanted = hf(EXPORTS[name][0])(**prompt.hf()).logits
    embeds, is_visual = merged(model, prompt)
    out = Conversation(model).feed(embeds, is_visual, guide=prompt.text_after)
    close(out["logits"], wanted, 2e-2)
    assert out["logits"].dtype == np.float32
    assert "attention_received" not in out or out["attention_received"].dtype == np.float32


def test_a_bfloat16_checkpoint_widened_is_the_same_model(exported, hf):
    model, prompt = exported("widened"), prompt_of(1, seed=91)
    with torch.no_grad():
        wanted = hf("brain")(**prompt.hf()).logits
    embeds, is_visual = merged(model, prompt)
    close(Conversation(model).feed(embeds, is_visual)["logits"], wanted)


@pytest.mark.parametrize("name", EXPORTS)
def test_golden_tensors_replay(exported, name):
    model = exported(name)
    cases = {tuple(key.split("/")[:2]) for key in model.golden}
    assert cases == {
        ("vision", "one"),
        ("vision", "two"),
        ("embed", "one"),
        ("decoder", "prefill"),
        ("decoder", "chunk"),
        ("decoder", "decode"),
    }
    for stage, case in cases:
        sides = {
            side: {k.split("/")[3]: v for k, v in model.golden.items() if k.startswith(f"{stage}/{case}/{side}/")}
            for side in ("in", "out")
        }
        out = model.run(stage, sides["in"])
        assert set(out) == set(sides["out"])
        for tensor, wanted in sides["out"].items():
            result = compare(
                f"{stage}/{case}/{tensor}", out[tensor], wanted, 2e-2 if model.spec.dtype == "float16" else None
            )
            assert result.agrees, (stage, case, tensor, result.problem)
    prefill = model.golden["decoder/prefill/in/inputs_embeds"]
    if model.spec.plan.points:
        assert model.golden["decoder/prefill/out/kept_0"].shape[1] < prefill.shape[1], "golden prunes nothing"
