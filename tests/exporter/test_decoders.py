"""Language models of every known type inside a LLaVA: the export answers as transformers does, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig

from engines.cascade import Cascade
from engines.talk.memory import Memory
from engines.talk.messages import asked
from exporter.decoders import DECODERS
from exporter.export import export_checkpoint
from exporter.reference import Reference
from graphs.errors import BadArtefact, UsageError
from tests.conftest import Outcome
from tests.tiny import tiny_llava
from tests.tiny_families import tiny_internvl, tiny_qwen3_vl

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
QUESTION = "which digit is red ? how many ?"
TOKENS = 6
ROPE = {"rope_theta": 10_000.0}

# Of each type what its forward must not lose; the three of Qwen's own families are held by tests/families.
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2},
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def assert_answers_as_transformers(checkpoint: Path, out: Path) -> None:
    export_checkpoint(checkpoint, out, policy="none", role="alone")
    cascade = Cascade.from_exports(out, threads=1)
    assert cascade.large
    turn = cascade.turn((asked(QUESTION, IMAGE),), max_new_tokens=TOKENS)
    prompt = Memory(cascade.large).prompt(turn.talk)
    run = cascade.large.generate(prompt, turn.options).finish()
    wanted = Reference(checkpoint).answer(IMAGE, QUESTION, TOKENS)
    assert prompt.line.tolist() == list(wanted.prompt)
    assert run.first_logits is not None
    np.testing.assert_allclose(run.first_logits, wanted.first_logits, atol=2e-4 * np.abs(wanted.first_logits).max())
    assert tuple(run.tokens) == wanted.tokens


def test_features_for_the_decoder_come_in_the_towers_order(tmp_path: Path) -> None:
    """Whatever order the configuration lists its layers in, which chooses the mergers only."""
    checkpoint = tiny_qwen3_vl(tmp_path / "checkpoint", deep=(2, 0))
    assert_answers_as_transformers(checkpoint, tmp_path / "export")


def test_every_type_that_is_taken_is_held_here_or_with_its_family() -> None:
    assert set(TYPES) | {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"} == DECODERS


@pytest.mark.parametrize("text_type", TYPES)
def test_a_decoder_answers_as_transformers(tmp_path: Path, text_type: str) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint", text_type=text_type, **TYPES[text_type])
    assert_answers_as_transformers(checkpoint, tmp_path / "export")


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_positions_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint", text_type="qwen2", rope_parameters=ROPE | ROPES[kind])
    assert_answers_as_transformers(checkpoint, tmp_path / "export")


def test_a_window_over_all_layers_ends_the_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint", text_type="mistral", sliding_window=64)
    spec = export_checkpoint(checkpoint, tmp_path / "export", policy="none", role="alone")
    assert spec.language.max_positions == 64
    assert "64 positions at a time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text_type", "changes", "words"),
    [
        ("gemma", {"head_dim": 8}, "a decoder of type gemma"),
        (
            "phi3",
            {
                "rope_parameters": ROPE
                | {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 128,
                }
            },
            "longrope",
        ),
    ],
)
def test_a_decoder_that_would_lose_something_is_refused(
    saccade_cli: Callable[..., Outcome], tmp_path: Path, text_type: str, changes: dict[str, Any], words: str
) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint", text_type=text_type, **changes)
    with pytest.raises(UsageError, match=words):
        export_checkpoint(checkpoint, tmp_path / "export", policy="none", role="alone")
    told = saccade_cli("export", checkpoint, "-o", tmp_path / "export", "--role", "alone")
    assert told.code == 2
    assert told.stderr.strip().splitlines()[-1].startswith("saccade: ")
    assert not (tmp_path / "export").exists()


def test_two_weights_that_are_stored_and_differ_are_not_tied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """InternVL's published configurations do not say that its head is its own, and the class has it tied by default."""
    checkpoint = tiny_internvl(tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    del config["tie_word_embeddings"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(checkpoint).tie_word_embeddings
    assert_answers_as_transformers(checkpoint, tmp_path / "export")
    assert "config.json ties lm_head.weight" in capsys.readouterr().err


def test_one_weight_that_is_stored_twice_is_one(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    checkpoint = tiny_llava(tmp_path / "checkpoint", tie=True)
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    [embedding] = [name for name in tensors if name.endswith("embed_tokens.weight")]
    save_file(tensors | {"lm_head.weight": tensors[embedding].copy()}, path, metadata={"format": "pt"})
    assert_answers_as_transformers(checkpoint, tmp_path / "export")


@pytest.mark.parametrize("place", ["whole", "text_config"])
def test_a_quantised_checkpoint_is_called_one(tmp_path: Path, place: str) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (config if place == "whole" else config[place])["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadArtefact, match=r"is quantised \(awq\)"):
        export_checkpoint(checkpoint, tmp_path / "export", policy="none", role="alone")


def test_a_tower_without_a_class_token_gives_all_it_has(tmp_path: Path) -> None:
    """llava-interleave: SigLIP behind strategy "full"; what needs a class token says so."""
    checkpoint = tiny_llava(tmp_path / "checkpoint", tower="siglip_vision_model")
    assert_answers_as_transformers(checkpoint, tmp_path / "export")
    with pytest.raises(UsageError, match="a vision tower with a class token"):
        export_checkpoint(checkpoint, tmp_path / "tome", policy="tome", role="alone")


def test_a_tower_whose_features_are_not_known_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint", tower="dinov2")
    with pytest.raises(UsageError, match="vision towers of type dinov2 are not supported"):
        export_checkpoint(checkpoint, tmp_path / "export", policy="none", role="alone")


def test_an_image_processor_that_transformers_does_not_know_is_found_at_the_export(tmp_path: Path) -> None:
    checkpoint = tiny_llava(tmp_path / "checkpoint")
    path = checkpoint / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"image_processor_type": "Qwen2_5_VLImageProcessor"}
    path.write_text(json.dumps(settings))
    with pytest.raises(BadArtefact, match="cannot load its image processor"):
        export_checkpoint(checkpoint, tmp_path / "export", policy="none", role="alone")
