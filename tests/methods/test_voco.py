"""VoCo-LLaMA: a summary behind each image is all of it that text sees; against one written with loops."""

import pytest
import torch
from families import family_inputs, family_model
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_learned import compared, slow_voco

from vtprune_train import prune
from vtprune_train.pruning.base import Ranking
from vtprune_train.pruning.voco import VoCo
from vtprune_train.stream import ImageSpan, SegmentLayout

TEXTS = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"], ["a dog ?"]]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 9999),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
)
def test_equals_the_loops(seed, images, tokens, kv_heads):
    def slow(text_model, module, embeds, segment):
        return slow_voco(text_model, embeds, segment.spans, module.weight)

    gradients = compared(VoCo(tokens=tokens), images, seed, kv_heads, slow)
    assert (gradients[1].abs().sum() > 0) == (sum(images) > 0)


def test_only_summaries_are_kept():
    method = VoCo(tokens=2)
    plan = method.plan([SegmentLayout(9, (ImageSpan(0, 3), ImageSpan(3, 2)), (7,)), SegmentLayout(2)], 3)
    ranking = Ranking(torch.zeros(1, 4, 8), torch.zeros(15, 2, 8), 1.0)
    kept = method.keys(1, ranking, plan.key_layouts[-1])
    assert kept.tolist() == [[False, False, False, True, True, False, False, True, True]] * 2


def test_the_cache_shrinks_to_the_summaries():
    """In every layer each row has its text and one token an image; a row without images is what it was."""
    model = prune(family_model("llava_next"), VoCo())
    inputs = family_inputs("llava_next", TEXTS)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    image = model.config.image_token_id
    text = (inputs["attention_mask"].bool() & (inputs["input_ids"] != image)).sum(dim=1)
    images = torch.tensor([1, 2, 0])
    for layer in cache.layers:
        assert layer.num_tokens().tolist() == (text + images).tolist()
        assert layer.keys.shape[2] < inputs["input_ids"].shape[1] // 2


def test_no_budget():
    assert VoCo().input_share(32) < 1e-3
    with pytest.raises(ValueError, match=r"which is no share such as 0\.25; set tokens"):
        VoCo().for_budget(0.25, 32)


@pytest.mark.parametrize("tokens", [0, -1, 2.0, True])
def test_wrong_settings(tokens):
    with pytest.raises(ValueError, match=f"tokens={tokens}"):
        VoCo(tokens=tokens)
