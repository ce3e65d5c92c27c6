"""A video file: its header, and frames at given indices, decoded with PyAV.

To load frames, a file is read twice: first to list its packets, then to decode the packets from the keyframe before
each wanted frame to that frame. Other packets are read and skipped. There are no seeks, because the position after a
seek differs between formats, and reading is far faster than decoding.
"""

from __future__ import annotations

import io
import math
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from vtprune_train.data.images import TOO_MANY_FILES
from vtprune_train.data.video_errors import ChangedVideo, UnreadableVideo
from vtprune_train.data.video_packets import Packet, Run, Timeline, uneven_times
from vtprune_train.models.families.layout import VideoHeader

if TYPE_CHECKING:  # PyAV is not needed for training on images
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Resize = Callable[[np.ndarray], np.ndarray]
"""Resizes a frame [height, width, 3] uint8."""
MAX_FRAMES = 1_000_000  # 9 hours of 30 frames per second; listing their packets takes about 300 MB


def file_header(source: Path | bytes, *, fps: float, max_pixels: int, name: str, times: bool = False) -> VideoHeader:
    """See :func:`~vtprune_train.data.videos.video_header`."""
    seconds = None
    with _reading(name), _open(source, max_pixels, name) as (container, stream):
        frames = _indexed_frames(container, stream)
        reads_all = not frames or (times and _is_uneven(stream))
        first, packets = _first_frame(container, stream, name, only_first=not reads_all)
        timeline = Timeline(packets, stream.codec_context.has_b_frames) if reads_all else None
        if frames:
            fps = float(stream.average_rate or fps)
        elif timeline is not None:
            frames, fps = len(timeline.frames), timeline.rate(stream.time_base, stream.average_rate, fps)
        if times and timeline is not None and len(timeline.times) == frames:
            seconds = timeline.seconds(stream.time_base, fps)
        height, width = _upright(np.empty((first.height, first.width), dtype=bool), first).shape
    if frames > MAX_FRAMES:
        raise UnreadableVideo(name, f"{frames} frames, more than {MAX_FRAMES}; split the video")
    return VideoHeader(height, width, frames, fps, frames / fps, seconds)


def file_frames(
    source: Path | bytes,
    indices: Sequence[int],
    header: VideoHeader,
    *,
    max_pixels: int,
    name: str,
    resize: Resize | None = None,
) -> np.ndarray:
    """See :func:`~vtprune_train.data.videos.load_frames`."""
    frames = np.empty((0, header.height, header.width, 3), dtype=np.uint8)
    with _reading(name):
        with _open(source, max_pixels, name) as (container, stream):
            packets = [_packet(packet) for packet in islice(_demux(container, stream), MAX_FRAMES)]
            timeline = Timeline(packets, stream.codec_context.has_b_frames)
            _check(container, stream, timeline, header, name)
        missing = set(indices)
        for from_start in (False, True):  # a keyframe may depend on frames before it, as with intra refresh
            try:
                if missing:
                    with _open(source, max_pixels, name) as (container, stream):
                        for index, frame in _wanted_frames(container, stream, timeline, missing, from_start, name):
                            rgb = _rgb(frame, index, header, name)
                            rgb = rgb if resize is None else resize(rgb)
                            if not len(frames):
                                frames = np.empty((len(indices), *rgb.shape), dtype=np.uint8)
                            frames[np.equal(indices, index)] = rgb
                            missing.remove(index)
            except UnreadableVideo:
                if from_start:
                    raise
    if missing:
        raise UnreadableVideo(name, f"frame {min(missing)} of {header.frames} is damaged or cannot be decoded")
    return frames


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Convert the exceptions that PyAV raises for a broken file to :class:`UnreadableVideo`."""
    try:
        from av.error import FFmpegError
    except ImportError as error:
        raise ImportError("reading videos needs PyAV: pip install av") from error

    try:
        yield
    except UnreadableVideo:
        raise
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise
        raise UnreadableVideo(name, error.strerror or str(error)) from error
    except (FFmpegError, ValueError) as error:
        raise UnreadableVideo(name, f"broken ({type(error).__name__}: {error})") from error


@contextmanager
def _open(source: Path | bytes, max_pixels: int, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first video stream, to be decoded on one thread. No other file or address is opened: FFmpeg
    would otherwise follow the addresses in a playlist."""
    import av

    if isinstance(source, Path) and not stat.S_ISREG(source.stat().st_mode):  # opening a pipe would hang
        raise UnreadableVideo(name, "not a regular file")
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        begin = file.read(64)
        if not begin:
            raise UnreadableVideo(name, "the file is empty")
        file.seek(0)
        try:
            container = av.open(file, "r", metadata_errors="replace", io_open=_refuse)
        except av.error.FFmpegError as error:
            raise UnreadableVideo(name, _why_unknown(begin, error)) from error
        if "matroska" in container.format.name and (missing := _missing_bytes(begin, container.size)) > 0:
            raise UnreadableVideo(name, f"truncated: its last {missing} bytes are missing")
        with container:
            stream = _video_stream(container, max_pixels, name)
            stream.thread_count = 1  # workers of the data loader are processes
            stream.codec_context.thread_type = "NONE"
            yield container, stream


