"""What a build is given: exports, or one bundle, whose models are exports still where it holds their graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engines.bundles.bundle import checked_manifest
from engines.bundles.manifest import MANIFEST_FILE
from graphs.console import say, step, warn
from graphs.errors import UsageError
from graphs.spec import SPEC_FILE


def exports_in(given: Sequence[Path]) -> tuple[list[Path], float | None]:
    """The folders of the exports, and the exit threshold that a bundle of a pair brings; None without one.

    A bundle stands alone for its models, each digest checked. Errors: BadArtefact for a bundle that is broken,
    UsageError for one beside another folder, or one that holds packed files or engines alone.
    """
    bundles = [folder for folder in given if (folder / MANIFEST_FILE).is_file()]
    if not bundles:
        return list(given), None
    if len(given) > 1:
        raise UsageError(f"{bundles[0]} is a bundle and was given beside another folder; give it alone, or exports")
    bundle = bundles[0]
    with step(f"checking {bundle}"):
        manifest = checked_manifest(bundle)
    held, members = {file.path for file in manifest.files}, manifest.members.values()
    if without := [member.folder for member in members if f"{member.folder}/{SPEC_FILE}" not in held]:
        raise UsageError(
            f"{bundle} holds no canonical graphs of {' and '.join(without)}, only what was made for "
            f"{' and '.join(manifest.targets)}; build from the exports, or from a bundle that does, as one for "
            "--target cpu without --precision"
        )
    if manifest.calibrations:
        warn(f"the calibrations of {bundle} are tied to its targets and are not taken over; calibrate the new bundle")
    say(f"building from the models of {bundle}")
    return [bundle / member.folder for member in members], manifest.threshold if len(members) > 1 else None
