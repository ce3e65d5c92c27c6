"""Vision towers with fewer tokens for one tile, by plain loops over tokens, written from the papers; used only to
compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def heads_of(attention, values: Tensor) -> Tensor:
    return values.unflatten(-1, (attention.num_heads, -1))


def attend(layer, x: Tensor, sizes: list[float], sees=None) -> tuple[Tensor, Tensor]:
    """[S, M] the output of a layer's attention, and [S, D] its keys averaged over heads; attention to a token counts
    ``sizes`` times. ``sees(row, column)`` says what a row attends to."""
    attention, normed = layer.self_attn, layer.layer_norm1(x)
    queries, keys, values = (
        heads_of(attention, part(normed)) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    rows = []
    for row in range(len(x)):
        heads = []
        for head in range(attention.num_heads):
            shares = []
            for column in range(len(x)):
                product = float(queries[row, head] @ keys[column, head]) * attention.scale
                seen = sees is None or sees(row, column)
                shares.append(math.exp(product) * sizes[column] if seen else 0.0)
            total = sum(shares)
            heads.append(sum(share / total * values[column, head] for column, share in enumerate(shares)))
        rows.append(torch.cat(heads))
    return attention.out_proj(torch.stack(rows)), keys.mean(dim=1)


def mlp(layer, x: Tensor) -> Tensor:
    return x + layer.mlp(layer.layer_norm2(x))


def embedded(tower, pixels: Tensor) -> Tensor:
    embeddings = tower.embeddings(pixels[None])
    return (tower.pre_layrnorm(embeddings) if hasattr(tower, "pre_layrnorm") else embeddings)[0]


def merge_once(x: Tensor, keys: Tensor, sizes: list[float], held: list[set[int]], number: int, class_tokens: int):
    """Merge ``number`` tokens at even places into their most similar ones at odd places."""
    unit = [key / key.norm() for key in keys]
    even, odd = range(0, len(x), 2), range(1, len(x), 2)
    best = []
    for place in even:
        if class_tokens and place == 0:
            continue
        likeness = [float(unit[place] @ unit[other]) for other in odd]
        most = max(range(len(likeness)), key=lambda i: (likeness[i], -i))
        best.append((-likeness[most], place, odd[most]))
    goes = {place: into for _, place, into in sorted(best)[:number]}
    by_likeness = [place for _, place, _ in sorted(best)[number:]]
    stays = [0, *sorted(by_likeness)] if class_tokens else by_likeness
    rows, new_sizes, new_held = [x[place] for place in stays], [sizes[i] for i in stays], [held[i] for i in stays]
    for place in odd:
        members = [place, *(source for source, into in goes.items() if into == place)]
        total = sum(sizes[member] for member in members)
        rows.append(sum(sizes[member] * x[member] for member in members) / total)
        new_sizes.append(total)
        new_held.append(set().union(*(held[member] for member in members)))
    return torch.stack(rows), new_sizes, new_held


def slow_tome(tower, pixels: Tensor, remaining, proportional: bool, class_tokens: int):
    """[n, M] features of a tile, and the patches that each holds; ``remaining``: patches after each layer."""
    x = embedded(tower, pixels)
    sizes, held = [1.0] * len(x), [{index} for index in range(len(x))]
    for layer, count in zip(tower.encoder.layers, remaining, strict=False):
        attended, keys = attend(layer, x, sizes if proportional else [1.0] * len(x))
        x = x + attended
        if number := len(x) - class_tokens - count:
            x, sizes, held = merge_once(x, keys, sizes, held, number, class_tokens)
        x = mlp(layer, x)
    return x[class_tokens:], [{patch - class_tokens for patch in patches} for patches in held[class_tokens:]]


def slow_vistog(tower, pixels: Tensor, module, depth: int, class_tokens: int):
    """[G, M] features of a tile, and the patches that each holds."""
    x = embedded(tower, pixels)
    own, groups = len(x), module.tokens.weight
    x = torch.cat([x, groups])
    for layer in tower.encoder.layers[:depth]:
        attended, _ = attend(layer, x, [1.0] * len(x), lambda row, column: row >= own or column < own)
        x = mlp(layer, x + attended)
    assign, patches = module.assign, x[class_tokens:own]
    queries, keys = assign.query(assign.group_norm(x[own:])), assign.key(assign.patch_norm(patches))
    values = assign.value(assign.patch_norm(patches))
    held = [set() for _ in groups]
    for patch in range(len(patches)):
        held[max(range(len(groups)), key=lambda group: float(queries[group] @ keys[patch]))].add(patch)
    rows = []
    for group, members in enumerate(held):
        mean = sum(values[member] for member in members) / len(members) if members else torch.zeros_like(values[0])
        rows.append(x[own + group] + assign.out(mean))
    return torch.stack(rows), held
