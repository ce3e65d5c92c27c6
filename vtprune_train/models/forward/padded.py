"""Padded interface of a pruned model: accepts Hugging Face processor outputs and packs them internally.

Embedding, image encoding and feature insertion use the family's code; only the decoder is replaced: rows are packed,
run through the stages, and unpacked to the original layout. The same applies to later calls with a cache.

Shape suffixes: B rows, L padded length, T tokens of the packed stream, V visual tokens, C hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from vtprune_train.core.plan import plan_pass
from vtprune_train.core.stream import IGNORE, ImageSpan, SegmentLayout, StreamPlan, text_key, to_device
from vtprune_train.models import HFModule
from vtprune_train.models.cache import Conversation, StagedLayer, first_attending, staged
from vtprune_train.models.families.base import Family, sliding_window
from vtprune_train.models.families.layout import Grids
from vtprune_train.models.forward.calls import Call, State, Visual, is_pruned, state_of, unwrapped
from vtprune_train.models.forward.decoder import DecoderOutput, check_attention, run_layers
from vtprune_train.models.forward.linear_attention import layers_that_attend
from vtprune_train.models.forward.rotary import rotary_tables
from vtprune_train.models.forward.staging import plan_staging, settle, use_three_parts
from vtprune_train.models.question import tokenizer_at, with_question
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import EncoderSignals

log = logging.getLogger(__name__)


def kept_tokens(model: HFModule, inputs: Mapping[str, Any]) -> list[list[list[np.ndarray]]]:
    """Return the visual tokens that a pruned model keeps after each drop, from one forward pass without gradients::

        kept = kept_tokens(model, processor(images=image, text=prompt, return_tensors="pt"))
        kept[0][0][-1]  # row 0, image 0, last drop: for example array([3, 17, 42, ...])

    Args:
        model: a pruned model.
        inputs: a batch as the processor returns it, on the model's device, without labels.

    Returns:
        For each row, for each of its images and videos, for each drop: [k] int64, indices into the tokens of the image
        or video. The tokens of a video are in order of time. A merged token is listed as one of its source tokens.

    Raises:
        ValueError: the model is not pruned.
    """
    if not is_pruned(model):
        raise ValueError("kept_tokens needs a pruned model; call prune(model, method) first")
    model = unwrapped(model)
    state: State = state_of(model)
    with torch.no_grad(), state.calling(inputs["input_ids"]) as call:
        assert call is not None, "kept_tokens cannot be called inside another forward pass"
        model.get_submodule(state.family.base)(**inputs, use_cache=False)
    stages = [rows.cpu().numpy() for rows in call.kept_rows]
    images, base = [], 0
    for segment in call.segments:
        of_spans = [base + span.offsets() for span in segment.spans]
        images.append([[_indices_of(rows, of_span) for rows in stages] for of_span in of_spans])
        base += segment.length
    return images


def _indices_of(rows: np.ndarray, of_span: np.ndarray) -> np.ndarray:
    """[k] int64, the indices into ``of_span`` [n] (ascending) of those of its rows that are in ``rows``."""
    place = np.searchsorted(of_span, rows)
    inside = place < len(of_span)
    inside[inside] = of_span[place[inside]] == rows[inside]
    return place[inside]


def stage_layers(model: HFModule) -> list[range]:
    """The decoder layers of each stage of a pruned model, counted from 0."""
    state: State = state_of(model)
    num_layers = len(model.get_submodule(state.family.decoder).layers)
    drops = () if state.method is None else state.method.drops(num_layers)
    return [range(first, end) for first, end in pairwise([0, *(drop.layer for drop in drops), num_layers])]


def forward_text(
    text_model: HFModule,
    state: State,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    use_cache: bool | None = None,
    deepstack_visual_embeds: Sequence[Tensor] | None = None,
    **keywords: Any,
) -> BaseModelOutputWithPast | MoeModelOutputWithPast:
    """Forward of the decoder over padded rows (left or right), cached or not, dropping tokens between layers.

    Args:
        text_model: the decoder.
        state: the pruning state, with the current call that identifies the visual tokens.
        inputs_embeds: [B, L, C], with image features inserted.
        attention_mask: [B, cached + L], 0 for padding; ``None`` means no padding.
        position_ids: [B, L]; must number each row's tokens consecutively (ignored inside ``generate``).
        past_key_values: staged cache from earlier calls; new tokens are appended.
        use_cache: whether to cache keys and values; ``None`` uses the config's value (never in training mode).

    Returns:
        ``last_hidden_state`` [B, L, C], normalized. Padding and dropped positions repeat the nearest kept row to their
        left (0 if none), so the row before any token is always the one that predicts it.

    Raises:
        ValueError: an input is not supported for packed batches.
    """
    _refuse(keywords, attention_mask, text_model.config)
    if use_cache is None:
        use_cache = bool(text_model.config.use_cache) and not text_model.training
    if checkpoints_layers(text_model):
        if past_key_values is not None:
            raise ValueError(
                "past_key_values in training mode with gradient checkpointing is not supported, as layers do not fill "
                "the cache; call model.eval() or model.gradient_checkpointing_disable() first, or leave "
                "past_key_values unset"
            )
        use_cache = False
    cache = None
    if use_cache or past_key_values is not None:
        cache = staged(past_key_values, len(text_model.layers), state.method, layers_that_attend(text_model))
    # Models with experts read router_logits of the output.
    output = MoeModelOutputWithPast if getattr(text_model.config, "num_experts", None) else BaseModelOutputWithPast
    call = state.running.call or Call(None)
    has_images = bool(call.images or call.videos)
    if cache is not None and cache.get_seq_length() and inputs_embeds.shape[1] == 1 and not has_images:
        hidden = decode(text_model, state.method, inputs_embeds, cache)
        return output(last_hidden_state=hidden, past_key_values=cache)
    hidden = _run_rows(
        text_model, state, call, inputs_embeds, attention_mask, position_ids, cache, deepstack_visual_embeds
    )
    return output(last_hidden_state=hidden, past_key_values=cache)


def checkpoints_layers(text_model: HFModule) -> bool:
    """Whether layers of the decoder are recomputed in the backward pass, so that they fill no cache."""
    return text_model.training and any(getattr(layer, "gradient_checkpointing", False) for layer in text_model.layers)


def _run_rows(
    text_model: HFModule,
    state: State,
    call: Call,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: DynamicCache | None,
    deepstack_visual_embeds: Sequence[Tensor] | None,
) -> Tensor:
    """[B, L, C]: :func:`forward_text` except for single-token decoding: pack, run the stages, unpack."""
    _refuse_adapters_of_rows(text_model)
    rows = _real_rows(attention_mask, inputs_embeds, 0 if cache is None else cache.get_seq_length())
    verifies_candidates, said_from = False, rows.shape[1]
    if call.prompt_width is not None:  # columns of this call start here
        call.prompt_width -= 0 if cache is None else cache.get_seq_length()
        verifies_candidates, said_from = call.prompt_width <= 0, max(call.prompt_width, 0)
        call.prompt_width = call.prompt_width if 0 < call.prompt_width < rows.shape[1] else None
    call.segments = _segments(call, rows, state, said_from)
    device = inputs_embeds.device
    new_length = inputs_embeds.shape[1]
    conversation = None
    if cache is not None and state.method is not None and state.method.needs.multi_turn == "keep_dense":
        conversation = _extended_conversation(call, rows, inputs_embeds, cache)
        if not verifies_candidates:
            inputs_embeds, rows = conversation.embeds, _laid_out_again(call, rows, conversation, cache)
    planned = plan_pass(call.segments, len(text_model.layers), state.method)
    three_parts = state.family.three_part_positions is not None
    staging = plan_staging(planned, state.method, len(call.segments), cache, device, three_parts)
    supervised = None if call.host_labels is None else np.flatnonzero(_next_column(call.host_labels) != IGNORE)
    plan, token_rows, visual_rows, call.supervised = to_device(
        (planned, np.flatnonzero(rows.ravel()), _visual_rows(call.segments), supervised), device
    )
    if position_ids is not None and state.running.prompt_width is None:
        continues = bool(cache is not None and cache.get_seq_length())
        if not three_parts:
            _check_positions(position_ids, rows.shape, token_rows, plan, continues)
        elif len(position_ids) == 4 and attention_mask is None:  # the first part distinguishes samples in one row
            _check_positions(position_ids[0], rows.shape, token_rows, plan, continues)
    if three_parts:
        use_three_parts(staging, call, position_ids, token_rows, cache)
    if deepstack_visual_embeds:
        staging.deepstack, staging.visual_rows = tuple(deepstack_visual_embeds), visual_rows
    embeds = inputs_embeds.flatten(0, 1).index_select(0, token_rows)
    output = run_layers(
        text_model, embeds, plan, state.method, staging, call.encoder, call.selections, call.selects
    )  # fmt: skip
    call.kept_rows, call.plan = output.origins, output.plan
    if call.selects:
        call.selections = output.selections
    if cache is not None:
        settle(cache, output.plan, state.method, staging.before, inputs_embeds.shape[1])
    if output.origins:
        # A merged token uses the position of one of its sources, but comes later in the packed batch.
        token_rows = token_rows.index_select(0, output.origins[-1]).cummax(0).values
    hidden = _spread(text_model.norm(output.last_hidden_state), token_rows, inputs_embeds.shape)
    if conversation is not None and cache is not None:
        first_attending(cache).conversation = conversation
    return hidden[:, -new_length:]


def _extended_conversation(call: Call, real: np.ndarray, inputs_embeds: Tensor, cache: DynamicCache) -> Conversation:
    """Append this call's columns to the stored conversation."""
    first = first_attending(cache)
    image = np.full(real.shape, Conversation.PADDING, dtype=np.int64)
    images_before = torch.zeros(len(real), 1, dtype=torch.int64)
    if first.conversation is not None:
        images_before = (first.conversation.image.amax(dim=1, keepdim=True).cpu() + 1).clamp(min=0)
    for row, segment in enumerate(call.segments):
        image_of_token = np.full(segment.length, Conversation.TEXT, dtype=np.int64)
        for number, span in enumerate(segment.spans):
            image_of_token[span.offsets()] = number + int(images_before[row])
        image[row, real[row]] = image_of_token
    new = to_device(image, inputs_embeds.device)
    layouts = tuple(tuple((span.grids, span.frames) for span in segment.spans) for segment in call.segments)
    return (
        Conversation(inputs_embeds, new, layouts)
        if first.conversation is None
        else first.conversation.and_then(inputs_embeds, new, layouts)
    )


