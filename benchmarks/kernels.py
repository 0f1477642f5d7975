"""``python -m benchmarks.kernels``: each kernel beside torch's own way and beside the copy bandwidth of the device.

Legend: B batch, H query heads, V key-value heads, S rows, T keys, D head width, G guide rows, K kept rows.

The peers: softmax over the guide rows' map, summed, in fp32 sums; torch.topk, sorted again; a gather. A call is timed
over many launches between two CUDA events, its inputs as they lie (in the L2 cache where they fit, for both alike);
the median of repeats counts. The copy's bandwidth is the limit for what only moves rows. One JSON document goes to
stdout and to ``benchmarks/results/kernels_<device>.json``.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from graphs.errors import BackendMissing, SaccadeError

RESULTS = Path(__file__).parent / "results"
REPEATS, LAUNCHES = 20, 50
# heads, key-value heads, head width, keys, guide rows
ATTENTION = ((32, 8, 128, 4096, 64), (32, 8, 128, 4096, 1), (14, 2, 64, 2048, 40), (32, 32, 128, 1024, 512))
SELECTION = ((1024, 512), (4096, 400), (16384, 1638))  # rows, kept
HIDDEN = ((4096, 400, 4096), (16384, 8192, 4096))  # rows, kept, width
COPIED = 1 << 30  # bytes, far beyond any cache


def main() -> int:
    """Measure, print, write; the exit code."""
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
    rows = [*attention_rows(), *selection_rows(), *compaction_rows(bandwidth)]
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
        },
        "copy_GB_per_s": round(bandwidth, 1),
        "results": rows,
    }


def copy_bandwidth() -> float:
    """GB per second of a copy on the device, bytes read and bytes written counted."""
    import torch

    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
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


def row(op: str, sizes: dict[str, int], kernel_us: float, peer: str, peer_us: float, **more: float) -> dict[str, Any]:
    """One line of the results; times in microseconds, the wrapper's own cost included for both."""
    return {"op": op, **sizes, "kernel_us": round(kernel_us, 2), "peer": peer, "peer_us": round(peer_us, 2), **more}


def attention_rows() -> list[dict[str, Any]]:
    """AttentionReceived beside the softmax map, summed."""
    import torch

    from plugins.kernels.launch_torch import run

    rows = []
    for heads, groups, width, keys, guides in ATTENTION:
        q = torch.randn(1, heads, keys, width, device="cuda", dtype=torch.float16)
        k = torch.randn(1, groups, keys, width, device="cuda", dtype=torch.float16)
        guide = torch.zeros(guides, dtype=torch.int32, device="cuda")
        hidden_GT = torch.ones(guides, keys, dtype=torch.bool, device="cuda").triu(keys - guides + 1)
        scale = width**-0.5

        def map_summed(q: Any = q, k: Any = k, hidden: Any = hidden_GT, g: int = guides, scale: float = scale) -> Any:
            every_k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            logit = (q[:, :, -g:] @ every_k.transpose(2, 3)).float() * scale
            return logit.masked_fill(hidden, -torch.inf).softmax(-1).sum((1, 2))

        def kernel(q: Any = q, k: Any = k, guide: Any = guide, scale: float = scale) -> Any:
            return run("AttentionReceived", (q, k, guide), (scale,))

        sizes = {"H": heads, "V": groups, "D": width, "T": keys, "G": guides}
        rows.append(row("AttentionReceived", sizes, median_us(kernel), "softmax, sum", median_us(map_summed)))
    return rows


def selection_rows() -> list[dict[str, Any]]:
    """KeepTopK beside torch.topk and a sort of its indices."""
    import torch

    from plugins.kernels.launch_torch import run

    rows = []
    for count, kept in SELECTION:
        score = torch.rand(1, count, device="cuda")
        is_visual = torch.ones(1, count, dtype=torch.bool, device="cuda")
        keep = torch.zeros(kept, dtype=torch.int32, device="cuda")

        def peer(score: Any = score, kept: int = kept) -> Any:
            return score.topk(kept, sorted=False).indices.sort().values

        def kernel(score: Any = score, is_visual: Any = is_visual, keep: Any = keep) -> Any:
            return run("KeepTopK", (score, is_visual, keep))

        rows.append(row("KeepTopK", {"S": count, "K": kept}, median_us(kernel), "topk, sort", median_us(peer)))
    return rows


def compaction_rows(bandwidth: float) -> list[dict[str, Any]]:
    """CompactRows beside torch.gather, and its bytes moved as a share of the copy's bandwidth."""
    import torch

    from plugins.kernels.launch_torch import run

    rows = []
    for count, kept, width in HIDDEN:
        x = torch.randn(1, count, width, device="cuda", dtype=torch.float16)
        at = torch.randperm(count, device="cuda")[:kept].sort().values[None]
        column = at[..., None].expand(1, kept, width)
        kernel_us = median_us(lambda x=x, at=at: run("CompactRows", (x, at)))  # type: ignore[misc]
        peer_us = median_us(lambda x=x, column=column: x.gather(1, column))  # type: ignore[misc]
        moved = 2 * kept * width * x.element_size() / kernel_us / 1e3
        sizes = {"S": count, "K": kept, "width": width}
        more = {"GB_per_s": round(moved, 1), "share_of_copy": round(moved / bandwidth, 3)}
        rows.append(row("CompactRows", sizes, kernel_us, "gather", peer_us, **more))
    return rows


if __name__ == "__main__":
    sys.exit(main())
