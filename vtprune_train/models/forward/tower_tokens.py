"""Runs a CLIP or SigLIP tower with fewer tokens (:attr:`Needs.tower`): ``prune`` replaces ``forward`` of the tower, its
encoder and the projector, which change nothing outside :func:`changing`.

The layers' submodules are called inside the layer's call, as in transformers, but tokens are merged between attention
and MLP. The projector runs on the merged tokens; its output is gathered back to one row per patch, so that the family's
code lays out patches as usual.

Shape suffixes: P tiles, N patches of a tile, n tokens of a tile after the last merge, S tokens of a tile in the tower
(class tokens first), M tower hidden size, C decoder hidden size, V visual tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers.modeling_outputs import BaseModelOutput

from vtprune_train.core.flops import Grid
from vtprune_train.core.stream import to_device
from vtprune_train.models import HFModule
from vtprune_train.models.families.base import Family, Lacks
from vtprune_train.models.families.towers import tile_tower
from vtprune_train.models.forward.calls import State, by_name
from vtprune_train.models.forward.decoder import PARAMETERS
from vtprune_train.models.forward.sharding import call_as, check_all_heads
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import EncoderSignals
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.tower import Merged, TowerChange

BIASED = ("sdpa", "eager")  # implementations of attention that take a bias


def check_change(config: Any, family: Family, needs: Needs) -> None:
    """Raise if the tower of a model (according to its config) cannot run with the tokens that ``needs.tower`` asks for.

    Raises:
        ValueError: without the method's name.
    """
    change = needs.tower
    assert change is not None
    possible = "changes the tokens of the vision tower, which is possible for CLIP and SigLIP towers of LLaVA models"
    after = "use a method that drops tokens after the tower, for example divprune or cdpruner"
    if isinstance(family.patches, Lacks):
        smaller = "lower max_pixels of its processor, or " if family.tower is not None else ""
        raise ValueError(f"{possible}, not for {family.title}; {smaller}{after}")
    try:
        tower = tile_tower(config)
    except ValueError as error:
        raise ValueError(f"{possible}, not for a {config.vision_config.model_type}; {after}") from error
    if tower.depth < 1:
        raise ValueError(
            f"vision_feature_layer={config.vision_feature_layer} takes the input of the tower's first layer, so no "
            "layer could run with fewer tokens"
        )
    change.remaining(tower)
    implementation = config.vision_config._attn_implementation
    if change.needs_bias and implementation not in (None, *BIASED):
        raise ValueError(
            f"adds a bias to the vision tower's attention, which {implementation!r} does not take; load the model with "
            'attn_implementation={"vision_config": "sdpa"}'
            + (", or set proportional=False" if hasattr(change, "proportional") else "")
        )
    if needs.multi_turn == "keep_dense":
        raise ValueError(
            "merges tokens inside the vision tower, which does not run again for earlier images: "
            "multi_turn='keep_dense' cannot be combined with it; use multi_turn='drop'"
        )


class Change:
    """The change of one run of the tower, and its result: ``groups`` [P, N] int64, the token (of n) that holds each
    patch; ``None`` before the tower has run."""

    def __init__(self, config: Any, change: TowerChange, module: nn.Module | None):
        self.change, self.vision, self.module = change, config.vision_config, module
        self.tower = tile_tower(config)
        self.remaining, self.merged = change.remaining(self.tower), change.merged(self.tower)
        self.groups: Tensor | None = None

    @torch.no_grad()
    def signals(self, index: Tensor) -> EncoderSignals:
        """The groups of visual tokens.

        Args:
            index: [V] int64, patch index (of P * N) of each token; out-of-range values mean no patch.

        Raises:
            ValueError: the tower did not run.
        """
        if self.groups is None:
            raise ValueError(
                f"{self.change.name} changes the tokens of the vision tower, but the tower's forward was replaced "
                "after prune; replace it before"
            )
        tiles, patches = self.groups.shape
        shows = (index >= 0) & (index < tiles * patches)
        patch = torch.where(shows, index, 0)
        tile = torch.div(patch, patches, rounding_mode="floor")
        group = self.groups.flatten().index_select(0, patch) + tile * self.merged
        none = torch.zeros(0, len(index), device=index.device)
        return EncoderSignals(none, none.T, torch.where(shows, tile, -1), group=torch.where(shows, group, -1))


@contextmanager
def changing(base: HFModule, state: State, method: PruningMethod) -> Iterator[Change]:
    """Context manager in which the tower of this thread's calls runs with the tokens of ``method``."""
    owner = next(i for i, part in enumerate(method.parts) if part.needs.tower is not None)
    change = method.parts[owner].needs.tower
    assert change is not None
    module = getattr(base.language_model, PARAMETERS, None)
    if module is not None and len(method.parts) > 1:
        module = dict(module.named_children()).get(str(owner))
    before, state.running.tower = state.running.tower, Change(base.config, change, module)
    try:
        yield state.running.tower
    finally:
        state.running.tower = before


