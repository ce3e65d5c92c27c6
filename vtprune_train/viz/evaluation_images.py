"""Draws the kept tokens of images and videos of the evaluation data, for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vtprune_train.core.stream import IMAGE, VIDEO, to_device
from vtprune_train.data.images import UNREADABLE
from vtprune_train.data.load.collate import Collator, lay_out
from vtprune_train.data.visuals import VisualFile
from vtprune_train.models.families.layout import Clip, SampleImages, Visual, VisualTokens
from vtprune_train.models.io.video_processor import DecodedVideo
from vtprune_train.training import distributed as ranks
from vtprune_train.training.loop.callback import Callback, Trainer
from vtprune_train.viz.draw_video import draw_all
from vtprune_train.viz.show import look, stage_names


@dataclass
class Question:
    """A sample up to its last answer: ``inputs`` in the format of a processor, its images and videos, and the ``text``
    of the question."""

    inputs: dict[str, Tensor]
    images: list[Image.Image | DecodedVideo]
    text: str


class EvaluationImages(Callback):
    """Draws the kept tokens on the first ``train.eval_show`` images of ``data.eval`` at every evaluation, for the
    trackers."""

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        collate, images = trainer.eval_collate, trainer.config.train.eval_show
        if not images or not trainer.config.train.trackers or collate is None or collate.method is None:
            return
        drawn = draw_kept(trainer.engine.module, collate, images=images, device=trainer.device)
        tagged = {f"kept_tokens/{number}": pixels for number, pixels in enumerate(drawn)}
        trainer.trackers.log_images(tagged, trainer.state.step)


def draw_kept(model: nn.Module, collate: Collator, *, images: int, device: torch.device) -> list[np.ndarray]:
    """Draw the first samples of ``collate.index`` that have images; all ranks call this.

    Args:
        model: the pruned model; its mode is restored.
        collate: collator of the evaluation data.
        images: number of images after which to stop.
        device: this rank's device.

    Returns:
        [height, width, 3] uint8 for each sample on rank 0; empty on other ranks.
    """
    drawn = []
    for question in ranks.from_rank_0(lambda: _questions(collate, images)):
        inputs = to_device(question.inputs, device)
        kept = look(model, collate.image_processor, inputs, question.images, collate.layout)
        if ranks.rank() == 0:
            drawn.append(np.asarray(draw_all(kept, stage_names(model), question.text)))
    return drawn


class _NothingToShowError(ValueError):
    """Raised for a sample with images after its last answer, which affect the layout of the images before it."""


def _questions(collate: Collator, images: int) -> list[Question]:
    """Questions with at least ``images`` images in total, from the first samples whose files can be read."""
    questions: list[Question] = []
    for sample in range(len(collate.index)):
        record = collate.index.record(sample)
        if not record.images and not record.videos:
            continue
        if sum(len(question.images) for question in questions) >= images:
            break
        try:
            questions.append(_question(collate, sample))
        except (*UNREADABLE, _NothingToShowError) as error:
            ranks.log.warning("evaluation: cannot show %s: %s", collate.index.sample_id(sample), error)
    return questions


def _question(collate: Collator, sample: int) -> Question:
    """The sample up to its last answer, whose query row ranks the visual tokens.

    Raises:
        UnreadableImage: an image cannot be read.
        _NothingToShowError: all images follow the last answer, or some do and change the layout of the others.
    """
    index = collate.index
    loaded = collate.load(sample, sample)
    record = index.record(sample)
    sizes, pixels = loaded.images.sizes, loaded.images.pixels
    tokens = collate.layout.visual_tokens(sizes)
    segment, ids = lay_out(loaded.chat, tokens)
    end = segment.query_offsets[-1] + 1
    before = [i for i, last in enumerate(_ends(tokens, loaded.chat.image_offsets)) if last <= end]
    if not before:
        raise _NothingToShowError("its images follow its last answer")
    images = SampleImages([sizes[i] for i in before], [pixels[i] for i in before])
    if collate.layout.visual_tokens(images.sizes) != [tokens[i] for i in before]:
        raise _NothingToShowError("images after its last answer change the layout of the others")
    files = index.files(sample, record)
    turns = record.turns
    last = max(number for number, turn in enumerate(turns) if turn.role == "assistant")
    return Question(
        inputs={"input_ids": torch.from_numpy(ids[None, :end]), **collate.layout.model_inputs(images)},
        images=[_opened(files[i], sizes[i], collate.max_image_pixels) for i in before],
        text=turns[last - 1].text.replace(IMAGE, "").replace(VIDEO, "").strip(),
    )


def _opened(file: VisualFile, visual: Visual, max_pixels: int) -> Image.Image | DecodedVideo:
    content: Any = file.load(visual, max_pixels)
    return DecodedVideo(visual, content) if isinstance(visual, Clip) else content


def _ends(visuals: Sequence[VisualTokens], offsets: Sequence[int]) -> list[int]:
    """The row after the last token of each image and video; ``offsets`` of their runs, each counted as one token."""
    runs = [length for visual in visuals for length in visual.runs]
    ends = np.array(offsets) + np.cumsum(np.array(runs) - 1) + 1
    return ends[np.cumsum([len(visual.runs) for visual in visuals]) - 1].tolist()  # type: ignore[no-any-return]