def _laid_out_again(call: Call, real: np.ndarray, conversation: Conversation, cache: DynamicCache) -> np.ndarray:
    """Clear the cache and rerun the whole conversation as this call's segments; return the mask of its non-padding
    columns.

    A later turn is therefore equivalent to one call with the whole conversation: all image tokens are present and are
    ranked with the new question. Only random draws differ, since they are seeded by this turn's text. Between turns
    only the decoder's input embeddings are stored, a fraction of a full cache."""
    first = first_attending(cache)
    if not first.get_seq_length():
        return real
    images = conversation.image.cpu().numpy()
    is_token = images != Conversation.PADDING
    segments = []
    for row, segment in enumerate(call.segments):
        before = int(is_token[row].sum()) - segment.length
        image_of_token = images[row][is_token[row]]
        runs = [_runs(image_of_token == number) for number in range(image_of_token.max() + 1)]
        segments.append(
            SegmentLayout(
                length=before + segment.length,
                spans=tuple(_span(*known) for known in zip(runs, conversation.layouts[row], strict=True)),
                query_offsets=tuple(before + offset for offset in segment.query_offsets),
                key=segment.key,
                question=segment.question,
            )
        )
    call.segments = segments
    cache.reset()
    return is_token


def prefill(
    text_model: HFModule,
    method: PruningMethod | None,
    embeds_TC: Tensor,
    segments: Sequence[SegmentLayout],
    cache: DynamicCache | None = None,
    encoder: EncoderSignals | None = None,
) -> tuple[Tensor, DecoderOutput, DynamicCache]:
    """Run packed prompts and fill a staged cache; the equivalent of :func:`forward_text` for a packed batch.

    ``embeds_TC`` holds the concatenated segments with image features inserted; ``cache`` comes from earlier calls.

    Returns:
        [T_last, C] normalized hidden states, the output of the layers, and the cache for :func:`decode`.
    """
    cache = staged(cache, len(text_model.layers), method, layers_that_attend(text_model))
    planned = plan_pass(segments, len(text_model.layers), method)
    staging = plan_staging(planned, method, len(segments), cache, embeds_TC.device)
    plan = to_device(planned, embeds_TC.device)
    output = run_layers(text_model, embeds_TC, plan, method, staging, encoder)
    settle(cache, output.plan, method, staging.before, max(segment.length for segment in segments))
    return text_model.norm(output.last_hidden_state), output, cache


