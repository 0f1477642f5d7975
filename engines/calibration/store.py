"""Writing a calibration into a bundle's manifest: in one step, with a new digest."""

from __future__ import annotations

from pathlib import Path

from engines.bundles.manifest import MANIFEST_FILE, Manifest, manifest_of
from engines.calibration.record import Calibration
from graphs.errors import OperationFailed, UsageError
from graphs.files import atomic_file


def refuse_unwritable(bundle: Path) -> None:
    """UsageError where no calibration could be written, found out by writing the manifest as it is."""
    path = bundle.resolve() / MANIFEST_FILE
    try:
        with atomic_file(path, beside=path.parent) as partial:
            partial.write_bytes(path.read_bytes())
    except OSError as e:
        raise UsageError(
            f"{bundle} cannot be changed ({e.strerror}), but its manifest has to hold the calibration; nothing was "
            "asked; calibrate a copy in a folder where you can write"
        ) from None


def write_calibration(bundle: Path, calibration: Calibration, found_on: str) -> Manifest:
    """Put a calibration into a bundle's manifest, in place of one that is tied to the same; return what was written.

    found_on: the digest of the manifest that it was found with; OperationFailed where the bundle's is another by now.
    The old manifest is there until the new one is complete.
    """
    bundle = bundle.resolve()
    manifest = manifest_of(bundle)
    if manifest.sha256 != found_on:
        raise OperationFailed(
            f"{bundle} was changed while the questions were asked, so the threshold may not be its own and was not "
            "written; calibrate it again"
        )
    others = tuple(c for c in manifest.calibrations if c.tied_to() != calibration.tied_to())
    signed = manifest.model_copy(update={"calibrations": (*others, calibration)}).signed()
    with atomic_file(bundle / MANIFEST_FILE, beside=bundle) as partial:
        partial.write_text(signed.dumps(), "utf-8")
    return signed
