"""The table of known families."""

from exporter import internvl, llava, qwen_vl

FAMILIES = (llava.FAMILY, internvl.FAMILY, *qwen_vl.FAMILIES)
