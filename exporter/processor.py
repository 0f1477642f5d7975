"""What travels unchanged with an export: tokenizer, image processor, chat template; and the special tokens."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from exporter.checkpoint import Checkpoint
from graphs.console import say, warn
from graphs.errors import BadArtefact, first_line
from graphs.spec import TEMPLATE_FILE, TEMPLATE_HOLDERS, Tokens

PROCESSOR_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)

# What generate does in greedy decoding too where generation_config.json says so, and no run here → what asks nothing.
UNHEARD: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("num_beams", "guidance_scale", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), ([],)),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty"), ({}, [])),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), ()),
}


def tokens_of(source: Checkpoint) -> Tokens:
    """Special tokens, from generation_config.json where it says more than config.json."""
    from tokenizers import Tokenizer
    from transformers import GenerationConfig

    path = source.folder / "tokenizer.json"
    if not path.is_file():
        raise BadArtefact(f"{path} is missing; save the checkpoint's fast tokenizer with transformers and export again")
    try:
        text = Tokenizer.from_file(str(path)).id_to_token(source.config.image_token_id)
    except Exception as e:
        raise BadArtefact(f"{path} is not a tokenizer ({e}); download the checkpoint again") from None
    if text is None:
        raise BadArtefact(
            f"{path} has no token with the image token's id {source.config.image_token_id}; "
            "the tokenizer does not belong to this config.json, download the checkpoint again"
        )
    path = source.folder / "generation_config.json"
    try:
        asked = GenerationConfig.from_pretrained(source.folder) if path.is_file() else None
    except Exception as e:
        raise BadArtefact(f"{path} is not a generation configuration ({e}); download the checkpoint again") from None
    eos = (asked or GenerationConfig.from_model_config(source.config)).eos_token_id
    if eos is None and (eos := source.text.eos_token_id) is not None:
        say(f"{path} names no end-of-sequence token, so an answer ends with {eos}, the language model's")
    if left := [name for name, idle in UNHEARD.items() if getattr(asked, name, None) not in (None, *idle)]:
        warn(
            f"{path} asks for {' and '.join(left)}, which is not done here: answers will differ from Hugging Face "
            "generate's"
        )
    listed = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not listed:
        raise BadArtefact(f"{source.folder} names no end-of-sequence token; add eos_token_id to generation_config.json")
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in listed):
        raise BadArtefact(
            f"{source.folder}: eos_token_id is {eos!r:.60}, but must be the number of a token; correct it"
        )
    return Tokens(image=source.config.image_token_id, image_text=text, eos=listed, pad=source.text.pad_token_id)


def processor_files(folder: Path) -> list[Path]:
    """Tokenizer, image processor and chat template, as far as there; BadArtefact where one of the first two fails.

    Both are loaded and used once, from the files that travel, as a run will.
    """
    found = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
    if not {"preprocessor_config.json", "processor_config.json"} & {path.name for path in found}:
        raise BadArtefact(
            f"{folder} has no preprocessor_config.json, so images cannot be prepared; download the whole checkpoint"
        )
    with TemporaryDirectory() as place:
        alone = Path(place) / "processor"
        copy_processor(found, alone)  # nothing else travels
        _refuse_broken_image_processor(folder, alone)
        _refuse_broken_tokenizer(folder, alone)
    if not _has_template(folder):
        warn(
            f"{folder} has no chat template, without which an export cannot be asked questions; add "
            "chat_template.jinja and export again"
        )
    return found


def _refuse_broken_image_processor(folder: Path, alone: Path) -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        made = AutoImageProcessor.from_pretrained(alone, local_files_only=True, trust_remote_code=False, backend="pil")
    except Exception as e:
        raise BadArtefact(
            f"{folder}: transformers cannot load its image processor ({first_line(e)}); name one that it knows in "
            "preprocessor_config.json, or use a newer revision of the checkpoint"
        ) from None
    try:
        with np.errstate(all="ignore"):
            pixels = made(images=[[Image.new("RGB", (64, 48), "gray")]], return_tensors="np")["pixel_values"]
        if not np.isfinite(pixels).all():
            raise ValueError("it makes pixels that are not numbers")
    except Exception as e:
        raise BadArtefact(
            f"{folder}: its image processor cannot prepare a grey image ({first_line(e)}); correct "
            "preprocessor_config.json or download it again"
        ) from None


def _refuse_broken_tokenizer(folder: Path, alone: Path) -> None:
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(alone, local_files_only=True, trust_remote_code=False)("a word")
    except Exception as e:
        raise BadArtefact(
            f"{folder}: its tokenizer cannot read a word ({first_line(e)}); correct tokenizer_config.json, or download "
            "it again"
        ) from None


def _has_template(folder: Path) -> bool:
    holders = (folder / name for name in TEMPLATE_HOLDERS)
    return (folder / TEMPLATE_FILE).is_file() or any(
        '"chat_template"' in path.read_text("utf-8", "replace") for path in holders if path.is_file()
    )


def copy_processor(files: list[Path], target: Path) -> None:
    """The files as they are."""
    target.mkdir()
    for path in files:
        shutil.copyfile(path, target / path.name)
