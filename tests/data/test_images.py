"""Odd and hostile pictures: what is read, and how; and the one error of those that are not."""

import errno
import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import Qwen2VLImageProcessorPil

from tests.support.families import QWEN_SIZE, family_model, family_processor
from vtprune_train.config.data import DataConfig
from vtprune_train.data import images
from vtprune_train.data.images import MAX_PIXELS, UnreadableImage, image_size, load_image
from vtprune_train.models.families import trained_family

NOISE = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE)
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source, **options):
    return np.asarray(load_image(source, image_size(source, **options), **options))


def reason(source, **options):
    """Why a picture is refused."""
    with pytest.raises(UnreadableImage) as caught:
        pixels(source, **options)
    return caught.value.reason


def png(width, height, color=2, depth=8, rows=None):
    """A PNG that claims its size; as many rows as are given."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows or b"")) + chunk(b"IEND", b"")
    )


def test_a_file_and_its_bytes_read_alike(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(PHOTO))
    assert np.array_equal(pixels(tmp_path / "a.png"), NOISE) and np.array_equal(pixels(encoded(PHOTO)), NOISE)


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch):
    """Between one and two times the limit Pillow warns only."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for side in (10_000, 100_000):
        assert reason(png(side, side)).startswith(f"more pixels than data.max_image_pixels={MAX_PIXELS} (")
    assert "more pixels than data.max_image_pixels=1499" in reason(encoded(PHOTO), max_pixels=1499)
    assert image_size(encoded(PHOTO), max_pixels=1500) == (30, 50)
    assert image_size(png(20_000, 20_000), max_pixels=400_000_000) == (20_000, 20_000), "beyond Pillow's own limit"
    assert DataConfig().max_image_pixels == MAX_PIXELS == Image.MAX_IMAGE_PIXELS, "and Pillow's is put back"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(kind, orientation):
    """Size from the header and pixels agree; a mark in the upper left comes to its corner."""
    upright = np.zeros((32, 48, 3), dtype=np.uint8)
    upright[:16, :16] = 255
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    assert image_size(source) == (32, 48)
    assert np.abs(pixels(source).astype(int) - upright).max() < 60


def test_sizes_come_from_the_header_alone(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for kind in FORMATS:
        assert image_size(encoded(PHOTO, kind)) == (30, 50), kind


def test_damaged_exif_is_as_none():
    source = encoded(PHOTO, exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert np.array_equal(pixels(source), NOISE)


def test_cmyk_with_and_without_adobe_inversion():
    red = Image.new("RGB", (16, 16), (200, 30, 20))
    jpeg = encoded(red.convert("CMYK"), "JPEG")
    assert b"Adobe" in jpeg, "Pillow writes it inverted, with Adobe's marker"
    plain = encoded(red.convert("CMYK"), "TIFF")
    for source in (jpeg, plain):
        assert np.abs(pixels(source).astype(int) - (200, 30, 20)).max() < 8


@pytest.mark.parametrize(
    ("grey", "expected"),
    [
        (np.array([[0, 257, 32896, 65535]], dtype=np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 1, 100, 200]], dtype=np.uint16), [0, 0, 0, 1]),
        (np.array([[0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], dtype=np.float32), [0, 100, 255]),
        (np.array([[-3, 0, 3]], dtype=np.float32), [0, 128, 255]),
        (np.array([[7e4, 7e4, 7e4]], dtype=np.float32), [0, 0, 0]),
        (np.array([[0, 100, 255]], dtype=np.int32), [0, 100, 255]),
        (np.array([[0, 25700]], dtype=np.int32), [0, 100]),
        (np.array([[0, 2**31 - 1]], dtype=np.int32), [0, 255]),
    ],
)
def test_grey_of_more_than_8_bits_keeps_its_scale(grey, expected):
    seen = pixels(encoded(Image.fromarray(grey), "TIFF"))
    assert seen[0].tolist() == [[value] * 3 for value in expected]


def test_a_16_bit_png_keeps_its_scale():
    rows = b"\x00" + np.array([0, 257, 65535], dtype=">u2").tobytes()
    assert pixels(png(3, 1, color=0, depth=16, rows=rows))[0, :, 0].tolist() == [0, 1, 255]


def test_values_that_are_no_numbers_are_refused():
    grey = np.array([[0, np.nan]], dtype=np.float32)
    assert reason(encoded(Image.fromarray(grey), "TIFF")) == "some of its values are not finite"


def test_one_bit():
    bits = Image.fromarray(np.array([[0, 255, 255]], dtype=np.uint8)).convert("1")
    assert pixels(encoded(bits))[0, :, 1].tolist() == [0, 255, 255]


def palette(**transparency):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return encoded(image, transparency.pop("kind", "PNG"), **transparency)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (encoded(Image.fromarray(np.array([[[9, 9, 9, 0], [0, 0, 0, 128]]], dtype=np.uint8))),
         [(255, 255, 255), (127, 127, 127)]),
        (encoded(Image.fromarray(np.array([[[9, 0], [50, 255]]], dtype=np.uint8), "LA")), [(255,) * 3, (50,) * 3]),
        (palette(), [(255, 0, 0), (0, 0, 255)]),
        (palette(transparency=0), [(255, 255, 255), (0, 0, 255)]),
        (palette(transparency=b"\x00\x80"), [(255, 255, 255), (127, 127, 255)]),
        (palette(kind="GIF", transparency=1), [(255, 0, 0), (255, 255, 255)]),
        (encoded(Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], dtype=np.uint8)), transparency=(9, 9, 9)),
         [(255, 255, 255), (1, 2, 3)]),
    ],
    ids=["RGBA", "LA", "palette", "palette index", "palette alpha", "GIF", "RGB key"],
)  # fmt: skip
def test_transparency_is_laid_over_white(source, expected):
    seen = pixels(source)[0].astype(int)
    assert np.abs(seen - np.array(expected)).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames(kind):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)) == (255, 0, 0)).all()


