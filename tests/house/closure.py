"""A virtual environment holding exactly what a distribution declares, linked from the current one.

Installing from an index would take a minute and a network. Linking the declared closure takes a
second and is as strict: a module that no requirement brings cannot be imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

SHIPPED = ("engines", "exporter", "glyphs", "graphs", "plugins")
SHIPPED_FILES = ("saccade.py", "pyproject.toml", "README.md", "LICENSE")


def wheel_from_tree(root: Path, workplace: Path) -> Path:
    """Build the wheel from a copy, so that the tree stays clean and two test runs do not meet."""
    source = workplace / "source"
    for room in SHIPPED:
        shutil.copytree(root / room, source / room, ignore=shutil.ignore_patterns("__pycache__", "*.partial"))
    for name in SHIPPED_FILES:
        shutil.copy(root / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(workplace), str(source)], check=True)
    [wheel] = workplace.glob("saccade-*.whl")
    return wheel


def link_closure(python: Path, distribution: str, extras: set[str]) -> list[str]:
    """Link every distribution that ``distribution[extras]`` needs into the environment of ``python``."""
    site = python.parent.parent / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    here = Path(sysconfig.get_path("purelib"))
    [installed] = metadata.distributions(name=distribution, path=[str(site)])
    names = closure(installed, extras)
    for name in names:
        files = metadata.distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(here / top)
    return sorted(names)


def closure(distribution: metadata.Distribution, extras: set[str]) -> set[str]:
    """Return the names of everything a distribution needs, its markers read for this machine."""
    seen: set[str] = set()
    waiting = [(distribution, frozenset(extras))]
    while waiting:
        current, wanted = waiting.pop()
        for need in map(Requirement, current.requires or []):
            applies = need.marker is None or any(need.marker.evaluate({"extra": e}) for e in wanted | {""})
            if applies and need.name not in seen:
                seen.add(need.name)
                waiting.append((metadata.distribution(need.name), frozenset(need.extras)))
    return seen
