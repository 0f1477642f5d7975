"""Which model families the tool takes, and which it does not and why; what ``saccade show families`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FamilyNote:
    """A family by its name in spec.json. architecture: as config.json has it. example: a checkpoint people use."""

    name: str
    architecture: str
    example: str
    image: str
    note: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)  # score of the vision stage → why it does not serve


NO_CLASS = "its vision tower has no class token"
JOINED = "its tokens are cut from tiles and joined by place behind the tower, and tokens merged inside have lost theirs"
PATCHES = "its tower takes patches of all images in blocks that the host lays out, and merging inside would undo them"


@dataclass(frozen=True)
class Refused:
    """An architecture that is not taken, why, and what to take instead."""

    name: str
    architecture: str
    reason: str


KNOWN = (
    FamilyNote("llava", "LlavaForConditionalGeneration", "llava-hf/llava-1.5-7b-hf", "one tile"),
    FamilyNote(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "a whole view and tiles joined into one map",
        refuses={"tome": JOINED},
    ),
    FamilyNote(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "a whole view and tiles joined into one map, shrunk where it is large",
        "several images at once are not cut, as the processor has it",
        {"cls": NO_CLASS, "tome": JOINED},
    ),
    FamilyNote(
        "internvl",
        "InternVLForConditionalGeneration",
        "OpenGVLab/InternVL3-1B-hf",
        "tiles and a thumbnail",
        "the converted checkpoints, whose names end in -hf (2.5, 3, 3.5)",
    ),
    FamilyNote(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "Qwen/Qwen2-VL-2B-Instruct",
        "its own resolution in patches",
        refuses={"cls": NO_CLASS, "tome": PATCHES},
    ),
    FamilyNote(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "its own resolution in patches",
        "windowed layers attend by window: memory grows with the patches, not their square",
        {"cls": NO_CLASS, "tome": PATCHES},
    ),
    FamilyNote(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        "Qwen/Qwen3-VL-2B-Instruct",
        "its own resolution in patches",
        "deepstack features are pruned with the same rows",
        {"cls": NO_CLASS, "tome": PATCHES},
    ),
    FamilyNote(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        "HuggingFaceM4/Idefics3-8B-Llama3",
        "named tiles and a whole view",
        refuses={"cls": NO_CLASS},
    ),
    FamilyNote(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "named tiles and a whole view",
        refuses={"cls": NO_CLASS},
    ),
)
REFUSED = (
    Refused(
        "InternVL2 and other checkpoints with their own code",
        "InternVLChatModel",
        "they carry remote code, which is never run; take the converted ones, e.g. OpenGVLab/InternVL3-1B-hf",
    ),
    Refused("mPLUG-Owl2", "MPLUGOwl2LlamaForCausalLM", "it is not in transformers"),
    Refused("the first Qwen-VL", "QWenLMHeadModel", "it is not in transformers; take Qwen2-VL or later"),
)


def refusal(family: str, score: str) -> str | None:
    """Why a score of the vision stage does not serve a family, None where it does."""
    return next((f.refuses.get(score) for f in KNOWN if f.name == family), None)


def documents() -> list[dict[str, object]]:
    """The table as JSON knows it: the known families, then the refused."""
    known = [
        {
            "family": f.name,
            "supported": True,
            "architecture": f.architecture,
            "example": f.example,
            "image": f.image,
            "note": f.note,
            "refuses": dict(f.refuses),
        }
        for f in KNOWN
    ]
    refused = [
        {"family": r.name, "supported": False, "architecture": r.architecture, "note": r.reason} for r in REFUSED
    ]
    return [*known, *refused]
