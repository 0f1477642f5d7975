"""Is the installed version of a library the one this release was written against?

The pins stand in one place, ``pyproject.toml``; here they are read back from the installed
distribution. ``require("torch", "transformers")`` is called at the start of a verb, ``require_once`` where a
library is first used, so that a wrong or missing one is one sentence and an exit code, never a stack trace half-way.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

from graphs.errors import BackendMissing, OperationFailed

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "saccade"

# Distributions that bring the same module: exactly one of them may be installed.
RIVALS = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")}

# Where an import fails, the distribution that brings the module.
DISTRIBUTION_OF = {
    "PIL": "pillow",
    "cuda": "cuda-python",
    "onnx_ir": "onnx-ir",
    "sklearn": "scikit-learn",
    "tensorrt_rtx": "tensorrt-rtx",
    "yaml": "pyyaml",
}


@cache
def pins() -> dict[str, tuple[Requirement, str | None]]:
    """Return distribution name → its requirement and the extra that brings it (None: the base install)."""
    from packaging.requirements import Requirement  # every open imports this file, few ask for pins

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        raise OperationFailed(
            "saccade is not installed in this Python, so the versions it needs are unknown: "
            "run pip install . in its folder"
        ) from None
    table: dict[str, tuple[Requirement, str | None]] = {}
    for line in lines:
        requirement = Requirement(line)
        # The backend writes the marker as `extra == "name"`, alone or after an `and`.
        marker = str(requirement.marker or "")
        extra = marker.rpartition('extra == "')[2].rstrip('"') if "extra ==" in marker else None
        if requirement.name != DISTRIBUTION:
            table.setdefault(requirement.name, (requirement, extra))
    return table


def require(*distributions: str) -> None:
    """Raise unless every distribution is installed in a version this release accepts.

    A missing one is BackendMissing (exit code 4), another version or two rivals of one module
    OperationFailed (exit code 1).
    """
    for name in distributions:
        rivals = installed_rivals(name)
        if len(rivals) > 1:
            raise OperationFailed(
                f"{' and '.join(rivals)} are both installed and overwrite each other's module {name}: "
                f"run pip uninstall {' '.join(rivals)}, then install one of {extras_of(name)}"
            )
        if not rivals:
            raise missing(name)
        requirement, _ = pins().get(rivals[0], (None, None))
        version = installed_version(rivals[0])
        if requirement and version and not requirement.specifier.contains(version, prereleases=True):
            raise OperationFailed(
                f"{rivals[0]} {version} is installed, this release of saccade needs "
                f"{rivals[0]}{requirement.specifier}: run pip install '{rivals[0]}{requirement.specifier}'"
            )


require_once = cache(require)  # for what is opened again and again


def installed_rivals(name: str) -> list[str]:
    """Those that are installed of a distribution and of what brings the same module."""
    return [rival for rival in RIVALS.get(name, (name,)) if installed_version(rival)]


def missing(module_or_distribution: str) -> BackendMissing:
    """Return the error for a library that is not installed, naming the extra that brings it."""
    root = module_or_distribution.partition(".")[0]
    name = DISTRIBUTION_OF.get(root, root)
    known = any(rival in pins() for rival in RIVALS.get(name, (name,)))
    remedy = f"run pip install {extras_of(name)}" if known else f"run pip install {name}"
    return BackendMissing(f"{name} is not installed in this Python: {remedy}")


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def extras_of(name: str) -> str:
    """Return what to give pip for a distribution or its rivals: 'saccade[cpu]' or 'saccade[gpu]'."""
    extras = [pins()[rival][1] for rival in RIVALS.get(name, (name,)) if rival in pins()]
    return " or ".join(f"'{DISTRIBUTION}[{extra}]'" if extra else DISTRIBUTION for extra in extras)
