"""A real run over a folder with one of each odd and hostile picture."""

import io
import json
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.support.runner import Runs, assert_equal_checkpoints

pytestmark = pytest.mark.slow

NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PNG = encoded(PHOTO, "PNG")
HEADER = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + PNG[24:29]
BOMB = PNG[:12] + HEADER + zlib.crc32(HEADER).to_bytes(4, "big") + PNG[33:]

READ = {
    "rotated.jpg": encoded(PHOTO, "JPEG", exif=rotated()),
    "progressive.jpg": encoded(PHOTO, "JPEG", progressive=True),
    "cmyk.jpg": encoded(PHOTO.convert("CMYK"), "JPEG"),
    "grey16.tif": encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "TIFF"),
    "float.tif": encoded(Image.fromarray(NOISE[..., 0] / np.float32(255)), "TIFF"),
    "bits.png": encoded(PHOTO.convert("1"), "PNG"),
    "transparent.png": encoded(PHOTO.convert("RGBA"), "PNG"),
    "palette.png": encoded(PHOTO.convert("P"), "PNG", transparency=0),
    "animated.gif": encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(180)]),
    "row.png": encoded(Image.fromarray(NOISE[:1]), "PNG"),
    "column.png": encoded(Image.fromarray(NOISE[:, :1]), "PNG"),
    "long.png": encoded(Image.new("RGB", (9000, 1), "red"), "PNG"),
}
REFUSED = {
    "bomb.png": (BOMB, "more pixels than data.max_image_pixels=89478485"),
    "crc.png": (PNG[:20] + b"\xff" + PNG[21:], "not an image that Pillow can read (it starts with b"),
    "empty.png": (b"", "the file is empty"),
    "words.jpg": (b"<html>404</html>", "not an image that Pillow can read"),
    "heic.jpg": (b"\x00\x00\x00\x18ftypheic" + bytes(40), "HEIC"),
    "folder.png": (None, "Is a directory"),
    "loop.png": (None, "Too many levels of symbolic links"),
    "missing.png": (None, "No such file or directory"),
}
CUT = {"cut.png": PNG[:3000], "cut.jpg": encoded(PHOTO, "JPEG")[:900]}
NUM_BAD = len(REFUSED) + len(CUT)
SETTINGS = (
    "data.eval=[]",
    "data.workers=1",
    f"data.max_bad={NUM_BAD}",
    "data.max_bad_share=1",
    "deepspeed=configs/deepspeed/zero0.json",
    "train.epochs=1",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("pictures"), num_train=5)
    data = made.folder / "data"
    contents = {**READ, **CUT, **{name: content for name, (content, _) in REFUSED.items()}}
    for name, content in contents.items():
        if content is not None:
            (data / "images" / name).write_bytes(content)
    (data / "images" / "folder.png").mkdir()
    (data / "images" / "loop.png").symlink_to("loop.png")
    records = json.loads((data / "train.json").read_text())
    for name in contents:
        said = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": f"about {len(name)}"}]
        records.append({"id": name, "image": name, "conversations": said})
    (data / "train.json").write_text(json.dumps(records))
    return made


def test_they_are_trained_on_or_named_and_a_stopped_run_ends_with_the_same_bits(runs):
    whole = runs.run("whole", *SETTINGS)
    for name, (_, reason) in REFUSED.items():
        assert re.search(rf"left out: {name}: image .*/{name}: {re.escape(reason)}", whole.stderr), name
    assert f"{len(REFUSED)} record(s) cannot be used" in whole.stderr, "cut pictures have a whole header"
    for name in CUT:
        assert re.search(rf"left out \d+:\d+:{name}: .*/{name}: .*(truncated|broken)", whole.stderr), name
    metrics = runs.metrics("whole")
    assert sum(m["samples"] for m in metrics) == 5 + len(READ) + len(CUT)
    assert sum(m["unreadable"] for m in metrics) == len(CUT)
    state = json.loads((runs.checkpoint("whole") / "trainer.json").read_text())
    assert len(state["unreadable"]) == len(CUT)

    runs.run("stopped", *SETTINGS, "run.stop_after=2")
    runs.run("stopped", *SETTINGS)
    assert_equal_checkpoints(runs.checkpoint("stopped"), runs.checkpoint("whole"))


def test_one_more_than_allowed_stops_the_run(runs):
    by_header = runs.run("over", *SETTINGS, f"data.max_bad={len(REFUSED) - 1}", expect=2)
    assert f"{len(REFUSED)} records cannot be used, more than data.max_bad={len(REFUSED) - 1}" in by_header.stderr
    by_pixels = runs.run("over", *SETTINGS, f"data.max_bad={NUM_BAD - 1}", expect=3)
    assert f"{NUM_BAD} samples could not be used, more than data.max_bad={NUM_BAD - 1}" in by_pixels.stderr
