"""Images of the evaluation data with the tokens that are kept, for TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vtprune_train.core.stream import IMAGE, to_device
from vtprune_train.data.images import UNREADABLE, load_image
from vtprune_train.data.load.collate import Collator, lay_out
from vtprune_train.models.families.layout import SampleImages
from vtprune_train.training import distributed as ranks
from vtprune_train.training.loop.callbacks import only_warning
from vtprune_train.training.loop.trainer import Callback, Trainer
from vtprune_train.viz.draw import draw
from vtprune_train.viz.show import look, stage_names


@dataclass
class Question:
    """A sample up to its last answer: ``inputs`` as a processor makes them, its pictures, the question's ``text``."""

    inputs: dict[str, Tensor]
    images: list[Image.Image]
    text: str


class EvaluationImages(Callback):
    """The first ``train.eval_show`` images of the evaluation data with the tokens that are kept, to TensorBoard."""

    def on_evaluation(self, trainer: Trainer, collate: Collator) -> None:
        if not trainer.config.train.eval_show or collate.method is None:
            return
        drawn = draw_kept(trainer.engine.module, collate, images=trainer.config.train.eval_show, device=trainer.device)
        board = trainer.engine.monitors.tensorboard
        if board is None:
            return
        for number, pixels in enumerate(drawn):
            with only_warning(f"{board.log_dir}: image {number} of step {trainer.state.step}"):
                board.add_image(f"survivors/{number}", pixels, trainer.state.step, dataformats="HWC")


def draw_kept(model: nn.Module, collate: Collator, *, images: int, device: torch.device) -> list[np.ndarray]:
    """The first samples of ``collate.index`` that have pictures, drawn; all ranks call this together.

    Args:
        model: pruned; its mode is restored afterwards.
        collate: of the evaluation data.
        pictures: draw samples until there are so many pictures.
        device: this rank's.

    Returns:
        for each sample [height, width, 3] uint8.
    """
    drawn = []
    for question in ranks.from_rank_0(lambda: _questions(collate, images)):
        inputs = to_device(question.inputs, device)
        shown = look(model, collate.image_processor, inputs, question.images)
        if ranks.rank() == 0:
            drawn.append(np.asarray(draw(shown, stage_names(model), question.text)))
    return drawn


class _NothingToShowError(ValueError):
    """Pictures of a sample follow its last answer, so that the others do not stand as they would without them."""


def _questions(collate: Collator, images: int) -> list[Question]:
    """Questions with ``pictures`` pictures in all, from the first samples whose files can be read."""
    questions: list[Question] = []
    for sample in range(len(collate.index)):
        if not collate.index.image_sizes(sample):
            continue
        if sum(len(question.images) for question in questions) >= images:
            break
        try:
            questions.append(_question(collate, sample))
        except (*UNREADABLE, _NothingToShowError) as error:
            ranks.log.warning("evaluation: cannot show %s: %s", collate.index.sample_id(sample), error)
    return questions


def _question(collate: Collator, sample: int) -> Question:
    """The sample up to its last answer: the token before that ranks the visual tokens.

    Raises:
        UnreadableImage: a picture cannot be read.
        _NothingToShowError: all of them follow the last answer, or some do and change the layout of the others.
    """
    index = collate.index
    loaded = collate.load(sample, sample)
    record = index.record(sample)
    sizes, pixels = loaded.images.sizes, loaded.images.pixels
    tokens = collate.layout.tokens(sizes)
    segment, ids = lay_out(loaded.chat, tokens)
    end = segment.query_offsets[-1] + 1
    asked = [i for i, span in enumerate(segment.spans) if span.end <= end]
    if not asked:
        raise _NothingToShowError("its pictures follow its last answer")
    seen = SampleImages([sizes[i] for i in asked], [pixels[i] for i in asked])
    if collate.layout.tokens(seen.sizes) != [tokens[i] for i in asked]:
        raise _NothingToShowError("pictures follow its last answer, and change how the others are laid out")
    files = index.image_files(sample, record)
    turns = record.turns
    last = max(number for number, turn in enumerate(turns) if turn.role == "assistant")
    return Question(
        inputs={"input_ids": torch.from_numpy(ids[None, :end]), **collate.layout.model_inputs(seen)},
        images=[load_image(files[i], sizes[i], max_pixels=collate.max_image_pixels) for i in asked],
        text=turns[last - 1].text.replace(IMAGE, "").strip(),
    )
