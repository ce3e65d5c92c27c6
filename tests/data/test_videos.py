"""Frames of videos equal those of ffmpeg's command line, at any indices; unusable videos raise one error."""

import errno
import importlib.util
import os
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.videos import FRAMES, SIZE, has_ffmpeg, make_videos, moving_frames, reference_frames, write_video
from vtprune_train.data import video_files
from vtprune_train.data.images import ChangedImage, UnreadableImage
from vtprune_train.data.video_packets import Packet, Timeline
from vtprune_train.data.videos import ChangedVideo, UnreadableVideo, is_video_name, load_frames, video_header
from vtprune_train.models.families.layout import VideoHeader

pytest.importorskip("av", reason="videos need PyAV (pip install av)")
needs_ffmpeg = pytest.mark.skipif(not has_ffmpeg(), reason="ffmpeg is not installed: it makes these videos")


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def h264(tmp_path_factory):
    """An H.264 file with B-frames and three keyframes, and all its frames, decoded one after another by PyAV."""
    import av

    path = tmp_path_factory.mktemp("h264") / "a.mp4"
    write_video(path, moving_frames(), options={"bf": "3", "x264-params": "scenecut=0"})
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return path, frames


def all_frames(source):
    header = video_header(source)
    return load_frames(source, range(header.frames), header)


def reason(source, indices=(0,), header=None, **options):
    with pytest.raises(UnreadableVideo) as caught:
        load_frames(source, indices, header or video_header(source, **options), **options)
    return caught.value.reason


COUNTS = {
    "h264.mp4": 30, "vp9.webm": 30, "variable.mp4": 15, "variable.mkv": 15, "open_gop.mp4": 30, "refresh.ts": 30,
    "fragments.mp4": 30, "ten_bits.mkv": 4, "animation.gif": 12, "animation.apng": 4, "packed.avi": 30,
    "reordered.avi": 30,
    "with_audio.mp4": 30, "rotated.mp4": 30, "edited.mp4": 24, "late.mkv": 30, "stream.ts": 30, "stream.h264": 30,
    "index_first.mp4": 30, "joined.ts": 20, "joined_open.ts": 20, "interlaced.ts": 30, "hidden.webm": 30,
}  # fmt: skip


@needs_ffmpeg
@pytest.mark.parametrize("kind", COUNTS)
def test_frames_equal_those_of_ffmpeg(videos, kind):
    """All of them, and few: B-frames, open GOPs, edit lists, times that are variable, start late, or are absent, or are
    those of decoding (AVI)."""
    path = videos[kind]
    header = video_header(path)
    reference = reference_frames(path, header.height, header.width)
    assert header.frames == len(reference) == COUNTS[kind]
    assert np.array_equal(all_frames(path), reference)
    rng = np.random.default_rng(0)
    for _ in range(4):
        indices = rng.integers(0, header.frames, 3).tolist()
        assert np.array_equal(load_frames(path.read_bytes(), indices, header), reference[indices]), indices


@needs_ffmpeg
def test_frames_that_are_not_shown_are_packets_of_their_own_in_vp8(videos):
    """Otherwise ``hidden.webm`` above would test nothing."""
    import av

    with av.open(str(videos["hidden.webm"])) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) > COUNTS["hidden.webm"]


@needs_ffmpeg
@pytest.mark.parametrize(
    ("kind", "height", "width", "fps", "seconds"),
    [
        ("h264.mp4", 48, 64, 10, 3), ("vp9.webm", 48, 64, 10, 3), ("rotated.mp4", 64, 48, 10, 3),
        ("variable.mp4", 48, 64, 15 / 2.9, 2.9), ("variable.mkv", 48, 64, 15 / 2.9, 2.9), ("late.mkv", 48, 64, 10, 3),
        ("edited.mp4", 48, 64, 10, 2.4), ("animation.gif", 48, 64, 10, 1.2), ("stream.h264", 48, 64, 25, 1.2),
    ],
)  # fmt: skip
def test_headers(videos, kind, height, width, fps, seconds):
    """A raw stream has no times: FFmpeg's rate for it is 25."""
    header = video_header(videos[kind])
    assert (header.height, header.width) == (height, width)
    assert (header.fps, header.duration) == pytest.approx((fps, seconds))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3"}), ("a.mkv", "libx264", {"bf": "3", "x264-params": "open-gop=1"}),
        ("a.webm", "libvpx-vp9", {"deadline": "realtime"}), ("a.mov", "mpeg4", {"bf": "2"}),
        ("a.ts", "mpeg2video", {"bf": "2"}),
    ],
)  # fmt: skip
def test_headers_count_the_decoded_frames(tmp_path, name, codec, options):
    import av

    path = write_video(tmp_path / name, moving_frames(), fps=30, codec=codec, options=options)
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    header = video_header(path)
    assert header.frames == len(decoded) == FRAMES and header.fps == pytest.approx(30)
    assert np.array_equal(load_frames(path, [29, 3, 14, 3], header), [decoded[index] for index in (29, 3, 14, 3)])


