"""LLaVA-NeXT over a packed stream: embed, see, splice, decode, score. The forward functions that ``prune`` installs.

Each is installed on the module whose parameters it uses, so that DeepSpeed's gather hooks of that module fire.

Shape suffixes: T tokens in the stream, V visual tokens, R supervised rows, C hidden size, P tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtprune_train.models import HFModule, padded
from vtprune_train.models.decoder import run_layers
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.stream import PackedBatch, StreamPlan

TEXT_MODELS = ("llama", "mistral", "qwen2")


class PackedOutput(NamedTuple):
    """``loss_sum`` [] float32, summed over supervised rows; ``correct`` [R] bool, whether greedy decoding agrees;
    ``kept`` as in :class:`~vtprune_train.models.decoder.DecoderOutput`."""

    loss_sum: Tensor
    correct: Tensor
    kept: tuple[Tensor, ...]


def check_text_model(text_model: HFModule) -> None:
    """Refuse decoders whose layers need more than the packed stream carries.

    Raises:
        ValueError: naming the model type and what is missing.
    """
    config = text_model.config
    if config.model_type not in TEXT_MODELS:
        raise ValueError(f"language model type {config.model_type!r} is not supported; supported: {TEXT_MODELS}")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_type={rope_type!r} looks at the longest position of the batch, which couples packed samples (and "
            "copies it to the host); use a checkpoint with a fixed rotary embedding (default, linear, llama3, yarn)"
        )


def forward(self: HFModule, batch: Any = None, **inputs: Any) -> Any:
    """Forward of the whole model: a :class:`PackedBatch`, or the padded inputs of a Hugging Face processor."""
    if not isinstance(batch, PackedBatch):
        return padded.forward(self, input_ids=inputs.pop("input_ids", batch), **inputs)
    hidden_RC, kept = self.model(batch)
    loss_sum, correct = self.lm_head(hidden_RC, batch.targets)
    return PackedOutput(loss_sum, correct, kept)


def forward_model(self: HFModule, batch: PackedBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward of ``LlavaNextModel``: [R, C] normed hidden states of the supervised rows, and the rows kept."""
    text_TC = self.language_model.embed_tokens(batch.input_ids)
    features = _image_features(self, batch.pixel_values.to(text_TC.dtype))
    table = torch.cat([features, self.image_newline.to(features.dtype).unsqueeze(0)])
    if len(batch.visual_rows):
        visual_VC = table.index_select(0, batch.visual_index)
        embeds_TC = text_TC.index_copy(0, batch.visual_rows, visual_VC.to(text_TC.dtype))
    else:
        # A rank without an image still takes part in the gradients of tower, projector and newline.
        embeds_TC = text_TC + (0.0 * table).sum().to(text_TC.dtype)
    return self.language_model(embeds_TC, batch.plan)


def _image_features(self: HFModule, pixel_values: Tensor) -> Tensor:
    """[P * patches, C]: all tiles through tower and projector at once, class tokens dropped."""
    trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    layer = self.config.vision_feature_layer
    chosen = states[layer] if isinstance(layer, int) else torch.cat([states[index] for index in layer], dim=-1)
    return self.multi_modal_projector(chosen[:, 1:]).flatten(0, 1)


def forward_text(
    self: HFModule, embeds_TC: Tensor, plan: StreamPlan, *, method: PruningMethod | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward of the decoder: [R, C] normed hidden states of ``plan.predict_rows``, and the rows kept."""
    output = run_layers(self, embeds_TC, plan, method)
    return self.norm(output.last_hidden_state.index_select(0, plan.predict_rows)), output.kept
