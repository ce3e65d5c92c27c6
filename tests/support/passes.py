"""Random conversations through a tiny decoder: by the fast path, and by a slow one that a test brings."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from tests.support.helpers import tiny_model
from tests.support.packed import assert_close, random_segment
from vtprune_train.models.forward.attention import PREFIX
from vtprune_train.models.forward.decoder import run_layers

SHAPES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=3)  # images, turns
DECODERS = st.sampled_from([(4, "llama"), (2, "mistral"), (1, "qwen2")])


class ExactRotary(nn.Module):
    """The rotary tables in float64 (transformers makes them in float32), so that a pass differs by rounding alone."""

    def __init__(self, config):
        super().__init__()
        half = config.hidden_size // config.num_attention_heads // 2
        self.frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)

    def forward(self, hidden, position_ids):
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def text_model_of(seed=0, decoder=(2, "llama"), num_layers=6):
    """In float64: rounding must not decide which of two nearly equal tokens stays."""
    kv_heads, text_type = decoder
    model = tiny_model(seed, kv_heads=kv_heads, text_type=text_type, num_layers=num_layers).double().eval()
    text_model = model.model.language_model
    text_model.config._attn_implementation = PREFIX + "varlen_sdpa"
    text_model.rotary_emb = ExactRotary(text_model.config)
    return text_model


def random_batch_of(seed, shapes, plain=False):
    """Layouts (``plain``: without questions), and [T, 32] embeddings."""
    rng = np.random.default_rng(seed)
    segments = [random_segment(rng, images, turns, plain) for images, turns in shapes]
    return segments, torch.from_numpy(rng.standard_normal((sum(s.length for s in segments), 32)))


def fast(text_model, method, segments, embeds):
    """The last hidden states, and for each boundary the rows of the first stage that entered the next."""
    plan = method.plan(segments, len(text_model.layers))
    output = run_layers(text_model, embeds, plan, method)
    return output.last_hidden_state, [rows.tolist() for rows in output.origins]


def check_against(slow, text_model, method, segments, embeds):
    """``slow(text_model, segment, embeds of the segment) -> hidden, [offsets after each boundary]``, one by one."""
    with torch.no_grad():
        hidden, origins = fast(text_model, method, segments, embeds)
        expected, expected_origins, start = [], [[] for _ in origins], 0
        for segment in segments:
            own, stages = slow(text_model, segment, embeds[start : start + segment.length])
            assert len(stages) == len(origins)
            expected.append(own)
            for found, stage in zip(expected_origins, stages, strict=True):
                found += [start + offset for offset in stage]
            start += segment.length
    assert origins == expected_origins
    assert_close(hidden, torch.cat(expected), largest=1e-8, mean=1e-9)


def check_singly(text_model, method, segments, embeds):
    """A batch chooses and computes what each of its samples does alone."""
    with torch.no_grad():
        hidden, origins = fast(text_model, method, segments, embeds)
        alone, alone_origins, start = [], [[] for _ in origins], 0
        for segment in segments:
            own, stages = fast(text_model, method, [segment], embeds[start : start + segment.length])
            alone.append(own)
            for found, stage in zip(alone_origins, stages, strict=True):
                found += [start + offset for offset in stage]
            start += segment.length
    assert origins == alone_origins
    assert_close(hidden, torch.cat(alone), largest=1e-9, mean=1e-10)


def image_of(segment, offset):
    """Which image of a segment a token belongs to; ``None`` for text."""
    return next((i for i, span in enumerate(segment.spans) if span.start <= offset < span.end), None)


def ranking_rows(segment, alive):
    """Places in ``alive`` of the rows that rank; one that is an image's last token moves to its last remaining one."""
    return [max(place for place, offset in enumerate(alive) if offset <= query) for query in segment.query_offsets]


def best_of_each(segment, alive, worth, count):
    """Text, and of each image the ``count(image, present)`` worthiest tokens, the earlier of equals."""
    stay = [offset for offset in alive if image_of(segment, offset) is None]
    for image in range(len(segment.spans)):
        present = [offset for offset in alive if image_of(segment, offset) == image]
        stay += sorted(present, key=lambda o: (-worth[o], o))[: count(image, present)]
    return sorted(stay)
