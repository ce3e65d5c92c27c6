"""transformers' own video processors, which need torchvision, in a process of their own.

They need none of torchvision's compiled operators, which fit only PyTorch builds with CUDA. `make ecosystem` installs
its files into a folder of the environment that no other process imports from.
"""

import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "torchvision"


def reference(folder, jobs):
    """The results of :func:`main`'s jobs, from a new process.

    Args:
        folder: for the files that go between the processes.
        jobs: a name and its arguments each: ``("sample", class name, [(total, fps, settings)])``, ``("pixels", class
            name, settings, frames)``, or ``("inputs", checkpoint, text, frames of each video, fps of each)``.
    """
    torch.save(jobs, folder / "jobs.pt")
    command = [sys.executable, "-m", "tests.support.torchvision_reference", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


def _sample(transformers, name, cases):
    """The indices of each case, or why it is refused."""
    from transformers.video_utils import VideoMetadata

    found = []
    for total, fps, settings in cases:
        limits = {key: value for key, value in settings.items() if key in ("min_frames", "max_frames")}
        rates = {key: value for key, value in settings.items() if key not in limits}
        processor = getattr(transformers, name)(**limits)
        processor.fps = None  # Qwen3-VL has a default, which num_frames contradicts
        try:
            metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)
            found.append([int(index) for index in processor.sample_frames(metadata, **rates)])
        except (ValueError, ZeroDivisionError) as error:
            found.append(str(error))
    return found


def _pixels(transformers, name, settings, frames):
    processor = getattr(transformers, name)(**settings)
    return dict(processor([frames.numpy()], do_sample_frames=False, return_tensors="pt"))


def _inputs(transformers, checkpoint, text, videos, rates):
    """What the family's processor makes of a text with videos, whose frames it samples."""
    from transformers.video_utils import VideoMetadata

    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    metadata = [VideoMetadata(len(v), fps=fps, duration=len(v) / fps) for v, fps in zip(videos, rates, strict=True)]
    return dict(
        processor(
            text=[text],
            videos=[frames.numpy() for frames in videos],
            video_metadata=metadata,
            do_sample_frames=True,
            return_tensors="pt",
        )
    )


def main(folder):
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.insert(0, str(FOLDER))
    import transformers

    kinds = {"sample": _sample, "pixels": _pixels, "inputs": _inputs}
    jobs = torch.load(folder / "jobs.pt")
    torch.save([kinds[kind](transformers, *arguments) for kind, *arguments in jobs], folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
