"""Artefacts, plans and machines in words and tables: what ``show``, ``check`` and ``verify`` print."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from math import floor
from pathlib import Path
from typing import Any, get_args

from engines.bundles.footprint import footprint_in_words
from engines.bundles.golden import Replay
from engines.bundles.manifest import Manifest, MemberEntry, TargetEntry
from engines.targets import TARGETS
from graphs.errors import UsageError
from graphs.ops import DOMAIN, OPS
from graphs.plan import Budget, PruningPlan, Role, retention_of
from graphs.policies import TABLE, plan_of_policy
from graphs.spec import StageSpec, VisualGrid
from plugins.registry import service

MB = 1e6


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """Rows of text as aligned lines."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def plan_in_words(plan: PruningPlan, layers: int) -> list[str]:
    """What a plan does in a model of ``layers`` layers, one line per prune point or guidance."""
    lines = []
    if plan.guidance:
        chosen = plan.guidance.layers
        which = "all layers" if len(chosen) == layers else f"layers {', '.join(map(str, chosen))}"
        lines.append(f"gives guidance: attention received from rows '{plan.guidance.rows}', summed over {which}")
    if plan.vision:
        each = " of each image" if plan.vision.per_image else ""
        lines.append(f"at the vision stage keeps {_budget(plan.vision)}{each} by score '{plan.vision.score}'")
    for point in plan.points:
        by = {
            "priority": "the small model's guidance",
            "random": f"a draw from seed {point.seed}",
            "preview": f"attention of layer {point.layer} itself from rows '{point.rows}', before it runs",
            "attention": f"attention of layer {point.layer - 1} from rows '{point.rows}'",
        }[point.score]
        each = " of each image" if point.per_image else ""
        merged = f", {point.merge:.0%} of those as clusters of the dropped" if point.merge else ""
        lines.append(f"before layer {point.layer} of {layers} keeps {_budget(point)}{each} by {by}{merged}")
    if plan.points and not any(budget.count for budget in plan.budgets):
        share = retention_of(plan, layers, tuple(budget.keep for budget in plan.budgets))
        lines[-1] += f" (average retention {share:.2%})"
    return lines or ["prunes nothing"]


def _budget(point: Budget) -> str:
    return f"{point.count} tokens" if point.count else f"{100 * point.keep:g}%"


def stage_in_words(name: str, stage: StageSpec) -> list[str]:
    """A stage's inputs and outputs as a table; the caches of all layers of one length are one line."""
    rows: list[tuple[str, str, str, str]] = []
    for side, tensors in (("in", stage.inputs), ("out", stage.outputs)):
        for tensor in tensors:
            shape = f"[{', '.join(_dimension(d) for d in tensor.shape)}]{' length only' if tensor.carrier else ''}"
            of_layer = tensor.name.startswith(("past_", "present_"))
            if of_layer and rows and rows[-1][0] == side and rows[-1][2:] == (tensor.dtype, shape):
                rows[-1] = side, f"{rows[-1][1].partition(' … ')[0]} … {tensor.name}", tensor.dtype, shape
            else:
                rows.append((side, tensor.name, tensor.dtype, shape))
    return [f"  {name} ({stage.file})", *columns(rows, "    ")]


def _dimension(size: int | str) -> str:
    """A sum's terms in alphabetical order, as the tracer writes them in any."""
    return " + ".join(sorted(size.split(" + "))) if isinstance(size, str) else str(size)


def grid_in_words(grid: VisualGrid) -> str:
    """How many visual tokens an image becomes."""
    if grid.kind == "patches":
        side = grid.patch * grid.merge
        return f"one visual token per {side}×{side} pixels"
    return f"{grid.rows}×{grid.columns} visual tokens" + ("" if grid.kind == "fixed" else " per tile")


def member_in_words(name: str, member: MemberEntry) -> list[str]:
    """A model of a bundle: size, plan, and for each target its precision, memory, ops and stages."""
    language, grid = member.language, member.grid
    lines = [
        f"{name}: {member.architecture} ({member.family}), {language.layers} layers of width {language.width}, "
        f"{grid_in_words(grid)}",
        *(f"  plan {member.plan.name}: {line}" for line in plan_in_words(member.plan, language.layers)),
    ]
    shown: list[dict[str, StageSpec]] = []
    for target, entry in member.targets.items():
        lines += target_in_words(target, entry)
        if entry.stages not in shown:
            lines += [line for stage, spec in entry.stages.items() for line in stage_in_words(stage, spec)]
        shown.append(entry.stages)
    return lines


def target_in_words(target: str, entry: TargetEntry) -> list[str]:
    """What a model is on one target, its stages left out."""
    served = ", ".join(f"{op} by its {by}" for op, by in entry.ops.items()) or "none of ours"
    return [
        f"  on {target}: {_precision(entry)}, {entry.weight_bytes / MB:.1f} MB of weights{_engines_in_words(entry)}",
        f"  on {target}: memory, estimated: {footprint_in_words(entry.footprint)}",
        f"  on {target}: ops: {served}",
    ]


