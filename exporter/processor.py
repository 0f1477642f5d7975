"""What travels unchanged with an export: tokenizer, image processor, chat template; and the special tokens."""

import shutil
from pathlib import Path

from exporter.checkpoint import Checkpoint
from graphs.errors import BadArtefact
from graphs.spec import Tokens

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
        raise BadArtefact(f"{path} is no tokenizer ({e}); download the checkpoint again") from None
    if text is None:
        raise BadArtefact(
            f"{path} has no token with the image token's id {source.config.image_token_id}; "
            "the tokenizer does not belong to this config.json"
        )
    eos = source.text.eos_token_id
    if (source.folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(source.folder).eos_token_id or eos
    listed = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    if not listed:
        raise BadArtefact(f"{source.folder} names no end-of-sequence token; add eos_token_id to generation_config.json")
    return Tokens(image=source.config.image_token_id, image_text=text, eos=listed, pad=source.text.pad_token_id)


def copy_processor(folder: Path, target: Path) -> None:
    """Tokenizer, image processor and chat template as they are."""
    target.mkdir()
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if not (target / "preprocessor_config.json").exists() and not (target / "processor_config.json").exists():
        raise BadArtefact(
            f"{folder} has no preprocessor_config.json, so images cannot be prepared; download the whole checkpoint"
        )
