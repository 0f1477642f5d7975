"""Tiny random checkpoints, built from the families' configuration classes; no weight is downloaded."""

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [
    "USER:",
    "ASSISTANT:",
    *"what which where how many digit colour is the red green blue ?".split(),
    *"0123456789",
]


def write_processor(folder: Path, image_size: int, patch_size: int) -> None:
    """A real tokenizer, image processor and chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, PreTrainedTokenizerFast
    from transformers.models.llava.processing_llava import LlavaProcessor

    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=TEMPLATE,
    )
    size = {"height": image_size, "width": image_size}
    images = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size)
    fast.save_pretrained(folder)
    images.save_pretrained(folder)
    del LlavaProcessor


def tiny_llava(
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tie: bool = False,
    text_type: str = "llama",
    tower: str = "clip_vision_model",
    **sizes: Any,
) -> Path:
    """Save a random LLaVA of a few thousand parameters, with its processor, into ``folder``."""
    import torch
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tie,
    } | {k: v for k, v in sizes.items() if k not in ("image_size", "patch_size")}
    image_size, patch_size = sizes.get("image_size", 32), sizes.get("patch_size", 8)
    vision = AutoConfig.for_model(
        tower,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
    )
    whole = {} if tower.startswith("clip") else {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    text_config = AutoConfig.for_model(text_type, **text)
    config = LlavaConfig(
        vision_config=vision, text_config=text_config, image_token_index=4, tie_word_embeddings=tie, **whole
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_processor(folder, image_size, patch_size)
    return folder
