"""VoCo-LLaMA: a summary behind each image is all of it that text sees; against one written with loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.families import FAMILIES, SPECIAL, family_inputs, family_model
from tests.support.helpers import tiny_model
from tests.support.slow_learned import TOLERANCE, compared, slow_voco
from vtprune_train import prune
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models.forward.padded import decode, prefill
from vtprune_train.models.patch import saved_method
from vtprune_train.pruning.candidates import Ranking
from vtprune_train.pruning.methods.voco import VoCo

HIDE = st.sampled_from(["all_before", "image"])
TEXTS = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"], ["a dog ?"]]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 9999),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    HIDE,
)
def test_equals_the_loops(seed, images, tokens, kv_heads, hide):
    def slow(text_model, module, embeds, segment):
        return slow_voco(text_model, embeds, segment.spans, module.weight, hide)

    gradients = compared(VoCo(tokens=tokens, hide=hide), images, seed, kv_heads, slow)
    assert (gradients[1].abs().sum() > 0) == (sum(images) > 0)


def test_a_checkpoint_saved_before_hide_was_a_setting_hides_the_image():
    model = tiny_model()
    model.config.pruning = {"method": "voco", "tokens": 1}
    assert saved_method(model) == VoCo(tokens=1, hide="image")
    model.config.pruning = {"method": [{"method": "fastv"}, {"method": "voco", "tokens": 2}]}
    assert saved_method(model).methods[1] == VoCo(tokens=2, hide="image")
    model.config.pruning = VoCo().settings()
    assert saved_method(model) == VoCo(hide="all_before")


def test_only_summaries_are_kept():
    method = VoCo(tokens=2)
    plan = method.plan([SegmentLayout(9, (ImageSpan(0, 3), ImageSpan(3, 2)), (7,)), SegmentLayout(2)], 3)
    ranking = Ranking(torch.zeros(1, 4, 8), torch.zeros(15, 2, 8), 1.0)
    kept = method.keys(1, ranking, plan.key_layouts[-1])
    assert kept.tolist() == [[False, False, False, True, True, False, False, True, True]] * 2


def random_prompt(rng: np.random.Generator, num_images: int) -> SegmentLayout:
    offset, spans = int(rng.integers(0, 4)), []
    for _ in range(num_images):
        spans.append(ImageSpan(offset, int(rng.integers(2, 9))))
        offset = spans[-1].end + int(rng.integers(0, 3))
    length = offset + int(rng.integers(1, 4))
    return SegmentLayout(length, tuple(spans), (length - 1,))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 9999),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(1, 3),
    HIDE,
)
def test_turns_of_a_batch_and_decoding_equal_the_loops_over_each_conversation(seed, rows, tokens, hide):
    """Rows with images in any turn, or in none, on one cache; then three decoded tokens, against single masked passes
    over all that was said."""
    rng = np.random.default_rng(seed)
    model = prune(tiny_model(seed).double().eval(), VoCo(tokens=tokens, hide=hide))
    method, text_model = VoCo(tokens=tokens, hide=hide), model.model.language_model
    turns = max(len(row) for row in rows)
    layouts = [[random_prompt(rng, n) for n in [*row, *[0] * (turns - len(row))]] for row in rows]
    embeds = [[torch.from_numpy(rng.standard_normal((s.length, 32))) for s in row] for row in layouts]
    more = torch.from_numpy(rng.standard_normal((len(rows), 3, 32)))
    cache = None
    with torch.no_grad():
        for turn in range(turns):
            stream = torch.cat([row[turn] for row in embeds])
            _, _, cache = prefill(text_model, method, stream, [row[turn] for row in layouts], cache)
        decoded = torch.cat([decode(text_model, method, more[:, i : i + 1], cache) for i in range(3)], dim=1)
        for row, (segments, parts) in enumerate(zip(layouts, embeds, strict=True)):
            spans, start = [], 0
            for segment in segments:
                spans += [ImageSpan(start + span.start, span.length) for span in segment.spans]
                start += segment.length
            whole = torch.cat([*parts, more[row]])
            expected = slow_voco(text_model, whole, spans, text_model.pruning.weight, hide)
            torch.testing.assert_close(decoded[row], text_model.norm(expected[-3:]), **TOLERANCE)
            front = spans[0].start if spans and hide == "all_before" else 0
            left = len(whole) - sum(span.length for span in spans) - front + tokens * len(spans)
            assert all(int(layer.num_tokens()[row]) == left for layer in cache.layers)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("qwen3_5")])  # a state has no keys
def test_every_family_generates_on_what_is_left(family):
    """Left-padded rows: generation on the cache equals passes without one, and layers hold what follows the first
    image's own tokens alone."""
    model = prune(family_model(family), VoCo())
    inputs = family_inputs(
        family, [["user what is", 0, "shown ? assistant :"], ["a red", 1, "and", 2, "two ?"], ["a ?"]]
    )
    settings = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": list(range(len(SPECIAL)))}
    with torch.no_grad():
        made = model.generate(**inputs, **settings)
        assert torch.equal(made, model.generate(**inputs, **settings, use_cache=False))
        cache = model(**inputs, use_cache=True).past_key_values
    image = model.config.image_token_id
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    text = mask & (ids != image)
    first = (ids == image).int().argmax(dim=1) * (ids == image).any(dim=1)
    behind = (text & (torch.arange(ids.shape[1]) >= first[:, None])).sum(dim=1)
    for layer in cache.layers:
        assert layer.num_tokens().tolist() == (behind + 2 * torch.tensor([1, 2, 0])).tolist()


def test_the_cache_shrinks_to_the_summaries():
    """In every layer each row has its text and one token an image; a row without images is what it was."""
    model = prune(family_model("llava_next"), VoCo(tokens=1, hide="image"))
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
    with pytest.raises(ValueError, match=r"cannot be fitted to a share such as 0\.25; set tokens"):
        VoCo().for_budget(0.25, 32)


def test_hide_is_one_of_two():
    with pytest.raises(ValueError, match="hide='text' is not one of all_before, image"):
        VoCo(hide="text")


@pytest.mark.parametrize("tokens", [0, -1, 2.0, True])
def test_wrong_settings(tokens):
    with pytest.raises(ValueError, match=f"tokens={tokens}"):
        VoCo(tokens=tokens)
