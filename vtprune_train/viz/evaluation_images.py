"""Draws the kept tokens of images of the evaluation data, for TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vtprune_train.core.stream import IMAGE, to_device
from vtprune_train.data.images import UNREADABLE
from vtprune_train.data.load.collate import Collator, lay_out
from vtprune_train.models.families.layout import SampleImages
from vtprune_train.training import distributed as ranks
from vtprune_train.training.loop.callback import Callback, Trainer
from vtprune_train.viz.draw import draw
from vtprune_train.viz.show import look, stage_names


@dataclass
class Question:
    """A sample up to its last answer: ``inputs`` in the format of a processor, its images, and the ``text`` of the
    question."""

    inputs: dict[str, Tensor]
    images: list[Image.Image]
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
        kept = look(model, collate.image_processor, inputs, question.images)
        if ranks.rank() == 0:
            drawn.append(np.asarray(draw(kept, stage_names(model), question.text)))
    return drawn


class _NothingToShowError(ValueError):
    """Raised for a sample with images after its last answer, which affect the layout of the images before it."""


def _questions(collate: Collator, images: int) -> list[Question]:
    """Questions with at least ``images`` images in total, from the first samples whose files can be read."""
    questions: list[Question] = []
    for sample in range(len(collate.index)):
        record = collate.index.record(sample)
        if not record.images or record.videos:
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
    tokens = collate.layout.tokens(sizes)
    segment, ids = lay_out(loaded.chat, [int(count) for count in tokens])
    end = segment.query_offsets[-1] + 1
    before = [i for i, span in enumerate(segment.spans) if span.end <= end]
    if not before:
        raise _NothingToShowError("its images follow its last answer")
    images = SampleImages([sizes[i] for i in before], [pixels[i] for i in before])
    if collate.layout.tokens(images.sizes) != [tokens[i] for i in before]:
        raise _NothingToShowError("images after its last answer change the layout of the others")
    files = index.files(sample, record)
    turns = record.turns
    last = max(number for number, turn in enumerate(turns) if turn.role == "assistant")
    return Question(
        inputs={"input_ids": torch.from_numpy(ids[None, :end]), **collate.layout.model_inputs(images)},
        images=[files[i].load(sizes[i], collate.max_image_pixels) for i in before],
        text=turns[last - 1].text.replace(IMAGE, "").strip(),
    )
