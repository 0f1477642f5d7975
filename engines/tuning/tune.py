"""The plan search: every layer, keep ratio and threshold on one part of the data, the choice on the other part.

A choice among many looks better on the questions it was made on than it is, so it is reported on others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundles.manifest import Manifest, manifest_of
from engines.cascade import Cascade
from engines.evaluation.contenders import unmetered
from engines.evaluation.data import Data
from engines.evaluation.settings import Setting, Shares, layers_of, shares_of
from engines.evaluation.sweep import Plan, Row, answered, asked_before, rows_of
from engines.tuning.front import Asked, System, asked_of, cheapest, front_of, systems_of
from engines.tuning.layers import cut_before, layers_to_walk, own_layer
from graphs.console import percent, say, track
from graphs.errors import UsageError
from graphs.files import atomic_file, refuse_foreign_folder
from graphs.plan_file import document_of

SCHEMA = "saccade.tune/1"
PLAN_FILE, DOCUMENT = "plan.toml", "tune.json"
STEADY = 1.15  # the most that one computation's median time may differ between layers' searches
CHANCE = 0.05  # that what is not seen in a sample is there all the same
KEEPS = (0.8, 0.64, 0.35, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class Wanted:
    """What is searched. max_loss: of accuracy beside the large model that sees everything. seed: of the split."""

    max_loss: float
    metric: str = "exact"
    keeps: Sequence[tuple[float, ...]] = ()
    layers: Sequence[int] = ()
    checkpoint: Path | None = None
    max_new_tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Search:
    """An opened bundle and what its journals are named by."""

    bundle: Path
    cascade: Cascade
    manifest: Manifest
    wanted: Wanted
    out: Path

    def rows(self, data: Data, layer: int | None, settings: tuple[Setting, ...], name: str) -> list[Row]:
        """Ask, going on where the journal ends; nothing is exported where it is complete."""
        assert self.cascade.large
        plan = Plan(
            manifests=(f"{self.manifest.models_sha256}, cut before layer {layer}",),
            data=data.digest,
            targets=(self.cascade.large.target,),
            settings=settings,
            max_new_tokens=self.wanted.max_new_tokens,
            seed=self.wanted.seed,
            threads=self.cascade.large.threads,
        )
        journal = self.out / f"{name}.jsonl"
        done = asked_before(journal, plan, data)
        if len(done) == len(data.examples):
            return done
        with cut_before(self.cascade, self.manifest, self.wanted.checkpoint, layer, self.out) as cascade:
            contenders = [unmetered(self.bundle, self.manifest, cascade)]
            where = "" if layer is None else f", cut before layer {layer}"
            fresh = rows_of(contenders, data, plan, journal, len(done))
            return [*done, *track(fresh, f"asking{where}", len(data.examples) - len(done))]


def tune_bundle(
    bundle: Path, data: Data, out: Path, wanted: Wanted, target: str | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Search, write tune.json and, where something was found, plan.toml into ``out``; return the document.

    Raises UsageError for too few questions and for what the bundle cannot be run with, before any question is asked.
    """
    refuse_foreign_folder(out, DOCUMENT, PLAN_FILE, "layer-*.jsonl")
    tuned_on, reported_on = halves(data, wanted.seed)
    refuse_too_few(tuned_on, reported_on, wanted.max_loss)
    say(f"{len(tuned_on.examples)} questions to tune on, {len(reported_on.examples)} others to report on")
    manifest = manifest_of(bundle)
    cascade = Cascade.open(bundle, target, threads, reuses_beginnings=False)
    pruned = pruned_settings(cascade, wanted.keeps)
    everything = Setting((1.0,) * len(pruned[0].keep), None)
    layers = layers_to_walk(cascade, manifest, wanted.checkpoint, wanted.layers)
    assert cascade.large
    if not wanted.checkpoint:
        say("layers are not walked, because each needs its own export; give --checkpoint to try others")
    search, guided = Search(bundle, cascade, manifest, wanted, out), cascade.large.spec.plan.needs_guidance
    wholes: list[Asked] = []
    cut: list[Asked] = []
    for layer in layers:
        settings = (everything, *pruned)
        rows, there = answered(search.rows(tuned_on, layer, settings, f"layer-{layer}"), tuned_on)
        truths = [example.answers for example in there.examples]
        whole, *others = (asked_of(rows, truths, wanted.metric, layer, setting, guided) for setting in settings)
        wholes.append(whole)
        cut += others
    refuse_too_few(there, reported_on, wanted.max_loss)
    systems, baseline = systems_of([wholes[0], *cut]), wholes[0].system(None)
    best = cheapest(systems, baseline.accuracy - wanted.max_loss)
    assert best  # the baseline is one of them
    found = None if best is baseline or best.ms >= baseline.ms else best
    document = {
        "schema": SCHEMA,
        "bundle": str(bundle),
        "manifest_sha256": manifest.sha256,
        "data_sha256": data.digest,
        "target": cascade.large.target,
        "metric": wanted.metric,
        "max_loss": wanted.max_loss,
        "max_new_tokens": wanted.max_new_tokens,
        "seed": wanted.seed,
        "bad": list(there.bad),
        "layers": layers,
        "layers_walked": wanted.checkpoint is not None,
        "keep": [list(setting.keep) for setting in pruned],
        "tuned_on": len(there.examples),
        "reported_on": len(reported_on.examples),
        "baseline": baseline.document(),
        "baseline_ms_median_by_layer": [round(float(np.median(whole.ms)), 3) for whole in wholes],
        "front": [system.document() for system in front_of(systems)],
        "chosen": found.document() if found else None,
        "reported": None,
        "plan": None,
    }
    if found:
        setting = Setting(found.keep, found.policy)
        told, rest = reported(search, reported_on, found, setting, everything, guided)
        refuse_too_few(there, rest, wanted.max_loss)
        document |= {
            "reported": told,
            "reported_on": len(rest.examples),
            "bad": [*there.bad, *rest.bad[len(data.bad) :]],
        }
        document["plan"] = str(write_plan(search, found, told))
    else:
        (out / PLAN_FILE).unlink(missing_ok=True)  # of a search that allowed more
    with atomic_file(out / DOCUMENT) as partial:
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8", "replace")
    return document


