"""What photos an engine's bounds take: looked up by the model's own image processor, for its tiles decide it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from engines.processing import Processor
from engines.trt.bounds import Bounds, profiles_of
from graphs.errors import SaccadeError
from graphs.spec import ExportSpec

PHOTOS = ((640, 480), (1920, 1080))
TEXT_ROWS = 64  # of a short question and its template


def photos_in_words(folder: Path, spec: ExportSpec, bounds: Bounds) -> list[str]:
    """One line for each photo that does not fit, with what it needs; none where the processor cannot be asked.

    folder: an export, whose ``processor/`` is read. bounds: fitted.
    """
    largest = {name: shapes[2] for name, shapes in profiles_of("vision", spec, bounds)["any"].items()}
    lines = []
    for size in PHOTOS:
        try:
            seen = Processor(folder, spec).look(Image.new("RGB", size))
        except SaccadeError:
            return []  # told where images are prepared
        rows, most = sum(seen.tokens) + TEXT_ROWS, bounds.max_prompt or 0
        wide = [
            name
            for name, array in seen.feeds.items()
            if any(have > fits for have, fits in zip(array.shape, largest[name], strict=True))
        ]
        if rows > most or wide:
            parts = next((len(array) for name, array in seen.feeds.items() if name == "pixel_values"), 0)
            tiles = f" in {parts} tiles" if spec.grid.kind in ("anyres", "tiles") else ""
            lines.append(
                f"a photo of {size[0]}×{size[1]} makes {rows - TEXT_ROWS} visual tokens{tiles}, more than these "
                "engines take; for such ones give a larger --max-prompt"
                + (" and --max-images" if tiles and parts > (bounds.max_images or 0) else "")
            )
    return lines
