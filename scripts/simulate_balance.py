"""Simulate load balance across ranks for the published length-grouped sampler, random order, and our sampler.

    python scripts/simulate_balance.py                        # 8 to 4096 ranks, a few minutes
    python scripts/simulate_balance.py --ranks 512 --json balance.json

Ranks synchronize after every micro-step (ZeRO-3 gathers weights in every layer, ZeRO-2 reduces gradients in every
micro-step), so a step takes as long as the slowest rank in each micro-step. "max / mean" is the step time relative to
perfectly balanced FLOPs. With ZeRO-0 and 1, ranks synchronize once per step ("once").

Samples are synthetic. Visual tokens are computed from image sizes with AnyRes. Costs are the FLOPs of LLaVA-NeXT-7B
(forward and backward, all parameters trained) with PyramidDrop's published schedule.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vtprune_train.core.flops import DecoderGeometry, TowerGeometry, TrainingCost, layers_per_stage, stage_lengths
from vtprune_train.data.plan.dealing import deal
from vtprune_train.models.families.llava_next import AnyRes
from vtprune_train.pruning.methods.pyramiddrop import PyramidDrop

LLAVA_NEXT_7B = TrainingCost(
    DecoderGeometry(32, 4096, 11008, 32, 32, 128, 32064),
    TowerGeometry(23, 1024, 4096, 576, 14, 1024, 4096),
    trains_decoder=True,
    trains_tower=True,
)
ANYRES = AnyRes(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), 336, 14)
# LLaVA-NeXT's data have about 2,268 visual and 121 text tokens a sample (arXiv 2410.17247, average lengths of stages).
TEXT_ONLY = 0.05  # share of samples without an image, as in the published mixes (ShareGPT)
# Image kinds: share, mean (height, width), standard deviation of log aspect ratio and of log size.
IMAGES = (
    (0.51, (480, 640), 0.12, 0.10),  # photographs (COCO, Visual Genome), landscape
    (0.12, (640, 480), 0.10, 0.10),  # photographs, portrait
    (0.16, (800, 800), 0.06, 0.25),  # squares
    (0.10, (1600, 1240), 0.15, 0.25),  # documents
    (0.04, (220, 300), 0.25, 0.20),  # small images
    (0.07, (400, 1000), 0.30, 0.25),  # wide charts, strips of text
)
PROMPT = 40  # tokens of the system prompt and the roles of one turn
# Tokens per turn are log-normal (mean, sigma); the number of turns is geometric with this mean.
WITH_IMAGE, IMAGE_TURNS = (27.0, 1.0), 1.8
WITHOUT, TEXT_TURNS = (160.0, 0.9), 3.5
LONGEST = 4096


@dataclass
class Mix:
    """[samples] text tokens, visual tokens, tiles, and supervised tokens."""

    text: np.ndarray
    visual: np.ndarray
    tiles: np.ndarray
    supervised: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        return self.text + self.visual

    def cost(self, method: PyramidDrop | None) -> np.ndarray:
        """[samples] FLOPs of forward and backward."""
        return pass_cost(self.text, self.visual, self.tiles, self.supervised, method)


def pass_cost(
    text: np.ndarray, visual: np.ndarray, tiles: np.ndarray, supervised: np.ndarray, method: PyramidDrop | None
) -> np.ndarray:
    """[samples] FLOPs of samples with (at most) one image each."""
    num_layers = LLAVA_NEXT_7B.decoder.num_layers
    drops = method.drops(num_layers) if method is not None else ()
    lengths = stage_lengths(text, visual, np.arange(len(text)), drops)
    return LLAVA_NEXT_7B.sample(lengths, layers_per_stage(drops, num_layers), tiles, supervised)


def draw_mix(count: int, rng: np.random.Generator) -> Mix:
    """``count`` samples of a mix like LLaVA-NeXT's instruction data."""
    has_image = rng.random(count) >= TEXT_ONLY
    visual, tiles = draw_images(count, rng)
    visual, tiles = visual * has_image, tiles * has_image
    turns = rng.geometric(1 / np.where(has_image, IMAGE_TURNS, TEXT_TURNS))
    mean = np.where(has_image, WITH_IMAGE[0], WITHOUT[0]) * turns
    sigma = np.where(has_image, WITH_IMAGE[1], WITHOUT[1]) / np.sqrt(turns)
    words = np.exp(rng.normal(np.log(mean) - sigma**2 / 2, sigma))
    text = np.clip(PROMPT + 10 * (turns - 1) + words, PROMPT + 2, LONGEST - visual).astype(np.int64)
    return Mix(text, visual, tiles, np.maximum(1, (text - PROMPT) * 6 // 10))


def draw_images(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[count] visual tokens and tiles of drawn image sizes (rounded to 20 pixels: AnyRes works on each size once)."""
    kind = rng.choice(len(IMAGES), count, p=[share for share, *_ in IMAGES])
    height, width = np.array([size for _, size, _, _ in IMAGES], dtype=float)[kind].T
    aspect, size = (rng.normal(0, np.array([row[i] for row in IMAGES])[kind]) for i in (2, 3))
    sides = np.stack([height * np.exp(size - aspect / 2), width * np.exp(size + aspect / 2)], axis=1)
    sides = np.maximum(40, np.round(sides / 20) * 20).astype(np.int64)
    different, which = np.unique(sides, axis=0, return_inverse=True)
    tokens = np.array([len(ANYRES.visual_index((h, w))) for h, w in different.tolist()])
    tiles = np.array([ANYRES.num_tiles((h, w)) for h, w in different.tolist()])
    return tokens[which.ravel()], tiles[which.ravel()]


Step = list[list[np.ndarray]]  # [micro-steps][ranks] samples


def random_order(mix: Mix, ranks: int, batch: int, micro: int, rng: np.random.Generator) -> Iterator[Step]:
    """Random order, ``micro`` samples per rank and micro-step."""
    order = rng.permutation(len(mix.text))
    for start in range(0, len(order), ranks * batch):
        yield rows(order[start : start + ranks * batch], ranks, micro)


def published_order(mix: Mix, ranks: int, batch: int, micro: int, rng: np.random.Generator) -> Iterator[Step]:
    """LLaVA's ``group_by_modality_length``: mega-batches of one modality, sorted by the number of words (images do
    not count), split so that chunks have equal counts and about equal words. ``accelerate`` assigns chunks to ranks in
    order. Leftover samples come last, mixed and unsorted."""
    mega = ranks * batch
    whole: list[list[int]] = []
    rest: list[int] = []
    for modality in (mix.visual > 0, mix.visual == 0):
        members = rng.permutation(np.flatnonzero(modality))
        parts = [members[start : start + mega] for start in range(0, len(members), mega)]
        chunked = [
            even_chunks(part[np.argsort(-mix.text[part], kind="stable")], mix.text, mega // micro) for part in parts
        ]
        rest += chunked.pop() if chunked else []
        whole += chunked
    order = [sample for number in rng.permutation(len(whole)).tolist() for sample in whole[number]] + sorted(rest)
    for start in range(0, len(order), mega):
        yield rows(np.array(order[start : start + mega]), ranks, micro)


def even_chunks(members: np.ndarray, lengths: np.ndarray, chunks: int) -> list[int]:
    """Sorted samples, each to the shortest chunk that is not full (the published ``split_to_even_chunks``, with a heap
    instead of its search), one chunk after another. If they cannot be split evenly, they are assigned round-robin."""
    if len(members) % chunks:
        return np.concatenate([members[start::chunks] for start in range(chunks)]).tolist()
    full = len(members) // chunks
    heap = [(0, number) for number in range(chunks)]
    held: list[list[int]] = [[] for _ in range(chunks)]
    for sample, length in zip(members.tolist(), lengths[members].tolist(), strict=True):
        filled, number = heap[0]
        held[number].append(sample)
        if len(held[number]) == full:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (filled + length, number))
    return [sample for chunk in held for sample in chunk]


def rows(order: np.ndarray, ranks: int, micro: int) -> Step:
    """Samples in order: ``micro`` to each rank in turn, micro-step after micro-step."""
    return [list(part.reshape(ranks, micro)) for part in order.reshape(-1, ranks * micro)]


@dataclass
class Result:
    """Results of one sampler; the best possible ratio is 1."""

    sampler: str
    ranks: int
    max_over_mean: float  # time of all steps / time with perfectly balanced FLOPs
    worst_step: float
    once: float  # the same if ranks synchronize once per step
    micro_steps: float
    most_tokens: int  # of a micro-batch, before dropping, including padding
    padding: float  # FLOPs with padding / without
    plan_ms: float  # median CPU time to plan one step
    throughput: float = 1.0  # steps in the same time, ours = 1


def measure(
    name: str, steps: Iterator[Step], mix: Mix, ranks: int, cost: np.ndarray, method: PyramidDrop | None, pads: bool
) -> Result:
    """Simulate all steps of one sampler."""
    slowest, even, once, counts, times, tokens = [], [], [], [], [], 0.0
    useful, padded = 0.0, 0.0
    while True:
        began = time.process_time()
        step = next(steps, None)
        times.append(time.process_time() - began)
        if step is None:
            break
        done = np.array([micro_step_cost(micro, mix, cost, method, pads) for micro in step])  # [micro-steps, ranks]
        step_flops = sum(float(summed(micro, cost).sum()) for micro in step)
        useful, padded = useful + step_flops, padded + float(done.sum())
        slowest.append(done.max(axis=1).sum())
        once.append(done.sum(axis=0).max())
        even.append(step_flops / ranks)
        counts.append(len(step))
        tokens = max(tokens, *(most_tokens(micro, mix, pads) for micro in step))
    return Result(
        name, ranks,
        max_over_mean=sum(slowest) / sum(even),
        worst_step=float((np.array(slowest) / np.array(even)).max()),
        once=sum(once) / sum(even),
        micro_steps=float(np.mean(counts)),
        most_tokens=int(tokens),
        padding=padded / useful,
        plan_ms=1000 * float(np.median(times[:-1])),
    )  # fmt: skip


def micro_step_cost(
    micro: list[np.ndarray], mix: Mix, cost: np.ndarray, method: PyramidDrop | None, pads: bool
) -> np.ndarray:
    """[ranks] FLOPs of a micro-step; padding samplers pad each sample to the longest one in its micro-batch."""
    if not pads:
        return summed(micro, cost)
    held = np.stack(micro)  # [ranks, samples]
    text = np.broadcast_to(mix.text[held].max(axis=1, keepdims=True), held.shape).ravel()
    visual = np.broadcast_to(mix.visual[held].max(axis=1, keepdims=True), held.shape).ravel()
    flat = held.ravel()
    return pass_cost(text, visual, mix.tiles[flat], mix.supervised[flat], method).reshape(held.shape).sum(axis=1)


def most_tokens(micro: list[np.ndarray], mix: Mix, pads: bool) -> float:
    """Maximum tokens of any micro-batch in a micro-step."""
    if pads:
        held = np.stack(micro)
        return float(mix.tokens[held].max() * held.shape[1])
    return float(summed(micro, mix.tokens).max())


def summed(micro: list[np.ndarray], values: np.ndarray) -> np.ndarray:
    """[ranks] the sum over each micro-batch; some may be empty."""
    rank = np.repeat(np.arange(len(micro)), [len(samples) for samples in micro])
    return np.bincount(rank, weights=values[np.concatenate(micro)], minlength=len(micro))


def our_order(
    mix: Mix, cost: np.ndarray, ranks: int, batch: int, max_tokens: int, rng: np.random.Generator
) -> Iterator[Step]:
    """Random order; within each step, samples are assigned by cost with a token limit."""
    order, tokens = rng.permutation(len(mix.text)), mix.tokens
    for start in range(0, len(order), ranks * batch):
        step = order[start : start + ranks * batch]
        assignment = deal(tokens[step], cost[step], ranks, max_tokens)
        yield [[step[list(samples)] for samples in micro] for micro in assignment]


def simulate(options: argparse.Namespace, ranks: int, say: Callable[[str], None]) -> list[Result]:
    """Run all samplers on the same samples."""
    method = None if options.dense else PyramidDrop()
    mix = draw_mix(ranks * options.batch * options.steps, np.random.default_rng([options.seed, ranks]))
    cost = mix.cost(method)
    tiles = "/".join(f"{(mix.tiles == n).mean():.2f}" for n in (3, 4, 5))
    say(
        f"{ranks} ranks: {len(cost)} samples, {mix.visual.mean():.0f} visual and {mix.text.mean():.0f} text tokens "
        f"each (3/4/5 tiles: {tiles})"
    )
    results = []
    for name, order, pads in (
        ("published, as padded", published_order, True),
        ("published", published_order, False),
        ("random", random_order, False),
    ):
        steps = order(mix, ranks, options.batch, options.micro_batch, np.random.default_rng(options.seed))
        results.append(measure(name, steps, mix, ranks, cost, method, pads))
    steps = our_order(mix, cost, ranks, options.batch, options.max_tokens, np.random.default_rng(options.seed))
    results.append(measure("ours", steps, mix, ranks, cost, method, False))
    for result in results:
        result.throughput = results[-1].max_over_mean / result.max_over_mean
    return results


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    lines = [
        "| ranks | sampler | max / mean | worst step | once a step | throughput | micro-steps | most tokens | "
        "FLOPs with padding | planning, ms a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.ranks} | {r.sampler} | {r.max_over_mean:.3f} | {r.worst_step:.3f} | {r.once:.3f} | {r.throughput:.2f} | "
        f"{r.micro_steps:.1f} | {r.most_tokens} | {r.padding:.2f} | {_planning(r)} |"
        for r in results
    ]
    return "\n".join(lines)


def _planning(result: Result) -> str:
    """The other samplers order a whole epoch in advance, so only ours has a per-step planning time."""
    return f"{result.plan_ms:.0f}" if result.sampler == "ours" else ""


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    many = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    parser.add_argument("--ranks", type=positive, nargs="+", default=None, help=f"numbers of ranks; default {many}")
    parser.add_argument("--batch", type=positive, default=16, help="samples per rank and step")
    parser.add_argument("--micro_batch", type=positive, default=4, help="micro-batch size of the other samplers")
    parser.add_argument(
        "--max_tokens", type=positive, default=16384, help="token limit of our sampler, data.max_tokens"
    )
    parser.add_argument("--steps", type=positive, default=20, help="steps at each number of ranks (20)")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--dense", action="store_true", help="count costs without dropping")
    parser.add_argument("--quick", action="store_true", help="8 and 64 ranks, 4 steps")
    parser.add_argument("--json", type=Path, help="write results to this JSON file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.ranks, options.steps = options.ranks or [8, 64], min(options.steps, 4)
    options.ranks = options.ranks or many
    if options.batch % options.micro_batch:
        parser.error(f"--batch {options.batch} is not a multiple of --micro_batch {options.micro_batch}")
    if options.max_tokens < LONGEST:
        parser.error(f"--max_tokens {options.max_tokens} is smaller than the longest possible sample ({LONGEST})")
    if options.seed < 0:
        parser.error(f"--seed {options.seed} is negative")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    results = [
        r for ranks in options.ranks for r in simulate(options, ranks, lambda line: print(line, file=sys.stderr))
    ]
    print(table(results))
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"settings": settings, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