def decode(text_model: HFModule, method: PruningMethod | None, hidden_B1C: Tensor, cache: DynamicCache) -> Tensor:
    """Run one decoding step for all rows on a staged cache with transformers' attention: token embeddings [B, 1, C] ->
    normalized hidden states [B, 1, C]. Adds one column to every layer's cache."""
    check_attention(text_model)
    num_layers, shared = len(text_model.layers), first_attending(cache)
    drops = () if method is None else method.drops(num_layers)
    hidden = hidden_B1C
    for first, end in pairwise([0, *(drop.layer for drop in drops), num_layers]):
        attending = [layer for layer in cache.layers[first:end] if isinstance(layer, StagedLayer)]
        positions = rotary = None
        if attending:
            positions = attending[0].next_positions().unsqueeze(1)  # [B, 1]
            if shared.parts > 1:
                positions = positions.expand(shared.parts, -1, -1)
            rotary = rotary_tables(text_model, hidden, positions, cache.get_seq_length() + 1)
        masks: dict[tuple[int | None, int | None], Tensor | None] = {}
        for index in range(first, end):
            layer, cached, mask = text_model.layers[index], cache.layers[index], None
            if isinstance(cached, StagedLayer):
                window = sliding_window(layer.self_attn)
                sees = window, index if cached.compacted else None
                if sees not in masks:
                    masks[sees] = _decoding_mask(cached, window)
                mask = masks[sees]
            hidden = layer(
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary,
                past_key_values=cache, use_cache=True, staged_decoding=True,
            )  # fmt: skip
    if shared.conversation is not None:
        shared.conversation = shared.conversation.and_then(
            hidden_B1C, torch.full_like(shared.conversation.image[:, :1], Conversation.TEXT)
        )
    return text_model.norm(hidden)


