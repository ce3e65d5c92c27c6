"""``vtprune estimate --clock``: the seconds that a decoder of the model's sizes takes here, dense and pruned in turn.

A Llama decoder of the same sizes with random weights stands for the model's own, and random vectors for its images,
its text and what its tower attends to: no weights are read. Methods that count while they run follow what such scores
say, so the tokens that entered are reported beside the times.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel

from vtprune_train.bench.costs import Sample, segment_of
from vtprune_train.core.flops import DecoderGeometry, VisualTokens, stage_layers, visual_per_stage
from vtprune_train.core.plan import plan_pass
from vtprune_train.core.stream import StreamPlan, to_device
from vtprune_train.evaluation.timing import now
from vtprune_train.models.cache import cache_bytes
from vtprune_train.models.forward.attention import PREFIX, choose_backend
from vtprune_train.models.forward.decoder import PARAMETERS, run_layers
from vtprune_train.models.forward.padded import decode, prefill
from vtprune_train.models.io.method_parameters import fresh
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.candidates import EncoderSignals

DECODING_STEPS = 4  # of a repeat
TOWER_HIDDEN = 1024  # of the keys that methods before the decoder compare


@dataclass(frozen=True)
class Clocked:
    """One kind of work on one batch.

    Args:
        work: ``prefill`` (layers and cache), ``decoding step``, ``training step`` (forward and backward of the layers).
        batch: samples.
        dense, pruned: seconds, medians over the repeats.
        ratio: dense / pruned, the median over repeats of the two in the same one.
    """

    work: str
    batch: int
    dense: float
    pruned: float
    ratio: float


@dataclass(frozen=True)
class Clock:
    """What was measured.

    Args:
        device, dtype, threads, repeats: where and how.
        rows: every kind of work at every batch size.
        visual: one sample's visual tokens as the prefill took them, means over the layers.
        cache_bytes: keys and values after the prefill of one sample, dense and pruned.
        no_training: why no training step was run.
    """

    device: str
    dtype: str
    threads: int
    repeats: int
    rows: tuple[Clocked, ...]
    visual: VisualTokens
    cache_bytes: tuple[int, int]
    no_training: str | None


@dataclass
class _Side:
    """Dense or pruned: seconds of each repeat by kind of work, and what the last prefill left."""

    method: PruningMethod | None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cache_bytes: int = 0
    visual: VisualTokens | None = None

    def add(self, work: str, seconds: float, counts: bool) -> None:
        if counts:
            self.seconds.setdefault(work, []).append(seconds)


def clock(
    sizes: DecoderGeometry,
    method: PruningMethod | None,
    sample: Sample,
    batches: Sequence[int],
    *,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Clock:
    """Measure; a first repeat warms up and is thrown away, and the two change places from repeat to repeat.

    Raises:
        ValueError: the decoder does not fit into memory.
    """
    needed, free = _weight_bytes(sizes, dtype), _free_bytes(device)
    if needed > free:
        raise ValueError(f"--clock: {_memory(sizes, needed, free, device)}; clock it on a larger machine")
    no_training = None if 2 * needed <= free else _memory(sizes, 2 * needed, free, device)
    model = make_decoder(sizes, device, dtype)
    if method is not None and (own := fresh(method, model)) is not None:
        setattr(model, PARAMETERS, own)
    rows: list[Clocked] = []
    one: list[_Side] = []
    for batch in batches:
        sides = [_Side(None), _Side(method)]
        for repeat in range(repeats + 1):
            for side in sides if repeat % 2 else sides[::-1]:
                _generate(model, side, sample, batch, counts=repeat > 0)
                if no_training is None:
                    _train(model, side, sample, batch, counts=repeat > 0)
        rows += [_row(work, batch, sides) for work in sides[0].seconds]
        one = one or sides
    dense, pruned = one
    assert pruned.visual is not None
    cache = (dense.cache_bytes // batches[0], pruned.cache_bytes // batches[0])
    return Clock(
        str(device), str(dtype).removeprefix("torch."), torch.get_num_threads(), repeats, tuple(rows), pruned.visual,
        cache, no_training,
    )  # fmt: skip


def make_decoder(sizes: DecoderGeometry, device: torch.device, dtype: torch.dtype) -> LlamaModel:
    """A Llama decoder of ``sizes`` with random weights, in evaluation mode, on the packed attention of the device."""
    torch.manual_seed(0)
    with device:
        model = LlamaModel._from_config(_config(sizes, dtype), dtype=dtype).eval()
    model.config._attn_implementation = PREFIX + choose_backend("auto", device, dtype, sizes.head_dim)
    return model


def _config(sizes: DecoderGeometry, dtype: torch.dtype) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=sizes.num_layers, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, head_dim=sizes.head_dim,
        vocab_size=8, pad_token_id=None, max_position_embeddings=2**20, dtype=dtype,
    )  # fmt: skip


def _weight_bytes(sizes: DecoderGeometry, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        model = LlamaModel(_config(sizes, dtype))
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _memory(sizes: DecoderGeometry, needed: int, free: int, device: torch.device) -> str:
    return (
        f"{sizes.num_layers} layers of width {sizes.hidden} need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free "
        f"on {device}"
    )


@torch.no_grad()
def _generate(model: LlamaModel, side: _Side, sample: Sample, batch: int, counts: bool) -> None:
    """Prefill of a batch, and some decoding steps on its cache."""
    segments = [segment_of(sample)] * batch
    embeds, token = (_random(model, rows) for rows in (sum(segment.length for segment in segments), batch))
    encoder = _encoder(side.method, sample, batch, model.device)
    began = now(model.device)
    _, output, cache = prefill(model, side.method, embeds, segments, encoder=encoder)
    side.add("prefill", now(model.device) - began, counts)
    side.cache_bytes, taken = cache_bytes(cache), _taken(output.plan, cache, sample, batch)
    began = now(model.device)
    for _ in range(DECODING_STEPS):
        decode(model, side.method, token.unsqueeze(1), cache)
    side.add("decoding step", (now(model.device) - began) / DECODING_STEPS, counts)
    side.visual = taken


def _train(model: LlamaModel, side: _Side, sample: Sample, batch: int, counts: bool) -> None:
    """Forward and backward of the layers, the answer after each prompt."""
    plan = plan_pass([segment_of(sample, sample.answer)] * batch, len(model.layers), side.method)
    plan = to_device(plan, model.device)
    embeds = _random(model, plan.stages[0].num_tokens).requires_grad_()
    encoder = _encoder(side.method, sample, batch, model.device)
    model.train()
    began = now(model.device)
    output = run_layers(model, embeds, plan, side.method, encoder=encoder)
    model.norm(output.last_hidden_state).float().square().mean().backward()
    side.add("training step", now(model.device) - began, counts)
    model.zero_grad(set_to_none=True)
    model.eval()


def _random(model: LlamaModel, rows: int) -> Tensor:
    """[rows, C], the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, model.config.hidden_size, generator=generator).to(model.device, model.dtype)


