"""Videos from their files to batches: headers, frames, embedded bytes, tars, and videos that cannot be used."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.support.data import image_bytes, say, write_tar
from tests.support.family_runs import save_checkpoint
from tests.support.video_runs import VideoSetup
from tests.support.videos import SIZE, has_ffmpeg, make_videos, moving_frames, write_video
from vtprune_train.cli import train_main
from vtprune_train.data.records import read_records
from vtprune_train.data.visuals import NO_VIDEOS

pytest.importorskip("av", reason="videos need PyAV (pip install av)")
needs_ffmpeg = pytest.mark.skipif(not has_ffmpeg(), reason="ffmpeg is not installed: it makes these videos")


def asking(name, video, **more):
    return {"id": name, "video": video, "conversations": say("<video> what is shown ?", "a red cat"), **more}


class Data(VideoSetup):
    """Records of their own, for a family that takes videos."""

    def __init__(self, folder, family="qwen2_5_vl"):
        super().__init__(family, folder)
        self.root = folder / "clips"
        self.built = self.parts()

    def collate(self, records, path="train.json", videos="videos", **settings):
        """A collator of these records; ``records`` is ``None`` if ``path`` is there."""
        if records is not None:
            (self.root / path).write_text(json.dumps(records))
        source = self.config.data.train[0].model_copy(update={"path": path, "videos": videos})
        data = self.config.data.model_copy(update={"train": [source], **settings})
        was, self.config = self.config, self.config.model_copy(update={"data": data})
        try:
            return self.collator(self.built, None)
        finally:
            self.config = was


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def videos(data):
    return make_videos(data.root / "videos")


def cut(path, share):
    """The file's first bytes: of an MP4, without its index or with it, by where that is."""
    target = path.with_name(f"cut_{path.name}")
    target.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return target.name


GOOD = ("h264.mp4", "vp9.webm", "variable.mp4", "rotated.mp4", "animation.gif", "with_audio.mp4", "stream.ts")


@needs_ffmpeg
def test_every_kind_of_video_is_indexed_by_its_header_and_decoded(data, videos):
    """Sizes after rotation; a folder and a list of frames, one frame, and a part of a video."""
    height, width = SIZE
    folder = data.root / "videos" / "frames"
    folder.mkdir()
    for number, frame in enumerate(moving_frames(12, (40, 30))):
        Image.fromarray(frame).save(folder / f"{number}.png")
    write_video(data.root / "videos" / "one.mp4", moving_frames(1), fps=5)
    records = [asking(name, name) for name in GOOD]
    records += [
        asking("folder", {"path": "frames", "fps": 6}),
        asking("list", [["frames/0.png", "frames/5.png", "frames/11.png"]]),
        asking("one", "one.mp4"),
        asking("part", {"video": "h264.mp4", "start": 1.0, "end": 2.0}),
    ]
    collate = data.collate(records)
    assert len(collate.index) == len(records)
    for number, record in enumerate(records):
        loaded = collate.load(number, number)
        [clip], [pixels] = loaded.images.sizes, loaded.images.pixels
        size = {"rotated.mp4": (width, height), "folder": (40, 30), "list": (40, 30)}.get(record["id"], SIZE)
        assert clip.size == size, record["id"]
        lengths = collate.index.lengths([number])
        [tokens] = collate.layout.visual_tokens([clip])
        assert (lengths.tokens[0], lengths.tiles[0]) == (lengths.text[0] + tokens.total, len(pixels)), record["id"]
    indices = {record["id"]: collate.load(n, n).images.sizes[0].indices for n, record in enumerate(records)}
    assert len(indices["one"]) == 1 and min(indices["part"]) >= 10 and max(indices["part"]) <= 20
    assert not collate(range(len(records))).unreadable


@needs_ffmpeg
def test_unusable_videos_are_counted_and_named(data, videos, caplog):
    """Two are refused by their headers; one, whose header is whole, at load time; the others are trained on."""
    early, late = cut(videos["h264.mp4"], 0.5), cut(videos["index_first.mp4"], 0.6)
    names = [early, "audio.m4a", late, "missing.mp4", "h264.mp4"]
    with pytest.raises(ValueError, match=r"3 records cannot be used, more than data\.max_bad=2") as refusal:
        data.collate([asking(name, name) for name in names], max_bad=2, max_bad_share=1.0)
    assert f"{early}: video" in str(refusal.value)
    collate = data.collate([asking(name, name) for name in names], max_bad=4, max_bad_share=1.0)
    assert len(collate.index) == 2
    said = caplog.text
    assert "without an index (moov)" in said and "no video stream (only audio)" in said and "No such file" in said
    batch = collate([0, 1])
    assert batch.sample_ids == (collate.index.sample_id(1),)
    [(sample, reason)] = batch.unreadable
    assert late in sample and "truncated" in reason


def test_videos_that_change_after_indexing(data):
    """A damaged video is left out; one of another size or rate also has its index rebuilt."""
    folder = data.root / "videos"
    for name in ("a", "b", "c"):
        write_video(folder / f"{name}.mp4", moving_frames(20, (40, 60)), fps=5)
    records = [asking(name, f"{name}.mp4") for name in ("a", "b", "c")]
    collate = data.collate(records, "changing.json")
    assert not collate([0, 1, 2]).unreadable
    (folder / "a.mp4").write_bytes(b"damaged")
    write_video(folder / "b.mp4", moving_frames(20, (60, 60)), fps=5)
    batch = collate([0, 1, 2])
    assert batch.sample_ids == (collate.index.sample_id(2),)
    damaged, changed = (reason for _, reason in batch.unreadable)
    assert "a.mp4: not a video that FFmpeg can read" in damaged
    assert "60 x 60, but had 2" not in changed and "of 60 x 60, but had" in changed
    write_video(folder / "a.mp4", moving_frames(20, (40, 60)), fps=5)
    again = data.collate(None, "changing.json")
    assert again.load(1, 1).images.sizes[0].size == (60, 60)