def reported(
    search: Search, data: Data, found: System, setting: Setting, everything: Setting, guided: bool
) -> tuple[dict[str, Any], Data]:
    """The choice and the baseline on questions that had no part in it, with what of these could be asked.

    The loss is paired, question by question.
    """
    assert search.cascade.large
    layer = own_layer(search.cascade.large.spec.plan) if found.layer is None else found.layer
    settings = tuple(dict.fromkeys((everything, setting)))
    rows = search.rows(data, layer, settings, f"chosen-{layer}-{setting.name.replace(' ', '-').replace(':', '-')}")
    rows, data = answered(rows, data)
    truths = [example.answers for example in data.examples]
    whole, one = (asked_of(rows, truths, search.wanted.metric, layer, s, guided) for s in (everything, setting))
    loss_N = whole.chosen(None)[0] - one.chosen(found.threshold)[0]
    return {
        "baseline": whole.system(None).document(),
        "chosen": one.system(found.threshold).document(),
        "loss": float(loss_N.mean()),
        "loss_standard_error": float(loss_N.std() / math.sqrt(len(loss_N))),
    }, data


def write_plan(search: Search, found: System, told: dict[str, Any]) -> Path:
    """Write the chosen plan as a plan file, with where it comes from."""
    assert search.cascade.large
    plan = search.cascade.large.spec.plan
    exits = "nothing exits" if found.threshold is None else f"exit threshold {found.threshold:g}"
    one, whole = (
        f"{told[name]['accuracy']:.1%} in {told[name]['ms_per_question']:.1f} ms" for name in ("chosen", "baseline")
    )
    said = (
        f"# Found by saccade tune ({search.wanted.metric}, {search.cascade.large.target}), {exits}.\n"
        f"# On questions that had no part in the choice: {one};\n# the large model that sees everything: {whole}.\n"
    )
    path = search.out / PLAN_FILE
    with atomic_file(path) as partial:
        partial.write_text(said + document_of(plan, f"{plan.name}-tuned", found.keep, found.layer).dumps(), "utf-8")
    return path


