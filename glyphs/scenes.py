"""Scenes of coloured handwritten digits on clutter, drawn with numpy alone.

N scenes, G = 9 glyph slots, H = W = 96 pixels. Only + - * / and comparisons touch floats, and only
`random` and `integers` are drawn, so that a seed gives the same bytes on every machine (no libm, no
BLAS, no fused multiply-add).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

SIDE = 96
PATCH = 8
SLOTS = 9
WINDOW = 32
SIZES = (18, 22)
COLOURS = {
    "red": (250, 66, 60),
    "green": (66, 210, 70),
    "blue": (80, 112, 252),
    "yellow": (225, 208, 45),
    "purple": (205, 76, 220),
    "cyan": (50, 205, 214),
    "white": (228, 228, 228),
}
TRAIN_SCANS = 1437  # 1797 * 4 // 5; the scans from here on are held out
COUNTS = (3, 4, 4, 5, 5, 6, 6, 7)
DENSE_COUNTS = (7, 8, 8, 9)  # for the tower's lessons, where no question is asked
MIN_STEP_X = 6.0  # between glyphs of one colour, so that "in order" has one answer


@dataclass(frozen=True)
class Scenes:
    """digit, colour: int [N,G], -1 in empty slots; x, y: centre, float [N,G]; size: float [N,G]; scan: int [N,G]."""

    digit: np.ndarray
    colour: np.ndarray
    x: np.ndarray
    y: np.ndarray
    size: np.ndarray
    scan: np.ndarray

    def __len__(self) -> int:
        return len(self.digit)


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans, uint8 [1797,8,8], and their digits, uint8 [1797]."""
    with np.load(Path(__file__).with_name("scans.npz")) as file:
        return file["scans"], file["digits"]


@cache
def scans_by_digit(held_out: bool) -> tuple[np.ndarray, ...]:
    """For each digit the indices of its scans in the one part or in the other."""
    part = slice(TRAIN_SCANS, None) if held_out else slice(0, TRAIN_SCANS)
    digits = scans()[1]
    offset = part.start or 0
    return tuple(np.flatnonzero(digits[part] == d) + offset for d in range(10))


def _between(rng: np.random.Generator, low: float, high: float, shape=None) -> np.ndarray:
    return rng.random(shape) * (high - low) + low


def _place(rng: np.random.Generator, colour: np.ndarray, size: np.ndarray) -> list[tuple[float, float]] | None:
    """Centres of non-overlapping glyphs, or None when a glyph finds no room."""
    centres: list[tuple[float, float]] = []
    for i, s in enumerate(size):
        for fx, fy, jx, jy in rng.random((24, 4)).tolist():
            # Never in the middle of a patch or on its edge: 2 or 6 pixels into it, give or take 3/4.
            x, y = (4 * int(f * SIDE / 4) + 2 + (j - 0.5) * 1.5 for f, j in ((fx, jx), (fy, jy)))
            inside = min(x, y) >= s / 2 and max(x, y) <= SIDE - s / 2
            free = inside and all(
                max(abs(x - u), abs(y - v)) >= (s + size[j]) / 2 + 1
                and (colour[i] != colour[j] or abs(x - u) >= MIN_STEP_X)
                for j, (u, v) in enumerate(centres)
            )
            if free:
                centres.append((x, y))
                break
        else:
            return None
    return centres


def sample_scenes(rng: np.random.Generator, n: int, held_out: bool, counts: tuple[int, ...] = COUNTS) -> Scenes:
    """n scenes. One colour is favoured in each, so that several glyphs often share a colour."""
    digit, colour, scan = (np.full((n, SLOTS), -1) for _ in range(3))
    x, y, size = (np.zeros((n, SLOTS)) for _ in range(3))
    pools = scans_by_digit(held_out)
    for i in range(n):
        centres = None
        while centres is None:
            k = counts[rng.integers(len(counts))]
            favoured, share = rng.integers(len(COLOURS)), rng.random() * 0.6
            c = np.where(rng.random(k) < share, favoured, rng.integers(len(COLOURS), size=k))
            s = _between(rng, *SIZES, k)
            centres = _place(rng, c, s)
        d = rng.integers(10, size=k)
        digit[i, :k], colour[i, :k], size[i, :k] = d, c, s
        x[i, :k], y[i, :k] = zip(*centres, strict=False)
        scan[i, :k] = [pools[j][rng.integers(len(pools[j]))] for j in d]
    return Scenes(digit, colour, x, y, size, scan)


