"""The large model of a bundle with its cut before another layer: its checkpoint exported once more, for a while.

A keep ratio is a run's own choice, but the layer of a cut is in the graph: the caches before and behind it have lengths
of their own. So another layer is another export, made by a process of its own (it needs torch, and this one must stay
as it was while it is timed) and removed when it has been asked.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engines.bundles.manifest import Manifest, MemberEntry
from engines.cascade import Cascade
from engines.model import Model
from engines.targets import TARGETS
from graphs.console import step
from graphs.errors import BackendMissing, BadArtefact, OperationFailed, UsageError
from graphs.files import sha256_of
from graphs.plan import PruningPlan, layer_of
from graphs.plan_file import PlanDocument, document_of
from graphs.spec import ExportSpec, spec_from_folder

EXPORT = ("-m", "saccade", "export")
EXPORTED = ".export.partial"
DEPTHS = (0.05, 0.125, 0.25, 0.5)  # shares of the depth that are tried beside the bundle's own layer
SAME = ("architecture", "role", "dtype", "language", "grid", "tokens")


def own_layer(plan: PruningPlan) -> int | None:
    """The layer of a plan's only cut in the decoder, None where it has none or several."""
    return plan.points[0].layer if len(plan.points) == 1 else None


def layers_to_walk(
    cascade: Cascade, manifest: Manifest, checkpoint: Path | None, asked: Sequence[int]
) -> list[int | None]:
    """Return the layers to cut before, ascending; the bundle's own alone where there is no checkpoint.

    Raises UsageError where a layer cannot be had.
    """
    assert cascade.large
    spec, own = cascade.large.spec, own_layer(cascade.large.spec.plan)
    if not checkpoint:
        if others := [layer for layer in asked if layer != own]:
            raise UsageError(
                f"a cut before layer {others[0]} needs another export than this bundle's (layer {own}); give the large "
                "model's checkpoint with --checkpoint"
            )
        return [own]
    if own is None:
        raise UsageError(
            f"plan {spec.plan.name} has {len(spec.plan.points)} prune points in the decoder, and other layers can be "
            "tried for one only; leave --checkpoint out, or give a bundle whose plan has one"
        )
    if TARGETS[cascade.large.target].runs == "engines":
        raise UsageError(
            f"target {cascade.large.target} runs engines, and another layer would need one built; tune on a target "
            "that runs graphs"
        )
    entry = large_of(manifest).targets[cascade.large.target]
    if entry.precision or entry.dtype == "bfloat16":
        raise UsageError(
            f"target {cascade.large.target} of this bundle was built with --precision {entry.precision or 'bf16'}, and "
            "an export of another layer would be timed without; tune on a bundle that was built without"
        )
    wanted = asked or [own, *(layer_of(share, spec.language.layers) for share in DEPTHS)]
    found: list[int | None] = []
    for layer in sorted(set(wanted)):
        plan = document_of(spec.plan, spec.plan.name, [1.0] * len(spec.plan.budgets), layer)
        if asked or layer or spec.plan.points[0].score != "attention":  # which has no layer before the first
            plan.resolved(spec.language.layers)
            found.append(layer)
    return found


@contextmanager
def cut_before(
    cascade: Cascade, manifest: Manifest, checkpoint: Path | None, layer: int | None, work: Path
) -> Iterator[Cascade]:
    """Yield the cascade, its large model exported anew where it is cut before another layer.

    work: an existing folder for the export, on a disk that has room for the weights once more; what a killed search
    left there goes. Raises what the export does, by its exit code, and BadArtefact for a checkpoint that is not the
    bundle's.
    """
    large = cascade.large
    assert large
    if layer == own_layer(large.spec.plan):
        yield cascade
        return
    assert checkpoint
    held = work / EXPORTED
    shutil.rmtree(held, ignore_errors=True)
    try:
        held.mkdir()
        folder = held / "large"
        plan = document_of(large.spec.plan, large.spec.plan.name, [1.0] * len(large.spec.plan.budgets), layer)
        with step(f"exporting {checkpoint} with its cut before layer {layer}"):
            export(checkpoint, folder, plan, large.spec, held / "plan.toml")
        spec = spec_from_folder(folder)
        refuse_another(checkpoint, folder, spec, large.spec, manifest)
        cut = Model(folder, spec, large.target, large.threads)
        yield Cascade(cascade.small, cut, cascade.threshold, cascade.reuses_beginnings)
    finally:
        shutil.rmtree(held, ignore_errors=True)


def large_of(manifest: Manifest) -> MemberEntry:
    """The large model's entry, or that of the only one."""
    return manifest.members["large" if "large" in manifest.members else "alone"]


def export(checkpoint: Path, out: Path, plan: PlanDocument, like: ExportSpec, file: Path) -> None:
    """Run ``saccade export`` under a plan, in role and precision of ``like``; its error is raised here as its own."""
    file.write_text(plan.dumps(), "utf-8")
    how = ("--plan", str(file), "--role", like.role, "--dtype", like.dtype)
    told = subprocess.run(
        [sys.executable, *EXPORT, str(checkpoint), "-o", str(out), *how],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if told.returncode:
        kinds = (UsageError, BadArtefact, BackendMissing)
        kind = next((k for k in kinds if k.exit_code == told.returncode), OperationFailed)
        last = next((line for line in reversed(told.stderr.splitlines()) if line.strip()), "it said nothing")
        raise kind(last.removeprefix("saccade: "))


def refuse_another(checkpoint: Path, folder: Path, spec: ExportSpec, own: ExportSpec, manifest: Manifest) -> None:
    """BadArtefact where a checkpoint is not what the bundle's large model was exported from: sizes, then every byte."""
    differs = [name for name in SAME if getattr(spec, name) != getattr(own, name)]
    member = large_of(manifest)
    known = {file.path: file.sha256 for file in manifest.files}
    for name in (weight.name for weight in spec.weights if not differs):
        differs += [f"the weights {name}"] if known.get(f"{member.folder}/{name}") != sha256_of(folder / name) else []
    if differs:
        raise BadArtefact(
            f"{checkpoint} is not the checkpoint of the bundle's large model: {differs[0]} differ; give the one that "
            "was exported"
        )
