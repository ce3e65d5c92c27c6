"""A model over a packed stream, as the project's own loop feeds it: embed, see, splice, decode, score.

Each function stands in for the forward of the module whose parameters it uses, so that DeepSpeed's gather hooks of that
module fire.

Shape suffixes: T tokens in the stream, V visual tokens, R supervised rows, C hidden size, P tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtprune_train.models import HFModule
from vtprune_train.models.calls import State
from vtprune_train.models.decoder import Staging, run_layers
from vtprune_train.models.head import Teaching
from vtprune_train.stream import PackedBatch, StreamPlan


class PackedOutput(NamedTuple):
    """The loss of one micro-batch, summed over supervised rows.

    ``loss_sum`` [] float32 is what training minimises: ``cross_entropy``, with a teacher plus its weight times
    ``consistency``; those two [] float32 are for reading only. ``correct`` [R] bool, whether greedy decoding agrees;
    ``kept`` as in :class:`~vtprune_train.models.decoder.DecoderOutput`.
    """

    loss_sum: Tensor
    correct: Tensor
    kept: tuple[Tensor, ...]
    cross_entropy: Tensor
    consistency: Tensor | None = None


def forward(model: HFModule, state: State, batch: PackedBatch) -> PackedOutput:
    """Forward of the whole model: the loss of one micro-batch."""
    hidden_RC, kept, taught_RC = model.get_submodule(state.family.base)(batch)
    if batch.teacher is None:
        loss_sum, correct = model.lm_head(hidden_RC, batch.targets)
        return PackedOutput(loss_sum, correct, kept, loss_sum.detach())
    teaching = Teaching(taught_RC, batch.teacher.weight, batch.teacher.temperature)
    loss_sum, correct, cross_entropy, divergence = model.lm_head(hidden_RC, batch.targets, teaching)
    return PackedOutput(loss_sum, correct, kept, cross_entropy, divergence)


def forward_base(self: HFModule, state: State, batch: PackedBatch) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Forward of the base: [R, C] normed hidden states of the supervised rows, the rows kept, and [R, C] what the
    teacher's pass says at the same rows (pictures are looked at once, for both passes)."""
    text_TC = self.language_model.embed_tokens(batch.input_ids)
    table = _feature_table(self, batch, text_TC.dtype)
    if len(batch.visual_rows):
        visual_VC = table.index_select(0, batch.visual_index)
        embeds_TC = text_TC.index_copy(0, batch.visual_rows, visual_VC.to(text_TC.dtype))
    else:
        # A rank without an image still takes part in the gradients of tower, projector and newline.
        embeds_TC = text_TC + (0.0 * table).sum().to(text_TC.dtype)
    taught_RC = None
    if batch.teacher is not None:
        with torch.no_grad():
            taught_RC, _ = self.language_model(embeds_TC.detach(), batch.teacher.plan, batch.positions)
    return *self.language_model(embeds_TC, batch.plan, batch.positions), taught_RC


def _feature_table(self: HFModule, batch: PackedBatch, dtype: torch.dtype) -> Tensor:
    """[features, C], the rows that ``batch.visual_index`` counts."""
    pixels = batch.pixel_values.to(dtype)
    if batch.image_inputs is None:
        features = _tile_features(self, pixels)
        newline = getattr(self, "image_newline", None)
        return features if newline is None else torch.cat([features, newline.to(features.dtype).unsqueeze(0)])
    # Sizes stay on the host, where the family's code reads them without waiting for the device.
    inputs = {key: torch.tensor(v) if isinstance(v, tuple) else v for key, v in batch.image_inputs.items()}
    return torch.cat(list(self.get_image_features(pixels, **inputs, return_dict=True).pooler_output))


def _tile_features(self: HFModule, pixel_values: Tensor) -> Tensor:
    """[P * patches, C]: all tiles through tower and projector at once, class tokens dropped."""
    trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    layer = self.config.vision_feature_layer
    chosen = states[layer] if isinstance(layer, int) else torch.cat([states[index] for index in layer], dim=-1)
    return self.multi_modal_projector(chosen[:, 1:]).flatten(0, 1)


def forward_text(
    self: HFModule, state: State, embeds_TC: Tensor, plan: StreamPlan, positions: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward of the decoder: [R, C] normed hidden states of ``plan.predict_rows``, and the rows kept.

    ``positions`` [parts, T] stay with their tokens; without them each segment counts from 0.
    """
    staging = None if positions is None else Staging((positions,))
    output = run_layers(self, embeds_TC, plan, state.method, staging)
    return self.norm(output.last_hidden_state.index_select(0, plan.predict_rows)), output.kept
