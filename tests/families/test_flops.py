"""Estimated FLOPs of every family's export against torch's own counter on the Hugging Face model.

Legend: S rows, H heads, d head width, G guide rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engines.bundles.packed import pack_member
from engines.evaluation.flops import Meter, Metered, cost_of, stage_costs, stage_flops
from graphs.rules.rule import stage_from_folder
from tests.families.cases import pictures
from tests.families.conftest import PLAN, Sample

pytestmark = pytest.mark.slow
ROWS, GUIDES = 40, 6
# They take the output of the last layer but one; transformers computes the last one too.
ONE_LESS = {"llava", "llava_next"}
# Their windows are padded to one length here, where transformers cuts each attention to what is there.
PADDED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}


@pytest.fixture
def eager(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sample]:
    """The sample with attention as plain products, which the counter sees."""
    for module in sample.model.modules():
        if (config := getattr(module, "config", None)) is not None:
            monkeypatch.setattr(config, "_attn_implementation_internal", "eager")
    return sample


@torch.no_grad()
def counted(call: Callable[[], Any], unused: str = "none") -> int:
    """What torch counts, without the outer product of rotary embeddings, which stands for a table, and ``unused``."""
    with FlopCounterMode(display=False) as counter:
        call()
    found = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    left_out = [name for name in found if name.rpartition(".")[2].startswith("rotary") or name.endswith(unused)]
    return found["Global"] - sum(found[name] for name in left_out)


def of_language(sample: Sample, rows: int, past: int = 0) -> int:
    """The layers and the head of one row."""
    width = sample.onnx.spec.language.width
    cache = None
    if past:
        with torch.no_grad():
            cache = sample.language(inputs_embeds=torch.randn(1, past, width), use_cache=True).past_key_values
    embeds = torch.randn(1, rows, width)
    layers = counted(lambda: sample.language(inputs_embeds=embeds, past_key_values=cache, use_cache=True))
    return layers + counted(lambda: sample.model.lm_head(torch.randn(1, 1, width)))


def test_a_prefill_pruned_and_whole_and_a_decode_step(eager: Sample) -> None:
    language, spec = eager.onnx.spec.language, eager.onnx.spec
    cost = stage_costs(eager.onnx.folder, spec)["decoder"]
    empty = {f"P_{i}": 0 for i in range(3)}
    assert cost.uncounted == ()
    received = 2 * language.heads * GUIDES * ROWS * language.head_dim  # the map that the first point goes by
    whole = {"S": ROWS, "S_1": ROWS, "S_2": ROWS, "G": GUIDES, "R": 1, **empty}
    assert cost.flops(whole) - received == of_language(eager, ROWS)
    # Every layer costs alike, so a pruned run is one part of runs at each of its lengths.
    head = counted(lambda: eager.model.lm_head(torch.randn(1, 1, language.width)))
    lengths = [len(part) for part in PLAN.segments(language.layers)]
    parts = [
        (of_language(eager, n) - head) * k // language.layers for n, k in zip((ROWS, 25, 11), lengths, strict=True)
    ]
    assert cost.flops(whole | {"S_1": 25, "S_2": 11}) - received == sum(parts) + head
    step = {"S": 1, "S_1": 1, "S_2": 1, "G": 1, "R": 1, **dict.fromkeys(empty, ROWS)}
    rated = 2 * language.heads * (ROWS + 1) * language.head_dim
    assert cost.flops(step) - rated == of_language(eager, 1, past=ROWS)


def test_packed_stages_cost_what_the_canonical_ones_do(sample: Sample, tmp_path: Path) -> None:
    folder, spec = sample.onnx.folder, sample.onnx.spec
    packed = pack_member("one", folder, spec, tmp_path / "cpu", "fp32").spec
    lengths = (f"{name}_{i}" for name in ("S", "P") for i in range(3))
    sizes = {name: 3 + i for i, name in enumerate(("S", "G", "R", "N", "V", *lengths))}
    for stage, cost in stage_costs(tmp_path, packed).items():
        wanted = cost_of(stage_from_folder(folder, spec, stage))
        known = sizes | dict.fromkeys({*cost.symbols, *wanted.symbols} - {*sizes}, 11)
        assert cost.uncounted == wanted.uncounted == ()
        assert cost.flops(known) == wanted.flops(known), stage


@pytest.mark.parametrize("shapes", [[(40, 64)], [(64, 64), (24, 40)]], ids=str)
def test_the_vision_stage(eager: Sample, shapes: list[tuple[int, int]]) -> None:
    costs = stage_costs(eager.onnx.folder, eager.onnx.spec)
    assert costs["vision"].uncounted == ()
    meter = Meter()

    class Nothing:
        def run(self, feeds: Any, host: Any = (), device: Any = (), in_place: Any = None) -> dict[str, Any]:
            return {}

        def to_host(self, value: Any) -> np.ndarray:
            return value

    seen = eager.onnx.seen(pictures(shapes))
    Metered(Nothing(), "vision", costs["vision"], meter).run(seen.feeds)
    found = stage_flops("large", meter.taken(), costs)["large_vision"]
    inputs = eager.visual_inputs(eager.hf_inputs(shapes))
    last = eager.model.config.vision_config.to_dict().get("num_hidden_layers", 0) - 1
    unused = f"encoder.layers.{last}" if eager.case.name in ONE_LESS else "none"
    wanted = counted(lambda: eager.model.model.get_image_features(**inputs, return_dict=True), unused)
    if eager.case.name in PADDED:
        assert wanted <= found <= 1.6 * wanted
    else:
        assert found == wanted
