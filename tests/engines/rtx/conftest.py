"""A tiny pair exported once, its lowered files by precision, and one rtx bundle per way to serve the ops."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from engines.bundles.golden import Case, cases_of, fed, told
from engines.sessions.session import open_session
from graphs.lowering import Lowering
from graphs.lowering.export import LoweredExport, lowered_export
from graphs.spec import spec_from_folder
from plugins.registry import NODE_ATTRIBUTES, ops_with_kernels
from plugins.trt import process_environment
from tests.tiny import tiny_llava

Exports = dict[str, Path]
Lower = Callable[..., LoweredExport]


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """small: what each key received, in every layer. large: pruned by a priority. Head widths are multiples of 8."""
    import torch

    from exporter.export import export_checkpoint

    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("rtx-exports")
    sizes: dict[str, dict[str, Any]] = {"small": {"seed": 1}, "large": {"seed": 5, "hidden_size": 64}}
    for role, changes in sizes.items():
        layers = 2 if role == "small" else 3
        checkpoint = tiny_llava(home / f"{role}-checkpoint", num_hidden_layers=layers, **changes)
        options = {} if role == "small" else {"fraction": 0.4, "keep": 0.25}
        export_checkpoint(checkpoint, home / role, policy="sgl", role=role, **options)  # type: ignore[arg-type]
    return {role: home / role for role in sizes}


@pytest.fixture(scope="session")
def lower(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """Lower an export, each way once."""

    @cache
    def lowered(
        role: str,
        precision: str = "float32",
        plugins: bool = False,
        parser: str = "current",
        capacity: int | None = None,
    ) -> LoweredExport:
        asked = {"plugin_ops": frozenset(ops_with_kernels()), "plugin_attributes": NODE_ATTRIBUTES} if plugins else {}
        lowering = Lowering(precision, parser=parser, capacity=capacity, **asked)  # type: ignore[arg-type]
        out = tmp_path_factory.mktemp("lowered")
        return lowered_export(exports[role], spec_from_folder(exports[role]), out, lowering)

    return lowered


def feeds_of(lowered: LoweredExport, case: Case) -> dict[str, np.ndarray]:
    """A golden case's inputs in the types, and the form of cache, of the lowered file."""
    given = fed(case, lowered.spec)
    return {t.name: given[t.name].astype(t.dtype) for t in lowered.spec.stages[case.stage].inputs}


def run_onnx(lowered: LoweredExport, case: Case) -> dict[str, np.ndarray]:
    """A golden case through a lowered file in ONNX Runtime."""
    outputs = [t.name for t in lowered.spec.stages[case.stage].outputs]
    got = open_session(lowered.file(case.stage), threads=1).run(feeds_of(lowered, case), host=outputs)
    return told(case, got)


def golden(folder: Path) -> list[Case]:
    return cases_of(folder, spec_from_folder(folder))


def interpreted(
    lowered: LoweredExport, cases: list[Case], work: Path, plugins: bool, stage: str = "decoder"
) -> dict[str, dict[str, np.ndarray]]:
    """Golden cases of a stage through the parsed network, in a process of its own."""
    graph = ir.load(lowered.file(stage)).graph
    scale = {n.name: n.attributes.get_float("scale") if "scale" in n.attributes else None for n in graph if n.domain}
    ops = {n.name: (n.op_type, scale[n.name]) for n in graph if n.domain}
    files = {case.name: (str(work / f"{case.name}-in.npz"), str(work / f"{case.name}-out.npz")) for case in cases}
    for case in cases:
        np.savez(files[case.name][0], **feeds_of(lowered, case))  # type: ignore[arg-type]
    job = {"onnx": str(lowered.file(stage)), "ops": ops, "plugins": plugins, "cases": files}
    (work / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.engines.rtx.interpreter", str(work / "job.json")]
    root = Path(__file__).parent.parent.parent.parent
    done = subprocess.run(command, env=process_environment(work), cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {case.name: told(case, dict(np.load(files[case.name][1]))) for case in cases}
