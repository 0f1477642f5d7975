"""Targets that no machine has, for the choice among several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.targets import Target

ASKED: list[Sequence[Any]] = []


def nothing(engines: Sequence[Any]) -> list[str]:
    """This one runs everywhere."""
    ASKED.append(engines)
    return []


def much(engines: Sequence[Any]) -> list[str]:
    """This one runs nowhere."""
    ASKED.append(engines)
    return ["no NVIDIA driver is loaded", "dreams 3 is installed, the engines are of dreams 4"]


HERE = "tests.engines.bundle.other_targets"
NEVER_OPENED = {"session": "", "module": "", "distributions": ()}
DREAM = Target("dream", "graphs", "device", reasons=f"{HERE}:much", **NEVER_OPENED)
SECOND = Target("second", "graphs", "host", reasons=f"{HERE}:nothing", **NEVER_OPENED)
