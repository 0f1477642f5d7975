"""The host half of every family, by the family's name in spec.json."""

from engines.families import anyres, idefics3, internvl, llava, qwen_vl
from engines.families.family import HostFamily, Seen, expanded, folded

FAMILIES: dict[str, HostFamily] = {
    "llava": llava.FAMILY,
    "internvl": internvl.FAMILY,
    "llava_next": anyres.FAMILY,
    "llava_onevision": anyres.FAMILY,
    "qwen2_vl": qwen_vl.FAMILY,
    "qwen2_5_vl": qwen_vl.FAMILY,
    "qwen3_vl": qwen_vl.FAMILY,
    "idefics3": idefics3.FAMILY,
    "smolvlm": idefics3.FAMILY,
}

__all__ = ["FAMILIES", "HostFamily", "Seen", "expanded", "folded"]