def _decoding_mask(layer: StagedLayer, window: int | None) -> Tensor | None:
    """[B, 1, 1, W + 1] bool: mask of the columns visible to the new token; ``None`` if all are."""
    assert layer.padding is not None
    width = layer.width + 1
    if not layer.is_padded and (window is None or window >= width):
        return None
    columns = torch.arange(width, device=layer.padding.device)
    seen = columns[None, :] >= layer.padding[:, None]
    if window is not None:
        seen &= columns[None, :] > width - 1 - window
    return seen[:, None, None, :]


def _refuse(keywords: dict[str, Any], attention_mask: Tensor | None, config: Any) -> None:
    for key in ("output_attentions", "output_hidden_states"):
        if keywords.get(key, getattr(config, key, False)):  # names used by transformers
            raise ValueError(
                f"a pruned model does not take {key}{'' if key in keywords else ' (set in the config)'}: stages have "
                "different lengths; call the model inside `with vtprune_train.dense(model):` to get it from the dense "
                "model"
            )
    if keywords.get("output_router_logits"):
        raise ValueError(
            "a pruned model does not take output_router_logits, neither as an argument nor in the text config: stages "
            "have different lengths, so the load-balancing loss of the experts is not computed; set it to False, or "
            "call the model inside `with vtprune_train.dense(model):`"
        )
    if keywords.get("cu_seq_lens_q") is not None:
        raise ValueError(
            "cu_seq_lens_q (several samples packed into one row) is not supported by a pruned model; pad each sample "
            "to its own row"
        )
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        shape = type(attention_mask).__name__ if not isinstance(attention_mask, Tensor) else tuple(attention_mask.shape)
        raise ValueError(
            f"attention_mask must be [rows, length] with 0 for padding, not {shape}; a pruned model applies the causal "
            "mask itself"
        )


