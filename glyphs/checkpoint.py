"""The two configurations, the shared tokenizer and processor, and how a checkpoint folder is written."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from glyphs.data import NAMES
from glyphs.scenes import PATCH, SIDE

PAIR = Path(__file__).with_name("pair")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = "look and answer . USER ASSISTANT : ? which digit is what colour the how many read digits in order".split()
VISUAL_TOKENS = (SIDE // PATCH) ** 2
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
{{ messages[0]['content'] if messages[0]['content'] is string else messages[0]['content'][0]['text'] }} {% else -%}
look and answer. {% endif -%}
{%- for message in messages if message['role'] != 'system' -%}
{{ message['role'] | upper }}: {% if message['content'] is string -%}
{{ message['content'] }} {% else -%}
{%- for part in message['content'] if part['type'] == 'image' %}<image>
{% endfor -%}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""
PREFIX = "look and answer. USER: <image>\n"
SUFFIX = " ASSISTANT:"

# layers, width, ffn, heads, key-value heads | tower: layers, width, ffn, heads
SHAPES = {
    "large": (24, 64, 192, 4, 2, 3, 128, 384, 8),
    "small": (6, 48, 128, 3, 1, 2, 96, 192, 6),
}


def config_from_name(name: str) -> LlavaConfig:
    """The configuration of "large" or "small"."""
    layers, width, ffn, heads, kv_heads, tower_layers, tower_width, tower_ffn, tower_heads = SHAPES[name]
    ids = {token: i for i, token in enumerate(vocabulary())}
    special = dict(bos_token_id=ids["<s>"], eos_token_id=ids["</s>"], pad_token_id=ids["<pad>"])
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=tower_width,
        intermediate_size=tower_ffn,
        num_hidden_layers=tower_layers,
        num_attention_heads=tower_heads,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=tower_width,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<image>"],
        vision_feature_layer=-1,
        image_seq_length=VISUAL_TOKENS,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        **special,
    )


def vocabulary() -> tuple[str, ...]:
    """Every token, in the order of its id."""
    return (*SPECIAL, *map(str, range(10)), *NAMES, *WORDS)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words and punctuation; `<s>` in front; decoding joins the tokens with single spaces."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_processor() -> LlavaProcessor:
    """The processor of both models."""
    size = {"height": SIDE, "width": SIDE}
    image = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image,
        new_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def save_checkpoint(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Everything `from_pretrained` and the three Auto classes need."""
    config = model.config
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=9,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    processor = new_processor()
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