def pruned_settings(cascade: Cascade, keeps: Sequence[Shares]) -> tuple[Setting, ...]:
    """The shares to walk, less those that keep everything; UsageError where nothing can be pruned or shares misfit."""
    if not cascade.large or not cascade.large.spec.plan.budgets:
        raise UsageError("this bundle's large model is not pruned, so there is no plan to tune; build one that prunes")
    plan = cascade.large.spec.plan
    if not keeps and len(plan.budgets) > 1:
        raise UsageError(
            f"this plan has {len(plan.budgets)} prune points; give --keep with a share for each, such as 0.5:0.25"
        )
    walked = shares_of(plan, keeps or [(share,) for share in KEEPS])
    pruned = [Setting(shares, plan.name, layers_of(plan)) for shares in dict.fromkeys(walked) if min(shares) < 1]
    if not pruned:
        raise UsageError("every share of --keep is 1, so there is nothing to choose from; give one below 1")
    return tuple(pruned)


def halves(data: Data, seed: int) -> tuple[Data, Data]:
    """Return the questions to tune on and those to report on, whatever their order; one that stands twice is in one."""
    drawn = sorted({e.digest for e in data.examples}, key=lambda d: hashlib.sha256(f"{seed} {d}".encode()).digest())
    first = set(drawn[: (len(drawn) + 1) // 2])
    return (
        replace(data, examples=tuple(e for e in data.examples if e.digest in first)),
        replace(data, examples=tuple(e for e in data.examples if e.digest not in first)),
    )


def refuse_too_few(tuned_on: Data, reported_on: Data, max_loss: float) -> None:
    """UsageError where one answer weighs more than the loss that is allowed, in either part."""
    if not 0 < max_loss < 1:
        raise UsageError(f"max-loss is {max_loss:g}, but must be in (0, 1), a share of accuracy; 0.01 is one point")
    least = math.ceil(1 / max_loss - 1e-9)
    sizes = [len(part.examples) for part in (tuned_on, reported_on)]
    if min(sizes) < least:
        raise UsageError(
            f"{sizes[0]} questions to tune on and {sizes[1]} to report on are too few for a loss of at most "
            f"{max_loss:g}: below {least} in each part one answer is more than that; give at least "
            f"{2 * least} questions or a larger --max-loss"
        )


def doubts(document: dict[str, Any]) -> list[str]:
    """What speaks against the choice: a machine that was now fast, now slow, and the other part of the data."""
    told, bound, times = document["reported"], document["max_loss"], document["baseline_ms_median_by_layer"]
    found = []
    if max(times) > STEADY * min(times):
        found.append(
            f"the large model that sees everything took {min(times):.1f} ms at one time and {max(times):.1f} at "
            "another, so the layers' times cannot be compared; search again, into another folder, when the machine "
            "does nothing else"
        )
    if told is None:
        return found
    loss, error = told["loss"], told["loss_standard_error"]
    unseen = 1 - CHANCE ** (1 / document["reported_on"])  # the largest loss that shows in none of so many by chance
    if loss > bound:
        found.append(
            f"on the questions to report on {loss:.1%} are lost, more than the {percent(bound)} that were allowed"
        )
    elif loss + 2 * error > bound:
        found.append(
            f"{document['reported_on']} questions determine the loss only to ± {2 * error:.1%}, so it may be more than "
            f"{percent(bound)}"
        )
    elif not error and unseen > bound:
        found.append(
            f"on the {document['reported_on']} questions to report on every answer was worth the same, which it may be "
            f"by chance where up to {unseen:.1%} are lost; {math.ceil(math.log(CHANCE) / math.log(1 - bound))} would "
            f"distinguish that from {percent(bound)}"
        )
    return found
