"""``python -m benchmarks.machinery``: what pruning, guidance and a long cache cost beside the model itself.

On shape (a), every part asked in turn, round after round, in one process (milliseconds, medians of all rounds):

    pruned / bound     time to the first token (vision apart) of the large model cut before layer K of L, over
                       K/L of the full prefill plus (L−K)/L of a prompt of the short length from the start
    guidance           the small model's prefill and decode step with guidance, over those without; where it is made at
                       the answer's end, what an answer of one token takes for it is the prefill's, and what a longer
                       one takes beyond that its steps'
    consistency        the consistency pass over the small model's run, an answer of 16 tokens
    break-even         how many times the small model's cost the large one must have for the cascade to win where no
                       answer exits, if the small one's whole run shrinks as it does: run / (full − pruned prefill)
    cache reads        (a step at 4,096 past rows − a step at 64) over the time of reading that cache once

Results: benchmarks/results/MACHINE/machinery-TARGET-PRECISION.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.figures import conditions, keep, spread
from benchmarks.peers.making import made
from benchmarks.peers.process import Pythons
from benchmarks.shapes import IMAGE, QUESTION
from engines.cascade import Cascade
from engines.decoder import Chunk
from engines.model import Model

SHAPE, SCHEMA, TOKENS = "qwen2_5_vl", "saccade.benchmark.machinery/1", 16
SHORT = (140, 280)  # 5 × 10 visual tokens, what 0.05 keeps of ``IMAGE``'s 1,000
PAST = (64, 4096)
Times = dict[str, list[float]]


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where checkpoint and exports are kept.")
@click.option("--target", type=click.Choice(["cpu", "openvino"]), default="cpu", show_default=True)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--note", default="", help="What else the machine did, for the conditions.")
def main(work: Path, target: str, precision: str, rounds: int, threads: int, note: str) -> None:
    """Measure, print, write."""
    on, folder = f"{target}-{precision}", work / SHAPE
    alone = "none" if on == "cpu-fp32" else f"none-{on}"
    for name in (alone, f"twice-{on}"):
        if why := made(name, folder, SHAPE, str(Pythons().of("torch"))):
            raise click.ClickException(why)
    plain, pair = (  # prompts of two lengths are compared, from their start
        Cascade.open(folder / name, target=target, threads=threads, preload=True, reuses_beginnings=False)
        for name in (alone, f"twice-{on}")
    )
    assert plain.large
    assert pair.large
    times = asked_in_turn(plain, pair, rounds)
    layers, layer = pair.large.spec.language.layers, pair.large.spec.plan.points[0].layer
    steps = times.pop("guided steps")
    document = {
        "schema": SCHEMA,
        "conditions": conditions(SHAPE, rounds, 1, TOKENS, threads, note)
        | {"target": target, "precision": precision, "runtime": Pythons().runtimes()},
        "ms": {name: spread(values) for name, values in times.items()},
        "guided_steps": spread(steps),
        "ratios": ratios(times, median(steps), layers, layer) | long_cache(plain.large, rounds, threads),
    }
    keep(f"machinery-{on}", document)
    click.echo(json.dumps(document, indent=1))


def asked_in_turn(plain: Cascade, pair: Cascade, rounds: int) -> Times:
    """The same image to the model as it is and to the pair; a small image to the model as it is."""
    times: Times = {}
    rng = np.random.default_rng(0)

    def picture(size: tuple[int, int]) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))

    def note(name: str, ms: dict[str, float], member: str, tokens: int) -> None:
        times.setdefault(f"{name} prefill", []).append(ms[f"{member}_prefill"])
        times.setdefault(f"{name} step", []).append(ms[f"{member}_decode"] / max(1, tokens - 1))

    for round_ in range(rounds + 1):
        if round_ == 1:
            times.clear()  # the first round warms up
        image = picture(IMAGE)
        full = plain.ask(image, QUESTION, max_new_tokens=TOKENS)
        note("full", full.milliseconds, "alone", len(full.tokens))
        small = pair.look(image, QUESTION, max_new_tokens=TOKENS)
        note("small", small.milliseconds, "small", len(small.tokens))
        times.setdefault("small guidance", []).append(small.milliseconds["small_guidance"])
        first = pair.look(image, QUESTION, max_new_tokens=1)
        times.setdefault("first guidance", []).append(first.milliseconds["small_guidance"])
        times.setdefault("guided steps", []).append(len(small.tokens) - 1)
        run = sum(t for stage, t in small.milliseconds.items() if "prepare" not in stage and "open" not in stage)
        times.setdefault("small run", []).append(run)
        times.setdefault("consistency", []).append(small.milliseconds["small_consistency"])
        both = pair.answer_large(small, draft=False)
        note("pruned", both.milliseconds, "large", len(both.tokens))
        short = plain.ask(picture(SHORT), QUESTION, max_new_tokens=1)
        note("short", short.milliseconds, "alone", 1)
    return times


def ratios(times: Times, steps: float, layers: int, layer: int) -> dict[str, float]:
    """Of medians."""
    ms = {name: median(values) for name, values in times.items()}
    share = layer / layers
    later = (ms["small guidance"] - ms["first guidance"]) / steps
    return {
        "pruned / bound": ms["pruned prefill"] / (share * ms["full prefill"] + (1 - share) * ms["short prefill"]),
        "guidance, prefill": (ms["small prefill"] + ms["first guidance"]) / ms["full prefill"],
        "guidance, step": (ms["small step"] + later) / ms["full step"],
        "consistency / small run": ms["consistency"] / ms["small run"],
        "break-even": ms["small run"] / (ms["full prefill"] - ms["pruned prefill"]),
    }


def long_cache(model: Model, rounds: int, threads: int) -> dict[str, float]:
    """Decode steps behind a short and a long text, beside reading the long one's cache once."""
    language = model.spec.language
    steps: dict[int, list[float]] = {}
    caches = {}
    for rows in PAST:
        ids = [100 + i % 1000 for i in range(rows)]
        caches[rows] = model.decoder.run(text(model, ids)).cache
    nbytes = 2 * language.layers * language.kv_heads * language.head_dim * PAST[-1] * 4
    parts = np.array_split(np.ones(nbytes // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        reads = []
        for i in range(10 * rounds):
            reads.append(timed(lambda: list(pool.map(np.max, parts))))
            for rows, cache in caches.items():
                start = time.perf_counter()
                caches[rows] = model.decoder.run(text(model, [100 + i]), cache).cache
                steps.setdefault(rows, []).append(1e3 * (time.perf_counter() - start))
    short, long = (median(steps[rows]) for rows in PAST)
    read = median(reads)
    return {
        "step at 64, ms": short,
        "step at 4096, ms": long,
        "one read, ms": read,
        "cache reads": (long - short) / read,
    }


def text(model: Model, ids: list[int]) -> Chunk:
    """A chunk of text."""
    return Chunk(model.embed_text(ids), np.zeros(len(ids), bool))


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
