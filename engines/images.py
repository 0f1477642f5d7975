"""An image from whatever the user has: a path, a Pillow image, or an array; checked before anything is computed."""

from __future__ import annotations

import struct
import warnings
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from graphs.errors import BadArtefact, UsageError

Picture: TypeAlias = str | PathLike[str] | Image.Image | np.ndarray

MIN_SIDE = 2
# Processors resize the shorter side to a fixed length, so a long strip would grow without bound.
MAX_ASPECT = 200
# EXIF 2.32, tag 0x0112: where the first row and column lie → what turns them to top and left.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_from(picture: Picture) -> Image.Image:
    """Return an RGB image whose pixels are all read.

    picture: a file's path (turned as its EXIF orientation says), a Pillow image, or a uint8 array
    [H, W], [H, W, 3] or [H, W, 4]. Raises BadArtefact for a file that is missing, no image,
    truncated or larger than Pillow's decompression limit, and for one of no usable shape.
    """
    if isinstance(picture, Image.Image):
        image, name = picture, "the image"
    elif isinstance(picture, np.ndarray):
        image, name = _image_from_array(picture), "the array"
    elif isinstance(picture, str | PathLike):
        name = str(picture)
        image = _image_from_file(Path(picture))
    else:
        raise UsageError(
            f"an image cannot be made from {type(picture).__name__}; give a path, a Pillow image or a uint8 array"
        )
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise BadArtefact(
            f"{name} is {width}×{height} pixels, smaller than the minimum of {MIN_SIDE}×{MIN_SIDE}; give a larger image"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadArtefact(
            f"{name} is {width}×{height} pixels, but one side may be at most {MAX_ASPECT} times the other; crop it"
        )
    if image.mode in ("I", "F"):
        raise BadArtefact(
            f"{name} has 32-bit pixels (mode {image.mode}) of unknown range; "
            "save it as PNG, with 8 or 16 bits a channel"
        )
    try:
        if image.mode.startswith("I;16"):  # Pillow would make everything from 256 on white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return _on_white(image).convert("RGB")
    except (OSError, ValueError) as e:
        raise BadArtefact(f"{name} cannot be decoded ({e}); save it again as PNG or JPEG") from None


def _image_from_file(path: Path) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of tags that nobody reads
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.load()
                return _upright(file)
    except FileNotFoundError:
        raise BadArtefact(f"there is no image at {path}; check the path") from None
    except IsADirectoryError:
        raise BadArtefact(f"{path} is a folder, not an image; give one file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadArtefact(
            f"{path} has more than {limit:,} pixels once unpacked, which could be a decompression bomb; "
            "make it smaller and ask again"
        ) from None
    except UnidentifiedImageError:
        raise BadArtefact(f"{path} is not an image that Pillow can read; give a PNG or a JPEG") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as e:
        reason = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise BadArtefact(f"{path} is broken or cut short ({reason}); save it again as PNG or JPEG") from None


def _upright(file: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; of other tags, however odd they are, nothing is read."""
    turn = TURNS.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    return file.copy() if turn is None else file.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    """What is transparent is white, as transformers' image processors have it, whatever colour lies below."""
    if image.mode == "RGB" or not image.has_transparency_data:
        return image
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)


def _image_from_array(array: np.ndarray) -> Image.Image:
    grey = array.ndim == 2
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise UsageError(
            f"an array of {array.dtype} {list(array.shape)} is not an image; give uint8 [H, W], [H, W, 3] or [H, W, 4]"
        )
    return Image.fromarray(np.ascontiguousarray(array))
