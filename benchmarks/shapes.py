"""``python -m benchmarks.shapes SHAPE OUT``: a checkpoint of a real model's shape with random weights, all made here.

    qwen2_5_vl        (a) a decoder as Qwen2.5-0.5B's (24 layers, width 896, 14 heads, 2 KV heads, intermediate 4,864,
                      tied embeddings), vocabulary 32,000, behind Qwen2.5-VL's tower, its widths divided by 2.5
    llava-1b|3b|7b    (b) LLaVA-1.5: CLIP-L at 336 pixels (576 tokens), a Llama decoder of about that many parameters

Tokenizer, image processor and chat template lie beside the weights; nothing is downloaded. The weights are the classes'
own initialisation under a fixed seed and lie in memory once while they are written. ``IMAGE`` is the size in pixels
that gives shape (a) 1,000 visual tokens; a prompt of ``QUESTION`` has ``TEXT_TOKENS`` others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import click

IMAGE = (700, 1120)  # height, width: 25 × 40 visual tokens of 28 × 28 pixels
QUESTION = "what is in a box on the table"
TEXT_TOKENS = 40  # of shape (a)'s whole prompt, the visual tokens apart
VOCAB = 32_000

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are a helper."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% elif 'text' in c %}{{ c['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TOKENS = {
    "pad": "<|endoftext|>",
    "start": "<|im_start|>",
    "eos": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
LLAVA_TOKENS = {"pad": "<pad>", "start": "<s>", "eos": "</s>", "image": "<image>"}
# layers, width, heads, intermediate; the 3b is OpenLLaMA's, the 7b LLaVA-1.5-7B itself
LLAVA = {"1b": (16, 2048, 16, 5504), "3b": (26, 3200, 32, 8640), "7b": (32, 4096, 32, 11008)}
LAYERS = {"qwen2_5_vl": 24} | {f"llava-{size}": layers for size, (layers, *_) in LLAVA.items()}  # of a shape's decoder


def qwen2_5_vl(folder: Path, *, tied: bool = True, dtype: str = "float32") -> Path:
    """Shape (a) in ``folder``; tied: lm_head is the embedding table. Returns the folder."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    ids = write_tokenizer(folder, QWEN_TOKENS, CHATML)
    # Qwen2.5-VL: 32 layers of width 1,280, 16 heads, intermediate 3,420, every eighth layer sees the whole image.
    vision = {
        "depth": 12,
        "hidden_size": 512,
        "num_heads": 8,
        "intermediate_size": 1368,
        "out_hidden_size": 896,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [2, 5, 8, 11],
    }
    text = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": LAYERS["qwen2_5_vl"],
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32_768,
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
        "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]},
        "tie_word_embeddings": tied,
    }
    special = {f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end", "image", "video")}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=tied, **special)
    write_weights(Qwen2_5_VLForConditionalGeneration, config, folder, ids, dtype)
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16_384}
    Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=size).save_pretrained(folder)
    name_processor(folder, "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor")
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14, "merge_size": 2, "size": size}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")
    return folder


def llava(folder: Path, size: str = "1b", *, dtype: str = "float32") -> Path:
    """Shape (b) in ``folder``, of a size of ``LLAVA``. Returns the folder."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    layers, width, heads, intermediate = LLAVA[size]
    ids = write_tokenizer(folder, LLAVA_TOKENS, VICUNA)
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        bos_token_id=ids["start"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        tie_word_embeddings=False,
    )
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=ids["image"], tie_word_embeddings=False
    )
    write_weights(Llava, config, folder, ids, dtype)
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(folder)
    name_processor(folder, "LlavaProcessor", "CLIPImageProcessor")
    extra = {"processor_class": "LlavaProcessor", "patch_size": 14, "vision_feature_select_strategy": "default"}
    extra["num_additional_image_tokens"] = 1
    (folder / "processor_config.json").write_text(json.dumps(extra, indent=2) + "\n")
    return folder


SHAPES: dict[str, Callable[..., Path]] = {"qwen2_5_vl": qwen2_5_vl}
SHAPES |= {f"llava-{size}": (lambda folder, size=size, **rest: llava(folder, size, **rest)) for size in LLAVA}


def write_weights(model_class: Any, config: Any, folder: Path, ids: dict[str, int], dtype: str) -> None:
    """Initialise and save; generation is greedy and ends at the end token."""
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = model_class(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.config.dtype = dtype
    model.generation_config = GenerationConfig(eos_token_id=ids["eos"], pad_token_id=ids["pad"], do_sample=False)
    model.save_pretrained(folder)


def write_tokenizer(folder: Path, named: dict[str, str], template: str) -> dict[str, int]:
    """A byte-level BPE of ``VOCAB`` tokens whose merges are made up: letter pairs, words of three and four letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a, b in product(["Ġ", *ascii_lowercase], ascii_lowercase)]
    threes = [(a + b, c) for (a, b), c in product(pairs, ascii_lowercase)]
    fours = ((a + b, c + d) for (a, b), (c, d) in product(pairs, pairs[len(ascii_lowercase) :]))
    wanted = VOCAB - len(named) - len(bytes_) - len(pairs) - len(threes)
    merges = [*pairs, *threes, *islice(fours, wanted)]
    tokens = [*bytes_, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named.values()])
    folder.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=named["eos"],
        pad_token=named["pad"],
        extra_special_tokens={f"{name}_token": token for name, token in named.items() if name not in ("eos", "pad")},
        chat_template=template,
    )
    fast.save_pretrained(folder)
    vocab = tokenizer.get_vocab()
    return {name: vocab[token] for name, token in named.items()}


def name_processor(folder: Path, processor: str, image_processor: str) -> None:
    """preprocessor_config.json says the class that other tools look for."""
    path = folder / "preprocessor_config.json"
    found = json.loads(path.read_text())
    path.write_text(
        json.dumps(found | {"processor_class": processor, "image_processor_type": image_processor}, indent=2)
    )


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
def main(shape: str, out: Path, dtype: str) -> None:
    """Write a checkpoint of a real model's shape with random weights."""
    click.echo(SHAPES[shape](out, dtype=dtype))


if __name__ == "__main__":
    main()
