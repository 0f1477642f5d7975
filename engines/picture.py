"""The kept-token picture: what the large model sees, and where the small one looked. Pillow only.

Legend: H, W the processed image's pixels, V = rows × columns visual tokens.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engines.answer import Answer
from engines.cascade import Cascade
from engines.decoder import Keep
from engines.families import Seen
from engines.images import Picture, image_from
from graphs.atomic import atomic_file
from graphs.errors import UsageError
from graphs.spec import VisualGrid

PANEL = 480  # shorter side of a panel is at least this many pixels
MARGIN = 16
DIM = 0.22  # what is left of a dropped token's brightness
INK, PAPER = (32, 32, 36), (255, 255, 255)
# Dark to bright, evenly rising in lightness, so that it also reads in grey.
HEAT = np.array([(8, 8, 24), (64, 16, 96), (148, 38, 100), (222, 78, 60), (250, 160, 40), (252, 246, 176)], np.float32)


def show_kept_tokens(
    cascade: Cascade,
    image: Picture,
    question: str,
    output: Path,
    keep: Keep = None,
    max_new_tokens: int | None = None,
) -> Answer:
    """Ask without an early exit, write the picture as PNG and return the answer it shows."""
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output} does not end in .png; the picture is written as PNG, name it so")
    model = cascade.large or cascade.small
    if not model:
        raise UsageError("this bundle holds no model to show; build it again")
    picture = image_from(image)
    answer = cascade.ask(picture, question, keep=keep, threshold=1, max_new_tokens=max_new_tokens)
    visual = model.processor.look(picture)
    grid, place_V = map_of(visual)
    kept = np.flatnonzero(np.isin(place_V, answer.kept[-1])) if answer.kept else None
    guidance = None if answer.guidance is None else answer.guidance[place_V]
    drawing = kept_picture(model.processor.view(visual), grid, kept, guidance, caption_of(question, answer))
    with atomic_file(output) as partial:
        drawing.save(partial, format="PNG")
    return answer


def map_of(visual: Seen) -> tuple[VisualGrid, np.ndarray]:
    """The first image's whole view as a grid, and the visual token of each of its fields, row by row.

    Where an image is also cut into tiles, their tokens are not drawn.
    """
    rows, columns = visual.whole[0].shape
    return VisualGrid(image_height=0, image_width=0, rows=rows, columns=columns), visual.whole[0].ravel()


def caption_of(question: str, answer: Answer) -> str:
    """Return the line below the picture."""
    kept = answer.visual_tokens if not answer.kept else len(answer.kept[-1])
    return f"{question}  →  {answer.text}   ({kept} of {answer.visual_tokens} visual tokens kept)"


def kept_picture(
    seen: Image.Image, grid: VisualGrid, kept: np.ndarray | None, guidance_V: np.ndarray | None, caption: str
) -> Image.Image:
    """Return the image with dropped tokens dimmed, and beside it the guidance as a heat map.

    seen: RGB [H, W] as the model gets it. kept: indices of visual tokens, None for all. guidance_V:
    None leaves the heat map out.
    """
    scale = max(1, -(-PANEL // min(seen.size)))
    size = (seen.width * scale, seen.height * scale)
    large = seen.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    panels = [dimmed(large, grid, kept)]
    if guidance_V is not None:
        panels.append(heat_map(large, grid, guidance_V))
    font = ImageFont.load_default(size=20)
    width = len(panels) * (size[0] + MARGIN) + MARGIN
    lines = textwrap.wrap(caption, max(20, (width - 2 * MARGIN) // 11)) or [""]
    page = Image.new("RGB", (width, size[1] + 2 * MARGIN + 28 * len(lines) + MARGIN // 2), PAPER)
    for i, panel in enumerate(panels):
        page.paste(panel, (MARGIN + i * (size[0] + MARGIN), MARGIN))
    ImageDraw.Draw(page).multiline_text((MARGIN, size[1] + 2 * MARGIN), "\n".join(lines), fill=INK, font=font)
    return page


def dimmed(image: Image.Image, grid: VisualGrid, kept: np.ndarray | None) -> Image.Image:
    """Return the image with the tokens that are not in ``kept`` darkened and greyed."""
    if kept is None:
        return image
    stays_V = np.zeros(grid.tokens, np.uint8)
    stays_V[kept] = 255
    mask = Image.fromarray(stays_V.reshape(grid.rows, grid.columns)).resize(image.size, Image.Resampling.NEAREST)
    dropped = image.convert("L").convert("RGB").point(lambda v: int(v * DIM))
    return Image.composite(image, dropped, mask)


def heat_map(image: Image.Image, grid: VisualGrid, guidance_V: np.ndarray) -> Image.Image:
    """Return guidance as colours, one field per token, with the image faintly in it.

    Attention has a long tail, so the colour is of the square root, from 0 to the highest.
    """
    share_V = np.sqrt(np.clip(guidance_V, 0, None) / max(float(guidance_V.max()), 1e-30))
    at = np.arange(len(HEAT)) / (len(HEAT) - 1)
    colour_V3 = np.stack([np.interp(share_V, at, HEAT[:, c]) for c in range(3)], axis=-1)
    field = colour_V3.round().astype(np.uint8).reshape(grid.rows, grid.columns, 3)
    heat = Image.fromarray(field).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(heat, image.convert("L").convert("RGB"), 0.18)
