"""The table of known families."""

from exporter import anyres, idefics3, internvl, llava, qwen_vl

FAMILIES = (llava.FAMILY, internvl.FAMILY, *qwen_vl.FAMILIES, *anyres.FAMILIES, *idefics3.FAMILIES)