def _precision(entry: TargetEntry) -> str:
    """What it computes in, and where they are narrower, its weights."""
    return f"{entry.precision} weights, {entry.dtype}" if entry.precision.startswith("int") else entry.computed_in


def _engines_in_words(entry: TargetEntry) -> str:
    """Version and GPUs of the engines, and in brackets what is beyond an engine for these alone."""
    made = {(engine.tensorrt, engine.sms, engine.compatibility, engine.parser) for engine in entry.engines.values()}
    plugins = {engine.plugins for engine in entry.engines.values()} - {"none"}
    said = ""
    for version, sms, compatibility, parser in made:
        notes = [
            f"hardware compatibility {compatibility.hardware}" if compatibility.hardware != "none" else "",
            "newer versions too" if compatibility.versions else "",
            f"written out for the parser of {parser}" if parser != "current" else "",
            "kernels built in ahead of time" if "aot" in plugins else "",
            "kernels as Python plugins" if "python" in plugins else "",
        ]
        noted = "; ".join(filter(None, notes))
        said += f", engines of {version} for SM {', '.join(f'{sm // 10}.{sm % 10}' for sm in sms)}"
        said += f" ({noted})" if noted else ""
    return said


def bundle_in_words(path: Path, manifest: Manifest) -> list[str]:
    """What ``show BUNDLE`` prints."""
    total = sum(entry.bytes for entry in manifest.files) / MB
    return [
        f"{path}: for target {' and '.join(manifest.targets)}, exit threshold {manifest.threshold:g}, "
        f"{len(manifest.files)} files, {total:.1f} MB",
        f"made by {manifest.created_by} with " + ", ".join(f"{k} {v}" for k, v in manifest.tools.items()),
        *(calibration.in_words() for calibration in manifest.calibrations),
        *(line for name, entry in manifest.members.items() for line in member_in_words(name, entry)),
    ]


def replays_in_words(replays: Sequence[Replay], model: str = "") -> list[str]:
    """One line per golden case: its largest error beside its tolerance, and the share of kept rows in common."""
    rows = [
        (
            " ".join(filter(None, (model, f"{r.stage}/{r.case}"))),
            "agrees" if r.agrees else "disagrees",
            f"error {r.max_error:.1e} of {max((t.tolerance for t in r.tensors), default=0):.0e}",
            "" if r.overlap is None else f"kept rows {floor(1000 * r.overlap) / 10:g}% equal",
            "" if r.merged is None else f"merged rows {floor(1000 * r.merged) / 10:g}% equal",
            f"{r.uncompared} tensors behind other kept rows not compared" if r.uncompared else "",
        )
        for r in replays
    ]
    return columns(rows)


def op_documents() -> list[dict[str, Any]]:
    """Each op of ours: its meaning, what serves it on each target if it is built here, and why not the kernel."""
    builders = {name: target.module if target.runs == "engines" else None for name, target in TARGETS.items()}
    return [
        {
            "op": f"{DOMAIN}::{name}",
            **{target: service(name, builder)[0] for target, builder in builders.items()},
            "why_body": {t: why for t, b in builders.items() for by, why in [service(name, b)] if by == "body"},
            "meaning": (import_module(op.define.__module__).__doc__ or "").partition("\n")[0].partition(": ")[2],
        }
        for name, op in OPS.items()
    ]


def op_rows(documents: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The same as rows: an op with its meaning, then what serves it and why not the kernel, a row for targets alike."""
    rows = []
    for document in documents:
        rows.append((document["op"], "", document["meaning"]))
        alike: dict[tuple[str, str], list[str]] = {}
        for target in TARGETS:
            alike.setdefault((document[target], document["why_body"].get(target, "")), []).append(target)
        rows += [(f"  {', '.join(targets)}", by, why) for (by, why), targets in alike.items()]
    return rows


def policy_documents(layers: int) -> list[dict[str, Any]]:
    """Each policy: its meaning, and what it does in a model of ``layers`` layers in each role."""
    return [
        {
            "policy": policy.name,
            "meaning": policy.meaning,
            "source": policy.source,
            "plan": policy.document("large").dumps(),
            "roles": {role: _plan_or_refusal(policy.name, role, layers) for role in get_args(Role)},
        }
        for policy in TABLE
    ]


def _plan_or_refusal(policy: str, role: Role, layers: int) -> list[str]:
    """A named plan in words, or why a model of this depth cannot have it."""
    try:
        return plan_in_words(plan_of_policy(policy, role, layers), layers)
    except UsageError as e:
        return [f"refused: {e}"]
