"""``python -m benchmarks.kernels``: each kernel beside torch's own way and beside the copy bandwidth of the device.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, C rows of a cache's buffer, D head width, G guide
rows, K kept rows.

The peers: softmax over the guide rows' map, summed, in fp32 sums; torch.topk, sorted again; gather or index_select,
whichever is faster; and the last two in a row, as a prune point has them. A call is timed over many launches between
two CUDA events, its inputs as they lie (in the L2 cache where they fit, for both alike); the median of repeats
counts. The copy's bandwidth is the limit: GB_per_s are the bytes that a call has to read and write at least, once
each. One JSON document goes to stdout and to ``benchmarks/results/kernels_<device>.json``.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from graphs.errors import BackendMissing, SaccadeError

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda"
REPEATS, LAUNCHES = 20, 50
# heads, key-value heads, head width, keys, guide rows
ATTENTION = ((32, 8, 128, 4096, 64), (32, 8, 128, 4096, 1), (14, 2, 64, 2048, 40), (32, 32, 128, 1024, 512))
# heads, key-value heads, head width, rows of the buffer, filled rows; a decode step, so one row and one guide
CACHES = ((32, 8, 128, 4096, 3000), (14, 2, 64, 16384, 1000))
SELECTION = ((1024, 512), (4096, 400), (16384, 1638))  # rows, kept
HIDDEN = ((4096, 400, 4096), (16384, 8192, 4096))  # rows, kept, width
COPIED = 1 << 30  # bytes, far beyond any cache


def main() -> int:
    """Measure, print, write; the exit code. ``--help`` prints this file's docstring; there are no other options."""
    if asked := sys.argv[1:]:
        click.echo(__doc__, err=asked != ["--help"])
        return 0 if asked == ["--help"] else 2
    try:
        document = measure()
    except SaccadeError as e:
        click.echo(f"benchmarks.kernels: {e}", err=True)
        return e.exit_code
    text = json.dumps(document, indent=2)
    name = re.sub(r"\W+", "_", str(document["conditions"]["device"])).lower()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"kernels_{name}.json").write_text(text + "\n", "utf-8")
    click.echo(text)
    return 0


