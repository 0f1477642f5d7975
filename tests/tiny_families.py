"""A tiny random checkpoint of every family, with tokenizer, image processor and chat template in its style.

Built from the families' configuration classes; no weight and no file is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny import WORDS

CHATML = (
    "{%% for m in messages %%}{{ '<|im_start|> ' + m['role'] + '\n' }}{%% for c in m['content'] %%}"
    "{%% if c['type'] == 'image' %%}{{ %r }}{%% else %%}{{ c['text'] }}{%% endif %%}{%% endfor %%}"
    "{{ ' <|im_end|>\n' }}{%% endfor %%}{%% if add_generation_prompt %%}{{ '<|im_start|> assistant\n' }}{%% endif %%}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{{ '<image>\n' }}{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
SMOL = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}:"
    "{% else %}: {% endif %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% else %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
CONTROL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
TALK = [*WORDS, "user", "assistant", "User:", "Assistant:", "and", "compare"]
VOCAB = 96
SPREAD = 0.3

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def write_tokenizer(folder: Path, specials: list[str], template: str, named: dict[str, str]) -> None:
    """A real fast tokenizer of whole words; ``named`` become its attributes, as the real ones have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(dict.fromkeys([*CONTROL, *specials, *TALK]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*CONTROL, *specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
        chat_template=template,
    )
    fast.save_pretrained(folder)


def id_of(special: str, specials: list[str]) -> int:
    """A special token's id."""
    return [*CONTROL, *specials].index(special)


def save_random(model_class: Any, config: Any, folder: Path, seed: int, dtype: str) -> None:
    """Random weights, wide enough that greedy answers vary."""
    import torch

    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed_tokens" in name else SPREAD)
            elif parameter.dim() == 1 and name.endswith("newline"):
                parameter.normal_()
        # An answer that holds the placeholder would be embedded as text by transformers, as an image by the export.
        model.lm_head.weight[config.image_token_id] = 0
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def text_of(sizes: dict[str, Any]) -> dict[str, Any]:
    """The decoder's sizes, some of them changed."""
    return TEXT | sizes


def tiny_internvl(folder: Path, *, seed: int = 0, dtype: str = "float32", **sizes: Any) -> Path:
    """InternVL over a Qwen2 decoder: tiles of 32×32 pixels, 4×4 patches, 2×2 tokens each."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl import InternVLVisionConfig

    specials = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**TOWER, image_size=32, patch_size=8),
        text_config=Qwen2Config(**text_of(sizes)),
        image_token_id=id_of("<IMG_CONTEXT>", specials),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    save_random(InternVLForConditionalGeneration, config, folder, seed, dtype)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    write_tokenizer(folder, specials, CHATML % "<IMG_CONTEXT>\n", names | {"video_token": "<video>"})
    GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=6).save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "InternVLProcessor", "image_seq_length": 4}\n')
    return folder


QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PATCH = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def finish_qwen(folder: Path, patch: int = 4) -> Path:
    """Tokenizer, image processor and template of the Qwen families."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    write_tokenizer(folder, QWEN, CHATML % "<|vision_start|><|image_pad|><|vision_end|>", {"image_token": QWEN[2]})
    size = {"shortest_edge": 256, "longest_edge": 4096}
    Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=size).save_pretrained(folder)
    return folder


def qwen_ids() -> dict[str, int]:
    """The special tokens that a configuration names."""
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {name: id_of(token, QWEN) for name, token in zip(names, QWEN, strict=True)}


def mrope(sizes: dict[str, Any]) -> dict[str, Any]:
    """A decoder whose rotary angles go by time, row and column."""
    text = text_of(sizes)
    half = (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]) // 2
    section = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    return text | {"rope_parameters": rope}


def tiny_qwen2_vl(folder: Path, *, seed: int = 0, dtype: str = "float32", **sizes: Any) -> Path:
    """Qwen2-VL: every tower layer sees its whole image."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = mrope(sizes)
    vision = PATCH | {"depth": 2, "embed_dim": 32, "hidden_size": text["hidden_size"], "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(vision_config=vision, text_config=text, **qwen_ids())
    save_random(Qwen2VLForConditionalGeneration, config, folder, seed, dtype)
    return finish_qwen(folder)


def tiny_qwen2_5_vl(folder: Path, *, seed: int = 0, dtype: str = "float32", **sizes: Any) -> Path:
    """Qwen2.5-VL: windows of 4×4 patches in one layer, whole images in the other."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = mrope(sizes)
    vision = PATCH | {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **qwen_ids())
    save_random(Qwen2_5_VLForConditionalGeneration, config, folder, seed, dtype)
    return finish_qwen(folder)