def _glyph_alpha(
    rng: np.random.Generator, scenes: Scenes, at: tuple, left: np.ndarray, top: np.ndarray, lesson: bool
) -> np.ndarray:
    """Ink of each glyph in its window, float32 [M,WINDOW,WINDOW]: turned, stretched, slanted, thicker or thinner.

    A lesson bends the scans further than a held-out picture does, and blends in a second scan of the digit.
    """
    m = len(left)
    f = lambda low, high: _between(rng, low, high, (m, 1, 1)).astype(np.float32)  # noqa: E731
    spread = 1.5 if lesson else 1.0
    half_tan, slant = f(-0.06 * spread, 0.06 * spread), f(-0.08 * spread, 0.08 * spread)
    stretch = f(1 - 0.1 * spread, 1 + 0.1 * spread)
    level, gain = f(0.42 - 0.08 * (spread - 1), 0.52 + 0.08 * (spread - 1)), f(1.6, 2.4)
    cos, sin = (1 - half_tan * half_tan) / (1 + half_tan * half_tan), 2 * half_tan / (1 + half_tan * half_tan)
    grid = np.arange(WINDOW, dtype=np.float32) + np.float32(0.5)
    per_pixel = (8 / scenes.size[at]).astype(np.float32)[:, None, None]
    dx = (grid[None, None, :] + (left - scenes.x[at]).astype(np.float32)[:, None, None]) * per_pixel
    dy = (grid[None, :, None] + (top - scenes.y[at]).astype(np.float32)[:, None, None]) * per_pixel
    u = (cos * dx + sin * dy) / stretch + slant * dy + np.float32(4.5)
    v = cos * dy - sin * dx + np.float32(4.5)
    ink = np.zeros((m, 10, 10), np.float32)
    scan = scans()[0][scenes.scan[at]].astype(np.float32)
    if lesson:
        pools = scans_by_digit(False)
        other = np.array([pools[d][rng.integers(len(pools[d]))] for d in scenes.digit[at]])
        scan += f(-0.1, 0.4).clip(0) * (scans()[0][other] - scan) + rng.integers(-2, 3, size=scan.shape) * (scan > 0)
        bend = [f(-0.045, 0.045) for _ in range(6)]
        u += bend[0] * dx * dy + bend[1] * dx * dx + bend[2] * dy * dy
        v += bend[3] * dx * dy + bend[4] * dx * dx + bend[5] * dy * dy
    ink[:, 1:9, 1:9] = scan / np.float32(16)
    u, v = u.clip(0, 8.999), v.clip(0, 8.999)
    c, r = u.astype(np.int64), v.astype(np.int64)
    fu, fv = u - c, v - r
    flat, base = ink.reshape(m, 100), r * 10 + c
    tap = lambda k: np.take_along_axis(flat, (base + k).reshape(m, -1), 1).reshape(base.shape)  # noqa: E731
    value = (tap(0) * (1 - fu) + tap(1) * fu) * (1 - fv) + (tap(10) * (1 - fu) + tap(11) * fu) * fv
    return np.clip((value - level) * gain + np.float32(0.5), 0, 1) * (value > 0.05)


def _clutter(rng: np.random.Generator, n: int, strokes: int = 6) -> np.ndarray:
    """Dim background, float32 [n,H,W,3]: a gradient, strokes and blobs of low saturation, grain."""
    grid = np.arange(SIDE, dtype=np.float32)
    corner = _between(rng, 15, 75, (4, n, 1, 1, 3)).astype(np.float32)
    fx, fy = grid[None, None, :, None] / SIDE, grid[None, :, None, None] / SIDE
    image = (corner[0] * (1 - fx) + corner[1] * fx) * (1 - fy) + (corner[2] * (1 - fx) + corner[3] * fx) * fy
    for _ in range(strokes):
        x0, y0, dx, dy = (
            _between(rng, a, b, (n, 1, 1)).astype(np.float32) for a, b in ((0, 96), (0, 96), (-30, 30), (-30, 30))
        )
        width = _between(rng, 0.7, 2.2, (n, 1, 1)).astype(np.float32)
        gx, gy = grid[None, None, :] - x0, grid[None, :, None] - y0
        t = np.clip((gx * dx + gy * dy) / (dx * dx + dy * dy + 1), 0, 1)
        ex, ey = gx - t * dx, gy - t * dy
        cover = np.clip(width * width + 1 - (ex * ex + ey * ey), 0, 1)[..., None]
        tone = _between(rng, 40, 125, (n, 1, 1, 1)) + _between(rng, -22, 22, (n, 1, 1, 3))
        image += cover * (tone.astype(np.float32) - image)
    return image


@cache
def _stock(seed: int, n: int = 384) -> np.ndarray:
    """Backgrounds to reuse in training, uint8 [n,H,W,3]."""
    return _clutter(np.random.Generator(np.random.PCG64([seed, n])), n).astype(np.uint8)


def backgrounds(rng: np.random.Generator, n: int, stock: int | None) -> np.ndarray:
    """float32 [n,H,W,3]: fresh ones, or turned ones out of the stock of that seed; always fresh grain."""
    if stock is None:
        image = _clutter(rng, n)
    else:
        pick, turns = rng.integers((384, 8), size=(n, 2)).T.tolist()
        turned = [np.rot90(_stock(stock)[p][:, :: 1 - t // 4 * 2], t % 4) for p, t in zip(pick, turns, strict=True)]
        image = np.stack(turned).astype(np.float32)
    return image + rng.integers(-9, 10, size=image.shape, dtype=np.int8)


def draw(rng: np.random.Generator, scenes: Scenes, stock: int | None = None) -> np.ndarray:
    """The pictures, uint8 [N,H,W,3]."""
    image = np.pad(backgrounds(rng, len(scenes), stock), ((0, 0), (WINDOW, WINDOW), (WINDOW, WINDOW), (0, 0)))
    at = np.nonzero(scenes.digit >= 0)
    left, top = (np.floor(p[at]).astype(np.int64) - WINDOW // 2 for p in (scenes.x, scenes.y))
    alpha = _glyph_alpha(rng, scenes, at, left, top, lesson=stock is not None)[..., None]
    jitter = _between(rng, -10, 10, (len(left), 1, 1, 3))
    ink = (np.array(list(COLOURS.values()))[scenes.colour[at]][:, None, None, :] + jitter).astype(np.float32)
    for n, a, tint, c, r in zip(at[0], alpha, ink, left + WINDOW, top + WINDOW, strict=False):
        window = image[n, r : r + WINDOW, c : c + WINDOW]
        window += a * (tint - window)
    image = image[:, WINDOW:-WINDOW, WINDOW:-WINDOW]
    return np.clip(image, 0, 255).astype(np.uint8)
