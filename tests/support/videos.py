"""Small videos: written with PyAV, or with ffmpeg where only it can make them."""

import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np

SIZE = (48, 64)
FRAMES = 30
FPS = 10

_SOURCE = ("-f", "lavfi", "-i", f"testsrc2=size={SIZE[1]}x{SIZE[0]}:rate={FPS}:duration={FRAMES // FPS}")
_H264 = ("-c:v", "libx264", "-bf", "3", "-g", "10", "-pix_fmt", "yuv420p")
_VP8 = ("-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "25", "-b:v", "20k")
_SOME = ("-vf", "select='not(mod(n,3)*mod(n,4))'", "-fps_mode", "vfr")
_COMMANDS = {
    "h264.mp4": (*_SOURCE, *_H264),
    "vp9.webm": (*_SOURCE, "-c:v", "libvpx-vp9", "-g", "10", "-deadline", "realtime"),
    "variable.mp4": (*_SOURCE, *_SOME, *_H264),
    "variable.mkv": (*_SOURCE, *_SOME, *_H264),
    "open_gop.mp4": (*_SOURCE, *_H264, "-x264-params", "open-gop=1:scenecut=0"),
    "refresh.ts": (*_SOURCE, *_H264, "-bf", "0", "-x264-params", "intra-refresh=1"),
    "interlaced.ts": (*_SOURCE, *_H264, "-x264-params", "interlaced=1"),
    "fragments.mp4": (*_SOURCE, *_H264, "-movflags", "frag_keyframe+empty_moov"),
    "ten_bits.mkv": (*_SOURCE, "-c:v", "ffv1", "-pix_fmt", "yuv420p10le", "-frames:v", "4"),
    "animation.gif": (*_SOURCE, "-frames:v", "12"),
    "animation.apng": (*_SOURCE, "-frames:v", "4", "-f", "apng"),
    "reordered.avi": (*_SOURCE, *_H264, "-bf", "3"),
    "packed.avi": (*_SOURCE, "-c:v", "mpeg4", "-bf", "2", "-g", "10"),
    "with_audio.mp4": (*_SOURCE, "-f", "lavfi", "-i", "sine", "-t", "3", *_H264, "-c:a", "aac"),
    "audio.m4a": ("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac"),
    # made from h264.mp4, by copying its packets
    "rotated.mp4": ("-i", "h264.mp4", "-c", "copy", "-metadata:s:v", "rotate=90"),
    "edited.mp4": ("-ss", "0.55", "-i", "h264.mp4", "-c", "copy"),
    "late.mkv": ("-itsoffset", "5", "-i", "h264.mp4", "-c", "copy"),
    "stream.ts": ("-i", "h264.mp4", "-c", "copy"),
    "stream.h264": ("-i", "h264.mp4", "-c", "copy"),
    "open_gop.ts": (*_SOURCE, *_H264, "-x264-params", "open-gop=1:scenecut=0"),
    "index_first.mp4": ("-i", "h264.mp4", "-c", "copy", "-movflags", "+faststart"),
}


def has_ffmpeg() -> bool:
    return shutil.which("ffmpeg") is not None


def make_videos(folder: Path) -> dict[str, Path]:
    """Write one video of each kind with ffmpeg, of testsrc2's moving pattern."""

    def ffmpeg(*command: str) -> None:
        subprocess.run(["ffmpeg", "-y", "-loglevel", "error", *command], cwd=folder, check=True)

    for name, command in _COMMANDS.items():
        ffmpeg(*command, name)
    for number in ("1", "2"):  # VP8 has frames that are not shown only with two passes
        ffmpeg(*_SOURCE, *_VP8, "-pass", number, "hidden.webm")
    # players join a broadcast between keyframes, or at a keyframe that frames before it refer to
    (folder / "joined.ts").write_bytes((folder / "stream.ts").read_bytes()[188 * 18 :])
    content, start = (folder / "open_gop.ts").read_bytes(), _second_keyframe(folder / "open_gop.ts")
    (folder / "joined_open.ts").write_bytes(content[: 188 * 3] + content[start:])
    return {path.name: path for path in folder.iterdir() if path.suffix != ".log"}


def _second_keyframe(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return [packet.pos for packet in container.demux(video=0) if packet.size and packet.is_keyframe][1]


def reference_frames(path: Path, height: int, width: int) -> np.ndarray:
    """All frames as ffmpeg's command line decodes them, [n, height, width, 3] uint8."""
    command = ["ffmpeg", "-loglevel", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24"]
    raw = subprocess.run([*command, "-fps_mode", "passthrough", "-"], check=True, capture_output=True).stdout
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, height, width, 3)


def moving_frames(count: int = FRAMES, size: tuple[int, int] = SIZE) -> np.ndarray:
    """[count, height, width, 3] uint8: a gradient with a bar that moves, and the frame's index in the bar's colour."""
    height, width = size
    frames = np.empty((count, height, width, 3), dtype=np.uint8)
    frames[..., 0] = np.linspace(0, 255, width)
    frames[..., 1] = np.linspace(0, 255, height)[:, None]
    for index, frame in enumerate(frames):
        frame[..., 2] = index * 255 // max(count - 1, 1)
        frame[:, (start := index * 7 % width) : start + 8] = 255 - index * 3 % 256
    return frames


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: float = FPS,
    codec: str = "libx264",
    *,
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    keyframe_interval: int = 10,
    times: list[int] | None = None,
    display: tuple[int, bool, bool] | None = None,
) -> Path:
    """Write frames ([n, height, width, 3] uint8) with PyAV.

    Args:
        times: when each frame is shown, in units of ``1 / fps``; for a variable frame rate.
        display: degrees of counter-clockwise rotation, horizontal flip, vertical flip, to apply when shown.
    """
    import av

    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        stream.gop_size, stream.thread_count = keyframe_interval, 1
        if display:
            stream.set_display_rotation(*display)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (times[index] if times else index), 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
