"""Every failure a user can cause or meet, each with its exit code.

A message is one sentence that says what went wrong, what was got, what was wanted and what to do
next. Exit codes: 1 the operation failed, 2 usage, 3 the artefact is bad, 4 this machine lacks
the backend.
"""

from __future__ import annotations


class SaccadeError(Exception):
    """Base of every error that ends a verb in one sentence; ``exit_code`` is the process's."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class OperationFailed(SaccadeError):
    """The request was fine, doing it failed (disk full, numeric mismatch, engine error)."""

    exit_code = 1


class OutOfBounds(OperationFailed):
    """An engine was built for other shapes than it is fed with."""


class UsageError(SaccadeError):
    """The request itself cannot be served: a value out of range, a pair that does not fit."""

    exit_code = 2


class UnaskableQuestion(UsageError):
    """This question cannot be put to this model, whatever else is asked: others can."""


class BadArtefact(SaccadeError):
    """A checkpoint, export folder, bundle, image or data file is missing, broken or tampered with."""

    exit_code = 3


class BackendMissing(SaccadeError):
    """This machine or this installation lacks what the verb needs."""

    exit_code = 4


def first_line(error: Exception, most: int = 200) -> str:
    """What another's exception says first, at most ``most`` characters of it; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
