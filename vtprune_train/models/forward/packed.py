"""Forward pass on packed batches, used by the training loop: embed text, encode images, insert image features, run the
decoder, compute the loss.

Each function replaces the forward of the module whose parameters it uses, so that DeepSpeed's gather hooks fire.

Shape suffixes: T tokens in the stream, V visual tokens, R supervised rows, C hidden size, P tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from vtprune_train.core.stream import PackedBatch, StreamPlan, to_device
from vtprune_train.models import HFModule
from vtprune_train.models.families.base import required
from vtprune_train.models.forward.calls import STATE, State
from vtprune_train.models.forward.decoder import HEAD, TOWER, DecoderOutput, Staging, run_layers
from vtprune_train.models.forward.encoder import patch_index, patches_per_tile, reading
from vtprune_train.models.forward.head import Teaching
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import EncoderSignals


class PackedOutput(NamedTuple):
    """The loss of one micro-batch.

    ``loss_sum`` [] float32 is the training loss: the sum of the per-row cross-entropies ``row_loss`` [R] float32, plus
    weight * ``consistency`` [] float32 with a teacher. ``row_loss`` and ``consistency`` are detached and for logging
    only. ``correct`` [R] bool, whether the most likely token is the target; ``kept`` and ``plan`` as in
    :class:`~vtprune_train.models.forward.decoder.DecoderOutput`.
    """

    loss_sum: Tensor
    correct: Tensor
    kept: tuple[Tensor, ...]
    row_loss: Tensor
    consistency: Tensor | None
    plan: StreamPlan


def forward(model: HFModule, state: State, batch: PackedBatch) -> PackedOutput:
    """Forward of the whole model: the loss of one micro-batch.

    Raises:
        ValueError: lm_head was replaced after ``prune``.
    """
    if not any(STATE in module.__dict__ for module in model.lm_head.modules()):
        raise ValueError(
            "lm_head was replaced after prune (resize_token_embeddings, set_output_embeddings) and cannot compute the "
            "loss of packed batches; replace it before prune, or unprune(model) and prune it again"
        )
    hidden_RC, ran, taught_RC = model.get_submodule(state.family.base)(batch)
    teaching = None
    if batch.teacher is not None:
        teaching = Teaching(taught_RC, batch.teacher.weight, batch.teacher.temperature)
    with record_function(HEAD):
        loss_sum, correct, row_loss, divergence = model.lm_head(hidden_RC, batch.targets, teaching)
    return PackedOutput(loss_sum, correct, ran.kept, row_loss, None if teaching is None else divergence, ran.plan)


def forward_base(self: HFModule, state: State, batch: PackedBatch) -> tuple[Tensor, DecoderOutput, Tensor | None]:
    """Forward of the base: returns the normalized hidden states [R, C] of the supervised rows, the decoder output, and
    the teacher's hidden states [R, C] for the same rows (images are encoded once for both passes)."""
    if state.rank_by is not None:
        raise ValueError("rank_by is not supported for a PackedBatch; leave it out of prune(...)")
    text_TC = self.language_model.embed_tokens(batch.input_ids)
    embedded = _embedded(self, state, batch, text_TC, _tower_method(state, batch.plan))
    taught_RC = None
    if batch.teacher is not None:
        with torch.no_grad():
            taught = embedded
            if state.method is not None and state.method.needs.tower is not None:  # the teacher has another tower
                taught = _embedded(self, state, batch, text_TC, _tower_method(state, batch.teacher.plan))
            taught_RC, _ = self.language_model(
                taught.embeds.detach(), batch.teacher.plan, batch.positions, *taught[1:], batch.visual_rows
            )
    embeds_TC, *signals = embedded
    student = self.language_model(embeds_TC, batch.plan, batch.positions, *signals, batch.visual_rows)
    return *student, taught_RC


class _Embedded(NamedTuple):
    """Inputs of the decoder: embeddings [T, C] with visual features inserted, signals of the vision tower, and the
    features for DeepStack [V, C]."""

    embeds: Tensor
    encoder: EncoderSignals | None
    deepstack: tuple[Tensor, ...]


def _embedded(
    self: HFModule, state: State, batch: PackedBatch, text_TC: Tensor, method: PruningMethod | None
) -> _Embedded:
    """Run the tower for ``method`` and insert visual features into the text's embeddings."""
    with reading(self, state, method) as read, record_function(TOWER), _packed(state):
        tables = _feature_tables(self, state, batch, text_TC.dtype)
    encoder = None if read is None else read.signals(_patches(self, state, batch))
    if len(batch.visual_rows):
        visual_VC, *deeper = (table.index_select(0, batch.visual_index) for table in tables)
        return _Embedded(text_TC.index_copy(0, batch.visual_rows, visual_VC.to(text_TC.dtype)), encoder, tuple(deeper))
    # Ranks without images must still produce (zero) gradients for tower, projector and newline.
    zeros = [(0.0 * table).sum().to(text_TC.dtype) for table in tables]
    return _Embedded(text_TC + torch.stack(zeros).sum(), encoder, ())


