"""Pictures as Pillow reads them: upright, three channels of 8 bits; what can't be read is said in one sentence."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from corelora.errors import CoreLoraError

MOST_PIXELS = 100_000_000  # 300 MB once decoded; a larger picture is a mistake or an attack
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of one channel with 16 bits (PNG, TIFF)

Content = Mapping[str, Any]  # {"path": file or None, "bytes": its content or None}, as datasets has pictures


def read_picture(content: Content) -> Image.Image:
    """A picture as RGB, turned upright.

    Transparent parts show white; of an animation the first frame is taken; 16 bits a channel are scaled to 8 (Pillow's
    own conversion cuts them off, which leaves white).

    Args:
        content: a path, or the bytes themselves.

    Raises:
        CoreLoraError: why there is no picture, without its name.
    """
    data = content.get("bytes")
    if data is None:
        try:
            data = Path(content["path"]).read_bytes()
        except FileNotFoundError:
            raise CoreLoraError("there is no such file") from None
        except OSError as error:
            raise CoreLoraError(f"can't be read ({error.strerror or error})") from None
    return decode(data)


def decode(data: bytes) -> Image.Image:
    """The picture in the bytes of a file; as `read_picture`.

    Raises:
        CoreLoraError: why there is none.
    """
    if not data:
        raise CoreLoraError("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on large pictures and odd metadata; what matters is refused below
            with Image.open(io.BytesIO(data)) as picture:
                _check_size(picture.size)
                picture.load()
                return as_rgb(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        raise CoreLoraError("is not a picture, or of a kind that Pillow does not know") from None
    except Image.DecompressionBombError:
        raise CoreLoraError(f"is larger than {MOST_PIXELS:,} pixels, the limit: make it smaller") from None
    except CoreLoraError:
        raise
    except (OSError, ValueError, SyntaxError, IndexError, TypeError, EOFError) as error:  # what Pillow's readers raise
        raise CoreLoraError(f"is broken ({' '.join(str(error).split()) or type(error).__name__})") from None


def picture_problem(data: bytes) -> str | None:
    """Why the bytes of a file are no picture that can be used, or None."""
    try:
        decode(data)
    except CoreLoraError as error:
        return str(error)
    return None


def as_rgb(picture: Image.Image) -> Image.Image:
    """Any mode as RGB of 8 bits.

    Raises:
        CoreLoraError: floating-point pixels, whose range nothing says.
    """
    if picture.mode == "RGB":
        return picture if type(picture) is Image.Image else picture.copy()
    if picture.mode == "F":
        raise CoreLoraError("has floating-point pixels, whose range is unknown: save it with 8 bits a channel")
    if picture.mode in DEEP:
        deep = np.asarray(picture).astype(np.int64).clip(0, 65535)
        return Image.fromarray((deep / 257).round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return picture.convert("RGB")


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MOST_PIXELS:
        raise CoreLoraError(f"has {width:,} x {height:,} pixels, more than {MOST_PIXELS:,}, the limit: make it smaller")
