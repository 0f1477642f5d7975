"""How much memory the host, or the container around this process, can still give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Below a group of version 2 and 1: its limit, what it uses, and in memory.stat the files' pages that it can drop.
V2 = ("memory.max", "memory.current", "")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
DROPPED = ("active_file", "inactive_file")


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be had without swapping: of the system, or of a control group where less; None where unknown.

    root: where proc and sys lie.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return None if free is None else max(0, min(free, *_free_of_groups(root)))


def _free_of_groups(root: Path) -> Iterator[int]:
    """What every control group around this process leaves it; none where no limit is set."""
    yield 1 << 63
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, names = root / "sys/fs/cgroup" / ("memory" if controllers else ""), V1 if controllers else V2
            here = top / path.lstrip("/")
            # In a container the path may be the host's, of which only the top is seen.
            for folder in (here, *here.parents):
                if folder.is_relative_to(top):
                    with suppress(OSError, ValueError):  # without a limit: no file, or "max"
                        yield _free_of(folder, *names)


def _free_of(group: Path, limit: str, usage: str, prefix: str) -> int:
    free = int((group / limit).read_text()) - int((group / usage).read_text())
    with suppress(OSError):
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free += sum(int(stats.get(prefix + name, 0)) for name in DROPPED)
    return free
