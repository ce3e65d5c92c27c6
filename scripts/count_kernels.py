#!/usr/bin/env python
"""Count kernel launches and memory traffic of eager PyTorch using meta tensors (no GPU or weights needed).

    python scripts/count_kernels.py [--geometry 7b] [--samples 7] [--json FILE]

An ATen operation that is neither a view nor an allocation counts as one kernel. That is a lower bound: a sort or an
indexed write launches several. Bytes are the sizes of the input and output tensors, each counted once; caches are not
modeled. ``saved``: bytes that autograd stores for the backward pass, excluding parameters.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from torch.nn.attention.varlen import varlen_attn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

import bench
from vtprune_train import PyramidDrop
from vtprune_train.core.flops import TYPICAL_TEXT, TYPICAL_VISUAL
from vtprune_train.core.plan import plan_pass
from vtprune_train.core.stream import to_device
from vtprune_train.models.families import KNOWN_CONFIGS
from vtprune_train.models.forward.attention import PREFIX
from vtprune_train.models.forward.decoder import RANGES, SELECTOR, run_layers
from vtprune_train.models.forward.head import chunked_loss
from vtprune_train.pruning.base import PruningMethod

META = torch.device("meta")
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
OVERWRITES = {"copy_", "zero_", "fill_", "index_copy_"}  # the first argument is not read
PICKS = {"index_select", "embedding", "gather", "index"}  # only the returned part of the first argument is read


@dataclass
class Count:
    kernels: int = 0
    read: int = 0
    written: int = 0
    saved: int = 0

    def __sub__(self, other: Count) -> Count:
        return Count(*(mine - theirs for mine, theirs in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, int, int, int]:
        return self.kernels, self.read, self.written, self.saved


class Counter(TorchDispatchMode):
    """Counts operations, in total and per profiler range."""

    def __init__(self) -> None:
        super().__init__()
        self.total = Count()
        self.by_range: dict[str, Count] = {name: Count() for name in RANGES}
        self.open: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name == "_record_function_enter_new":
            self.open.append(args[0])
        elif name == "_record_function_exit":
            self.open.pop()
        elif not _is_view(func) and name not in NO_KERNEL and (written := _tensors(out)):
            inputs = _tensors((args, kwargs))
            if name in PICKS:
                inputs = [*inputs[1:], *written]
            elif name in OVERWRITES:
                inputs = inputs[1:]
            for count in (self.total, *(self.by_range[name] for name in self.open if name in self.by_range)):
                count.kernels += 1
                count.read += sum(map(_bytes, inputs))
                count.written += sum(map(_bytes, written))
        return out


def _is_view(func: Any) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _tensors(values: Any) -> list[Tensor]:
    return list({id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}.values())


def _bytes(tensor: Tensor) -> int:
    """Bytes of distinct elements; expanded dimensions count once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


