"""Which tokens end an answer, what a generation config asks for that is not done, and a template that is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from exporter.checkpoint import checkpoint_from_folder
from exporter.processor import processor_files, tokens_of
from graphs.errors import BadArtefact
from tests.tiny import tiny_llava


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_llava(tmp_path / "checkpoint")


def generation(folder: Path, **asked: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(asked))


@pytest.mark.parametrize(("asked", "wanted"), [(0, (0,)), (7, (7,)), ([0, 7], (0, 7))])
def test_the_generation_config_says_what_ends_an_answer(
    folder: Path, asked: int | list[int], wanted: tuple[int, ...]
) -> None:
    generation(folder, eos_token_id=asked)
    assert tokens_of(checkpoint_from_folder(folder)).eos == wanted


def test_without_a_generation_config_it_is_what_transformers_makes_of_the_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    source = checkpoint_from_folder(folder)
    assert tokens_of(source).eos == (2,)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [5, 6]}
    (folder / "config.json").write_text(json.dumps(config))
    source = checkpoint_from_folder(folder)
    assert GenerationConfig.from_model_config(source.config).eos_token_id == [5, 6]
    assert tokens_of(source).eos == (5, 6)


def test_a_generation_config_that_names_no_end_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generation(folder, bos_token_id=1)
    assert tokens_of(checkpoint_from_folder(folder)).eos == (2,)
    assert "names no end-of-sequence token, so an answer ends with 2" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["x", [2, None], -1, True])
def test_an_end_that_is_no_token_is_refused(folder: Path, asked: object) -> None:
    generation(folder, eos_token_id=asked)
    with pytest.raises(BadArtefact, match=r"eos_token_id|generation"):
        tokens_of(checkpoint_from_folder(folder))


def test_what_is_asked_for_and_not_done_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generation(folder, eos_token_id=2, num_beams=1, min_length=0, repetition_penalty=1.1, max_new_tokens=8)
    tokens_of(checkpoint_from_folder(folder))
    assert "not done here" not in capsys.readouterr().err
    generation(folder, eos_token_id=2, no_repeat_ngram_size=1, bad_words_ids=[[4]], num_beams=3)
    tokens_of(checkpoint_from_folder(folder))
    assert "no_repeat_ngram_size and num_beams and bad_words_ids, which is not done here" in capsys.readouterr().err


def test_a_missing_chat_template_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processor_files(folder)
    assert "chat template" not in capsys.readouterr().err
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json"):
        if (folder / name).is_file():
            document = json.loads((folder / name).read_text())
            document.pop("chat_template", None)
            (folder / name).write_text(json.dumps(document))
    processor_files(folder)
    assert "has no chat template, without which an export cannot be asked" in capsys.readouterr().err


def test_a_tokenizer_that_fails_is_found_at_the_export(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": ""}))
    with pytest.raises(BadArtefact, match="its tokenizer cannot read a word"):
        processor_files(folder)
