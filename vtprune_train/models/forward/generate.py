"""``generate`` for pruned models, and its unsupported options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from vtprune_train.models import HFModule
from vtprune_train.models.forward.calls import Call, State, by_name, is_pruned, state_of
from vtprune_train.models.forward.padded import checkpoints_layers
from vtprune_train.models.forward.reference import selections
from vtprune_train.models.forward.shared_prefill import ROWS, share_prefill


def generate(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Wrapper around ``generate`` that rejects options the staged cache does not support, and runs the prefill once for
    equal rows. Without a cache, every step ranks visual tokens with the prompt."""
    inputs = dict(by_name(original, args, kwargs))
    config = self._prepare_generation_config(**{"generation_config": None, **inputs})[
        0
    ]  # defaults filled in from the model's generation config
    _check_generation(self, config, inputs)
    if checkpoints_layers(self.get_submodule(state.family.decoder)):
        inputs["use_cache"] = _without_cache(state, config, inputs)
    prompt = inputs.get("input_ids") if inputs.get("inputs") is None else inputs["inputs"]
    sequences = max(config.num_beams or 1, config.num_return_sequences or 1)
    if sequences > 1:
        _check_repeated_images(self, state, prompt, inputs)
    widths = [tensor.shape[1] for tensor in (prompt, inputs.get("attention_mask")) if tensor is not None]
    running = state.running
    previous = (
        running.prompt_width,
        running.is_step,
        running.shared,
        running.repeats,
        running.pixels,
        running.selections,
    )
    running.prompt_width, running.is_step = max(widths, default=None), None
    running.shared = share_prefill(self, state.family, state.image_token, config, inputs)
    running.repeats = running.selections = running.pixels = None
    caches = config.use_cache and inputs.get("use_cache") is not False
    if state.rank_by is not None and caches and (running.shared is not None or sequences == 1):
        running.pixels = {key: value for key, value in inputs.items() if key not in ROWS}
    try:
        return original(**inputs)
    finally:
        (running.prompt_width, running.is_step, running.shared, running.repeats, running.pixels, running.selections) = (
            previous
        )


def prepare_inputs(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any) -> Any:
    """Called by ``generate`` before each of its forward passes; marks the pass as belonging to the prompt. The first
    pass gets one row for each distinct prompt."""
    state.running.is_step = True
    inputs = original(*args, **kwargs)
    if (shared := state.running.shared) is not None:
        state.running.shared, state.running.repeats = None, shared.repeats()
        inputs = shared.select(inputs, shared.sequences)
    if (pixels := state.running.pixels) is not None and inputs.get("input_ids") is not None:
        state.running.pixels = None
        rows = {key: inputs[key] for key in ROWS if inputs.get(key) is not None}
        base = self.get_submodule(state.family.base)
        state.running.selections = selections(state, base, Call(rows["input_ids"]), {**pixels, **rows})
    return inputs


def prepare_position_ids(
    self: HFModule, original: Callable[..., Any], state: State, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
) -> Any:
    """Prepare M-RoPE position ids. In later turns return text positions, which are ignored, because transformers would
    otherwise add a stale rope delta stored on the module by the previous request."""
    cache, types = model_kwargs.get("past_key_values"), model_kwargs.get("mm_token_type_ids")
    cached = 0 if cache is None else cache.get_seq_length()
    if (shared := state.running.shared) is not None:  # the images are those of the distinct prompts
        rows = shared.select({**model_kwargs, "input_ids": inputs_tensor})
        positions = original(rows["input_ids"], rows)
        return positions.index_select(positions.ndim - 2, shared.prompt)
    if not cached:
        return original(inputs_tensor, model_kwargs)
    grids = model_kwargs.get("image_grid_thw"), model_kwargs.get("video_grid_thw")
    has_visuals = any(grid is not None for grid in grids) if types is None else types[:, cached:].any()
    if has_visuals:
        return original(inputs_tensor, model_kwargs)
    return GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)[None]


def _check_generation(model: HFModule, config: GenerationConfig, inputs: dict[str, Any]) -> None:
    """Reject ``generate`` settings that the staged cache does not support, whether passed as arguments or set in the
    generation config."""
    if config.prefill_chunk_size is not None:
        raise ValueError(
            f"prefill_chunk_size={config.prefill_chunk_size} is not supported: a pruned model ranks visual tokens by "
            "the end of the prompt and needs it as a whole; leave prefill_chunk_size unset"
        )
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} is not supported: a pruned model keeps a different "
            "number of tokens in each layer, which needs the dynamic cache; leave cache_implementation unset"
        )
    assistant, negative = inputs.get("assistant_model"), inputs.get("negative_prompt_ids")
    if assistant is not None and is_pruned(assistant):
        raise ValueError(
            "assistant_model is pruned, but it gets the prompt without its images; call unprune(assistant_model)"
        )
    if negative is not None and state_of(model).visual_tokens(negative).any():
        raise ValueError(
            "negative_prompt_ids hold image or video tokens, but generate passes no image or video with them; leave "
            "these tokens out of the negative prompt"
        )


def _without_cache(state: State, config: GenerationConfig, inputs: dict[str, Any]) -> bool:
    """Set ``use_cache=False`` for a model in training mode with gradient checkpointing, whose layers do not fill the
    cache."""
    needs_cache = [key for key in ("past_key_values", "assistant_model") if inputs.get(key) is not None]
    needs_cache += ["prompt_lookup_num_tokens"] if config.prompt_lookup_num_tokens is not None else []
    if needs_cache:
        raise ValueError(
            f"{needs_cache[0]} needs a cache, which layers with gradient checkpointing do not fill in training mode; "
            "call model.eval() or model.gradient_checkpointing_disable() before generate"
        )
    state.warn_once(
        "generate in training mode with gradient checkpointing runs without a cache and computes the whole row at "
        "every step: call model.eval() or model.gradient_checkpointing_disable() first"
    )
    return False


def _check_repeated_images(model: HFModule, state: State, prompt: Tensor | None, inputs: dict[str, Any]) -> None:
    """Reject rows with several images (or tiles) or several videos if generate returns several sequences per row on
    transformers < 5.18, which repeats each image or video individually instead of those of a row together, and so
    assigns them to the wrong rows."""
    if hasattr(GenerationMixin, "_expand_multimodal_outputs") or prompt is None:
        return
    if type(model)._expand_inputs_for_generation is not GenerationMixin._expand_inputs_for_generation:
        return  # Qwen2-VL and later families expand images themselves
    for pixels, token, what in (
        ("pixel_values", state.image_token, "images or tiles"),
        ("pixel_values_videos", state.video_token, "videos"),
    ):
        values = inputs.get(pixels)
        if values is None or token is None:
            continue
        rows = int((prompt == token).any(dim=1).sum())
        if len(values) != rows:
            raise ValueError(
                f"num_beams or num_return_sequences above 1 with {len(values)} {what} in {rows} rows: transformers "
                f"before 5.18 assigns {what} to the wrong rows; install transformers>=5.18, or use one of them for "
                "each row"
            )


def refuse_continuous_batching(
    self: HFModule, original: Callable[..., Any], state: State, *args: Any, **kwargs: Any
) -> Any:
    raise ValueError(
        f"{original.__name__} is not supported: continuous batching uses a paged cache, but a pruned model keeps a "
        "different number of tokens in each layer; pad the prompts to one batch and call generate, or use "
        "unprune(model)"
    )