def _refuse(url: str, *_: Any) -> Any:
    raise PermissionError(f"it refers to another file, which is not opened: {url}")


def _why_unknown(begin: bytes, error: Exception) -> str:
    if begin[4:8] == b"ftyp":
        return "an MP4 or MOV file without an index (moov): truncated, or its recording was not finished"
    return f"not a video that FFmpeg can read ({type(error).__name__}; it starts with {begin[:16]!r})"


def _missing_bytes(begin: bytes, size: int) -> int:
    """How much longer a Matroska or WebM file of ``size`` bytes should be; at most 0 for a whole file, and for one that
    was written without knowing its length. FFmpeg reads a truncated one as a shorter video.

    A file is an EBML header and a segment; each has an identifier, a length and a content (RFC 8794).
    """
    _, segment = _element(begin, 0)
    if segment is None or segment >= len(begin) - 16:
        return 0
    _, end = _element(begin, segment)
    return 0 if end is None else end - size


def _element(content: bytes, start: int) -> tuple[int, int | None]:
    """Where the content of an EBML element begins and ends; ``None`` if its length is unknown."""
    at = start + 9 - content[start].bit_length()  # leading zeros tell how many bytes an identifier or a length has
    num_bytes = 9 - content[at].bit_length()
    length = int.from_bytes(content[at : at + num_bytes]) & (2 ** (7 * num_bytes) - 1)
    begin = at + num_bytes
    return begin, None if length == 2 ** (7 * num_bytes) - 1 else begin + length


def _video_stream(container: InputContainer, max_pixels: int, name: str) -> VideoStream:
    from av.stream import Discard, Disposition

    if container.format.name == "image2" or container.format.name.endswith("_pipe"):
        raise UnreadableVideo(
            name, "an image, not a video; write it as an image (FFmpeg does not read WebP animations)"
        )
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams}))
        raise UnreadableVideo(name, f"no video stream (only {kinds or 'an empty container'})")
    stream = streams[0]
    if stream.codec_context is None:
        raise UnreadableVideo(name, "FFmpeg has no decoder for its codec; convert the video to H.264")
    if stream.height * stream.width > max_pixels:
        size = f"{stream.height} x {stream.width}"
        raise UnreadableVideo(name, f"frames of {size}, more pixels than data.max_image_pixels={max_pixels}")
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    return stream


def _indexed_frames(container: InputContainer, stream: VideoStream) -> int:
    """Number of frames in the index of an MP4 or MOV file; 0 if the file has no complete index."""
    entries = stream.index_entries
    is_complete = "mp4" in container.format.name and 0 < len(entries) == stream.frames and entries[0].is_keyframe
    if not is_complete or not stream.average_rate:
        return 0
    return sum(entry.size > 0 and not entry.is_discard for entry in entries)  # an edit list discards frames


def _is_uneven(stream: VideoStream) -> bool:
    """Whether the frames in the index of an MP4 or MOV file have no constant rate. The index has times of decoding."""
    entries = [entry.timestamp for entry in stream.index_entries if entry.size > 0 and not entry.is_discard]
    tick, rate = float(stream.time_base or 0), float(stream.average_rate or 0)
    return uneven_times([(time - entries[0]) * tick for time in entries], rate) is not None


def _first_frame(
    container: InputContainer, stream: VideoStream, name: str, *, only_first: bool
) -> tuple[VideoFrame, list[Packet]]:
    """The first frame that can be decoded, and the packets up to it or of the whole file."""
    from av.error import InvalidDataError

    first, packets = None, []
    for packet in _demux(container, stream):
        if first is None:
            with suppress(InvalidDataError):  # the first frames of a cut stream may need missing ones
                first = next(iter(packet.decode()), None)
        packets.append(_packet(packet))
        if len(packets) > MAX_FRAMES or (only_first and first):
            break
    first = first or next(iter(stream.decode(None)), None)
    if first is None:
        raise UnreadableVideo(name, "no frame can be decoded")
    return first, packets


