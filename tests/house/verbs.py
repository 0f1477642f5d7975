"""A verb that fails in every way a verb can, for the tests of the front door."""

from __future__ import annotations

import errno
import importlib

import click

from graphs.errors import BackendMissing, BadArtefact, OperationFailed, UsageError

FAILURES = {
    "operation": OperationFailed("the engine\n  gave up"),
    "usage": UsageError("keep is 2, it lies in (0, 1]"),
    "artefact": BadArtefact("a.bundle is truncated"),
    "backend": BackendMissing("no CUDA device"),
    "interrupt": KeyboardInterrupt(),
    "disk-full": OSError(errno.ENOSPC, "No space left on device", "out/decoder.onnx"),
    "forbidden": PermissionError(errno.EACCES, "Permission denied", "out"),
    "surprise": ZeroDivisionError("division\nby zero"),
}


@click.command()
@click.argument("how", type=click.Choice([*FAILURES, "no-torch", "no-room", "exit-3", "none"]))
def fail(how: str) -> None:
    """Fail as asked."""
    if how in FAILURES:
        raise FAILURES[how]
    if how == "no-torch":
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    if how == "no-room":
        importlib.import_module("engines.nowhere")
    if how == "exit-3":
        click.get_current_context().exit(3)
    click.echo("done")
