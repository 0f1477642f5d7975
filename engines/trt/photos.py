"""What photos an engine's bounds take: looked up by the model's own image processor, for its tiles decide it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from engines.processing import Processor
from engines.trt.bounds import Bounds, Room, profiles_of
from graphs.errors import SaccadeError
from graphs.spec import ExportSpec

PHOTOS = ((640, 480), (1920, 1080))
TEXT_ROWS = 64  # of a short question and its template
MOST_ROWS = 4096  # of a chunk that is made room for unasked: its maps and activations are an engine's memory


@dataclass(frozen=True)
class Photo:
    """One size of photo as a model's processor makes it. shapes: of the vision stage's inputs, by name."""

    width: int
    height: int
    tokens: int
    tiles: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def rows(self) -> int:
        """Rows of the prompt with a short question about it."""
        return self.tokens + TEXT_ROWS


def photos_seen(folder: Path, spec: ExportSpec) -> list[Photo]:
    """PHOTOS, each as the processor of an export makes it; none where that cannot be asked."""
    try:
        processor = Processor(folder, spec)
        seen = [(size, processor.look(Image.new("RGB", size))) for size in PHOTOS]
    except SaccadeError:
        return []  # told where images are prepared
    tiled = spec.grid.kind in ("anyres", "tiles")
    return [
        Photo(
            *size,
            sum(of.tokens),
            len(of.feeds["pixel_values"]) if tiled else 0,
            {name: array.shape for name, array in of.feeds.items()},
        )
        for size, of in seen
    ]


def room_for(photos: list[Photo]) -> Room:
    """Room for those of them that take at most MOST_ROWS rows; none for any where all take more."""
    fitting = [photo for photo in photos if photo.rows <= MOST_ROWS]
    return Room(max((p.rows for p in fitting), default=0), max((p.tiles for p in fitting), default=0))


def misfits_in_words(photos: list[Photo], spec: ExportSpec, bounds: Bounds) -> list[str]:
    """One line for each photo that does not fit, with what it needs. bounds: fitted."""
    largest = {name: shapes[2] for name, shapes in profiles_of("vision", spec, bounds)["any"].items()}
    lines = []
    for photo in photos:
        wide = any(
            have > fits for name, shape in photo.shapes.items() for have, fits in zip(shape, largest[name], strict=True)
        )
        if wide or photo.rows > (bounds.max_prompt or 0):
            lines.append(
                f"a photo of {photo.width}×{photo.height} makes {photo.tokens} visual tokens"
                + (f" in {photo.tiles} tiles" if photo.tiles else "")
                + ", more than these engines take; for such ones give a larger --max-prompt"
                + (" and --max-images" if photo.tiles > (bounds.max_images or 0) else "")
            )
    return lines