def test_progressive_jpegs_and_colour_profiles():
    """A profile is not applied."""
    assert pixels(encoded(PHOTO, "JPEG", progressive=True)).shape == (30, 50, 3)
    assert np.array_equal(pixels(encoded(PHOTO, icc_profile=b"any profile")), NOISE)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"<html>404</html>", "not an image that Pillow can read (it starts with b'<html>404</html>')"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "HEIC, which Pillow cannot read; convert it to"),
        (b"just some words", "not an image that Pillow can read (it starts with b'just some words')"),
    ],
)
def test_files_that_are_no_images(tmp_path, content, expected):
    (tmp_path / "a.jpg").write_bytes(content)
    assert reason(tmp_path / "a.jpg").startswith(expected) and reason(content).startswith(expected)
    with pytest.raises(UnreadableImage, match=f"^{tmp_path}/a.jpg: "):
        image_size(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImage, match=r"^shard.tar/7.jpg: "):
        image_size(content, name="shard.tar/7.jpg")


def test_places_without_an_image(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    codes = {"none.png": errno.ENOENT, "loop": errno.ELOOP, ".": errno.EISDIR, "a" * 300: errno.ENAMETOOLONG}
    for name, code in codes.items():
        assert reason(tmp_path / name) == os.strerror(code), name
    assert reason(tmp_path / "pipe") == "not a regular file", "opening it would wait for ever"
    assert "null" in reason(tmp_path / "a\0b")


def failing(tmp_path, monkeypatch, number):
    """A picture that the system does not open, for this reason."""
    path = tmp_path / "a.png"
    path.write_bytes(encoded(PHOTO))

    def fail(self, *_):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(type(path), "open", fail)
    return path


def test_permission_denied(tmp_path, monkeypatch):
    """By its errno: a superuser may read everything."""
    assert reason(failing(tmp_path, monkeypatch, errno.EACCES)) == "Permission denied"


def test_too_many_open_files_is_no_fault_of_an_image(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="Too many open files"):
        image_size(failing(tmp_path, monkeypatch, errno.EMFILE))


def test_errors_of_our_own_are_not_taken_for_broken_images(monkeypatch):
    monkeypatch.setattr(images, "_rgb", lambda *_: (_ for _ in ()).throw(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        load_image(encoded(PHOTO), (30, 50))


@pytest.mark.parametrize("kind", [*FORMATS, "AVIF"])
def test_truncated_files_are_refused_not_grey(kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # another library may have set it
    source = encoded(PHOTO, kind)
    for length in (len(source) // 2, len(source) - len(source) // 8):
        assert reason(source[:length]), kind
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_colours_without_a_conversion_are_refused_with_their_name(monkeypatch):
    """Which they are depends on how Pillow was built."""
    monkeypatch.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(ValueError("conversion from LAB")))
    expected = "its mode LAB cannot be converted to RGB (conversion from LAB)"
    assert reason(encoded(Image.new("LAB", (4, 4)), "TIFF")) == expected


def test_an_image_of_another_size_is_named():
    with pytest.raises(UnreadableImage, match=r"^x: it is 30 x 50, but was .31, 50. when the data was indexed"):
        load_image(encoded(PHOTO), (31, 50), name="x")


def test_the_error_comes_through_a_pipe_whole():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.png", "the file is empty")))
    assert (error.name, error.reason, str(error)) == ("a.png", "the file is empty", "a.png: the file is empty")


@pytest.mark.parametrize("kind", [*FORMATS, "AVIF", "JPEG2000", "ICO", "PPM", "TGA", "PCX", "SGI"])
def test_damage_raises_nothing_else(kind):
    """Bits flipped, bytes cut out and ends cut off: a picture, or the one error."""
    rng = np.random.default_rng(len(kind))
    whole = encoded(PHOTO, kind)
    outcomes = {"read": 0, "refused": 0}
    for trial in range(150):
        broken = bytearray(whole)
        if trial % 3 == 0:
            del broken[int(rng.integers(len(broken))) :]
        elif trial % 3 == 1:
            start = int(rng.integers(len(broken)))
            del broken[start : start + int(rng.integers(1, 20))]
        else:  # most near the front, where the header is
            for place in rng.integers(0, min(len(broken), 10 ** int(rng.integers(2, 5))), 4):
                broken[place] ^= 1 << int(rng.integers(8))
        try:
            seen = pixels(bytes(broken), max_pixels=10**6)
            assert seen.ndim == 3 and seen.dtype == np.uint8
            outcomes["read"] += 1
        except UnreadableImage as error:
            assert error.reason
            outcomes["refused"] += 1
    assert outcomes["refused"] > 20, outcomes


FAMILIES = ("llava_next", "llava", "llava_onevision", "qwen2_5_vl")
STRIPS = [(1, 200), (200, 1), (3, 190), (190, 3), (2, 90), (1, 1), (1, 3), (3, 3)]


def through_processor(name, size, color=(250, 10, 90)):
    """The layout, the model, and the pixels and features of a picture of one colour."""
    model = family_model(name)
    if name == "qwen2_5_vl":
        processor = Qwen2VLImageProcessorPil(patch_size=7, merge_size=2, size=QWEN_SIZE)
    else:
        processor = family_processor(name).image_processor
    layout = trained_family(model.config.model_type, "")[1].layout(model.config, processor)
    image = load_image(encoded(Image.new("RGB", size[::-1], color)), size)
    return model, layout, layout.pixels(processor, [image])[0]


def features_of(name, model, layout, seen, size):
    grid = {"image_grid_thw": torch.tensor([[1, *layout.grid(size)]])} if name == "qwen2_5_vl" else {}
    tiles = {"image_sizes": torch.tensor([size])} if name in ("llava_next", "llava_onevision") else {}
    shown = seen[None] if tiles else seen
    with torch.no_grad():
        return torch.cat(list(model.model.get_image_features(shown, **grid, **tiles, return_dict=True).pooler_output))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", STRIPS, ids=str)
def test_strips_go_through_every_family(name, size):
    """Sides of 1 and 3 pixels are no channels, and the layout counts what the real model makes of them."""
    model, layout, seen = through_processor(name, size)
    assert len(seen) == layout.tiles([size])[0]
    first = seen[:1] if name != "qwen2_5_vl" else seen.reshape(len(seen), 3, -1).transpose(0, 1).flatten(1)[None]
    assert torch.allclose(first.flatten(2).amax(-1), first.flatten(2).amin(-1), atol=1e-3), "one colour a channel"
    assert len(features_of(name, model, layout, seen, size)) == layout.tokens([size])[0] > 0


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)], ids=str)
def test_a_very_long_strip_is_tiled_or_refused_before_it_is_scaled(size):
    for name in ("llava_next", "llava_onevision"):
        model, layout, seen = through_processor(name, size)
        assert len(features_of(name, model, layout, seen, size)) == layout.tokens([size])[0]
    for name in ("llava", "qwen2_5_vl"):
        model = family_model(name)
        layout = trained_family(name, "")[1].layout(model.config, Qwen2VLImageProcessorPil(patch_size=7, merge_size=2))
        with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels is more than 200 times as long as wide"):
            layout.tokens([size])
