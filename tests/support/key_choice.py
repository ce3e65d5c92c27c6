"""A decoder and prompts for methods that choose keys."""

from __future__ import annotations

from tests.support.helpers import tiny_model
from tests.support.passes import ExactRotary
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.attention import PREFIX


def packed_decoder(seed, **config):
    """In float64, rotary tables included: rounding must not decide which of two nearly equal keys stays."""
    model = tiny_model(seed, **config).double().eval()
    text_model = model.model.language_model
    text_model.rotary_emb = ExactRotary(text_model.config)
    text_model.config._attn_implementation = PREFIX + "varlen_sdpa"
    return text_model


def spans_of(segment):
    return [(span.start, span.length) for span in segment.spans]


def random_prompt(rng, num_images):
    """Images and text in any order; the last token is text and ranks."""
    offset, spans = int(rng.integers(1, 4)), []
    for _ in range(num_images):
        spans.append(ImageSpan(offset, int(rng.integers(5, 20))))
        offset = spans[-1].end + int(rng.integers(0, 4))
    length = offset + int(rng.integers(1, 6))
    return SegmentLayout(length, tuple(spans), (length - 1,))


TURNS = [
    [["user", 0, "what is shown ? assistant :"], ["is the dog red ?"]],
    [["and", 1, "left ? assistant :"], ["and here", 2, "no ?"]],
    [["a red cat ?"], ["round", 3, "yes assistant :"]],
]
