"""A small model of another depth, width and head count guides a large one of its family; unequal grids are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.answer import SmallPass
from engines.cascade import Cascade
from engines.confidence import consistency_of
from engines.guidance import priority_of
from engines.sampling import Options
from engines.talk.memory import Memory
from engines.talk.messages import asked
from engines.trt.bounds import Bounds, profiles_of
from engines.trt.engine import engine_from_onnx
from engines.trt.options import lowering_of
from engines.trt.reading import reading_from
from exporter.export import export_checkpoint
from graphs.compare import TOLERANCES
from graphs.errors import UsageError
from graphs.lowering.export import lowered_export
from graphs.policies import plan_of_policy
from graphs.spec import past_names, spec_from_folder
from plugins.cubin_file import MAGIC
from tests.families.cases import CASES, PROMPTS, pictures
from tests.families.conftest import Sample
from tests.families.reference import guidance_of, pruned_forward

SMALL = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
QUESTION = "which digit is red ?"
pytestmark = pytest.mark.slow


# All but LLaVA-1.5, whose pairs are those of tests/engines.
@pytest.fixture(scope="session", params=[name for name in CASES if name != "llava"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Checkpoints and exports of a pair."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp(f"pair_{request.param}")
    found: dict[str, Any] = {"case": case}
    for role, sizes in (("small", SMALL), ("large", {})):
        found[role] = case.checkpoint(folder / f"{role}_checkpoint", **sizes)
        options = {"fraction": 0.4, "keep": 0.3} if role == "large" else {}
        export_checkpoint(found[role], folder / role, policy="sgl", role=role, **options)
        found[f"{role}_export"] = folder / role
    return found


def loaded(case: Any, folder: Path) -> Sample:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return Sample(case, folder, model, case.hf_processor(folder, model.config), None)


def embedded(sample: Sample, ids: torch.Tensor, inputs: dict[str, torch.Tensor]) -> tuple[Any, Any, Any, Any]:
    """Embeddings, positions, visual rows and deepstack features of a prompt and the tokens behind it."""
    prompt, fed = inputs["input_ids"].shape[1], ids.shape[1] - inputs["input_ids"].shape[1]
    features, *deep = sample.hf_features(inputs)
    is_visual = torch.cat([inputs["input_ids"][0] == sample.model.config.image_token_id, torch.zeros(fed, dtype=bool)])
    embeds = sample.language.embed_tokens(ids).detach()
    embeds[0, is_visual] = features
    positions = sample.hf_positions(inputs)
    behind = (positions.max() + 1 + torch.arange(fed)).expand(*positions.shape[:-1], fed)
    stack = [torch.zeros_like(embeds).index_put((torch.tensor(0), is_visual.nonzero()[:, 0]), d) for d in deep]
    assert prompt + fed == len(is_visual)
    return embeds, torch.cat([positions, behind], -1), is_visual, stack


@pytest.mark.parametrize("by", ["kernel", "body"])
@pytest.mark.parametrize(("role", "served"), [("small", {"ReceivedInCache"}), ("large", {"KeepTopK", "CompactRows"})])
def test_both_become_engines(pair: dict[str, Any], tmp_path: Path, role: str, served: set[str], by: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder: Path = pair[f"{role}_export"]
    spec, plugins = spec_from_folder(folder), by == "kernel"
    lowering = replace(lowering_of("float32", "plugin" if plugins else "body", "current"), capacity=96)
    lowered = lowered_export(folder, spec, tmp_path, lowering, link=True)
    profiles = profiles_of("decoder", lowered.spec, Bounds(64, 96, 32, 8, 2).fitted(lowered.spec, None))
    file, ops = lowered.file("decoder"), lowered.ops["decoder"]
    engine = tmp_path / "decoder.engine"
    asked = "python" if plugins else "none"
    answer = engine_from_onnx(file, engine, sms=[89], profiles=profiles, ops=ops, plugins=asked)
    reading = reading_from(answer["reading"])
    assert set(ops.values()) == served
    assert reading.served == dict.fromkeys(ops, by)
    assert reading.unused == ()
    segments = enumerate(lowered.spec.plan.segments(spec.language.layers))
    wanted = [(f"visible_{j}", f"past_k_{i}", "KV_CACHE_UPDATE", 96) for j, segment in segments for i in segment]
    assert [(a.mask, a.cache, a.grown, a.rows) for a in reading.attentions] == wanted
    assert engine.stat().st_size == answer["bytes"]
    assert (MAGIC in engine.read_bytes()) is plugins


def test_guidance_and_pruned_answer_are_those_of_plain_maps(pair: dict[str, Any]) -> None:
    cascade = Cascade.from_exports(pair["small_export"], pair["large_export"], threshold=1, threads=1)
    (picture,) = pictures(PROMPTS[0])
    looked = cascade.look(picture, QUESTION, max_new_tokens=5)
    answer = cascade.answer_large(looked, max_new_tokens=1)
    small, large = loaded(pair["case"], pair["small"]), loaded(pair["case"], pair["large"])
    inputs = small.hf_inputs(PROMPTS[0])
    ids = torch.cat([inputs["input_ids"], torch.tensor([looked.tokens[:-1]], dtype=torch.int64)], 1)
    wanted = guidance_of(small.language, *embedded(small, ids, inputs)).numpy()
    np.testing.assert_allclose(looked.guidance, wanted, atol=TOLERANCES["float32"] * float(wanted.max()))

    inputs = large.hf_inputs(PROMPTS[0])
    embeds, positions, is_visual, stack = embedded(large, inputs["input_ids"], inputs)
    priority = torch.zeros(len(is_visual))
    priority[is_visual] = torch.from_numpy(looked.guidance)
    plan = plan_of_policy("sgl", "large", 3, fraction=0.4, keep=0.3)
    count = max(1, int(len(wanted) * 0.3 + 1e-9))
    arguments = (embeds, positions, is_visual, plan, (count,), priority, len(is_visual), None, stack)
    reference = pruned_forward(large.language, large.model.lm_head, *arguments)
    ordinal = np.cumsum(is_visual.numpy()) - 1
    kept = [int(ordinal[t]) for t in reference.kept[0] if is_visual[t]]
    assert answer.kept is not None
    assert answer.kept[0].tolist() == kept
    assert answer.tokens[0] == int(reference.logits.argmax())


def test_a_follow_up_of_the_cascade_is_that_of_a_fresh_run(pair: dict[str, Any]) -> None:
    """The small model answers two turns; scores and a large model that comes late are those of empty caches."""
    cascade = Cascade.from_exports(pair["small_export"], pair["large_export"], threshold=0, threads=1)
    assert cascade.small
    talk = cascade.chat(keep=0.3, max_new_tokens=4)
    talk.ask(QUESTION, pictures(PROMPTS[0]))
    turn = cascade.turn((*talk.talk, asked("and what colour ?")), talk._memories, max_new_tokens=4)
    fresh = cascade.turn(turn.talk, max_new_tokens=4)
    looked, anew = cascade.look_at(turn), cascade.look_at(fresh)
    assert looked.prompt.cached > 0 == anew.prompt.cached
    assert looked.tokens == anew.tokens
    assert looked.confidence.confidence == pytest.approx(anew.confidence.confidence, abs=1e-4)
    scores = (consistency_of(cascade.small, p.prompt, p.tokens, looked.guidance, 0.5) for p in (looked, anew))
    assert next(scores) == pytest.approx(next(scores), abs=1e-4)
    late, at_once = cascade.answer_large(looked, 0.3), cascade.answer_large(anew, 0.3, looked.guidance)
    assert late.tokens == at_once.tokens
    assert late.kept is not None
    assert at_once.kept is not None
    assert late.kept[0].tolist() == at_once.kept[0].tolist()


def test_a_draft_changes_no_token_and_no_kept_one(pair: dict[str, Any]) -> None:
    """Any draft: its rows are text, trimmed from every segment's cache, and a follow-up goes on behind the answer."""
    cascade = Cascade.from_exports(pair["small_export"], pair["large_export"], threshold=1, threads=1)
    assert cascade.large
    assert cascade.drafts
    looked = cascade.look(pictures(PROMPTS[2]), QUESTION, max_new_tokens=6)
    prompt = Memory(cascade.large).prompt(looked.turn.talk)
    priority_S = priority_of(prompt, looked.guidance)
    plain = cascade.large.generate(prompt, Options(6), 0.3, priority_S).finish()
    said = [t for t in plain.tokens if t not in cascade.large.spec.tokens.eos]
    for draft in (said, said[:2] + looked_tokens(looked, 4), looked.tokens):
        got = cascade.large.generate(prompt, Options(6), 0.3, priority_S, draft).finish()
        assert got.tokens == plain.tokens
        assert [k.tolist() for k in got.kept] == [k.tolist() for k in plain.kept]
        assert got.cache
        assert plain.cache
        assert [p.tolist() for p in got.cache.positions] == [p.tolist() for p in plain.cache.positions]
        for length, layer in ((plain.cache.lengths[0], 0), (plain.cache.lengths[-1], 2)):
            for name in past_names(layer):
                mine, theirs = (cascade.large.to_host(run.cache.values[name])[:, :, :length] for run in (got, plain))
                np.testing.assert_allclose(mine, theirs, atol=1e-4)
    talks = [cascade.chat(keep=0.3, max_new_tokens=4, draft=draft) for draft in (True, False)]
    for question, shown in ((QUESTION, pictures(PROMPTS[0])), ("and what colour ?", [])):
        drafted, alone = (talk.ask(question, shown) for talk in talks)
        assert drafted.tokens == alone.tokens
        assert alone.draft is None


def looked_tokens(looked: SmallPass, count: int) -> list[int]:
    """The small model's first tokens, over and over, as a draft that is wrong somewhere."""
    return (list(looked.tokens) * count)[:count]


def test_unequal_grids_are_refused(pair: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair["small_export"], other)
    path = other / "processor" / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"size": {"height": 8, "width": 8}}))
    with pytest.raises(UsageError, match="cuts images differently: size"):
        Cascade.from_exports(other, pair["large_export"])
    assert settings.pop("do_resize"), "as the class has it by default, and published files leave it out"
    path.write_text(json.dumps(settings))
    Cascade.from_exports(other, pair["large_export"])
    shutil.copy(pair["small_export"] / "processor" / "preprocessor_config.json", path)
    spec = json.loads((other / "spec.json").read_text())
    spec["grid"]["merge"] += 1
    (other / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(UsageError, match="unequal grids of visual tokens: merge"):
        Cascade.from_exports(other, pair["large_export"])
