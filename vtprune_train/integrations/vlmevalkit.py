"""Pruned models in VLMEvalKit. It has no plug-ins, so register the model before its ``run.py`` starts.

::

    from functools import partial
    from vlmeval.config import supported_VLM
    from vtprune_train.integrations.vlmevalkit import VTPrune

    supported_VLM["vtprune"] = partial(VTPrune, model_path="runs/llava_next_pdrop")

Source of the interface: ``vlmeval/vlm/base.py`` (``BaseModel.generate_inner``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from vlmeval.vlm.base import BaseModel

from vtprune_train.core.stream import IMAGE, VIDEO
from vtprune_train.evaluation.answering import answers, load, open_image
from vtprune_train.evaluation.videos import open_video
from vtprune_train.models.families import register_family
from vtprune_train.models.io.video_processor import DecodedVideo
from vtprune_train.pruning import SAVED


class VTPrune(BaseModel):
    """Answers messages of text and the paths of images and videos.

    Args:
        model_path: a run, checkpoint, Hugging Face folder or hub id.
        method: a pruning method, or ``None`` for the dense model; by default the saved one.
        device, dtype, trust_remote_code: see :func:`vtprune_train.evaluation.answering.load`.
        family: ``path/to/file.py:FAMILY``, for a model of a family outside the package.
        fps, num_frames: sampled frames of a video, per second or in total, instead of the checkpoint's setting.
        generation: keywords of ``generate``.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str,
        method: Any = SAVED,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        family: str | None = None,
        fps: float | None = None,
        num_frames: int | None = None,
        **generation: Any,
    ) -> None:
        super().__init__()
        if family is not None:
            register_family(family)
        self.loaded = load(
            model_path,
            method,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            fps=fps,
            num_frames=num_frames,
        )
        self.VIDEO_LLM = hasattr(self.loaded.processor, "video_processor")  # VLMEvalKit then passes whole videos
        self.generation = {"max_new_tokens": 512, **generation}

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to ``[{"type": "image", "value": PATH}, {"type": "text", "value": STR}, ...]``, with parts of type
        ``video`` for videos.

        Raises:
            ValueError: a part has another type, or an image or video cannot be read.
        """
        visuals: list[Image.Image | DecodedVideo] = []
        texts = []
        for part in message:
            if part["type"] == "image":
                visuals.append(open_image(Path(part["value"])))
                texts.append(IMAGE + "\n")
            elif part["type"] == "video":
                visuals.append(open_video(Path(part["value"]), self.loaded.processor))
                texts.append(VIDEO + "\n")
            elif part["type"] == "text":
                texts.append(part["value"])
            else:
                raise ValueError(
                    f"message part of type {part['type']!r} is not supported; vtprune supports image, video and text"
                )
        return answers(self.loaded, [(visuals, "".join(texts))], **self.generation)[0]
