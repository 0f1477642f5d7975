"""Questions from several threads take turns: one piece of one answer is computed at a time.

Runtimes keep shapes, buffers and requests from one call to the next, tokenizers their settings, so two runs at once mix
up their questions. Between two pieces of an answer that streams, another one may go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import wraps
from threading import RLock
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from engines.targets import TARGETS

if TYPE_CHECKING:
    from engines.model import Model

# On a device all cascades of this process take turns: those of one bundle share a stream, which may be being captured.
DEVICE = RLock()

P = ParamSpec("P")
R = TypeVar("R")


def lock_of(models: Iterable[Model]) -> AbstractContextManager[object]:
    """What these models' runs are made under."""
    targets = [TARGETS.get(model.target) for model in models]
    return RLock() if all(target and target.memory == "host" for target in targets) else DEVICE


def one_at_a_time(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method that is run under its object's ``lock``."""

    @wraps(method)
    def locked(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return locked
