"""``python -m benchmarks.cache``: what a decode step pays for its cache, by the cache's form and length.

Legend: H query heads, V key-value heads, D head width, C rows of a buffer.

A stack of nothing but attentions, as the exporter writes them (24 layers, 14 heads, 2 key-value heads of width 64:
Qwen2.5-0.5B's, fp32), concatenated, scattered and grouped (``graphs.lowering.in_place``), and with a form of its own
for one row (``graphs.lowering.one_row``), without and with the op that tells what each key received. Forms, lengths and
the memory's read bandwidth (the same number of threads, each walking its part of an array) take turns, so that what
else runs on the machine meets all of them; the least counts, beside the median. ``--clock cpu`` counts this process's
own time instead of the wall's, for machines that do other work too: with one thread it is what the step would take
alone, but for what others do to memory. One JSON document goes to stdout and
to ``benchmarks/results/MACHINE/cache.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from statistics import median
from time import perf_counter, process_time
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.figures import commit, cpu, instructions, keep
from graphs.lowering.in_place import CacheInPlace
from graphs.lowering.one_row import OneRow
from graphs.ops import DOMAIN, OPS

LAYERS, H, V, D = 24, 14, 2, 64
LENGTHS = (64, 4096)
CLOCKS = {"wall": perf_counter, "cpu": process_time}
FORMS = ("concat", "scattered", "grouped", "one row")
SPARE = 16  # a buffer has one row in so many to spare, as engines/cache.py makes them


def stack(form: str, received: bool) -> bytes:
    """A decoder of attentions alone: q, k and v are the same in every layer but for what came out before."""
    f, values = onnx.TensorProto.FLOAT, onnx.helper.make_tensor_value_info
    inputs = [values(name, f, [1, heads, "S", D]) for name, heads in (("q", H), ("k", V), ("v", V))]
    inputs += [values("guide", onnx.TensorProto.INT32, ["G"])] if received else []
    outputs, nodes, x = [values(f"out_{LAYERS - 1}", f, [1, H, "S", D])], [], "q"
    for i in range(LAYERS):
        pasts, presents = [f"past_k_{i}", f"past_v_{i}"], [f"present_k_{i}", f"present_v_{i}"]
        inputs += [values(name, f, [1, V, "P_0", D]) for name in pasts]
        outputs += [values(name, f, [1, V, "T", D]) for name in presents]
        made = onnx.helper.make_node(
            "Attention", [x, "k", "v", "", *pasts], [f"out_{i}", *presents], is_causal=1, name=f"attention_{i}"
        )
        nodes.append(made)
        if received:
            nodes.append(
                onnx.helper.make_node(
                    "AttentionReceived",
                    [x, presents[0], "guide"],
                    [f"r_{i}"],
                    domain=DOMAIN,
                    scale=0.125,
                    name=f"r_{i}",
                )
            )
            if i:
                nodes.append(onnx.helper.make_node("Add", [f"r_{i}", f"sum_{i - 1}"], [f"sum_{i}"], name=f"sum_{i}"))
            else:
                nodes.append(onnx.helper.make_node("Identity", ["r_0"], ["sum_0"], name="sum_0"))
        x = f"out_{i}"
    if received:
        nodes[-1].output[0] = "attention_received"
        outputs.append(values("attention_received", f, [1, "T"]))
    graph = onnx.helper.make_graph(nodes, "stack", inputs, outputs)
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)]
    functions = [OPS["AttentionReceived"].function] if received else []
    model = onnx.shape_inference.infer_shapes(
        onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)
    )
    lowered = ir.from_proto(model)
    if form != "concat":
        lowered = CacheInPlace("scattered" if form == "scattered" else "grouped")(lowered).model
    if form == "one row":
        lowered = OneRow()(lowered).model
    return ir.to_proto(lowered).SerializeToString()


class Run:
    """One form at one length: its session and its bound tensors; every call is the same decode step."""

    def __init__(self, form: str, received: bool, length: int, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # as the product's sessions do
        self.session = ort.InferenceSession(stack(form, received), options, providers=["CPUExecutionProvider"])
        self.binding, self.milliseconds = self.session.io_binding(), list[float]()
        rng = np.random.default_rng(0)
        rows = length if form == "concat" else length + length // SPARE + 1
        feeds: dict[str, Any] = {
            name: rng.standard_normal((1, heads, 1, D), np.float32) for name, heads in (("q", H), ("k", V), ("v", V))
        }
        feeds |= {"guide": np.zeros(1, np.int32), "length_0": np.array([length])}
        feeds["received_before"] = np.zeros((1, rows), np.float32)
        self.held = []
        for given in self.session.get_inputs():
            array = feeds.get(given.name)
            if array is None:
                array = np.zeros((1, V, rows, D), np.float32)
                array[:, :, :length] = rng.standard_normal((1, V, length, D), np.float32)
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self.held.append((array, value))
            self.binding.bind_ortvalue_input(given.name, value)
            if given.name.startswith("past_") and form != "concat":
                self.binding.bind_ortvalue_output(given.name.replace("past", "present"), value)
        for told in self.session.get_outputs():
            if not told.name.startswith("present_") or form == "concat":
                self.binding.bind_output(told.name, "cpu")

    def step(self, clock: Callable[[], float]) -> None:
        """One decode step, timed."""
        start = clock()
        self.session.run_with_iobinding(self.binding)
        self.milliseconds.append(1e3 * (clock() - start))


def read_seconds(parts: list[np.ndarray], pool: ThreadPoolExecutor, clock: Callable[[], float]) -> float:
    """How long it takes to read all parts, a thread each."""
    start = clock()
    list(pool.map(np.max, parts))
    return clock() - start


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=40, show_default=True)
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", show_default=True)
def main(threads: int, repeats: int, clock: str) -> None:
    """Measure, print and store."""
    now = CLOCKS[clock]
    runs = {
        (form, received, length): Run(form, received, length, threads)
        for form in FORMS
        for received in (False, True)
        for length in LENGTHS
    }
    cache_bytes = 2 * LAYERS * V * D * 4 * LENGTHS[-1]
    parts = np.array_split(np.ones(cache_bytes // 4, np.float32), threads)
    reads = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            reads.append(1e3 * read_seconds(parts, pool, now))
            for run in runs.values():
                run.step(now)
    rows = [
        {"form": form, "received": received, "length": length, "least_ms": min(run.milliseconds),
         "median_ms": median(run.milliseconds)}
        for (form, received, length), run in runs.items()
    ]  # fmt: skip
    least = {key: min(run.milliseconds) for key, run in runs.items()}
    growth = {
        f"{form}{', received' if received else ''}":
            (least[form, received, LENGTHS[-1]] - least[form, received, LENGTHS[0]]) / min(reads)
        for form in FORMS for received in (False, True)
    }  # fmt: skip
    document = {
        "schema": "saccade.cache-benchmark/1",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu(),
        "instructions": instructions(),
        "onnxruntime": ort.__version__,
        "threads": threads,
        "clock": clock,
        "load_average": os.getloadavg(),
        "repeats": repeats,
        "layers": LAYERS,
        "heads": [H, V],
        "head_width": D,
        "cache_bytes_at_the_longest": cache_bytes,
        "read_ms": {"least": min(reads), "median": median(reads)},
        "growth_over_one_read": growth,
        "steps": rows,
    }
    keep("cache", document)
    click.echo(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