def test_rates_of_30000_by_1001_stay_exact(tmp_path):
    """Matroska rounds times to milliseconds."""
    for name in ("a.mkv", "a.mp4"):
        assert video_header(write_video(tmp_path / name, moving_frames(8), fps=30000 / 1001)).fps == 30000 / 1001


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_variable_rate_is_the_mean(tmp_path, kind):
    options = {"bf": "0"}  # with B-frames, libx264 derives the duration of the last frames from those before
    path = write_video(tmp_path / f"a.{kind}", moving_frames(5), fps=10, times=[0, 1, 2, 10, 19], options=options)
    assert video_header(path).fps == pytest.approx(5 / 2, rel=0.08), "the duration of the last frame varies"


def test_one_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(1))
    header = video_header(path)
    assert header == VideoHeader(*SIZE, 1, 10.0, 0.1) and load_frames(path, [0, 0], header).shape == (2, *SIZE, 3)
    assert load_frames(path, [], header).shape == (0, *SIZE, 3)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)])
def test_rotations_and_flips(tmp_path, degrees, flips):
    """The same pixels, turned: counter-clockwise, then flipped."""
    stored = all_frames(write_video(tmp_path / "a.mp4", moving_frames(3)))
    turned = np.rot90(stored, degrees // 90, axes=(1, 2))
    expected = turned[:, :: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
    seen = all_frames(write_video(tmp_path / "b.mp4", moving_frames(3), display=(degrees, *flips)))
    assert np.array_equal(seen, expected)


def test_packets_between_wanted_frames_are_not_decoded(h264, monkeypatch):
    """Frame 12 needs packets from the second keyframe on, and no packet is decoded twice."""
    path, frames = h264
    runs = []
    decode = video_files._decode
    monkeypatch.setattr(video_files, "_decode", lambda *args: runs.append(args[3]) or decode(*args))
    assert np.array_equal(load_frames(path, [12, 28, 11], video_header(path)), frames[[12, 28, 11]])
    assert [start for start, _ in runs[0]] == [10, 20] and len(runs) == 1
    assert runs[0][0][1] < 20 and runs[0][1][1] <= 29


def test_frames_before_an_open_keyframe_start_at_the_keyframe_before():
    times = {0: True, 1: False, 2: False, 6: True, 4: False, 5: False, 7: False}
    timeline = Timeline([Packet(time, 1, key, True) for time, key in times.items()])
    assert timeline.times == sorted(times) and timeline.runs([3]) == [(0, 4)] and timeline.runs([6]) == [(3, 6)]
    assert timeline.runs([6, 3]) == [(0, 6)] and timeline.runs([1, 5]) == [(0, 1), (3, 3)]


def test_frames_are_counted_if_times_repeat():
    timeline = Timeline([Packet(time, 0, time == 0, True) for time in (0, 1, 1, 2)])
    assert timeline.times == [] and timeline.frames == [0, 1, 2, 3] and timeline.runs([2]) == [(0, 3)]


def test_parts_follow_the_times_of_the_frames(tmp_path):
    """20 frames per second, then one per second; those of MP4 are in its index, others are those of the packets."""
    times, options = [*range(20), *range(20, 101, 20)], {"bf": "0"}
    for kind in ("mp4", "mkv"):
        path = write_video(tmp_path / f"a.{kind}", moving_frames(len(times)), fps=20, times=times, options=options)
        header = video_header(path, times=True)
        assert header.times == pytest.approx([time / 20 for time in times], abs=1e-3), kind
        assert (
            header.part(1, 3) == (20, 22) and header.part(0.5, None) == (10, 24) and header.part(None, 0.9) == (0, 18)
        )
        with pytest.raises(
            ValueError, match=r"no frame lies between start=3.2 and end=3.8; the video has 25 frames in"
        ):
            header.part(3.2, 3.8)
        with pytest.raises(ValueError, match="no frame lies between start=9 and end=None"):
            header.part(9, None)
        assert np.array_equal(load_frames(path, range(25), header), all_frames(path))
    for name, fps in (("b.mp4", 30000 / 1001), ("b.mkv", 30000 / 1001)):
        path = write_video(tmp_path / name, moving_frames(20), fps=fps, options={"bf": "3"})
        header = video_header(path, times=True)
        assert header.times is None and header.part(3 / header.fps, 0.5) == (3, 14), name


def test_a_change_of_the_frame_size_is_no_change_of_the_file(tmp_path):
    streams = [
        write_video(tmp_path / f"{number}.h264", moving_frames(10, size), options={"bf": "0"}).read_bytes()
        for number, size in enumerate((SIZE, (SIZE[0], 2 * SIZE[1])))
    ]
    content = b"".join(streams)
    header = video_header(content)
    assert header.frames == 20 and load_frames(content, [0, 9], header).shape == (2, *SIZE, 3)
    expected = "frame 10 is 48 x 128, but the first frame is 48 x 64; encode the video again with one size"
    assert reason(content, [10]) == expected


def test_frames_are_resized_while_they_are_decoded(h264, tmp_path):
    path, frames = h264
    folder = folder_of(tmp_path / "a", ["1.png", "2.png"])
    half = load_frames(path, [7, 2, 7], video_header(path), resize=lambda frame: frame[::2, ::2])
    assert np.array_equal(half, frames[[7, 2, 7]][:, ::2, ::2])
    assert load_frames(folder, [1, 0], video_header(folder), resize=lambda frame: frame[:9]).shape == (2, 9, SIZE[1], 3)


def folder_of(path, names, sizes=None):
    path.mkdir(exist_ok=True)
    for place, name in enumerate(names):
        Image.new("RGB", (sizes or {}).get(name, SIZE)[::-1], (place * 20, 0, 0)).save(path / name)
    return path


def test_a_folder_of_images(tmp_path):
    """In natural order; other files and hidden images are not frames."""
    names = ["frame1.png", "frame2.png", "frame10.png", "frame11.png"]
    folder = folder_of(tmp_path / "a", names)
    (folder / "notes.txt").write_text("no frame")
    (folder / "._frame3.png").write_bytes(b"a resource fork")
    assert video_header(folder) == VideoHeader(*SIZE, 4, 24.0, 4 / 24)
    header = video_header(folder, fps=2)
    assert (header.fps, header.duration) == (2.0, 2.0)
    assert load_frames(folder, [3, 0, 2], header)[:, 0, 0, 0].tolist() == [60, 0, 40]


def test_folders_that_are_refused(tmp_path):
    names = ["1.png", "2.png", "3.png"]
    folder = folder_of(tmp_path / "a", names, {"3.png": (20, 30)})
    assert load_frames(folder, [1], header := video_header(folder)).shape == (1, *SIZE, 3)
    expected = "frame 2 (3.png) does not have the size of the first frame; resize or remove this image"
    assert reason(folder, [2]) == expected
    (folder / "2.png").write_bytes(b"")
    assert reason(folder, [1]) == "frame 1 (2.png): the file is empty"
    (folder / "2.png").unlink()
    assert reason(folder, header=header) == "it has 2 frames, but had 3 when its header was read"
    (tmp_path / "empty").mkdir()
    assert reason(tmp_path / "empty").startswith("a folder without images (.avif, .bmp")
    assert reason(folder, max_pixels=100).startswith("frame 0 (1.png): more pixels than")
    other = VideoHeader(9, 9, 2, 24.0, 1.0)
    with pytest.raises(ChangedVideo, match=r"its first frame is \(48, 64\), but was \(9, 9\)"):
        load_frames(folder, [0], other)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"just some words, not a video", "not a video that FFmpeg can read (InvalidDataError; it starts with"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n/a.ts\n#EXT-X-ENDLIST\n", "not a video that FFmpeg can read"),
        (b"ffconcat version 1.0\nfile '/a.mp4'\n", "not a video that FFmpeg can read (PermissionError"),
    ],
    ids=["empty", "text", "playlist", "list of files"],
)
def test_files_that_are_no_videos(tmp_path, content, expected):
    (tmp_path / "a.mp4").write_bytes(content)
    assert reason(tmp_path / "a.mp4").startswith(expected) and reason(content).startswith(expected)