def _demux(container: InputContainer, stream: VideoStream) -> Iterator[Any]:
    """The packets of a stream that contain data.

    They end with the stream's empty packet: if streams appear within the file, PyAV 18 fails after it.
    """
    for packet in container.demux(stream):
        if packet.size:
            yield packet
        elif packet.dts is None:
            return


def _packet(packet: Any) -> Packet:
    # VP8 stores hidden reference frames as separate packets; newer codecs store them in the packet of a shown frame
    is_hidden = packet.stream.codec_context.codec.name in ("vp8", "libvpx") and not bytes(packet)[0] & 0x10
    return Packet(packet.pts, packet.duration or 0, packet.is_keyframe, not (packet.is_discard or is_hidden))


def _check(container: InputContainer, stream: VideoStream, timeline: Timeline, header: VideoHeader, name: str) -> None:
    """Compare a file with its header in the index."""
    frames = _indexed_frames(container, stream)
    fps = stream.average_rate if frames else timeline.rate(stream.time_base, stream.average_rate, header.fps)
    count = len(timeline.frames)
    if (frames or count) != header.frames or not math.isclose(fps or 0, header.fps, rel_tol=1e-3):
        found = f"{frames or count} frames at {float(fps or 0):g} per second"
        indexed = f"{header.frames} at {header.fps:g} when its header was read"
        raise ChangedVideo(name, f"it has {found}, but had {indexed}")
    if count != header.frames:
        raise UnreadableVideo(name, f"frame {count} of {header.frames} is missing: the file is truncated or damaged")


def _wanted_frames(
    container: InputContainer, stream: VideoStream, timeline: Timeline, missing: set[int], from_start: bool, name: str
) -> Iterator[tuple[int, VideoFrame]]:
    """Decode frames, except damaged ones, until the caller has removed all from ``missing``."""
    by_time: dict[int | None, int] = {timeline.times[index]: index for index in missing} if timeline.times else {}
    decoded = _decode(container, stream, timeline, timeline.runs(missing, from_start), name)
    for count, frame in enumerate(decoded):
        index = by_time.get(frame.pts) if timeline.times else count
        if index in missing and not frame.is_corrupt:
            yield index, frame
        if not missing:
            return


def _decode(
    container: InputContainer, stream: VideoStream, timeline: Timeline, runs: Sequence[Run], name: str
) -> Iterator[VideoFrame]:
    """The frames of runs of packets."""
    from av.error import FFmpegError

    packets = enumerate(_demux(container, stream))
    for first, last in runs:
        for position, packet in packets:
            try:
                yield from packet.decode() if position >= first and position not in timeline.dropped else ()
            except FFmpegError as error:
                frame = timeline.frames.index(position) if position in timeline.frames else "(not shown)"
                reason = f"frame {frame} of {len(timeline.frames)} cannot be decoded ({error.strerror})"
                raise UnreadableVideo(name, reason) from error
            if position == last:
                break
        yield from stream.decode(None)  # frames that the decoder still holds for reordering
        stream.codec_context.flush_buffers()


def _rgb(frame: VideoFrame, index: int, header: VideoHeader, name: str) -> np.ndarray:
    """Convert a frame to [height, width, 3] uint8 RGB. Bicubic is the interpolation of ffmpeg's command line."""
    from av.video.reformatter import Interpolation

    stored = _progressive(frame) if frame.interlaced_frame else frame
    rgb = stored.reformat(format="rgb24", interpolation=Interpolation.BICUBIC, threads=1).to_ndarray()
    image = _upright(rgb, frame)
    if image.shape[:2] != (header.height, header.width):
        size = f"{image.shape[0]} x {image.shape[1]}"
        expected = f"{header.height} x {header.width}"
        raise UnreadableVideo(
            name, f"frame {index} is {size}, but the first frame is {expected}; encode the video again with one size"
        )
    return image


def _progressive(frame: VideoFrame) -> VideoFrame:
    """Mark an interlaced frame as progressive: libswscale would convert each field, unlike ffmpeg's command line."""
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
    )
    graph.link_nodes(source, graph.add("setfield", "prog"), graph.add("buffersink")).configure()
    graph.push(frame)
    return cast("VideoFrame", graph.pull())


def _upright(image: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """Apply a frame's display matrix, rounded to quarter turns, to [height, width, ...].

    The matrix maps ``(x, y)`` to ``(a x + c y, b x + d y)`` (``libavutil/display.h``).
    """
    from av.sidedata.sidedata import Type

    matrix: Any = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