def _refuse_adapters_of_rows(text_model: HFModule) -> None:
    """Reject PEFT options that select adapters per row or per token position (PEFT passes them to its layers through
    hooks)."""
    for module in text_model.layers.modules():
        for hook in module._forward_pre_hooks.values():
            for key in {"adapter_names", "alora_offsets"} & getattr(hook, "keywords", {}).keys():
                raise ValueError(
                    f"a pruned model does not take {key}: rows are packed into one, and all their tokens use the same "
                    "adapters; call the model once for each adapter (set_adapter), or inside `with "
                    "vtprune_train.dense(model):`"
                )


def _real_rows(attention_mask: Tensor | None, inputs_embeds: Tensor, cached: int) -> np.ndarray:
    """[B, L] bool mask of non-padding positions of this call, after ``cached`` columns."""
    shape = inputs_embeds.shape[:2]
    if attention_mask is None:
        return np.ones(shape, dtype=bool)
    if attention_mask.shape[0] != shape[0] or not shape[1] <= attention_mask.shape[1] <= cached + shape[1]:
        after = f" after {cached} cached columns" if cached else ""
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} does not match inputs of shape "
            f"{tuple(shape)}{after}; it needs one column for each token"
        )
    real = attention_mask[:, attention_mask.shape[1] - shape[1] :].cpu().numpy().astype(bool)
    if empty := np.flatnonzero(~real.any(axis=1)).tolist():
        raise ValueError(f"row {empty[0]} of the batch has no token: its attention_mask is all zeros")
    return real


def _next_column(labels: np.ndarray) -> np.ndarray:
    """[B, L]: the label that each column predicts."""
    return np.pad(labels, ((0, 0), (0, 1)), constant_values=IGNORE)[:, 1:]