def measure() -> dict[str, Any]:
    """The document; BackendMissing where torch sees no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise BackendMissing(
            "torch sees no CUDA device here: run this on a machine with an NVIDIA GPU and a CUDA torch"
        )
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    rows = [
        *attention_rows(bandwidth),
        *cached_rows(bandwidth),
        *selection_rows(bandwidth),
        *compaction_rows(bandwidth),
        *prune_point_rows(bandwidth),
    ]
    return {
        "schema": "saccade.benchmark.kernels/1",
        "conditions": {
            "device": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "driver_cuda": torch.version.cuda,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "triton")},
            "date_utc": datetime.now(UTC).date().isoformat(),
            "repeats": REPEATS,
            "launches_per_repeat": LAUNCHES,
            "statistic": "median over repeats",
            "small_cases": "launch-bound: Python launches each call, and where the work is short that is timed",
        },
        "copy_GB_per_s": round(bandwidth, 1),
        "results": rows,
    }


def copy_bandwidth() -> float:
    """GB per second of a copy on the device, bytes read and bytes written counted."""
    import torch

    source = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPIED / median_us(lambda: target.copy_(source), 5) / 1e3


def median_us(call: Callable[[], object], launches: int = LAUNCHES) -> float:
    """Microseconds per call, the median of repeats."""
    import torch

    for _ in range(3):
        call()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(launches):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return sorted(times)[len(times) // 2]


def row(
    op: str, sizes: dict[str, int], kernel_us: float, peer: str, peer_us: float, moved: int, bandwidth: float
) -> dict[str, Any]:
    """One line of the results; times in microseconds, the wrapper's own cost included for both.

    moved: bytes read and written at least. bandwidth: the copy's, in GB per second.
    """
    rate = moved / kernel_us / 1e3
    more = {"GB_per_s": round(rate, 1), "share_of_copy": round(rate / bandwidth, 3)}
    return {"op": op, **sizes, "kernel_us": round(kernel_us, 2), "peer": peer, "peer_us": round(peer_us, 2), **more}


def summed_map(q: Any, k: Any, guides: int, scale: float) -> Any:
    """The peer of received attention: [B,T] from q [B,H,S,D] and k [B,V,T,D], the map of the last rows in memory."""
    import torch

    hidden_GT = torch.ones(guides, k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - guides + 1)
    every_k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logit = (q[:, :, -guides:] @ every_k.transpose(2, 3)).float() * scale
    return logit.masked_fill(hidden_GT, -torch.inf).softmax(-1).sum((1, 2))


def attention_rows(bandwidth: float) -> list[dict[str, Any]]:
    """AttentionReceived beside the softmax map, summed."""
    import torch

    from plugins.kernels.launch_torch import run

    rows = []
    for heads, groups, width, keys, guides in ATTENTION:
        q = torch.randn(1, heads, keys, width, device=DEVICE, dtype=torch.float16)
        k = torch.randn(1, groups, keys, width, device=DEVICE, dtype=torch.float16)
        guide = torch.zeros(guides, dtype=torch.int32, device=DEVICE)
        scale = width**-0.5
        moved = 2 * width * (heads * guides + groups * keys) + 4 * keys
        sizes = {"H": heads, "V": groups, "D": width, "T": keys, "G": guides}
        kernel_us = median_us(partial(run, "AttentionReceived", (q, k, guide), (scale,)))
        peer_us = median_us(partial(summed_map, q, k, guides, scale))
        rows.append(row("AttentionReceived", sizes, kernel_us, "softmax, sum", peer_us, moved, bandwidth))
    return rows


def cached_rows(bandwidth: float) -> list[dict[str, Any]]:
    """ReceivedInCache of a decode step beside the softmax map over the rows that are filled."""
    import torch

    from plugins.kernels.launch_torch import run

    rows = []
    for heads, groups, width, capacity, filled in CACHES:
        q = torch.randn(1, heads, 1, width, device=DEVICE, dtype=torch.float16)
        k = torch.randn(1, groups, capacity, width, device=DEVICE, dtype=torch.float16)
        guide = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        length = torch.tensor([filled - 1], device=DEVICE)
        scale = width**-0.5
        moved = 2 * width * (heads + groups * filled) + 4 * capacity
        sizes = {"H": heads, "V": groups, "D": width, "C": capacity, "T": filled, "G": 1}
        kernel_us = median_us(partial(run, "ReceivedInCache", (q, k, guide, length), (scale,)))
        peer_us = median_us(partial(summed_map, q, k[:, :, :filled], 1, scale))
        rows.append(row("ReceivedInCache", sizes, kernel_us, "softmax, sum", peer_us, moved, bandwidth))
    return rows


def top_rows(score: Any, kept: int) -> Any:
    """The peer of KeepTopK: indices [B,K], ascending."""
    return score.topk(kept, sorted=False).indices.sort().values


def selection_rows(bandwidth: float) -> list[dict[str, Any]]:
    """KeepTopK beside torch.topk and a sort of its indices."""
    import torch

    from plugins.kernels.launch_torch import run

    rows = []
    for count, kept in SELECTION:
        score = torch.rand(1, count, device=DEVICE)
        is_visual = torch.ones(1, count, dtype=torch.bool, device=DEVICE)
        keep = torch.zeros(kept, dtype=torch.int32, device=DEVICE)
        kernel_us = median_us(partial(run, "KeepTopK", (score, is_visual, keep)))
        peer_us = median_us(partial(top_rows, score, kept))
        moved = 5 * count + 8 * kept
        rows.append(row("KeepTopK", {"S": count, "K": kept}, kernel_us, "topk, sort", peer_us, moved, bandwidth))
    return rows


def gathered(x: Any, at: Any) -> Any:
    """A peer of CompactRows: [1,K,D] of x [1,S,D] by indices at [1,K]."""
    return x.gather(1, at[..., None].expand(1, at.shape[1], x.shape[2]))


def selected(x: Any, at: Any) -> Any:
    """The other one."""
    return x.index_select(1, at[0])


GATHERS: dict[str, Callable[[Any, Any], Any]] = {"gather": gathered, "index_select": selected}


def compaction_rows(bandwidth: float) -> list[dict[str, Any]]:
    """CompactRows beside the faster of torch's two gathers."""
    import torch

    from plugins.kernels.launch_torch import run

    rows = []
    for count, kept, width in HIDDEN:
        x = torch.randn(1, count, width, device=DEVICE, dtype=torch.float16)
        at = torch.randperm(count, device=DEVICE)[:kept].sort().values[None]
        kernel_us = median_us(partial(run, "CompactRows", (x, at)))
        gather = partial(x.gather, 1, at[..., None].expand(1, kept, width))
        peers = {"gather": gather, "index_select": partial(x.index_select, 1, at[0])}
        peer_us, peer = min((median_us(call), name) for name, call in peers.items())
        sizes = {"S": count, "K": kept, "width": width}
        moved = 2 * kept * width * x.element_size() + 8 * kept
        rows.append(row("CompactRows", sizes, kernel_us, peer, peer_us, moved, bandwidth))
    return rows


def prune_point_rows(bandwidth: float) -> list[dict[str, Any]]:
    """KeepTopK and CompactRows behind each other, beside topk, sort and the faster gather."""
    import torch

    from plugins.kernels.launch_torch import run

    rows = []
    for count, kept, width in HIDDEN:
        x = torch.randn(1, count, width, device=DEVICE, dtype=torch.float16)
        score = torch.rand(1, count, device=DEVICE)
        is_visual = torch.ones(1, count, dtype=torch.bool, device=DEVICE)
        keep = torch.zeros(kept, dtype=torch.int32, device=DEVICE)

        def kernels(x: Any = x, score: Any = score, is_visual: Any = is_visual, keep: Any = keep) -> Any:
            return run("CompactRows", (x, run("KeepTopK", (score, is_visual, keep))))

        def peer(gather: Callable[[Any, Any], Any], x: Any = x, score: Any = score, kept: int = kept) -> Any:
            return gather(x, top_rows(score, kept))

        sizes = {"S": count, "K": kept, "width": width}
        moved = 5 * count + 16 * kept + 2 * kept * width * x.element_size()
        kernel_us = median_us(kernels)
        peer_us, name = min((median_us(partial(peer, gather)), name) for name, gather in GATHERS.items())
        timed = kernel_us, f"topk, sort, {name}", peer_us
        rows.append(row("KeepTopK, CompactRows", sizes, *timed, moved, bandwidth))
    return rows


if __name__ == "__main__":
    sys.exit(main())
