"""The kept-token picture: what the large model sees, and where the small one looked. Pillow only.

Legend: H, W the processed image's pixels, V = rows × columns visual tokens.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engines.answer import Answer
from engines.budgets import Keep
from engines.cascade import Cascade
from engines.images import Picture
from engines.model import Model
from engines.talk.messages import asked
from graphs.atomic import atomic_file
from graphs.errors import UsageError

PANEL = 480  # shorter side of a panel is at least this many pixels
MARGIN = 16
DIM = 0.22  # what is left of a dropped token's brightness
INK, PAPER = (32, 32, 36), (255, 255, 255)
# Dark to bright, evenly rising in lightness, so that it also reads in grey.
HEAT = np.array([(8, 8, 24), (64, 16, 96), (148, 38, 100), (222, 78, 60), (250, 160, 40), (252, 246, 176)], np.float32)


def show_kept_tokens(
    cascade: Cascade,
    image: Picture | Sequence[Picture],
    question: str,
    output: Path,
    keep: Keep = None,
    max_new_tokens: int | None = None,
) -> Answer:
    """Ask without an early exit, write the picture as PNG and return the answer it shows; one row per image."""
    if output.suffix.lower() != ".png":
        raise UsageError(
            f"{output} does not end in .png; the picture is written as PNG, so use a name that ends in .png"
        )
    model = cascade.large or cascade.small
    if not model:
        raise UsageError("this bundle holds no model to show; build it again")
    images = asked(question, image).images
    if not images:
        raise UsageError("a question without an image keeps no visual tokens to draw; give --image")
    never = 1.0 if cascade.small and cascade.large else None
    answer = cascade.ask(images, question, keep=keep, threshold=never, max_new_tokens=max_new_tokens)
    with cascade.lock:
        rows = views_of(model, images, answer.kept[-1] if answer.kept else None, answer.guidance)
    with atomic_file(output) as partial:
        page_of(rows, caption_of(question, answer)).save(partial, format="PNG")
    return answer


def views_of(
    model: Model, images: Sequence[Image.Image], kept_V: np.ndarray | None, guidance_V: np.ndarray | None = None
) -> list[list[Image.Image]]:
    """Return the panels of each image.

    kept_V: indices into the visual tokens of all images, None for all. guidance_V: None leaves the heat maps out.
    """
    visual = model.processor.look(*images)
    starts = np.cumsum([0, *visual.tokens[:-1]])
    rows = []
    for i, (start, whole) in enumerate(zip(starts, visual.whole, strict=True)):
        # Where an image is also cut into tiles, their tokens are not drawn: only its whole view is a grid.
        place_V = start + whole.ravel()
        kept = None if kept_V is None else np.flatnonzero(np.isin(place_V, kept_V))
        guidance = None if guidance_V is None else guidance_V[place_V]
        rows.append(panels_of(model.processor.view(visual, i), whole.shape, kept, guidance))
    return rows


def caption_of(question: str, answer: Answer) -> str:
    """Return the line below the picture."""
    kept = answer.visual_tokens if not answer.kept else len(answer.kept[-1])
    return f"{question}: {answer.text}   ({kept} of {answer.visual_tokens} visual tokens kept)"


def panels_of(
    seen: Image.Image, grid: tuple[int, int], kept: np.ndarray | None, guidance_V: np.ndarray | None
) -> list[Image.Image]:
    """Return the image with dropped tokens dimmed, and beside it the guidance as a heat map.

    seen: RGB [H, W] as the model gets it. grid: rows and columns of tokens. kept: indices of visual tokens,
    None for all. guidance_V: None leaves the heat map out.
    """
    scale = max(1, -(-PANEL // min(seen.size)))
    size = (seen.width * scale, seen.height * scale)
    large = seen.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    return [dimmed(large, grid, kept), *([] if guidance_V is None else [heat_map(large, grid, guidance_V)])]


def page_of(rows: Sequence[Sequence[Image.Image]], caption: str) -> Image.Image:
    """Lay out panels, one row per image, over a caption."""
    font = ImageFont.load_default(size=20)
    width = max(sum(panel.width + MARGIN for panel in row) for row in rows) + MARGIN
    height = sum(row[0].height + MARGIN for row in rows) + MARGIN
    lines = textwrap.wrap(caption, max(20, (width - 2 * MARGIN) // 11)) or [""]
    page = Image.new("RGB", (width, height + 28 * len(lines) + MARGIN // 2), PAPER)
    top = MARGIN
    for row in rows:
        left = MARGIN
        for panel in row:
            page.paste(panel, (left, top))
            left += panel.width + MARGIN
        top += row[0].height + MARGIN
    ImageDraw.Draw(page).multiline_text((MARGIN, height), "\n".join(lines), fill=INK, font=font)
    return page


def dimmed(image: Image.Image, grid: tuple[int, int], kept: np.ndarray | None) -> Image.Image:
    """Return the image with the tokens that are not in ``kept`` darkened and greyed."""
    if kept is None:
        return image
    stays_V = np.zeros(grid[0] * grid[1], np.uint8)
    stays_V[kept] = 255
    mask = Image.fromarray(stays_V.reshape(grid)).resize(image.size, Image.Resampling.NEAREST)
    dropped = image.convert("L").convert("RGB").point(lambda v: int(v * DIM))
    return Image.composite(image, dropped, mask)


def heat_map(image: Image.Image, grid: tuple[int, int], guidance_V: np.ndarray) -> Image.Image:
    """Return guidance as colours, one field per token, with the image faintly in it.

    Attention has a long tail, so the colour is of the square root, from 0 to the highest.
    """
    share_V = np.sqrt(np.clip(guidance_V, 0, None) / max(float(guidance_V.max()), 1e-30))
    at = np.arange(len(HEAT)) / (len(HEAT) - 1)
    colour_V3 = np.stack([np.interp(share_V, at, HEAT[:, c]) for c in range(3)], axis=-1)
    field = colour_V3.round().astype(np.uint8).reshape(*grid, 3)
    heat = Image.fromarray(field).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(heat, image.convert("L").convert("RGB"), 0.18)
