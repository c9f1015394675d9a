"""Pictures of every mode, and everything that is none."""

import io

import numpy as np
import pytest
from PIL import Image

from corelora.errors import CoreLoraError
from corelora.vision import pictures
from corelora.vision.pictures import decode, picture_problem, read_picture


def data_of(picture, kind="PNG", **options):
    """The file of a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(mode="RGB"):
    """A picture 8 wide and 4 high that gets brighter to the right."""
    row = np.linspace(0, 255, 8).astype(np.uint8)
    return Image.fromarray(np.stack([row] * 4)).convert(mode)


# What Pillow writes of each kind.
MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "JPEG": ["1", "L", "RGB", "CMYK"],
    "GIF": ["1", "L", "P", "RGB"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "WEBP": ["L", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_mode_of_every_kind_is_rgb(mode, kind):
    """Whatever a format can hold comes as three channels of the same picture."""
    made = decode(data_of(ramp("RGB").convert(mode), kind))
    assert (made.mode, made.size) == ("RGB", (8, 4))
    values = np.asarray(made).mean(axis=(0, 2))
    assert values[-1] > 200 > 60 > values[0]


def test_sixteen_bits_are_scaled():
    """Pillow's own conversion would make everything over 255 white."""
    deep = np.linspace(0, 65535, 8).astype(np.uint16)[None].repeat(4, 0)
    for kind in ("PNG", "TIFF"):
        values = np.asarray(decode(data_of(Image.fromarray(deep), kind)))[0, :, 0]
        np.testing.assert_array_equal(values, (deep[0] / 257).round())


def test_what_is_transparent_shows_white():
    """Not whatever colour lies under it."""
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.asarray(decode(data_of(clear))).min() == 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert np.asarray(decode(data_of(palette, transparency=1))).min() == 255


def test_exif_turns_a_picture_upright():
    """Orientation 6: the camera was held on its side."""
    turned = Image.new("RGB", (8, 4), (0, 0, 0))
    turned.paste((255, 255, 255), (0, 0, 4, 4))  # its left half is white
    exif = Image.Exif()
    exif[0x0112] = 6
    made = decode(data_of(turned, "JPEG", exif=exif, quality=95))
    assert made.size == (4, 8)
    values = np.asarray(made).mean(axis=(1, 2))
    assert values[0] > 240
    assert values[-1] < 15


def test_cmyk_is_not_inverted():
    """White stays white."""
    assert np.asarray(decode(data_of(Image.new("RGB", (8, 8), "white").convert("CMYK"), "JPEG"))).min() > 250


NOISE = Image.effect_noise((64, 64), 60)
BROKEN = {
    "empty": (b"", "is empty"),
    "text": (b"hello", "is not a picture"),
    "half a JPEG": (data_of(NOISE.convert("RGB"), "JPEG")[:1000], "is broken"),
    "some of a PNG": (data_of(NOISE)[:200], "is broken"),
    "floats": (data_of(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
}


@pytest.mark.parametrize(("data", "said"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_picture_says_why(data, said):
    """One sentence each."""
    assert said in picture_problem(data)


def test_huge_pictures_are_refused_before_they_are_decoded(monkeypatch):
    """A small file can hold a picture of gigabytes."""
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1000)
    assert picture_problem(data_of(Image.new("L", (40, 25)))) is None
    assert "has 40 x 26 pixels, more than 1,000, the limit" in picture_problem(data_of(Image.new("L", (40, 26))))


def test_a_bomb_is_refused():
    """Pillow's own limit comes first where a picture is past it."""
    bomb = data_of(Image.new("1", (20_000, 10_000)))
    assert len(bomb) < 100_000
    assert "the limit" in picture_problem(bomb)


def test_files_that_are_not_there(tmp_path):
    """A folder is no file either."""
    with pytest.raises(CoreLoraError, match="no such file"):
        read_picture({"path": str(tmp_path / "none.png"), "bytes": None})
    with pytest.raises(CoreLoraError, match="can't be read"):
        read_picture({"path": str(tmp_path), "bytes": None})