@contextmanager
def _packed(state: State) -> Iterator[None]:
    """Context manager in which ``get_image_features`` is the family's own: the tower is read here, with the method of
    this step."""
    state.running.packed = True
    try:
        yield
    finally:
        state.running.packed = False


def _tower_method(state: State, plan: StreamPlan) -> PruningMethod | None:
    """The method that the tower runs with in a pass: if it changes the tower's tokens, the one of this step's schedule,
    which does not change them while all tokens are kept."""
    if state.method is None or state.method.needs.tower is None:
        return state.method
    method: PruningMethod | None = plan.outline.method
    return method


def _patches(self: HFModule, state: State, batch: PackedBatch) -> Tensor:
    """[V] int64, patch index of each visual token; out of range for newline tokens."""
    if batch.image_inputs is None:
        return batch.visual_index
    inputs = {key: np.array(value) if isinstance(value, tuple) else value for key, value in batch.image_inputs.items()}
    layout = required(state.family.patches, state.family.title)(
        self.config, {**inputs, "pixel_values": batch.pixel_values}
    )
    index = to_device(patch_index(layout, patches_per_tile(self.config)), batch.visual_index.device)
    return index.index_select(0, batch.visual_index)


def _feature_tables(self: HFModule, state: State, batch: PackedBatch, dtype: torch.dtype) -> list[Tensor]:
    """Feature tables [features, C] indexed by ``batch.visual_index``: the input of the decoder and, for families with
    DeepStack, the features that are added after each of its first layers."""
    images, *deeper = _image_tables(self, state, batch, dtype)
    if batch.video_pixels is None:
        return [images, *deeper]
    assert not deeper, "families with DeepStack features compute videos like images, without video_pixels"
    videos = self.get_video_features(batch.video_pixels.to(dtype), return_dict=True).pooler_output
    rows = torch.cat([images, *(tokens.reshape(-1, tokens.shape[-1]) for tokens in videos)])
    newline = getattr(self, "image_newline", None)
    return [rows if newline is None else torch.cat([rows, newline.to(rows.dtype).unsqueeze(0)])]


def _image_tables(self: HFModule, state: State, batch: PackedBatch, dtype: torch.dtype) -> list[Tensor]:
    """The features of all images, and of videos in families that compute them like images."""
    pixels = batch.pixel_values.to(dtype)
    if batch.image_inputs is None:
        features = _tile_features(self, state, pixels)
        newline = getattr(self, "image_newline", None)
        return [features if newline is None else torch.cat([features, newline.to(features.dtype).unsqueeze(0)])]
    # Keep sizes on the host so that the family's code reads them without a sync.
    inputs = {key: torch.tensor(v) if isinstance(v, tuple) else v for key, v in batch.image_inputs.items()}
    output = self.get_image_features(pixels, **inputs, return_dict=True)
    return [_rows(features) for features in (output.pooler_output, *(output.get("deepstack_features") or ()))]


def _rows(features: Tensor | Sequence[Tensor]) -> Tensor:
    """[features, C] of all images, from one tensor for all of them or one for each."""
    return features.flatten(0, -2) if isinstance(features, Tensor) else torch.cat(list(features))


def _tile_features(self: HFModule, state: State, pixel_values: Tensor) -> Tensor:
    """[P * patches, C]: run all tiles through vision tower and projector in one batch, without class tokens."""
    modules = self.vision_tower, None if state.running.tower is None else state.running.tower.module
    trains = any(p.requires_grad for module in modules if module is not None for p in module.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    layer = self.config.vision_feature_layer
    chosen = states[layer] if isinstance(layer, int) else torch.cat([states[index] for index in layer], dim=-1)
    return self.multi_modal_projector(chosen[:, 1:]).flatten(0, 1)


def forward_text(
    self: HFModule,
    state: State,
    embeds_TC: Tensor,
    plan: StreamPlan,
    positions: Tensor | None = None,
    encoder: EncoderSignals | None = None,
    deepstack: tuple[Tensor, ...] = (),
    visual_rows: Tensor | None = None,
) -> tuple[Tensor, DecoderOutput]:
    """Forward of the decoder: returns the normalized hidden states [R, C] of the predicting rows and the decoder
    output. ``positions`` [parts, T] are kept with their tokens; if ``None``, positions start at 0 in each segment.
    ``encoder`` is used by methods that need vision-tower signals. ``deepstack`` and ``visual_rows``: see
    :class:`~vtprune_train.models.forward.decoder.Staging`.
    """
    staging = Staging.counted(plan)
    if positions is not None:
        staging.positions = (positions, *staging.positions[1:])
    staging.deepstack, staging.visual_rows = deepstack, visual_rows
    # Warm-up steps use different settings; on full-token steps the method's parameters still need zero gradients.
    method = plan.outline.method or state.method
    output = run_layers(self, embeds_TC, plan, method, staging, encoder)
    return self.norm(output.last_hidden_state.index_select(0, output.plan.predict_rows)), output
