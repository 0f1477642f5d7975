"""The table of known families."""

from exporter import llava

FAMILIES = (llava.FAMILY,)
