"""Milliseconds between two moments."""

from __future__ import annotations

import time


class Clock:
    """``lap()`` is the time since the last call, or since it was made."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Return milliseconds and start the next lap."""
        now = time.perf_counter()
        passed, self._last = (now - self._last) * 1000, now
        return passed