class FlashSDPA(TorchFunctionMode):
    """Uses the flash kernel for ``scaled_dot_product_attention``, as on CUDA; on meta tensors PyTorch would select the
    unfused kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        assert kwargs.get("attn_mask") is None, "flash attention takes no mask"
        query, key, value = args[:3] if args else (kwargs[name] for name in ("query", "key", "value"))
        causal, scale = kwargs.get("is_causal", False), kwargs.get("scale")
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[0]


class SavedBytes(AbstractContextManager):
    """Bytes saved by autograd (each storage once), excluding ``left_out``."""

    def __init__(self, left_out: Iterable[Tensor]):
        self.left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
        self.kept: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self.left_out:
            self.kept.setdefault(key, tensor)  # keep a reference so that the address is not reused
        return tensor

    def __enter__(self) -> SavedBytes:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


@dataclass
class Counted:
    """Counts for the forward and backward pass of one function."""

    forward: Count
    backward: Count
    by_range: dict[str, Count] = field(default_factory=dict)

    def __sub__(self, other: Counted) -> Counted:
        return Counted(self.forward - other.forward, self.backward - other.backward)


def count(run: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> Counted:
    """Count a function that returns a tensor with a gradient; parameter gradients are cleared afterwards."""
    parameters = list(parameters)
    with ExitStack() as stack:
        stack.enter_context(FlashSDPA())
        saved = stack.enter_context(SavedBytes(parameters))
        forward = stack.enter_context(Counter())
        out = run()
    gradient = torch.empty_like(out)
    with Counter() as backward:
        out.backward(gradient)
    for parameter in parameters:
        parameter.grad = None
    forward.total.saved = saved.bytes
    return Counted(forward.total, backward.total, forward.by_range)


# ------------------------------------------------------------------------------------------------- benchmarked modules
@dataclass(frozen=True)
class Sizes:
    """Widths, and the packed batch: ``samples`` of equal length."""

    text: dict[str, Any]
    grouped: dict[str, Any]
    vision: dict[str, Any]
    tiles: int
    visual: int
    samples: int
    vocab: int
    head_rows: int
    chunks: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.samples * (self.visual + TYPICAL_TEXT)


def sizes_of(geometry: str, samples: int) -> Sizes:
    """``7b``: Vicuna-7B, the same with 8 key-value heads, CLIP-L/336, and a head of 152,064 words; or ``tiny``."""
    if geometry == "tiny":
        text = bench.llama(64, 176, 4, 4)
        grouped = text | {"num_key_value_heads": 2}
        return Sizes(text, grouped, bench.clip(32, 2, 2, tile=56), 3, 520, samples, 500, 40, (8, 16))
    text = KNOWN_CONFIGS["lmsys/vicuna-7b-v1.5"]().to_dict()
    grouped = text | {"num_key_value_heads": 8}
    vision = KNOWN_CONFIGS["openai/clip-vit-large-patch14-336"]().to_dict()
    return Sizes(text, grouped, vision, 31, TYPICAL_VISUAL, samples, 152_064, 2048, (220, 1024))


def decoder(text: dict[str, Any], backend: str, layers: int | None = None) -> LlamaModel:
    config = LlamaConfig(**text | ({} if layers is None else {"num_hidden_layers": layers}))
    config._attn_implementation = PREFIX + backend
    with META:
        return LlamaModel(config).to(torch.bfloat16).train()


def count_decoder(model: LlamaModel, sizes: Sizes, method: PruningMethod | None = None) -> Counted:
    """All layers on a packed batch."""
    plan = plan_pass(
        [bench.segment_of(sizes.visual, TYPICAL_TEXT)] * sizes.samples, model.config.num_hidden_layers, method
    )
    on_meta = to_device(plan, META)
    hidden = torch.empty(sizes.tokens, model.config.hidden_size, dtype=torch.bfloat16, device=META, requires_grad=True)
    return count(lambda: run_layers(model, hidden, on_meta, method).last_hidden_state, model.parameters())


def decoder_layer(text: dict[str, Any], backend: str, sizes: Sizes) -> Counted:
    """Cost of one layer, computed as two layers minus one to exclude per-pass overhead."""
    two, one = (count_decoder(decoder(text, backend, layers), sizes) for layers in (2, 1))
    return two - one


def tower_layer(sizes: Sizes) -> Counted:
    """One layer of the vision tower, likewise."""
    counted = []
    for layers in (2, 1):
        config = CLIPVisionConfig(**sizes.vision | {"num_hidden_layers": layers})
        config._attn_implementation = "sdpa"
        with META:
            model = CLIPVisionModel(config).to(torch.bfloat16)
            pixels = torch.empty(sizes.tiles, 3, config.image_size, config.image_size, dtype=torch.bfloat16)
        counted.append(count(partial(_tower_output, model, pixels), model.parameters()))
    return counted[0] - counted[1]


def _tower_output(model: CLIPVisionModel, pixels: Tensor) -> Tensor:
    return model(pixels).last_hidden_state


def head(sizes: Sizes, chunk_rows: int) -> Counted:
    """Language-model head and loss, in chunks."""
    hidden = torch.empty(sizes.head_rows, sizes.grouped["hidden_size"], dtype=torch.bfloat16, device=META)
    weight = nn.Parameter(torch.empty(sizes.vocab, hidden.shape[1], dtype=torch.bfloat16, device=META))
    targets = torch.empty(sizes.head_rows, dtype=torch.int64, device=META)
    hidden.requires_grad_()
    return count(lambda: chunked_loss(hidden, weight, None, targets, chunk_rows=chunk_rows)[0], [weight])


def grouped_attention(sizes: Sizes, expands: bool) -> Counted:
    """PyTorch's variable-length kernel with 8 key-value heads of 32, expanded to all query heads or not."""
    heads, groups = sizes.grouped["num_attention_heads"], sizes.grouped["num_key_value_heads"]
    head_dim = sizes.grouped["hidden_size"] // heads
    q, k, v = (
        torch.empty(sizes.tokens, n, head_dim, dtype=torch.bfloat16, device=META, requires_grad=True)
        for n in (heads, groups, groups)
    )
    starts = torch.empty(sizes.samples + 1, dtype=torch.int32, device=META)
    longest = sizes.visual + TYPICAL_TEXT

    def run() -> Tensor:
        keys, values = (x.repeat_interleave(heads // groups, dim=1) if expands else x for x in (k, v))
        more: dict[str, Any] = {} if expands else {"enable_gqa": True}
        out = varlen_attn(q, keys, values, starts, starts, longest, longest, window_size=(-1, 0), **more)
        assert isinstance(out, Tensor)
        return out

    return count(run)


def count_all(sizes: Sizes) -> list[dict[str, Any]]:
    """One result row per module: name, number of rows, forward and backward counts."""
    rows: list[dict[str, Any]] = []

    def add(name: str, counted: Counted, rows_of: int) -> None:
        rows.append({"name": name, "rows": rows_of, "forward": counted.forward, "backward": counted.backward})

    tokens = sizes.tokens
    for backend in ("varlen_sdpa", "varlen_torch"):
        add(f"decoder layer, {backend}", decoder_layer(sizes.text, backend, sizes), tokens)
    add("decoder layer, varlen_torch, grouped heads", decoder_layer(sizes.grouped, "varlen_torch", sizes), tokens)
    add("grouped attention, keys and values expanded", grouped_attention(sizes, expands=True), tokens)
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # PyTorch 2.13, not 2.11
        add("grouped attention, not expanded", grouped_attention(sizes, expands=False), tokens)
    patches = (sizes.vision["image_size"] // sizes.vision["patch_size"]) ** 2 + 1
    add("tower layer, sdpa", tower_layer(sizes), sizes.tiles * patches)
    for chunk in sizes.chunks:
        add(f"head of {sizes.vocab} words, {chunk} rows a chunk", head(sizes, chunk), sizes.head_rows)
    whole = decoder(sizes.text, "varlen_torch")
    add(f"decoder of {whole.config.num_hidden_layers} layers, dense", count_decoder(whole, sizes), tokens)
    for rank_with in ("next_layer", "this_layer"):
        dropped = count_decoder(whole, sizes, PyramidDrop(rank_with=rank_with))
        add(f"the same, PyramidDrop, {rank_with}", dropped, tokens)
        selector = [dropped.by_range[name] for name in SELECTOR]
        total = Count(*(sum(values) for values in zip(*(part.values() for part in selector), strict=True)))
        add(f"its selector, {rank_with}", Counted(total, Count()), tokens)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Kernels and gigabytes of both passes, and saved bytes per row (token, patch or supervised row)."""
    print(f"{'':48}{'rows':>7}{'kernels':>9}{'backward':>10}{'GB':>9}{'backward':>10}{'saved kB a row':>16}")
    for row in rows:
        forward, backward = row["forward"], row["backward"]
        moved = [(part.read + part.written) / 1e9 for part in (forward, backward)]
        saved = forward.saved / row["rows"] / 1e3
        print(
            f"{row['name']:48}{row['rows']:>7}{forward.kernels:>9}{backward.kernels:>10}{moved[0]:>9.2f}"
            f"{moved[1]:>10.2f}{saved:>16.1f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=("7b", "tiny"), default="7b")
    parser.add_argument(
        "--samples",
        type=int,
        default=7,
        help="number of samples, each with 2,268 visual (tiny: 520) and 121 text tokens",
    )
    parser.add_argument("--json", type=Path, help="also write results to this JSON file")
    arguments = parser.parse_args()
    sizes = sizes_of(arguments.geometry, arguments.samples)
    rows = count_all(sizes)
    print_table(rows)
    if arguments.json:
        report = {"torch": torch.__version__, "geometry": arguments.geometry, "tokens": sizes.tokens, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, default=vars, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