def test_a_video_whose_text_has_another_length_is_left_out(data, monkeypatch):
    """As that of Qwen3-VL, if its timestamps have more digits; the next start builds the index again."""
    write_video(data.root / "videos" / "text.mp4", moving_frames(20, (40, 60)), fps=5)
    collate = data.collate([asking("a", "text.mp4")], "text.json")
    assert not collate([0]).unreadable
    written = type(collate.layout).placeholder
    monkeypatch.setattr(type(collate.layout), "placeholder", lambda *visual: f"10 . {written(*visual)}")
    [(_, reason)] = collate([0]).unreadable
    assert "text.mp4: its text has" in reason
    again = data.collate(None, "text.json")
    assert not again([0]).unreadable


def test_embedded_videos(data, tmp_path):
    """The bytes of a video in parquet, as ``datasets`` stores them, and in a tar give the batch of the file."""
    path = data.root / "videos" / "embedded.mp4"
    write_video(path, moving_frames(20, (40, 60)), fps=5)
    content, gif = path.read_bytes(), data.root / "videos" / "moving.gif"
    frames = [Image.fromarray(frame) for frame in moving_frames(6, (40, 60))]
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=200)
    expected = data.collate([asking("a", "embedded.mp4")], "as_file.json")([0])
    rows = [
        {**asking("a", [content]), "videos": None},
        {**asking("b", None), "videos": [{"bytes": content, "path": "x.mp4"}]},
    ]
    for number, row in enumerate(rows):
        pq.write_table(pa.Table.from_pylist([row]), data.root / f"{number}.parquet")
    turns = {"conversations": say("<video> what is shown ?", "a red cat")}
    write_tar(
        data.root / "a.tar",
        [
            ("k1.mp4", content), ("k1.json", json.dumps(turns).encode()),
            ("k2.mp4", content), ("k2.txt", b"a red cat"),
            ("k3.gif", gif.read_bytes()), ("k3.json", json.dumps({"video": "k3.gif", **turns}).encode()),
            ("k4.b.webm", b"b"), ("k4.a.webm", b"a"),
            ("k4.json", json.dumps({"videos": ["k4.a.webm", "k4.b.webm"], **turns}).encode()),
            ("k5.gif", gif.read_bytes()), ("k5.txt", b"a cat"),
        ],
    )  # fmt: skip
    collate = data.collate(None, "a.tar", max_bad=1, max_bad_share=1.0)
    for batch in (*(data.collate(None, f"{number}.parquet")([0]) for number in (0, 1)), collate([0])):
        assert batch.input_ids.tolist() == expected.input_ids.tolist()
        assert (batch.pixel_values == expected.pixel_values).all()
    records = list(read_records(data.root / "a.tar"))
    assert records[1].turns[0].text == "<video>\n" and records[1].videos[0].file == content
    assert len(collate.load(2, 2).images.sizes[0].indices) > 1, "all frames of the GIF"
    assert "2 video(s) but 1 <video>" in records[3].error
    assert records[4].images and not records[4].videos, "the first frame of a GIF that is not listed as a video"


def test_records_with_videos_need_a_folder(data):
    with pytest.raises(ValueError, match="none of its 1 records can be used") as refusal:
        data.collate([asking("a", "a.mp4")], "no_folder.json", videos=None, max_bad=1, max_bad_share=1.0)
    assert NO_VIDEOS in str(refusal.value)


def test_a_dry_run_names_the_video_and_the_reason(tmp_path, capsys):
    save_checkpoint("qwen2_5_vl", tmp_path / "model")
    (tmp_path / "videos").mkdir()
    image_bytes(tmp_path, 1)
    write_video(tmp_path / "videos" / "good.mp4", moving_frames(8))
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(50))
    records = [asking("g", "good.mp4"), asking("b", "bad.mp4"), asking("h", "good.mp4")]
    (tmp_path / "train.json").write_text(json.dumps(records))
    settings = {
        "run": {"name": "run", "output_dir": str(tmp_path / "runs")},
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {
            "root": str(tmp_path),
            "train": [{"path": "train.json", "images": "images", "videos": "videos"}],
            "template": "qwen",
            "cache_dir": str(tmp_path / "cache"),
            "max_bad_share": 1.0,
        },
        "train": {"global_batch_size": 2},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    dry = ["--config", str(tmp_path / "run.yaml"), "--dry_run"]
    assert train_main([*dry, "data.max_bad=1"]) == 0
    assert "1 cannot be used (first: b: video" in capsys.readouterr().out
    assert train_main([*dry, "data.max_bad=0"]) == 2
    said = capsys.readouterr().err
    assert "bad.mp4: an MP4 or MOV file without an index (moov)" in said
    (tmp_path / "train.json").write_text(json.dumps([asking("late", {"path": "good.mp4", "start": 5})]))
    assert train_main(dry) == 2
    said = capsys.readouterr().err
    assert "late: video" in said and "no frame lies between start=5.0 and end=None; the video has 8 frames" in said
    assert train_main([*dry, "data.train.0.videos=null"]) == 2
    assert NO_VIDEOS in capsys.readouterr().err
    shutil.rmtree(tmp_path / "videos")
    (tmp_path / "videos").write_text("a file")
    assert train_main(dry) == 2
    assert "data.train.0.videos" in (said := capsys.readouterr().err) and "not a folder of videos" in said
