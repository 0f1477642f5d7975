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
    try:
        processor = Processor(folder, spec)
        photos = {size: processor.look(Image.new("RGB", size)) for size in PHOTOS}
    except SaccadeError:
        return []  # told where images are prepared
    lines = []
    for (width, height), seen in photos.items():
        tokens, tiles = sum(seen.tokens), 0
        if spec.grid.kind in ("anyres", "tiles"):
            tiles = len(seen.feeds["pixel_values"])
        wide = any(
            have > fits
            for name, array in seen.feeds.items()
            for have, fits in zip(array.shape, largest[name], strict=True)
        )
        if wide or tokens + TEXT_ROWS > (bounds.max_prompt or 0):
            lines.append(
                f"a photo of {width}×{height} makes {tokens} visual tokens"
                + (f" in {tiles} tiles" if tiles else "")
                + ", more than these engines take; for such ones give a larger --max-prompt"
                + (" and --max-images" if tiles > (bounds.max_images or 0) else "")
            )
    return lines
