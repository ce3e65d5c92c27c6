"""Replacement ``forward`` functions for a pruned model, its base model, decoder and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Cache

from vtprune_train.core.stream import IGNORE, PackedBatch, StreamPlan
from vtprune_train.models import HFModule
from vtprune_train.models.forward import packed, padded
from vtprune_train.models.forward.backend import choose_again
from vtprune_train.models.forward.calls import State, by_name, state_of
from vtprune_train.models.forward.head import chunked_loss, with_supervised
from vtprune_train.models.forward.images import note_images, note_videos
from vtprune_train.models.forward.reference import selections
from vtprune_train.models.forward.rotary import full_frequencies
from vtprune_train.models.forward.sharding import check_attention_function
from vtprune_train.models.forward.shared_prefill import repeat_rows


@torch.compiler.disable
def open_call(model: HFModule, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    """Open a call before the model's ``forward`` so that the decoder knows the labels, even if a trainer computes the
    loss itself from the base model's output (TRL, including its reference model)."""
    state = state_of(model)
    if state.is_dense:
        return
    if state.running.call is None and not args and isinstance(inputs.get("input_ids"), Tensor):
        state.running.open(inputs["input_ids"], _supervised(inputs))


@torch.compiler.disable
def close_call(model: HFModule, args: tuple[Any, ...], output: Any) -> None:
    state = state_of(model)
    if not state.is_dense:
        state.running.call = None