def tiny_qwen3_vl(
    folder: Path, *, seed: int = 3, dtype: str = "float32", deep: tuple[int, ...] = (0, 1), **sizes: Any
) -> Path:
    """Qwen3-VL: a learned position table of 6×6, features of two tower layers into the first two decoder layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = mrope({"head_dim": 12} | sizes)
    vision = PATCH | {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": list(deep),
    }
    config = Qwen3VLConfig(vision_config=vision, text_config=text, **qwen_ids())
    save_random(Qwen3VLForConditionalGeneration, config, folder, seed, dtype)
    return finish_qwen(folder)


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def tiny_llava_15(folder: Path, *, seed: int = 0, dtype: str = "float32", **sizes: Any) -> Path:
    """LLaVA-1.5 like the others here, with weights wide enough that its greedy answers vary."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER | {"num_hidden_layers": 3}, image_size=32, patch_size=8),
        text_config=LlamaConfig(**text_of(sizes)),
        image_token_index=id_of("<image>", ["<image>"]),
        tie_word_embeddings=False,
    )
    save_random(LlavaForConditionalGeneration, config, folder, seed, dtype)
    write_tokenizer(folder, ["<image>"], PLAIN, {"image_token": "<image>"})
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def tiny_llava_next(folder: Path, *, seed: int = 2, dtype: str = "float32", **sizes: Any) -> Path:
    """LLaVA-NeXT: a CLIP tower over tiles of 32×32, 4×4 tokens each."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER | {"num_hidden_layers": 3}, image_size=32, patch_size=8),
        text_config=LlamaConfig(**text_of(sizes)),
        image_token_index=id_of("<image>", ["<image>"]),
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    save_random(LlavaNextForConditionalGeneration, config, folder, seed, dtype)
    write_tokenizer(folder, ["<image>"], PLAIN, {"image_token": "<image>"})
    LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    ).save_pretrained(folder)
    return folder


def tiny_llava_onevision(folder: Path, *, seed: int = 1, dtype: str = "float32", **sizes: Any) -> Path:
    """LLaVA-OneVision: a SigLIP tower, maps of more than 3 tiles shrunk."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    pinpoints = [*PINPOINTS, [96, 64], [64, 96], [32, 32]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, image_size=32, patch_size=8, vision_use_head=False),
        text_config=Qwen2Config(**text_of(sizes)),
        image_token_index=id_of("<image>", ["<image>"]),
        video_token_index=id_of("<video>", ["<image>", "<video>"]),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_3",
        tie_word_embeddings=False,
    )
    save_random(LlavaOnevisionForConditionalGeneration, config, folder, seed, dtype)
    write_tokenizer(folder, ["<image>", "<video>"], CHATML % "<image>\n", {"image_token": "<image>"})
    LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints).save_pretrained(
        folder
    )
    return folder


SMOL_TOKENS = [
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
]


def _tiny_idefics(
    folder: Path, config_class: Any, model_class: Any, image_processor: Any, seed: int, dtype: str, sizes: Any
) -> Path:
    from transformers import LlamaConfig

    config = config_class(
        vision_config=TOWER | {"image_size": 32, "patch_size": 8},
        text_config=LlamaConfig(**text_of(sizes)),
        image_token_id=id_of("<image>", SMOL_TOKENS),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    save_random(model_class, config, folder, seed, dtype)
    write_tokenizer(folder, SMOL_TOKENS, SMOL, {})
    image_processor(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    ).save_pretrained(folder)
    return folder


def tiny_idefics3(folder: Path, *, seed: int = 0, dtype: str = "float32", **sizes: Any) -> Path:
    """Idefics3: tiles of 32×32, 2×2 tokens each."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    classes = (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil)
    return _tiny_idefics(folder, *classes, seed, dtype, sizes)


def tiny_smolvlm(folder: Path, *, seed: int = 0, dtype: str = "float32", **sizes: Any) -> Path:
    """SmolVLM: the same under its own names."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    classes = (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil)
    _tiny_idefics(folder, *classes, seed, dtype, sizes)
    (folder / "processor_config.json").write_text('{"processor_class": "SmolVLMProcessor", "image_seq_len": 4}\n')
    return folder


TINY: dict[str, Callable[..., Path]] = {
    "llava": tiny_llava_15,
    "internvl": tiny_internvl,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "llava_next": tiny_llava_next,
    "llava_onevision": tiny_llava_onevision,
    "idefics3": tiny_idefics3,
    "smolvlm": tiny_smolvlm,
}