def forward_tower(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    """Forward of the tower: resizes tiles if the change asks for it."""
    change: Change | None = state.running.tower
    if change is None:
        return original(*args, **inputs)
    inputs = by_name(original, args, inputs)
    grid = change.change.image_grid(change.tower)
    if grid != change.tower.grid:
        size = [patches * change.vision.patch_size for patches in grid]
        pixels = inputs["pixel_values"]
        smaller = interpolate(pixels.float(), size, mode="bicubic", align_corners=False, antialias=True)
        inputs |= {"pixel_values": smaller.to(pixels.dtype), "interpolate_pos_encoding": True}
    return original(**inputs)


def interpolated_positions(
    self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any
) -> Tensor:
    """[1, S, M] position embeddings of smaller tiles, bicubic as in transformers, from a call of the embedding, inside
    which ZeRO-3 gathers its weight. A matrix product, whose gradient is deterministic on GPUs too."""
    change: Change | None = state.running.tower
    if change is None:
        return original(*args, **inputs)  # type: ignore[no-any-return]
    first = change.tower.class_tokens
    positions = self.position_embedding(self.position_ids)
    matrix = to_device(_bicubic(change.tower.grid, change.change.image_grid(change.tower)), positions.device)
    return torch.cat([positions[:, :first], matrix.to(positions.dtype) @ positions[:, first:]], dim=1)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a tensor cached during evaluation is reused in training
def _bicubic(grid: Grid, smaller: Grid) -> Tensor:
    """[n, N] float32, weights of the patches of ``grid`` in those of the size ``smaller``."""
    every = torch.eye(grid[0] * grid[1]).unflatten(1, grid)[:, None]
    return interpolate(every, smaller, mode="bicubic", align_corners=False).flatten(1).T.contiguous()


def forward_encoder(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    """Forward of the tower's encoder, with merges in its layers."""
    change: Change | None = state.running.tower
    if change is None:
        return original(*args, **inputs)
    inputs = by_name(original, args, inputs)
    hidden, mask = inputs.pop("inputs_embeds"), inputs.pop("attention_mask", None)
    assert mask is None, "tiles have no padding"
    tower, how = change.tower, change.change
    tokens = how.start(hidden, tower, change.module)
    for index, layer in enumerate(self.layers):
        function: Callable[..., tuple[Tensor, ...]] | None = None
        if index < tower.depth and tokens.hidden.shape[1] - tower.class_tokens > change.remaining[index]:
            last = index == tower.depth - 1
            function = partial(_merging_layer, change=change, count=change.remaining[index], last=last, inputs=inputs)
        elif index == tower.depth - 1:
            function = partial(_last_layer, change=change, inputs=inputs)
        if function is None:
            bias = how.bias(tokens, tower)
            tokens = tokens._replace(hidden=layer(tokens.hidden, bias, **inputs))
        else:
            tokens = Merged(*call_as(layer, function, *tokens))
        if index == tower.depth - 1:
            change.groups = tokens.groups - tower.class_tokens
    return BaseModelOutput(last_hidden_state=tokens.hidden)


def _last_layer(
    layer: HFModule, hidden: Tensor, sizes: Tensor, groups: Tensor, change: Change, inputs: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The last layer before the features."""
    tokens = Merged(hidden, sizes, groups)
    hidden = type(layer).forward(layer, hidden, change.change.bias(tokens, change.tower), **inputs)
    return change.change.finish(tokens._replace(hidden=hidden), change.tower, change.module)


def _merging_layer(
    layer: HFModule,
    hidden: Tensor,
    sizes: Tensor,
    groups: Tensor,
    change: Change,
    count: int,
    last: bool,
    inputs: dict[str, Any],
) -> tuple[Tensor, ...]:
    """A layer that merges tokens between attention and MLP, recomputed in the backward pass like others; ``last``: the
    features are its output."""
    run = partial(_attend_merge, layer, change=change, count=count, inputs=inputs)
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        tokens = layer._gradient_checkpointing_func(run, hidden, sizes, groups)
    else:
        tokens = run(hidden, sizes, groups)
    return change.change.finish(Merged(*tokens), change.tower, change.module) if last else tokens


def _attend_merge(
    layer: HFModule, hidden: Tensor, sizes: Tensor, groups: Tensor, change: Change, count: int, inputs: dict[str, Any]
) -> tuple[Tensor, ...]:
    tokens = Merged(hidden, sizes, groups)
    bias = change.change.bias(tokens, change.tower)
    with _keys_of(layer.self_attn.k_proj) as keys:
        attended, _ = layer.self_attn(hidden_states=layer.layer_norm1(hidden), attention_mask=bias, **inputs)
    if not keys:
        raise ValueError(
            f"{change.change.name}: the keys of the vision tower could not be read: a tower that was compiled by "
            "torch.compile before prune runs no hooks; compile it with "
            "vtprune_train.models.forward.compile.compile_layers(model), or do not compile it"
        )
    heads, size = change.vision.num_attention_heads, change.vision.hidden_size
    check_all_heads(change.vision, "the vision tower", keys[0].shape[-1] * heads // size)
    tokens = change.change.merge(
        tokens._replace(hidden=hidden + attended), keys[0], heads, count, change.tower.class_tokens
    )
    return tokens._replace(hidden=tokens.hidden + layer.mlp(layer.layer_norm2(tokens.hidden)))


@contextmanager
def _keys_of(projection: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager that records the output of a module in this thread, without gradients."""
    outputs: list[Tensor] = []
    reader = threading.get_ident()

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        if threading.get_ident() == reader:
            outputs.append(output.detach())

    handle = projection.register_forward_hook(note)
    try:
        yield outputs
    finally:
        handle.remove()


def forward_projector(self: HFModule, original: Callable[..., Any], state: State, *args: Any, **inputs: Any) -> Any:
    """Forward of the projector: [P, n, M] -> [P, N, C], each patch with the features of its token."""
    features = original(*args, **inputs)
    change: Change | None = state.running.tower
    if change is None or change.groups is None:
        return features
    return features.gather(1, change.groups[..., None].expand(-1, -1, features.shape[-1]))