def forward(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    """Forward of the whole model: a :class:`PackedBatch`, or the padded inputs of a Hugging Face processor."""
    if args and isinstance(args[0], PackedBatch):
        return packed.forward(self, state, args[0])
    inputs = by_name(original, args, inputs)
    _check_inputs(state, inputs)
    input_ids, labels = inputs["input_ids"], _supervised(inputs)
    if labels is not None:
        _mask_visual(inputs, state.visual_tokens(input_ids))
    elif self.training and torch.is_grad_enabled() and state.method is not None:
        state.warn_once(
            "forward in training mode without labels: visual tokens are ranked by the last token of each row, whereas "
            "generation ranks them by the end of the prompt (label smoothing and compute_loss_func keep labels from "
            "the model)"
        )
    repeats, state.running.repeats = state.running.repeats, None
    with state.calling(input_ids, labels) as call:
        if call is not None:
            call.whole_head = isinstance(self.lm_head, FullyShardedDataParallel)
        output = original(**inputs)
    return output if repeats is None else repeat_rows(output, repeats)


def forward_base(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    """Forward of the base for a :class:`PackedBatch`, or for padded inputs, which the family's own code embeds."""
    if args and isinstance(args[0], PackedBatch):
        return packed.forward_base(self, state, args[0])
    inputs = by_name(original, args, inputs)
    _check_inputs(state, inputs)
    choose_again(self, state, inputs["input_ids"].device)
    with state.calling(inputs["input_ids"]) as call:
        assert call is not None
        if not call.selects:
            call.selections = selections(state, self, call, inputs)
        features = {key: value for key, value in (inputs.get("mm_encoder_outputs") or {}).items() if value is not None}
        if "image" in features:
            note_images(call, state, features["image"].pooler_output)
        if "video" in features:
            note_videos(call, features["video"].pooler_output)
        if state.family.three_part_positions is not None and inputs.get("position_ids") is None:
            cache = inputs.get("past_key_values")
            if any(inputs.get(key) is not None for key in ("image_grid_thw", "video_grid_thw")):
                inputs["position_ids"] = call.positions = state.family.three_part_positions(self, inputs)
            elif not features and isinstance(cache, Cache) and cache.get_seq_length():
                # Ignored: the staged cache tracks positions. Transformers would add a stale rope delta from the
                # previous request.
                inputs["position_ids"] = inputs["input_ids"].new_zeros(3, *inputs["input_ids"].shape)
        return original(**inputs)


def forward_decoder(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    check_attention_function(state.attention)
    full_frequencies(self)
    if len(args) > 1 and isinstance(args[1], StreamPlan):
        return packed.forward_text(self, state, *args)
    inputs = by_name(original, args, inputs)
    input_ids = inputs.pop("input_ids", None)
    if inputs.get("inputs_embeds") is None:
        inputs["inputs_embeds"] = self.embed_tokens(input_ids)
    return padded.forward_text(self, state, **inputs)


def forward_head(self: nn.Linear, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Return logits, or the chunked loss if targets are given (plus the KL term with a teacher). Runs inside the head's
    own call, where ZeRO-3 has gathered its weight."""
    if len(args) > 1:
        hidden, targets, teaching = args
        return chunked_loss(hidden, self.weight, self.bias, targets, teaching)
    logits, call = original(*args, **kwargs), state.running.call
    if call is None or call.labels is None or call.supervised is None or call.whole_head:
        return logits
    if not args or logits.shape[:-1] != call.labels.shape:  # logits_to_keep
        return logits
    return with_supervised(self, logits, args[0], call.supervised)


def _check_inputs(state: State, inputs: dict[str, Any]) -> None:
    if inputs.get("input_ids") is None:
        raise ValueError(
            "a pruned model needs input_ids to find the images and does not take inputs_embeds; pass input_ids and "
            "pixel_values alone, or call the model inside `with vtprune_train.dense(model):`"
        )
    if inputs["input_ids"].ndim != 2:
        raise ValueError(
            f"input_ids must have the shape [rows, length], not {tuple(inputs['input_ids'].shape)}; add the row "
            "dimension"
        )
    for key, reason in state.family.refused:
        if inputs.get(key) is not None:
            raise ValueError(f"a pruned {state.family.title} does not take {key}: {reason}")


def _supervised(inputs: dict[str, Any]) -> Tensor | None:
    """[B, L] int64 labels aligned with ``input_ids`` (-100 = ignored); ``None`` without labels.

    ``labels`` may be shortened to match ``logits_to_keep``. If they are missing, ``shift_labels`` (from sequence
    parallelism) are used.

    Raises:
        ValueError: ``labels`` match neither ``input_ids`` nor ``logits_to_keep``.
    """
    input_ids, labels, shifted = inputs["input_ids"], inputs.get("labels"), inputs.get("shift_labels")
    if labels is None:
        return None if shifted is None else F.pad(shifted, (1, 0), value=IGNORE)[:, :-1]
    if labels.shape == input_ids.shape:
        return labels
    kept = inputs.get("logits_to_keep", 0)
    columns = torch.arange(input_ids.shape[1])[_columns_kept(kept)]
    if labels.shape != (len(input_ids), len(columns)):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not match input_ids of shape {tuple(input_ids.shape)} with "
            f"logits_to_keep={kept}; pass one label for each token, -100 for those that are not supervised"
        )
    everywhere = labels.new_full(input_ids.shape, IGNORE)
    return everywhere.index_copy(1, columns.to(labels.device), labels)


def _columns_kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.cpu()


def _mask_visual(inputs: dict[str, Any], visual: Tensor) -> None:
    """Exclude image tokens ([B, L] bool) from the loss; dropped tokens have no logits."""
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    if labels is not None:
        kept = slice(None) if labels.shape == visual.shape else _columns_kept(inputs["logits_to_keep"])
        inputs["labels"] = labels.masked_fill(visual[:, kept].to(labels.device), IGNORE)
    if shifted is not None:
        inputs["shift_labels"] = shifted.masked_fill(F.pad(visual, (0, 1))[:, 1:].to(shifted.device), IGNORE)


def refuse_data_parallel(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        "torch.nn.DataParallel does not work with a pruned model, whose replicas are not pruned; run one process for "
        "each device: torchrun, deepspeed or accelerate launch (transformers' Trainer uses DataParallel where one "
        "process sees several GPUs)"
    )
