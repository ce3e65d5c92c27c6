"""Methods that leave keys out against their slow references: a training pass, and decoding after a prefill."""

from __future__ import annotations

import torch

from tests.support.key_choice import spans_of
from tests.support.key_reference import masked_forward
from tests.support.packed import assert_close
from vtprune_train.models.forward.decoder import run_layers
from vtprune_train.models.forward.padded import decode, prefill


def check_pass(text_model, method, segments, reference, rng):
    """A packed stream in training equals each segment by itself.

    ``reference(spans, queries)`` makes the ``choose`` of :func:`masked_forward`.
    """
    embeds = torch.from_numpy(rng.standard_normal((sum(segment.length for segment in segments), 32)))
    num_layers = len(text_model.layers)
    expected, start = [], 0
    with torch.no_grad():
        output = run_layers(text_model, embeds, method.plan(segments, num_layers), method)
        for segment in segments:
            own = embeds[start : start + segment.length]
            expected.append(_alone(text_model, method, own, segment, reference))
            start += segment.length
    assert_close(output.last_hidden_state, torch.cat(expected), largest=1e-9, mean=1e-10)


def check_decoding(text_model, method, segments, reference, rng):
    """Two tokens decoded behind a batch of prompts equal each row by itself.

    Returns:
        For each layer behind the prefill, the cache's columns and the most tokens that a row holds there.
    """
    embeds = torch.from_numpy(rng.standard_normal((sum(segment.length for segment in segments), 32)))
    more = torch.from_numpy(rng.standard_normal((len(segments), 2, 32)))
    with torch.no_grad():
        _, _, cache = prefill(text_model, method, embeds, segments)
        widths = [(layer.width, int(layer.num_tokens().max())) for layer in cache.layers]
        decoded = torch.cat([decode(text_model, method, more[:, i : i + 1], cache) for i in range(2)], dim=1)
        start = 0
        for row, segment in enumerate(segments):
            own = torch.cat([embeds[start : start + segment.length], more[row]])
            expected = _alone(text_model, method, own, segment, reference)
            assert_close(decoded[row], text_model.norm(expected[-2:]), largest=1e-9, mean=1e-10)
            start += segment.length
    return widths


def _alone(text_model, method, own, segment, reference):
    spans, queries = spans_of(segment), list(segment.query_offsets)
    layers = method.key_layers(len(text_model.layers))
    return masked_forward(text_model, own, spans, queries, layers, "query", reference(spans, queries))