def _segments(call: Call, real: np.ndarray, state: State, said_from: int) -> list[SegmentLayout]:
    """Build the layout of every row: images, videos, query rows and supervised tokens. Columns from ``said_from`` on
    were generated and are treated as text regardless of their ids."""
    images, videos = list(call.images), list(call.videos)
    ids = None if call.input_ids is None else call.input_ids.cpu().numpy()
    of_images = np.zeros_like(real) if ids is None else ids == state.image_token
    of_videos = np.zeros_like(real) if ids is None or state.video_token is None else ids == state.video_token
    of_images[:, said_from:] = of_videos[:, said_from:] = False
    visual = of_images | of_videos
    all_labels = None if call.labels is None else _without_images(call.labels.cpu().numpy(), visual, state)
    segments = []
    for row in range(len(real)):
        spans = _image_spans(of_images[row][real[row]], images, row, len(call.images), state.family)
        if of_videos[row].any():
            spans += _video_spans(of_videos[row][real[row]], videos, row, len(call.videos))
            spans = tuple(sorted(spans, key=lambda span: span.start))
        labels = None if all_labels is None else all_labels[row][real[row]]
        if labels is not None and state.method is not None and _prompt_is_supervised(labels != IGNORE, spans):
            state.warn_once(
                "labels supervise text right after an image, so visual tokens are ranked from there, whereas "
                "generation ranks them by the last token of the prompt: mask the whole prompt in the labels (TRL: "
                "prompt and completion columns, or assistant_only_loss=True), unless the prompt is only an image"
            )
        prompt = int(real[row, : call.prompt_width].sum())
        key = 0
        if ids is not None:
            own_labels = None if all_labels is None else all_labels[row]
            key = _key(ids[row], own_labels, real[row] & ~visual[row], call.prompt_width)
        # Query rows: the row before each supervised run; without labels, the last prompt token.
        queries = [] if labels is None else [start - 1 for start, _ in _runs(labels != IGNORE) if start]
        queries = queries or [prompt - 1]
        segment = SegmentLayout(int(real[row].sum()), spans, query_offsets=tuple(queries), key=key)
        if ids is not None and spans and state.method is not None and state.method.needs.question:
            path = None if state.source is None else state.source.name
            tokenizer = state.tokenizer or tokenizer_at(path, state.method.name)
            segment = with_question(segment, ids[row][real[row]], tokenizer)
        segments.append(segment)
    for what, given, left in (("images", call.images, images), ("videos", call.videos, videos)):
        if left:
            raise ValueError(f"got {len(given)} {what}, but input_ids hold the tokens of {len(given) - len(left)}")
    call.host_labels = all_labels
    return segments


def _prompt_is_supervised(supervised: np.ndarray, spans: Sequence[ImageSpan]) -> bool:
    """Heuristic: whether a row's labels ([length] bool) seem to include prompt text, i.e. one of the two tokens after
    an image is supervised (the first may be an end-of-image marker). A real answer is preceded by at least a role
    header and usually the question."""
    images = np.zeros(len(supervised) + 2, dtype=bool)
    for span in spans:
        images[span.start : span.end] = True
    ends = np.flatnonzero(images[:-1] & ~images[1:]) + 1
    return any(supervised[end : end + 2].any() for end in ends)


def _without_images(labels: np.ndarray, visual: np.ndarray, state: State) -> np.ndarray:
    """[B, L] ``labels`` with -100 at image tokens."""
    if (visual & (labels != IGNORE)).any():
        state.warn_once(
            "labels supervise image tokens; they are left out of the loss here, but a Trainer that counts labels "
            "divides the loss by too large a number: mask them in the collator (TRL: prompt and completion columns, "
            "or assistant_only_loss=True)"
        )
    return np.where(visual, IGNORE, labels)


def _span(runs: Sequence[tuple[int, int]], layout: tuple[Grids, int]) -> ImageSpan:
    """The span of the tokens in ``runs``, with its grids and steps in time."""
    length = sum(length for _, length in runs)
    return ImageSpan(runs[0][0], length, *layout, runs=tuple(runs) if runs[1:] else ())


def _video_spans(visual: np.ndarray, remaining: list[Visual], row: int, num_videos: int) -> tuple[ImageSpan, ...]:
    """The span of each video of a row; there may be text between its frames."""
    spans: list[ImageSpan] = []
    runs = _runs(visual)
    while runs:
        if not remaining:
            raise ValueError(
                f"row {row} has more video tokens than the {num_videos} videos have; pass pixel_values_videos of every "
                "video whose tokens are in input_ids (all that are not cached yet)"
            )
        video, pieces = remaining.pop(0), []
        missing = video.length
        while missing and runs:
            start, length = runs.pop(0)
            pieces.append((start, min(missing, length)))
            if length > missing:
                runs.insert(0, (start + missing, length - missing))
            missing -= pieces[-1][1]
        if missing:
            raise ValueError(
                f"row {row} has {video.length - missing} video tokens for a video of {video.length}; expand the "
                "placeholder with the model's own processor"
            )
        spans.append(_span(pieces, (video.grids, video.frames)))
    return tuple(spans)


