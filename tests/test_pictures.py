"""A picture of a data set is read by stated rules, from within the data set, and never with gigabytes of memory."""

import io
import resource
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from granalign_hf.training.pictures import UnreadableImageError, read_picture, read_value, within

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
TURNED = Image.Exif()
TURNED[0x0112] = 6  # 90 degrees


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content: bytes) -> Image.Image:
    return read_picture({"bytes": content, "path": None}, ())


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with_header(width: int, height: int) -> bytes:
    """A PNG of 70 bytes that claims a size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------- rules by kind

DEEP = Image.fromarray(np.full((6, 8), 128 * 256 + 7, dtype=np.uint16))
PALETTE = NOISE.convert("P")
KINDS = {
    "the first frame of a GIF": (
        encoded(Image.new("RGB", (8, 6), "red"), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")]),
        Image.new("RGB", (8, 6), (254, 0, 0)),
    ),
    "the first frame of a WebP": (
        encoded(
            *(Image.new("RGB", (8, 6), "red"), "WEBP"),
            **{"save_all": True, "lossless": True, "append_images": [Image.new("RGB", (8, 6), "blue")]},
        ),
        Image.new("RGB", (8, 6), "red"),
    ),
    "16-bit grey": (encoded(DEEP, "PNG"), Image.new("RGB", (8, 6), (128, 128, 128))),
    "CMYK": (encoded(Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "TIFF"), Image.new("RGB", (8, 6), (255, 0, 0))),
    "a palette": (encoded(PALETTE, "PNG"), PALETTE.convert("RGB")),
    "a palette with transparency": (encoded(PALETTE, "PNG", transparency=bytes(range(256))), PALETTE.convert("RGB")),
    "grey with transparency": (encoded(NOISE.convert("LA"), "PNG"), NOISE.convert("L").convert("RGB")),
    "turned by its EXIF tag": (encoded(NOISE, "PNG", exif=TURNED), NOISE.transpose(Image.Transpose.ROTATE_270)),
    "one pixel": (encoded(Image.new("RGB", (1, 1), "red"), "PNG"), Image.new("RGB", (1, 1), "red")),
    "a broken EXIF block": (encoded(NOISE, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), NOISE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_has_its_rule(kind):
    content, expected = KINDS[kind]
    picture = read(content)
    assert picture.mode == "RGB" and picture.size == expected.size
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_a_cmyk_jpeg_is_read():
    red = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(np.asarray(read(red), dtype=int) - (255, 0, 0)).max() < 12


JPEG, PNG = encoded(NOISE, "JPEG"), encoded(NOISE, "PNG")
BROKEN = {
    "a truncated JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "a truncated PNG": (PNG[: len(PNG) // 2], "truncated"),
    "no content": (b"", "cannot identify"),
    "a text": (b"this is no picture", "cannot identify"),
    "too many pixels": (png_with_header(30_000, 30_000), "exceeds limit of .* pixels"),
    "many pixels": (png_with_header(10_000, 10_000), "exceeds limit of .* pixels"),
    "numbers without a range": (encoded(Image.new("F", (4, 4)), "TIFF"), "mode 'F', whose range is not known"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "is a program .EPS."),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_read_says_why_and_names_the_file(kind):
    content, reason = BROKEN[kind]
    with pytest.raises(UnreadableImageError, match=rf"^Image `3` \(file x\.jpg\) cannot be read: .*{reason}"):
        read_value({"bytes": content, "path": "x.jpg"}, (), True, "Image `3`")


@pytest.mark.parametrize("size", [(30_000, 30_000), (10_000, 10_000), (2**31 - 1, 1)])
def test_a_header_claims_no_memory(size):
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableImageError):
        read(png_with_header(*size))
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


SOURCES = [
    *(JPEG, PNG, encoded(NOISE, "JPEG", exif=TURNED), encoded(NOISE.convert("CMYK"), "JPEG")),
    *(encoded(NOISE, kind) for kind in ("GIF", "WEBP", "BMP", "TIFF", "PPM")),
    *(content for content, _ in KINDS.values()),
]


@given(
    content=st.sampled_from(SOURCES),
    end=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    in_header=st.booleans(),
)
def test_bytes_that_were_changed_are_a_picture_or_one_kind_of_error(content, end, changes, in_header):
    """Whatever the decoders raise or warn of: nothing else comes out."""
    damaged = bytearray(content)
    for place, value in changes:
        damaged[int(place * (min(len(damaged), 120 if in_header else len(damaged)) - 1))] = value
    damaged = damaged[: len(damaged) if end > 0.5 else int(2 * end * len(damaged))]
    try:
        picture = read(bytes(damaged))
    except UnreadableImageError as error:
        assert "Image `of " in str(error)
    else:
        assert picture.mode == "RGB" and picture.width * picture.height <= Image.MAX_IMAGE_PIXELS


# ------------------------------------------------------------------------------------------------- within the data set


@pytest.fixture
def place(tmp_path):
    """A data set with a picture, one outside, and links to it."""
    (tmp_path / "data" / "inner").mkdir(parents=True)
    for folder in ("data/inner", "."):
        NOISE.save(tmp_path / folder / "x.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "x.png")
    (tmp_path / "data" / "folder").symlink_to(tmp_path)
    (tmp_path / "data" / "near.png").symlink_to(tmp_path / "data" / "inner" / "x.png")
    (tmp_path / "database").mkdir()
    NOISE.save(tmp_path / "database" / "x.png")
    return tmp_path


@pytest.mark.parametrize("path", ["inner/x.png", "{}/data/inner/x.png", "near.png", "inner/../inner/x.png"])
def test_a_path_within_the_data_set_is_read(place, path):
    value = {"bytes": None, "path": path.format(place)}
    assert np.array_equal(read_picture(value, (str(place / "data"),)), NOISE)


@pytest.mark.parametrize(
    "path",
    [
        *("../x.png", "{}/x.png", "link.png", "folder/x.png", "inner/../../x.png", "../database/x.png", "{}/database/x.png"),
        *("file://{}/x.png", "http://localhost/x.png", "zip://x.png::../x.zip", "zip://x.png::http://localhost/x.zip"),
        *("hf://datasets/other/set/x.png", "hf://datasets/org/set/../../other/set/x.png", "simplecache::../x.png"),
    ],
)
def test_a_path_that_leads_out_is_refused_by_name(place, path):
    value = {"bytes": None, "path": path.format(place)}
    roots = (str(place / "data"), "hf://datasets/org/set")
    with pytest.raises(ValueError, match=r"Image `7` cannot be read: the path '.*' leads out of the data set") as error:
        read_value(value, roots, True, "Image `7`")
    assert not isinstance(error.value, UnreadableImageError)  # such a row is not skipped as a broken picture is
    assert within(value["path"], ()) is None


def test_a_picture_in_an_archive_and_one_on_the_hub(place):
    with zipfile.ZipFile(place / "data" / "x.zip", "w") as archive:
        archive.write(place / "x.png", "a/x.png")
    path = f"zip://a/x.png::{place / 'data' / 'x.zip'}"
    assert np.array_equal(read_picture({"bytes": None, "path": path}, (str(place / "data"),)), NOISE)
    address = "hf://datasets/org/set@abc/x.png"
    assert within(address, ("hf://datasets/org/set",)) == address
    assert within("hf://datasets/org/set2/x.png", ("hf://datasets/org/set",)) is None


def test_a_picture_that_is_not_there(place):
    for value in ({"bytes": None, "path": "gone.png"}, None, {"bytes": None, "path": None}):
        with pytest.raises(UnreadableImageError, match=r"Image `7`.* cannot be read"):
            read_value(value, (str(place / "data"),), True, "Image `7`")