def _encoder(method: PruningMethod | None, sample: Sample, batch: int, device: torch.device) -> EncoderSignals | None:
    """What a tower might say, where ``method`` asks; an image's tokens are dealt evenly to its tiles."""
    if method is None or not method.needs.encoder_layers:
        return None
    tiles: list[Tensor] = []
    base = 0
    for picture in sample.pictures * batch:
        number = picture.tiles or 1
        tiles.append(base + torch.arange(picture.tokens) * number // picture.tokens)
        base += number
    tile, generator = torch.cat(tiles), torch.Generator().manual_seed(1)
    attention = torch.rand(len(method.needs.encoder_layers), len(tile), generator=generator)
    keys = torch.randn(len(tile), TOWER_HIDDEN, generator=generator)
    return to_device(EncoderSignals(attention, keys, tile), device)  # type: ignore[no-any-return]


def _taken(plan: StreamPlan, cache: DynamicCache, sample: Sample, batch: int) -> VisualTokens:
    """One sample's visual tokens in a pass that has just filled ``cache``."""
    visual = [count / batch for count in visual_per_stage(plan)]
    cached = [float(layer.num_tokens().float().mean()) - sample.text for layer in cache.layers]  # type: ignore[attr-defined]
    measured = VisualTokens.of(visual, stage_layers(plan), [1.0] * len(cached))
    return VisualTokens(measured.entering, measured.leaving, statistics.mean(cached))


def _row(work: str, batch: int, sides: Sequence[_Side]) -> Clocked:
    dense, pruned = (side.seconds[work] for side in sides)
    ratio = statistics.median(whole / own for whole, own in zip(dense, pruned, strict=True))
    return Clocked(work, batch, statistics.median(dense), statistics.median(pruned), ratio)


def render(result: Clock) -> list[str]:
    """Lines below an estimate."""
    lines = [
        f"measured on {result.device} ({result.threads} threads) in {result.dtype}: a decoder of these sizes with "
        f"random weights, {result.repeats} repeats",
        f"{'':<28}{'batch':<7}{'dense':>12}{'pruned':>12}{'dense / pruned':>17}",
    ]
    for row in result.rows:
        lines.append(
            f"{f'{row.work}, layers':<28}{row.batch:<7}{_seconds(row.dense):>12}{_seconds(row.pruned):>12}"
            f"{row.ratio:>12.3f}x"
        )
    dense, pruned = result.cache_bytes
    lines.append(
        f"{'cache of the prompt':<28}{'MB':<7}{dense / 1e6:>12.3f}{pruned / 1e6:>12.3f}{dense / pruned:>12.3f}x"
    )
    visual = result.visual
    lines.append(
        f"visual tokens taken: enter {visual.entering:.1f}, leave {visual.leaving:.1f}, cached {visual.cached:.1f}"
    )
    if result.no_training:
        lines.append(f"no training step: with gradients {result.no_training}")
    return lines


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{1e3 * value:.2f} ms"