def _image_spans(
    visual: np.ndarray, remaining: list[Visual], row: int, num_images: int, family: Family
) -> tuple[ImageSpan, ...]:
    spans: list[ImageSpan] = []
    for start, length in _runs(visual):
        offset = start
        while offset < start + length:
            if not remaining:
                raise ValueError(
                    f"row {row} has more image tokens than the {num_images} images have; pass pixel_values of every "
                    "image whose tokens are in input_ids (all that are not cached yet)"
                )
            image = remaining.pop(0)
            spans.append(ImageSpan(offset, image.length, image.grids, tile_tokens=image.tile_tokens))
            offset = spans[-1].end
        if offset != start + length:
            raise ValueError(
                f"row {row}: a run of {length} image tokens does not match the sizes of its images "
                f"({[span.length for span in spans if span.start >= start]} tokens)"
            )
        if family.run_is_one_image:
            spans = [*(span for span in spans if span.start < start), ImageSpan(start, length)]
    return tuple(spans)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Return (start, length) of every run of consecutive True values."""
    edges = np.flatnonzero(np.diff(np.pad(flags.astype(np.int8), 1))).reshape(-1, 2).tolist()
    return [(start, end - start) for start, end in edges]


def _key(ids: np.ndarray, labels: np.ndarray | None, text: np.ndarray, prompt_width: int | None) -> int:
    """Hash of a row's prompt text (from ids, labels and the text mask), independent of generated or supervised tokens
    after it."""
    rows = np.flatnonzero(text)
    if labels is not None:
        supervised = np.flatnonzero(labels != IGNORE)
        rows = rows[rows < (supervised[0] if len(supervised) else len(text))]
    elif prompt_width is not None:
        rows = rows[rows < prompt_width]
    return text_key(ids[rows])


def _visual_rows(segments: Sequence[SegmentLayout]) -> np.ndarray:
    """[V] int64, rows of the packed stream that hold visual tokens."""
    rows, start = [np.zeros(0, dtype=np.int64)], 0
    for segment in segments:
        rows += [start + span.offsets() for span in segment.spans]
        start += segment.length
    return np.concatenate(rows)


def _check_positions(
    position_ids: Tensor, shape: tuple[int, ...], token_rows: Tensor, plan: StreamPlan, continues: bool
) -> None:
    """Raise if position_ids do not number each row's tokens consecutively (starting after the cached tokens if the call
    ``continues``)."""
    positions = position_ids.expand(shape).flatten().index_select(0, token_rows)
    counted, first = plan.stages[0].position_ids, plan.stages[0].cu_seqlens[:-1]
    if continues:
        lengths = plan.stages[0].cu_seqlens.diff()
        starts = positions.index_select(0, first)
        counted = counted + starts.repeat_interleave(lengths, output_size=len(counted))
    if not torch.equal(positions, counted):
        raise ValueError(
            "position_ids must number the tokens of each row from 0 (after the cached ones); several samples packed "
            "into one row are not supported; leave position_ids unset"
        )


def _spread(hidden_TC: Tensor, token_rows: Tensor, shape: torch.Size) -> Tensor:
    """[B, L, C]: each position gets the hidden state of the nearest kept token at or before it; 0 if there is none."""
    places = torch.arange(shape[0] * shape[1], device=hidden_TC.device)
    source = torch.searchsorted(token_rows, places, right=True) - 1
    first = source.clamp(min=0)
    same_row = token_rows.index_select(0, first) // shape[1] == places // shape[1]
    exists = (source >= 0) & same_row
    filled = torch.where(exists.unsqueeze(1), hidden_TC.index_select(0, first), hidden_TC.new_zeros(()))
    return filled.view(shape[0], shape[1], -1)