def test_other_files_are_not_opened(tmp_path, h264):
    """A playlist could name any file or address."""
    (tmp_path / "a.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{h264[0]}\n#EXT-X-ENDLIST\n")
    assert reason(tmp_path / "a.m3u8") == f"it refers to another file, which is not opened: {h264[0]}"


def test_images_are_no_videos(tmp_path):
    for kind in ("png", "jpg", "webp"):
        Image.new("RGB", (20, 10)).save(tmp_path / f"a.{kind}")
        assert reason(tmp_path / f"a.{kind}").startswith(("an image, not a video", "not a video that FFmpeg")), kind


@needs_ffmpeg
def test_audio_alone_is_no_video(videos):
    assert reason(videos["audio.m4a"]) == "no video stream (only audio)"


def test_places_without_a_video(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    codes = {"none.mp4": errno.ENOENT, "loop": errno.ELOOP, "a" * 300: errno.ENAMETOOLONG}
    for name, code in codes.items():
        assert reason(tmp_path / name) == os.strerror(code), name
    assert "null" in reason(tmp_path / "a\0b")
    assert reason(tmp_path / "pipe") == "not a regular file", "opening it would wait for ever"


def test_an_mp4_without_its_index(h264):
    whole = h264[0].read_bytes()
    assert reason(whole[: len(whole) // 2]) == (
        "an MP4 or MOV file without an index (moov): truncated, or its recording was not finished"
    )


def test_a_truncated_file_with_its_index(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(), options={"movflags": "+faststart"})
    import av

    with (
        av.open(str(path), "r") as container,
        av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "+faststart"}) as copy,
    ):
        stream = copy.add_stream_from_template(container.streams.video[0])
        for packet in container.demux(video=0):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    whole = (tmp_path / "b.mp4").read_bytes()
    cut = whole[: len(whole) - len(whole) // 4]
    header = video_header(cut)
    assert header == video_header(whole), "the index is whole"
    assert "of 30 is missing: the file is truncated or damaged" in reason(cut)


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["vp9.webm", "variable.mkv", "late.mkv"])
def test_a_truncated_matroska_file(videos, kind):
    """FFmpeg would read it as a shorter video."""
    whole = videos[kind].read_bytes()
    for missing in (1, len(whole) // 3):
        assert reason(whole[:-missing]) == f"truncated: its last {missing} bytes are missing"
    start = whole.index(bytes.fromhex("18538067")) + 4
    streamed = whole[:start] + b"\x01" + b"\xff" * 7 + whole[start + 8 :]  # as written without seeking back
    assert all_frames(streamed).shape == all_frames(whole).shape


def test_a_frame_that_cannot_be_decoded_is_named(h264):
    """The packet of a keyframe is overwritten: the ten frames from it on are lost."""
    import av

    path, frames = h264
    whole = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        keyframes = [packet for packet in container.demux(video=0) if packet.size and packet.is_keyframe]
    start, size = keyframes[1].pos, keyframes[1].size
    whole[start : start + size] = b"\xff" * size
    header = video_header(bytes(whole))
    others = [0, 9, 20, 29]
    assert np.array_equal(load_frames(bytes(whole), others, header), frames[others])
    for index in (10, 15):
        assert reason(bytes(whole), [*others, index]).startswith("frame 10 of 30 cannot be decoded (Invalid data")


def test_a_changed_video_is_named(h264, tmp_path):
    path, _ = h264
    header = video_header(path)
    for change in ({"frames": 31}, {"fps": 12.0}):
        with pytest.raises(ChangedVideo, match=r"when its header was read"):
            load_frames(path, [0], VideoHeader(**{**vars(header), **change}), name="x")
    assert issubclass(ChangedVideo, ChangedImage) and issubclass(UnreadableVideo, UnreadableImage)
    with pytest.raises(IndexError, match="x: frame 30 of a video with 30 frames"):
        load_frames(path, [30], header, name="x")


def test_frames_are_decoded_from_the_start_if_their_keyframe_does_not_suffice(h264, monkeypatch):
    path, frames = h264
    runs = []
    decode = video_files._decode

    def decode_nothing_first(*args):
        runs.append(args[3])
        yield from decode(*args) if len(runs) > 1 else ()

    monkeypatch.setattr(video_files, "_decode", decode_nothing_first)
    assert np.array_equal(load_frames(path, [25, 12], video_header(path)), frames[[25, 12]])
    assert runs[1] == [(0, 29)] and len(runs) == 2
    monkeypatch.setattr(video_files, "_decode", lambda *_: iter(()))
    assert reason(path, [12, 25]) == "frame 12 of 30 is damaged or cannot be decoded"


def test_limits(h264, monkeypatch):
    assert "frames of 48 x 64, more pixels than data.max_image_pixels=3071" in reason(h264[0], max_pixels=3071)
    monkeypatch.setattr(video_files, "MAX_FRAMES", 29)
    assert reason(h264[0]) == "30 frames, more than 29; split the video"


def test_too_many_open_files_is_no_fault_of_a_video(h264, monkeypatch):
    def fail(self, *_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(self))

    monkeypatch.setattr(type(h264[0]), "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        video_header(h264[0])


def test_errors_of_our_own_are_not_taken_for_broken_videos(h264, monkeypatch):
    header = video_header(h264[0])
    monkeypatch.setattr(video_files, "_rgb", lambda *_: (_ for _ in ()).throw(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        load_frames(h264[0], [0], header)


def test_the_error_comes_through_a_pipe_whole():
    error = pickle.loads(pickle.dumps(ChangedVideo("a.mp4", "the file is empty")))
    assert (error.name, error.reason, str(error)) == ("a.mp4", "the file is empty", "a.mp4: the file is empty")


@pytest.mark.parametrize("kind", ["mp4", "mkv", "gif", "ts"])
def test_damage_raises_nothing_else(tmp_path, kind, capfd):
    """Bits flipped, bytes cut out and ends cut off: frames, or the one error; FFmpeg prints nothing."""
    options = {"codec": "gif", "pixel_format": "rgb8"} if kind == "gif" else {}
    whole = write_video(tmp_path / f"a.{kind}", moving_frames(12), keyframe_interval=4, **options).read_bytes()
    rng = np.random.default_rng(len(kind))
    outcomes = {"read": 0, "refused": 0}
    capfd.readouterr()
    for trial in range(60):
        broken = bytearray(whole)
        if trial % 3 == 0:
            del broken[int(rng.integers(len(broken))) :]
        elif trial % 3 == 1:
            start = int(rng.integers(len(broken)))
            del broken[start : start + int(rng.integers(1, 20))]
        else:
            for place in rng.integers(0, len(broken), 4):
                broken[place] ^= 1 << int(rng.integers(8))
        try:
            header = video_header(bytes(broken), max_pixels=10**6)
            seen = load_frames(bytes(broken), [0, header.frames - 1], header, max_pixels=10**6)
            assert seen.shape == (2, header.height, header.width, 3)
            outcomes["read"] += 1
        except UnreadableVideo as error:
            assert error.reason
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 1, outcomes
    assert capfd.readouterr() == ("", "")


def test_names():
    assert (
        is_video_name("a/b.MP4") and is_video_name("a.gif") and not is_video_name("a.png") and not is_video_name("mp4")
    )


def test_pyav_is_needed_only_to_read(h264, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "av"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("fresh", video_files.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match="reading videos needs PyAV: pip install av"):
        module.file_header(h264[0], fps=1, max_pixels=10**6, name="x")
