"""``vtprune estimate --clock``: measures a decoder of the model's sizes on this machine, dense and pruned in turn.

No weights are read: a Llama decoder of the same sizes with random weights replaces the model's decoder, and random
vectors replace its images, text and tower attention. Methods that determine their counts while running depend on these
random scores, so the numbers of tokens are reported with the times.
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

DECODING_STEPS = 4  # per repeat
TOWER_HIDDEN = 1024  # width of the tower's keys, for methods before the decoder


@dataclass(frozen=True)
class Clocked:
    """Times of one kind of work at one batch size.

    Args:
        work: ``prefill`` (layers and cache), ``decoding step``, ``training step`` (forward and backward of the layers).
        batch: number of samples.
        dense, pruned: median seconds over the repeats.
        ratio: median over the repeats of dense / pruned in the same repeat.
    """

    work: str
    batch: int
    dense: float
    pruned: float
    ratio: float


@dataclass(frozen=True)
class Clock:
    """The measurements.

    Args:
        device, dtype, threads, repeats: conditions of the measurement.
        rows: one entry per kind of work and batch size.
        visual: visual tokens of one sample in the executed prefill, means over the layers.
        cache_bytes: keys and values after the prefill of one sample, dense and pruned.
        no_training: why no training step was measured; ``None`` if it was.
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
    """The dense or the pruned side: seconds of each repeat by kind of work, and results of the last prefill."""

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
    """Measure dense and pruned in alternating order. A first repeat for warm-up is discarded.

    Raises:
        ValueError: the decoder does not fit into memory, or is not Llama-like.
    """
    if sizes.linear is not None or sizes.router:
        kind = "linear attention" if sizes.linear is not None else "experts"
        raise ValueError(f"--clock: only Llama-like decoders can be timed, and this one has {kind}; leave --clock out")
    needed, free = _weight_bytes(sizes, dtype), _free_bytes(device)
    if needed > free:
        raise ValueError(f"--clock: {_memory(sizes, needed, free, device)}; run --clock on a larger machine")
    no_training = None if 2 * needed <= free else _memory(sizes, 2 * needed, free, device)
    model = make_decoder(sizes, device, dtype)
    if method is not None and (parameters := fresh(method, model)) is not None:
        setattr(model, PARAMETERS, parameters)
    rows: list[Clocked] = []
    first: list[_Side] = []
    for batch in batches:
        sides = [_Side(None), _Side(method)]
        for repeat in range(repeats + 1):
            for side in sides if repeat % 2 else sides[::-1]:
                _generate(model, side, sample, batch, counts=repeat > 0)
                if no_training is None:
                    _train(model, side, sample, batch, counts=repeat > 0)
        rows += [_row(work, batch, sides) for work in sides[0].seconds]
        first = first or sides
    dense, pruned = first
    assert pruned.visual is not None
    cache = (dense.cache_bytes // batches[0], pruned.cache_bytes // batches[0])
    return Clock(
        str(device), str(dtype).removeprefix("torch."), torch.get_num_threads(), repeats, tuple(rows), pruned.visual,
        cache, no_training,
    )  # fmt: skip


def make_decoder(sizes: DecoderGeometry, device: torch.device, dtype: torch.dtype) -> LlamaModel:
    """A Llama decoder of ``sizes`` with random weights, in evaluation mode, with the best packed attention for the
    device."""
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
    """Measure the prefill of a batch and some decoding steps."""
    segments = [segment_of(sample)] * batch
    embeds, token = (_random(model, rows) for rows in (sum(segment.length for segment in segments), batch))
    encoder = _encoder(side.method, sample, batch, model.device)
    start = now(model.device)
    _, output, cache = prefill(model, side.method, embeds, segments, encoder=encoder)
    side.add("prefill", now(model.device) - start, counts)
    side.cache_bytes, visual = cache_bytes(cache), _visual_tokens(output.plan, cache, sample, batch)
    start = now(model.device)
    for _ in range(DECODING_STEPS):
        decode(model, side.method, token.unsqueeze(1), cache)
    side.add("decoding step", (now(model.device) - start) / DECODING_STEPS, counts)
    side.visual = visual


def _train(model: LlamaModel, side: _Side, sample: Sample, batch: int, counts: bool) -> None:
    """Measure forward and backward of the layers, with an answer after each prompt."""
    plan = plan_pass([segment_of(sample, sample.answer)] * batch, len(model.layers), side.method)
    plan = to_device(plan, model.device)
    embeds = _random(model, plan.stages[0].num_tokens).requires_grad_()
    encoder = _encoder(side.method, sample, batch, model.device)
    model.train()
    start = now(model.device)
    output = run_layers(model, embeds, plan, side.method, encoder=encoder)
    model.norm(output.last_hidden_state).float().square().mean().backward()
    side.add("training step", now(model.device) - start, counts)
    model.zero_grad(set_to_none=True)
    model.eval()


def _random(model: LlamaModel, rows: int) -> Tensor:
    """[rows, C] random values, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, model.config.hidden_size, generator=generator).to(model.device, model.dtype)


def _encoder(method: PruningMethod | None, sample: Sample, batch: int, device: torch.device) -> EncoderSignals | None:
    """Random signals of a vision tower if ``method`` needs them; an image's tokens are divided evenly among its
    tiles."""
    if method is None or not method.needs.from_tower:
        return None
    tiles: list[Tensor] = []
    base = 0
    for image in sample.images * batch:
        number = image.tiles or 1
        tiles.append(base + torch.arange(image.tokens) * number // image.tokens)
        base += number
    tile, generator = torch.cat(tiles), torch.Generator().manual_seed(1)
    attention = torch.rand(len(method.needs.encoder_layers), len(tile), generator=generator)
    keys = torch.randn(len(tile), TOWER_HIDDEN, generator=generator)
    features = torch.randn(len(tile), TOWER_HIDDEN, generator=generator) if method.needs.encoder_features else None
    return to_device(EncoderSignals(attention, keys, tile, features), device)  # type: ignore[no-any-return]


def _visual_tokens(plan: StreamPlan, cache: DynamicCache, sample: Sample, batch: int) -> VisualTokens:
    """The visual tokens of one sample in the pass that filled ``cache``."""
    visual = [count / batch for count in visual_per_stage(plan)]
    cached = [float(layer.num_tokens().float().mean()) - sample.text for layer in cache.layers]  # type: ignore[attr-defined]
    measured = VisualTokens.of(visual, stage_layers(plan), [1.0] * len(cached))
    return VisualTokens(measured.entering, measured.leaving, statistics.mean(cached))


def _row(work: str, batch: int, sides: Sequence[_Side]) -> Clocked:
    dense, pruned = (side.seconds[work] for side in sides)
    ratio = statistics.median(one / two for one, two in zip(dense, pruned, strict=True))
    return Clocked(work, batch, statistics.median(dense), statistics.median(pruned), ratio)


def render(result: Clock) -> list[str]:
    """The measurements as lines of a report."""
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
        lines.append(f"training step not measured: with gradients, {result.no_training}")
    return lines


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{1e3 * value:.2f} ms"
