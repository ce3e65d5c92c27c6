"""Random packed batches, and what a model makes of them."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.helpers import tiny_model
from vtprune_train import prune
from vtprune_train.core.plan import plan_stream
from vtprune_train.core.stream import ImageSpan, PackedBatch, SegmentLayout
from vtprune_train.models.families.llava_next import AnyRes

IMAGE_ID = 4


def assert_close(ours, theirs, largest=2e-5, mean=2e-6):
    """The largest difference, and the mean residual, so that a small systematic drift shows too."""
    difference = (ours - theirs).abs()
    assert difference.max() <= largest, difference.max()
    assert difference.mean() <= mean, difference.mean()


def random_segment(rng: np.random.Generator, num_images: int, num_turns: int, plain: bool = False) -> SegmentLayout:
    """A conversation: images spread over turns, a question and an answer each."""
    images = sorted(rng.integers(0, num_turns, num_images).tolist())
    spans, queries, supervised, offset = [], [], [], 1
    for turn in range(num_turns):
        for _ in range(images.count(turn)):
            length = int(rng.integers(8, 30))
            spans.append(ImageSpan(offset, length))
            offset += length
        offset += 0 if plain else int(rng.integers(2, 6))
        queries.append(offset - 1)
        answer = int(rng.integers(1, 4))
        supervised += range(offset, offset + answer)
        offset += answer
    return SegmentLayout(offset, tuple(spans), tuple(queries), tuple(supervised))


def random_batch(model, segments, seed=0) -> PackedBatch:
    """Token ids and feature rows for given layouts (pixels: as many tiles as the longest image needs)."""
    rng = np.random.default_rng(seed)
    anyres = AnyRes.of(model.config)
    ids, rows, start, targets = [], [], 0, []
    for segment in segments:
        tokens = rng.integers(5, 64, segment.length)
        for span in segment.spans:
            tokens[span.start : span.end] = IMAGE_ID
            rows.append(np.arange(start + span.start, start + span.end))
        ids.append(tokens)
        targets.append(tokens[list(segment.supervised_offsets)])
        start += segment.length
    visual_rows = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    tiles = 3
    table = tiles * anyres.patches_per_tile + 1
    targets = np.concatenate(targets)
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        visual_rows=torch.from_numpy(visual_rows),
        visual_index=torch.from_numpy(rng.integers(0, table, len(visual_rows))),
        pixel_values=torch.from_numpy(rng.standard_normal((tiles, 3, 28, 28), dtype=np.float32)),
        plan=plan_stream(segments, (), len(model.model.language_model.layers)),
        targets=torch.from_numpy(targets),
        answer_of_target=torch.zeros(len(targets), dtype=torch.int64),
        num_answers=1,
    )


def loss_and_grads(model, batch):
    model.zero_grad(set_to_none=True)
    output = model(batch)
    output.loss_sum.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss_sum.detach(), grads


def pruned(method, seed=0, **config):
    model = tiny_model(seed, **config)
    model.train()
    return prune(model, method)


class Forbid(TorchDispatchMode):
    """Fails on what would copy from device to host, or make a shape depend on data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in self.FORBIDDEN or (name in ("index", "index_put_") and any(_is_mask(i) for i in args[1])):
            raise AssertionError(f"{name} synchronises with the host")
        return func(*args, **(kwargs or {}))


def _is_mask(index):
    return index is not None and index.dtype in (torch.bool, torch.uint8)
