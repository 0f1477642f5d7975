"""The table of known families."""

from exporter import internvl, llava

FAMILIES = (llava.FAMILY, internvl.FAMILY)
