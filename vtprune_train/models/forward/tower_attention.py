"""Attention for native-resolution vision towers: one varlen call per layer, with lengths from the host.

By default, Qwen's vision towers copy the segment boundaries from the device in every layer and call SDPA once per
segment. If the name of the attention contains "flash", transformers makes a single varlen call instead; the decoder's
kernels are registered here under such names, without a causal mask. The lengths on the host are computed from the image
grids and passed to every layer as the keyword ``segments``, so neither the forward pass, nor the backward pass, nor a
recomputed layer waits for the device.

Shape suffixes: N patches of all images, H heads, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from vtprune_train.core.stream import to_device
from vtprune_train.models import HFModule
from vtprune_train.models.families.qwen import PatchGrids, TowerShape, frame_lengths, tower_inputs, window_lengths
from vtprune_train.models.forward.attention import FUNCTIONS, dense_function, in_mixed_precision
from vtprune_train.models.forward.calls import State, by_name
from vtprune_train.models.forward.rotary import full_frequencies

TOWER_PREFIX = "packed_flash_tower_"  # "flash" is what transformers looks for
_CONFIG = "_vtprune_config"
_DENSE = "_vtprune_dense"  # attribute on the copied tower config: the original attention implementation


def towers(module: nn.Module) -> dict[str, HFModule]:
    """Return the vision tower at ``module`` by name or, if PEFT wraps it (modules_to_save), the original and each
    adapter's copy."""
    return {name: part for name, part in module.named_modules() if isinstance(part, PreTrainedModel)}


def replace_config(tower: HFModule, backend: str) -> None:
    """Give the tower's modules a copy of the config that selects ``backend``. The model's config is not changed,
    because another model created from it would not know that kernel."""
    original = tower.config
    replaced = copy.copy(original)
    replaced._attn_implementation = TOWER_PREFIX + backend
    setattr(replaced, _DENSE, original._attn_implementation)
    for module in tower.modules():
        if module.__dict__.get("config") is original:
            module.__dict__[_CONFIG] = original
            module.config = replaced


def restore_config(module: nn.Module) -> None:
    """Undo :func:`replace_config` for one module."""
    if _CONFIG in module.__dict__:
        module.config = module.__dict__.pop(_CONFIG)


class Segments:
    """Segment lengths for the tower's attention: frames and, for windowed layers, windows. A separate class so that
    torch.compile treats it as opaque."""

    def __init__(self, *splits: tuple[int, ...]):
        self._by_number = {len(lengths): lengths for lengths in splits}

    def within(self, cu_seqlens: Tensor) -> tuple[int, ...]:
        """Return the lengths matching ``cu_seqlens`` [segments + 1], identified by the number of segments (if there are
        as many windows as frames, each frame is one window).

        Raises:
            ValueError: the number matches neither frames nor windows.
        """
        number = len(cu_seqlens) - 1
        if number not in self._by_number:
            expected = " or ".join(str(known) for known in self._by_number)
            raise ValueError(
                f"the vision tower's cu_seqlens has {number} segments, but the image grids imply {expected}; do not "
                "pass cu_seqlens"
            )
        return self._by_number[number]


def forward(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    """Forward of the tower of a pruned model."""
    full_frequencies(self)
    return original(**complete_inputs(self, by_name(original, args, inputs)))


def complete_inputs(tower: HFModule, inputs: dict[str, Any]) -> dict[str, Any]:
    """Complete the inputs of a Qwen tower with everything that it would otherwise compute from the grids on the device.

    If ``grid_thw`` [images, 3] is on the device, this synchronizes once. Existing keywords of
    :func:`~vtprune_train.models.families.qwen.tower_inputs` are kept."""
    grid_thw = inputs["grid_thw"].cpu()
    grids = tuple(tuple(grid) for grid in grid_thw.tolist())
    shape = TowerShape.of(tower)
    computed = {}
    if not shape.keywords <= inputs.keys():
        computed = _inputs_on(inputs["hidden_states"].device, shape, grids)
    return {**computed, **inputs, "grid_thw": grid_thw, "segments": _segments(shape, grids)}


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # disable inference mode: tensors cached during evaluation are reused in training
def _inputs_on(device: torch.device, shape: TowerShape, grids: PatchGrids) -> dict[str, Any]:
    return to_device(tower_inputs(shape, grids), device)  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def _segments(shape: TowerShape, grids: PatchGrids) -> Segments:
    windows = [] if shape.window_size is None else [window_lengths(shape, grids)]
    return Segments(frame_lengths(grids), *windows)


def _dense_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Original transformers behaviour: one varlen call with flash attention, otherwise one call per segment."""
    implementation = getattr(module.config, _DENSE)
    function = dense_function(module, implementation)
    if "flash" in implementation:
        return function(module, query, key, value, None, cu_seq_lens_q=cu_seqlens, **kwargs)  # type: ignore[no-any-return]
    for bound in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        kwargs.pop(bound)
    lengths = cu_seqlens.diff().tolist()
    splits = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([function(module, q, k, v, None, **kwargs)[0] for q, k, v in splits], dim=1), None


def _register(backend: str, function: Callable[..., Tensor]) -> None:
    @torch.compiler.disable  # lengths change every batch, so compiled layers break the graph here
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        cu_seq_lens_q: Tensor,
        segments: Segments | None = None,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """query, key and value [1, H, N, D] -> [1, N, H, D]; each patch attends within its segment. If ``segments`` is
        missing, run the dense model's attention."""
        if segments is None:
            return _dense_attention(module, query, key, value, cu_seq_lens_q, is_causal=is_causal, **kwargs)
        assert attention_mask is None and not is_causal, "attention of the vision tower does not take a mask"
        q_NHD, k_NHD, v_NHD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        lengths = segments.within(cu_seq_lens_q)
        out_NHD = function(
            *in_mixed_precision(q_NHD, k_NHD, v_NHD),
            cu_seq_lens_q=cu_seq_lens_q,
            segment_lengths=lengths,
            causal=False,
            **kwargs,
        )
        return out_NHD.unsqueeze(0), None

    AttentionInterface.register(TOWER_PREFIX + backend, attention)


for _name, _function in FUNCTIONS.items():
    _register(_name, _function)
