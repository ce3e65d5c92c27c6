"""Captures vision-tower attention and features during its forward pass: hooks on the query/key projections of the
requested layers record their outputs, and the attention each patch receives is computed from them; a hook on the
projector records its input.

Shape suffixes: P tiles, N patches of a tile, S tokens of a tile in the tower (patches, and a class token in front), H
heads, D head size, V visual tokens of the stream, M tower hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtprune_train.models import HFModule
from vtprune_train.models.families.base import Family, required
from vtprune_train.models.families.layout import NEWLINE
from vtprune_train.models.families.towers import class_tokens, feature_states, patch_grid
from vtprune_train.models.forward.calls import State
from vtprune_train.models.forward.compile import eager
from vtprune_train.models.forward.sharding import check_all_heads
from vtprune_train.models.forward.tower_tokens import Change, changing, check_change
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import EncoderSignals
from vtprune_train.pruning.needs import Needs, TowerLayer

MAPS = 4  # number of full attention maps in memory at once


def check_tower(config: Any, family: Family, method: PruningMethod) -> None:
    """Raise if the method reads the vision tower and the model (according to its config) cannot provide it.

    Raises:
        ValueError: the message names the method, the family and alternatives.
    """
    if method.needs.tower is not None:
        try:
            check_change(config, family, method.needs)
        except ValueError as error:
            name = method.needs.tower.name
            raise ValueError(f"{name}: {error}") from error
    needed = method.needs.read_from_tower
    if not needed:
        return
    instead = "use a method that does not need it, for example divprune or cdpruner"
    try:
        required(family.patches, f"needs {needed}, which is not available for {family.title}")
        class_tokens(config.vision_config)
    except ValueError as error:
        raise ValueError(f"{method.name} {error}; {instead}") from error
    if method.needs.multi_turn == "keep_dense":
        raise ValueError(
            f"{method.name} needs {needed}, which is not computed again for earlier images: "
            "multi_turn='keep_dense' cannot be combined with it; use multi_turn='drop'"
        )
    if not method.needs.encoder_layers:
        return
    try:
        layers_read(config, method.needs.encoder_layers)
    except ValueError as error:
        raise ValueError(f"{method.name}: {error}") from error


def layers_read(config: Any, wanted: Sequence[TowerLayer]) -> list[int]:
    """Resolve ``wanted`` to vision-tower layer indices. Negative indices count back from the layer that feeds the
    projector (-1); negative indices before the first layer are ignored. A float is a share of the depth, from 0.0 (the
    first layer) to 1.0 (the layer that feeds the projector), rounded half to even. ``last`` is the tower's last layer.

    Raises:
        ValueError: a layer does not exist, or no layer remains.
    """
    depth = config.vision_config.num_hidden_layers
    last = max(feature_states(config)) - 1
    numbers: list[int] = []
    for layer in wanted:
        if layer == "last":
            numbers.append(depth - 1)
        else:
            numbers.append(round(layer * last) if isinstance(layer, float) else layer)
    layers = [layer if layer >= 0 else last + 1 + layer for layer in numbers]
    if beyond := [layer for layer in layers if layer >= depth]:
        raise ValueError(
            f"the vision tower has no layer {beyond[0]}: it has {depth}, counted from 0; use 0 to {last}, or a "
            "negative number, which counts from the end"
        )
    layers = [layer for layer in layers if layer >= 0]
    if not layers:
        raise ValueError(
            f"{list(wanted)} are not among the vision tower's first {last + 1} layers, which the decoder's features "
            f"come from; use 0 to {last}, or -1 for the last of them"
        )
    return layers


class Reading:
    """Captured tensors of one vision-tower run, as far as ``needs`` asks for them: per layer, queries (only the class
    token's if it exists and ``encoder_rows`` is ``class``) and keys [P, S, M]; the input of the projector
    [P, S, projector input]; and the class token's part of the same hidden states, [P, hidden] each."""

    def __init__(self, config: Any, needs: Needs):
        self.needs = needs
        self.class_tokens = class_tokens(config.vision_config)
        self.rows = self.class_tokens if needs.encoder_rows == "class" else 0  # 0: all
        self.layers = layers_read(config, needs.encoder_layers) if needs.encoder_layers else []
        self.states = feature_states(config) if needs.class_features and self.class_tokens else []
        self.features: Tensor | None = None
        self.class_features: dict[int, Tensor] = {}
        self.projector: nn.Module | None = None
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.vision = config.vision_config
        self.heads = self.vision.num_attention_heads
        self.head_size = self.vision.hidden_size // self.heads

    def hook(self, tower: HFModule, projector: nn.Module | None = None) -> list[Any]:
        handles = []
        self.projector = projector
        if self.needs.encoder_features and projector is not None:
            handles.append(projector.register_forward_pre_hook(self._note_features()))
        for state in set(self.states):
            layer = tower.encoder.layers[max(state - 1, 0)]
            note = self._note_class(state)
            handles.append(layer.register_forward_hook(note) if state else layer.register_forward_pre_hook(note))
        for layer in set(self.layers):
            attention = tower.encoder.layers[layer].self_attn
            handles.append(attention.q_proj.register_forward_hook(self._note(self.queries, layer, self.rows)))
            handles.append(attention.k_proj.register_forward_hook(self._note(self.keys, layer, 0)))
        return handles

    def _note(self, notes: dict[int, Tensor], layer: int, rows: int) -> Any:
        reader = threading.get_ident()

        def note(module: nn.Module, args: Any, output: Tensor) -> None:
            if threading.get_ident() != reader:
                return  # a concurrent request on the same model
            check_all_heads(self.vision, f"layer {layer} of the vision tower", output.shape[-1] // self.head_size)
            noted = output.detach()
            notes[layer] = noted[:, :rows].clone() if rows else noted  # do not keep the other queries in memory

        return note

    def _note_features(self) -> Any:
        reader = threading.get_ident()

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == reader:
                self.features = args[0] if self.needs.merges_features else args[0].detach()

        return note

    def _note_class(self, state: int) -> Any:
        """A hook after layer ``state - 1``, or before layer 0."""
        reader = threading.get_ident()

        def note(module: nn.Module, args: Any, output: Any = None) -> None:
            if threading.get_ident() == reader:
                hidden = args[0] if output is None else output[0] if isinstance(output, tuple) else output
                noted = hidden[:, 0]
                self.class_features[state] = noted if self.needs.merges_features else noted.detach()

        return note

    def signals(self, index: Tensor) -> EncoderSignals:
        """The signals of visual tokens.

        Args:
            index: [V] int64, patch index (of P * N) of each token; out-of-range values mean no patch.

        Raises:
            ValueError: the tower's projections or features were not captured.
        """
        if missing := [layer for layer in self.layers if layer not in self.keys]:
            raise ValueError(
                f"the attention of the vision tower's layer {missing[0]} could not be read: a tower that was compiled "
                "by torch.compile before prune runs no hooks; compile it with "
                "vtprune_train.models.forward.compile.compile_layers(model), or do not compile it"
            )
        if self.needs.encoder_features and self.features is None:
            raise ValueError(
                "the input of the multimodal projector could not be read, because its hooks did not run; do not "
                "compile the projector with torch.compile"
            )
        patches = int(np.prod(patch_grid(self.vision)))
        features_PNM = None if self.features is None else self.features[:, self.features.shape[1] - patches :]
        keys_PNM = self.keys[self.layers[-1]][:, self.class_tokens :] if self.layers else None
        tiles = next(len(rows_PNM) for rows_PNM in (keys_PNM, features_PNM) if rows_PNM is not None)
        shows = (index >= 0) & (index < tiles * patches)
        patch = torch.where(shows, index, 0)
        tile = torch.where(shows, torch.div(patch, patches, rounding_mode="floor"), -1)

        def of_tokens(rows_PNM: Tensor) -> Tensor:
            return rows_PNM.flatten(0, 1).index_select(0, patch).masked_fill(~shows[:, None], 0.0)

        class_features = None
        if self.states:
            classes_PM = torch.cat([self.class_features[state] for state in self.states], dim=-1)
            class_features = of_tokens(classes_PM[:, None].expand(-1, patches, -1))
        attention = torch.zeros(0, len(index), device=index.device)
        signals = EncoderSignals(
            attention,
            keys=attention.new_zeros(len(index), 0),
            tile=tile,
            features=None if features_PNM is None else of_tokens(features_PNM),
            class_features=class_features,
            project=partial(_project, self.projector) if self.needs.merges_features else None,
        )
        if keys_PNM is None:
            return signals
        received = {layer: self._received(layer) for layer in set(self.layers)}
        attention = torch.stack([received[layer] for layer in self.layers]).index_select(1, patch)
        return replace(
            signals, attention=attention.masked_fill(~shows, torch.nan), keys=of_tokens(keys_PNM), heads=self.heads
        )

    @torch.no_grad()
    def _received(self, layer: int) -> Tensor:
        """[P * N] float32, attention each patch receives in a layer, averaged over heads and queries."""
        heads = 1 if self.needs.encoder_heads == "joined" else self.heads
        queries_PQHD = self.queries[layer].unflatten(-1, (heads, -1))
        keys_PSHD = self.keys[layer].unflatten(-1, (heads, -1))
        at_a_time = max(1, len(queries_PQHD)) if self.rows else MAPS
        rows = []
        for queries, keys in zip(queries_PQHD.split(at_a_time), keys_PSHD.split(at_a_time), strict=True):
            queries, keys = queries.float().transpose(1, 2), keys.float().transpose(1, 2)
            products = queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5  # [P, H, Q, S]
            rows.append(products.softmax(dim=-1).mean(dim=(1, 2))[:, self.class_tokens :])
        return torch.cat(rows).flatten()


def _project(projector: HFModule, features: Tensor) -> Tensor:
    """[n, projector input] -> [n, C]: calls the projector's own forward, so that its hooks gather its parameters when
    they are sharded."""
    projected: Tensor = projector(features.unsqueeze(0)).squeeze(0)
    return projected


@contextmanager
def reading(base: HFModule, state: State, method: PruningMethod | None) -> Iterator[Reading | Change | None]:
    """Context manager that captures what ``method`` needs from the vision tower of ``base``, or changes the tower's
    tokens for it; yields ``None`` if it needs nothing. The hooks are removed afterwards, before activation
    checkpointing runs a layer again. A compiled tower runs eagerly inside the context."""
    if method is not None and method.needs.tower is not None:
        with eager(base.vision_tower), changing(base, state, method) as change:
            yield change
        return
    if method is None or not method.needs.from_tower:
        yield None
        return
    notes = Reading(base.config, method.needs)
    handles = notes.hook(base.vision_tower, base.multi_modal_projector)
    try:
        with eager(base.vision_tower):
            yield notes
    finally:
        for handle in handles:
            handle.remove()


def patches_per_tile(config: Any) -> int:
    """Number of patches per tile (N)."""
    return int(np.prod(patch_grid(config.vision_config)))


def patch_index(patches_of_image: Sequence[tuple[np.ndarray, int]], patches: int) -> np.ndarray:
    """[V] int64, batch-wide patch index of each visual token, or NEWLINE. ``shown`` holds, per image, the image-local
    patch index of each token and the image's number of tiles (of ``patches`` patches)."""
    parts, first = [np.zeros(0, dtype=np.int64)], 0
    for index, tiles in patches_of_image:
        parts.append(np.where(index == NEWLINE, NEWLINE, index + first))
        first += tiles * patches
    return np.concatenate(parts)


def per_image(signals: EncoderSignals, lengths: Sequence[int]) -> list[EncoderSignals]:
    """The signals of each image's tokens."""
    sizes = list(lengths)
    optional = [
        [None] * len(sizes) if tensor is None else tensor.split(sizes)
        for tensor in (signals.features, signals.class_features, signals.group)
    ]
    parts = signals.attention.split(sizes, dim=1), signals.keys.split(sizes), signals.tile.split(sizes), *optional
    names = ("attention", "keys", "tile", "features", "class_features", "group")
    return [replace(signals, **dict(zip(names, part, strict=True))) for part in zip(*parts, strict=True)]


def joined(images: Sequence[EncoderSignals]) -> EncoderSignals:
    """Concatenate the signals of several images."""

    def optional(name: str) -> Tensor | None:
        known = [tensor for image in images if (tensor := getattr(image, name)) is not None]
        return torch.cat(known) if known else None

    return replace(
        images[0],
        attention=torch.cat([image.attention for image in images], dim=1),
        keys=torch.cat([image.keys for image in images]),
        tile=torch.cat([image.tile for image in images]),
        features=optional("features"),
        class_features=optional("class_features"),
        group=optional("group"),
    )
