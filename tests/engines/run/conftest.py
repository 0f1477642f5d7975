"""A tiny random pair, exported once per session, and the references beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.cascade import Cascade
from engines.model import Model
from graphs.spec import spec_from_folder
from tests.reference_sgl import Reference
from tests.tiny import tiny_llava

IMAGE_SIZE = 64  # 64 visual tokens, so that 5 % is three of them
NEW_TOKENS = 5

WORDS = "what which where how many digit colour is the red green blue ? 0 1 2 3 4 5 6 7 8 9".split()


@dataclass(frozen=True)
class TinyPair:
    """Checkpoints and their exports by role."""

    checkpoints: dict[str, Path]
    exports: dict[str, Path]

    def model(self, role: str, target: str = "cpu") -> Model:
        return Model(self.exports[role], spec_from_folder(self.exports[role]), target, threads=1)

    def cascade(self, threshold: float = 1.0, target: str = "cpu") -> Cascade:
        return Cascade(self.model("small", target), self.model("large", target), threshold)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    import torch

    from exporter.export import export_checkpoint

    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("tiny-pair")
    small = tiny_llava(home / "small", seed=1, num_hidden_layers=2, image_size=IMAGE_SIZE)
    large = tiny_llava(home / "large", seed=5, num_hidden_layers=3, hidden_size=48, image_size=IMAGE_SIZE)
    checkpoints = {"small": small, "large": large, "alone": large}
    exports = {}
    for role, options in {"small": {}, "large": {"fraction": 0.4}, "alone": {"fraction": 0.4, "keep": 0.25}}.items():
        exports[role] = home / f"{role}-export"
        export_checkpoint(checkpoints[role], exports[role], policy="sgl", role=role, **options)  # type: ignore[arg-type]
    return TinyPair(checkpoints, exports)


@pytest.fixture(scope="session")
def cascade(tiny_pair: TinyPair) -> Cascade:
    return tiny_pair.cascade()


@pytest.fixture(scope="session")
def references(tiny_pair: TinyPair) -> dict[str, Reference]:
    return {role: Reference(tiny_pair.checkpoints[role]) for role in ("small", "large")}


def picture_of(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def question_of(seed: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), int(rng.integers(1, 7))))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The graph files that ONNX Runtime opened during the test."""
    from engines.sessions import ort_session

    opened: list[Path] = []
    real: Callable[..., Any] = ort_session.OrtSession.__init__

    def noted(self: Any, file: Path, threads: int | None = None, in_place: bool = False) -> None:
        opened.append(Path(file))
        real(self, file, threads, in_place)

    monkeypatch.setattr(ort_session.OrtSession, "__init__", noted)
    return opened


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engines.bundles.build import build_bundle

    out = tmp_path_factory.mktemp("bundles") / "pair.bundle"
    build_bundle([tiny_pair.exports["small"], tiny_pair.exports["large"]], out)
    return out


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    picture_of(0).save(path)
    return path
