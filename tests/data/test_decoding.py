"""Decoding: one picture is the same pixels in every format, and what is no picture is named."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from ldm_pipeline.data.decoding import BadPicture, decode, decode_mask, read_size

LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "WebP": {"lossless": True, "exact": True},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
}


def noise(width: int = 23, height: int = 17, channels: int = 3) -> np.ndarray:
    """Random bytes [H, W, channels]: no two rows, columns or turns of them are alike."""
    shape = (height, width, channels)
    return np.random.default_rng(width * height).integers(0, 256, shape, dtype=np.uint8)


def encode(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    """An array as the bytes of a picture file, perhaps in another mode first."""
    picture = Image.fromarray(pixels)
    file = io.BytesIO()
    (picture if mode is None else picture.convert(mode)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_lossless_format_gives_the_same_pixels_whatever_its_name(kind: str) -> None:
    data = encode(noise(), kind, **LOSSLESS[kind])
    picture = decode(data, "a.jpg")
    assert picture.pixels.dtype == np.uint8
    assert np.array_equal(picture.pixels, noise())
    assert picture.mask is None
    assert read_size(data, "a.jpg") == picture.size == (23, 17)


def test_jpeg_is_decoded_as_pillow_does() -> None:
    data = encode(noise(), "JPEG", quality=90)
    stock = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode(data, "a.png").pixels, stock)
    # Smooth colours survive the compression; the tolerance is what quality 95 costs them.
    smooth = np.add.outer(np.arange(64), np.arange(64))[..., None] + np.array([0, 40, 80])
    smooth = smooth.astype(np.uint8)
    decoded = decode(encode(smooth, "JPEG", quality=95, subsampling=0), "a").pixels
    assert np.abs(decoded.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "WebP", "TIFF", "JPEG"])
def test_all_eight_exif_orientations_show_the_same_picture(kind: str) -> None:
    """The stored pixels are turned the other way, by Pillow; ours come back upright."""
    if kind == "JPEG":  # whole blocks of one colour, which JPEG keeps apart
        upright = np.kron(noise(3, 2) // 128 * 255, np.ones((16, 16, 1), np.uint8))
    else:
        upright = noise()
    turn = Image.Transpose
    stored_by = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    options = LOSSLESS.get(kind, {"quality": 100, "subsampling": 0})
    for orientation in range(1, 9):
        stored = Image.fromarray(upright)
        if orientation in stored_by:
            stored = stored.transpose(stored_by[orientation])
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        data = encode(np.asarray(stored), kind, exif=exif, **options)
        picture = decode(data, "a")
        assert picture.pixels.shape == upright.shape, orientation
        # JPEG may round a colour by a level or two.
        error = np.abs(picture.pixels.astype(int) - upright).max()
        assert error <= (3 if kind == "JPEG" else 0), orientation
        assert read_size(data, "a") == picture.size


def test_an_orientation_behind_the_pixels_of_a_png_is_seen_by_both_readers() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encode(noise())
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = data[:-12] + chunk + data[-12:]
    assert decode(data, "a").size == read_size(data, "a") == (17, 23)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_picture_upright() -> None:
    data = encode(noise(), exif=b"MM\0*\0\0\0\x08\xff\xff\xff")
    assert np.array_equal(decode(data, "a").pixels, noise())


@pytest.mark.parametrize("kind", ["PNG", "WebP", "TIFF"])
def test_alpha_is_laid_over_white_and_becomes_the_mask(kind: str) -> None:
    rgba = noise(channels=4)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    picture = decode(encode(rgba, kind, **LOSSLESS[kind]), "a")
    alpha = rgba[..., 3:].astype(float) / 255
    exact = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert picture.mask is not None
    assert np.array_equal(picture.mask, rgba[..., 3])
    assert np.abs(picture.pixels - exact).max() <= 0.5  # rounded to the nearest level
    on_grey = decode(encode(rgba, kind, **LOSSLESS[kind]), "a", background=(9, 90, 200))
    clear, opaque = rgba[..., 3] == 0, rgba[..., 3] == 255
    assert (on_grey.pixels[clear] == (9, 90, 200)).all()
    assert np.array_equal(on_grey.pixels[opaque], rgba[opaque][:, :3])


def test_alpha_turns_with_the_picture() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    rgba = noise(channels=4)
    picture = decode(encode(rgba, exif=exif), "a")
    assert picture.mask is not None
    assert np.array_equal(picture.mask, np.rot90(rgba[..., 3], -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_keep_the_high_byte(kind: str) -> None:
    wide = np.random.default_rng(0).integers(0, 2**16, (17, 23), dtype=np.uint16)
    picture = decode(encode(wide, kind), "a")
    assert np.array_equal(picture.pixels, np.repeat((wide >> 8)[..., None], 3, axis=2))


def test_16_bit_colour_keeps_the_high_byte_too() -> None:
    """Pillow writes no such PNG, so its chunks are made here."""
    wide = np.random.default_rng(0).integers(0, 2**16, (4, 5, 3), dtype=np.uint16)

    def chunk(kind: bytes, body: bytes) -> bytes:
        both = kind + body
        return struct.pack(">I", len(body)) + both + struct.pack(">I", zlib.crc32(both))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(decode(data, "a").pixels, wide >> 8)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk_follows_the_stated_formula(kind: str) -> None:
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [40, 80, 120, 60]]], np.uint8)
    ink = np.kron(ink, np.ones((8, 8, 1), np.uint8))
    file = io.BytesIO()
    Image.fromarray(ink, "CMYK").save(file, kind, **({"quality": 100} if kind == "JPEG" else {}))
    exact = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255
    # Rounding to whole levels; JPEG moves each ink by a level or two before.
    error = np.abs(decode(file.getvalue(), "a").pixels - exact).max()
    assert error <= (1 if kind == "TIFF" else 4)


def test_palettes_and_grey_are_looked_up() -> None:
    few = (noise() // 128 * 255).astype(np.uint8)
    palette = encode(few, mode="P")
    assert Image.open(io.BytesIO(palette)).mode == "P"
    assert np.array_equal(decode(palette, "a").pixels, few)
    clear = encode(few, mode="P", transparency=0)
    assert (decode(clear, "a").pixels[decode(clear, "a").mask == 0] == 255).all()
    grey = noise()[..., 0]
    assert np.array_equal(decode(encode(grey), "a").pixels, np.dstack([grey] * 3))
    dots = grey > 127
    assert np.array_equal(decode(encode(dots), "a").pixels[..., 2], dots * np.uint8(255))


def refuse_to_load(*_: object) -> None:
    raise AssertionError("decoded")


@pytest.mark.parametrize("kind", [*LOSSLESS, "JPEG"])
def test_a_bomb_is_refused_before_it_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(noise(), kind)
    assert decode(data, "a", max_pixels=23 * 17).size == (23, 17)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse_to_load)
    for reader in (decode, decode_mask, read_size):
        with pytest.raises(BadPicture, match=r"^some/bomb: 23x17 is more than 390 pixels"):
            reader(data, "some/bomb", max_pixels=23 * 17 - 1)


def test_a_header_that_promises_billions_of_pixels_is_refused_by_our_limit_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own limit stays silent
        for width, height in ((11_000, 11_000), (12_000, 12_000), (60_000, 60_000)):
            data = bytearray(encode(noise(), "BMP"))
            data[18:26] = struct.pack("<ii", width, height)
            if width == 11_000:
                assert read_size(bytes(data), "a") == (width, height)
            else:
                with pytest.raises(BadPicture, match=f"^a: {width}x{height} is more than"):
                    decode(bytes(data), "a")


@pytest.mark.parametrize("kind", [*LOSSLESS, "JPEG"])
def test_a_file_cut_off_anywhere_is_refused_by_name(kind: str) -> None:
    data = encode(noise(64, 64), kind)
    for cut in np.linspace(0, len(data) * 0.95, 40).astype(int):
        with pytest.raises(BadPicture, match=r"^some/picture: ") as caught:
            decode(data[:cut], "some/picture")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [*LOSSLESS, "JPEG"])
def test_random_damage_gives_a_picture_or_a_bad_picture_and_nothing_else(kind: str) -> None:
    rng = np.random.default_rng(0)
    data = np.frombuffer(encode(noise(64, 64), kind), np.uint8)
    refusals = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            damaged = data.copy()
            places = rng.integers(0, [len(data), len(data), 100, 100])
            damaged[places] = rng.integers(0, 256, 4)
            for reader in (decode, read_size):
                try:
                    reader(damaged.tobytes(), "a", max_pixels=10**6)
                except BadPicture as error:
                    refusals.append(str(error))
    assert refusals
    assert all(refusal.startswith("a: ") for refusal in refusals)


def test_other_formats_and_kinds_are_refused() -> None:
    gif = encode(noise()[..., 0], "GIF")
    floats = encode(noise()[..., 0].astype(np.float32), "TIFF")
    long = encode(noise()[..., 0].astype(np.int32), "TIFF")
    reasons = {
        gif: "is no JPEG, PNG, WebP, BMP, TIFF picture",
        b"": "is empty",
        b"<svg></svg>": "is no JPEG",
        floats: "pixels of the kind F",
        long: "pixels of the kind I",
    }
    for data, reason in reasons.items():
        with pytest.raises(BadPicture, match=reason):
            decode(data, "a.png")


@pytest.mark.parametrize("kind", ["PNG", "WebP", "TIFF"])
def test_several_frames_are_refused(kind: str) -> None:
    frames = [Image.fromarray(noise()), Image.fromarray(255 - noise())]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(BadPicture, match="several frames"):
        decode(file.getvalue(), "a")


def test_masks_are_grey_levels_and_black_where_clear() -> None:
    grey = noise()[..., 0]
    assert np.array_equal(decode_mask(encode(grey), "a"), grey)
    rgba = np.dstack([np.full((17, 23, 3), 255, np.uint8), grey])
    assert np.array_equal(decode_mask(encode(rgba), "a"), grey)
