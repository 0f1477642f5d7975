"""Tiny random checkpoints and their exports, each made once per session: tracing costs a second a layer."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter import export as exporter_page
from exporter.export import export_checkpoint
from graphs.plan import PrunePoint, PruningPlan
from tests.exporter.driver import Exported
from tests.tiny import tiny_llava

MIXED = PruningPlan(
    name="mixed",
    points=(
        PrunePoint(layer=1, score="attention", keep=0.5),
        PrunePoint(layer=2, score="priority", keep=0.25),
    ),
)
# name → the checkpoint, and what is asked of the export
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("untied", {"role": "small"}),
    "large": ("tied", {"role": "large", "fraction": 0.5, "keep": 0.5}),
    "mixed": ("untied", {"role": "alone", "plan": MIXED}),
    "half": ("half", {"role": "small", "in_place": True}),
    "narrowed": ("tied", {"role": "large", "fraction": 0.5, "keep": 0.5, "dtype": "float16"}),
    "widened": ("brain", {"role": "large"}),
}
SIZES: dict[str, dict[str, Any]] = {
    "untied": {"seed": 3, "num_hidden_layers": 3},
    "tied": {"seed": 4, "num_hidden_layers": 2, "tie": True},
    "half": {"seed": 5, "num_hidden_layers": 1, "dtype": "float16"},
    "brain": {"seed": 6, "num_hidden_layers": 1, "dtype": "bfloat16", "tie": True},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The named checkpoint; the one called half is stored as on the hub: old key names, two shards."""
    from tests.exporter.hub import roughen, stored_as_on_the_hub

    @cache
    def made(name: str) -> Path:
        folder = tiny_llava(tmp_path_factory.mktemp("checkpoint") / name, **SIZES[name])
        roughen(folder)
        if name == "half":
            stored_as_on_the_hub(folder)
        return folder

    return made


@pytest.fixture(scope="session")
def exported(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The named export, with its sessions."""

    @cache
    def made(name: str) -> Exported:
        source, options = EXPORTS[name]
        folder = checkpoint(source)
        out = None if options.get("in_place") else tmp_path_factory.mktemp("export") / name
        export_checkpoint(folder, out, **options)
        return Exported(out or folder)

    return made


@pytest.fixture(scope="session")
def hf(checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """The named checkpoint in transformers."""
    from transformers import LlavaForConditionalGeneration

    @cache
    def loaded(name: str, dtype: str = "float32", attention: str = "sdpa") -> Any:
        return LlavaForConditionalGeneration.from_pretrained(
            checkpoint(name), dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()

    return loaded


@pytest.fixture
def traced_before(exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Exports of the checkpoint "untied" as role small take their traces from an earlier export: no seconds lost."""
    import onnx_ir as ir

    folder = exported("small").folder

    def reread(program: Any, *_: Any) -> ir.Model:
        return ir.load(folder / f"{type(program).__name__.removesuffix('Program').lower()}.onnx")

    monkeypatch.setattr(exporter_page, "onnx_from_program", reread)
    return folder
