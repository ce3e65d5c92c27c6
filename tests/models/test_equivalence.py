"""What must hold between the fast path and slower, obvious ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.helpers import tiny_model
from tests.support.packed import Forbid, assert_close, loss_and_grads, pruned, random_batch, random_segment
from tests.support.reference import pyramiddrop
from vtprune_train import PyramidDrop, prune, unprune
from vtprune_train.core.stream import PackedBatch
from vtprune_train.models.forward.attention import PREFIX
from vtprune_train.models.forward.decoder import _Probe, run_layers
from vtprune_train.models.forward.recompute import checkpoint_activations

SIZES = [(40, 70), (90, 30), (50, 50), (30, 31), (28, 200)]


def assert_same_step(model, one, two, **tolerances):
    loss_one, grads_one = loss_and_grads(model, one) if not callable(one) else one()
    loss_two, grads_two = loss_and_grads(model, two) if not callable(two) else two()
    assert_close(loss_one, loss_two, largest=1e-4, mean=1e-4)
    assert grads_one.keys() == grads_two.keys()
    for name, grad in grads_one.items():
        scale = grads_two[name].abs().max().clamp(min=1.0)
        assert_close(grad / scale, grads_two[name] / scale, **tolerances)


METHOD = PyramidDrop(layers=(2, 3, 5), keep=(0.5, 0.3, 0.1))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=4),
    st.sampled_from(["next_layer", "this_layer"]),
    st.sampled_from(["renumber", "keep"]),
    st.sampled_from([(4, "llama"), (2, "mistral"), (1, "qwen2")]),
    st.booleans(),
)
def test_equals_the_slow_reference(seed, shapes, rank_with, positions, decoder, plain):
    """Several images, several turns, no image, grouped queries, batches, projector alignment."""
    kv_heads, text_type = decoder
    rng = np.random.default_rng(seed)
    method = PyramidDrop(layers=(2, 4), keep=(0.6, 0.25), rank_with=rank_with, positions=positions)
    # In float64: rounding must not decide which of two nearly equal tokens stays.
    model = tiny_model(seed, kv_heads=kv_heads, text_type=text_type).double().eval()
    text_model = model.model.language_model
    text_model.config._attn_implementation = PREFIX + "varlen_sdpa"
    segments = [random_segment(rng, images, turns, plain) for images, turns in shapes]
    embeds = torch.from_numpy(rng.standard_normal((sum(s.length for s in segments), 32)))
    plan = method.plan(segments, 6)
    with torch.no_grad():
        output = run_layers(text_model, embeds, plan, method)
        rows = torch.arange(len(embeds))
        for kept in output.kept:
            rows = rows[kept]
        expected_hidden, expected_rows, start = [], [], 0
        for segment in segments:
            hidden, alive = pyramiddrop(
                text_model,
                embeds[start : start + segment.length],
                [span.offsets() for span in segment.spans],
                list(segment.query_offsets),
                [2, 4],
                [0.6, 0.25],
                rank_with,
                positions,
            )
            expected_hidden.append(hidden)
            expected_rows += [start + offset for offset in alive]
            start += segment.length
    assert rows.tolist() == expected_rows
    assert_close(output.last_hidden_state, torch.cat(expected_hidden), largest=1e-4, mean=1e-5)


@pytest.mark.parametrize("rank_with", ["next_layer", "this_layer"])
def test_keep_everything_equals_dense(rank_with):
    segments = [random_segment(np.random.default_rng(i), 2, 2) for i in range(3)]
    model = tiny_model().train()
    batch = random_batch(model, segments)
    prune(model, None)
    dense = loss_and_grads(model, batch)
    unprune(model)
    method = PyramidDrop(layers=(1, 3), keep=(1.0, 1.0), rank_with=rank_with)
    prune(model, method)
    batch.plan = method.plan(segments, 6)
    everything = loss_and_grads(model, batch)
    assert torch.equal(dense[0], everything[0])
    assert all(torch.equal(grad, everything[1][name]) for name, grad in dense[1].items())


def test_packed_equals_one_by_one():
    rng = np.random.default_rng(1)
    segments = [random_segment(rng, images, turns) for images, turns in [(1, 1), (0, 2), (3, 2), (2, 3)]]
    model = pruned(METHOD)
    packed = random_batch(model, segments)
    packed.plan = METHOD.plan(segments, 6)

    def singly():
        model.zero_grad(set_to_none=True)
        total, start, visual, target = torch.zeros(()), 0, 0, 0
        for segment in segments:
            v = sum(span.length for span in segment.spans)
            r = len(segment.supervised_offsets)
            one = PackedBatch(
                input_ids=packed.input_ids[start : start + segment.length],
                visual_rows=packed.visual_rows[visual : visual + v] - start,
                visual_index=packed.visual_index[visual : visual + v],
                pixel_values=packed.pixel_values,
                plan=METHOD.plan([segment], 6),
                targets=packed.targets[target : target + r],
                answer_of_target=packed.answer_of_target[target : target + r],
                num_answers=1,
            )
            output = model(one)
            output.loss_sum.backward()
            total += output.loss_sum.detach()
            start, visual, target = start + segment.length, visual + v, target + r
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert_same_step(model, packed, singly)


@pytest.mark.parametrize("rank_with", ["next_layer", "this_layer"])
def test_activation_checkpointing_changes_nothing(rank_with):
    segments = [random_segment(np.random.default_rng(i), 2, 2) for i in range(3)]
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), rank_with=rank_with)
    model = pruned(method)
    batch = random_batch(model, segments)
    batch.plan = method.plan(segments, 6)
    plain = loss_and_grads(model, batch)
    calls = []
    hook = model.model.language_model.layers[3].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpoint_activations(model)
    recomputed = loss_and_grads(model, batch)
    hook.remove()
    assert len(calls) == 2, "the layer was not recomputed, so the test would show nothing"
    assert torch.equal(plain[0], recomputed[0])
    assert all(torch.equal(grad, recomputed[1][name]) for name, grad in plain[1].items())


@pytest.mark.parametrize("rank_with", ["next_layer", "this_layer"])
@pytest.mark.parametrize("positions", ["renumber", "keep"])
def test_forward_never_waits_for_the_device(rank_with, positions):
    segments = [random_segment(np.random.default_rng(i), i, 2) for i in range(4)]
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), rank_with=rank_with, positions=positions)
    model = pruned(method)
    batch = random_batch(model, segments)
    batch.plan = method.plan(segments, 6)
    with Forbid():
        output = model(batch)
    assert output.loss_sum.isfinite()
    with pytest.raises(AssertionError, match="synchronises"), Forbid():
        output.loss_sum.item()


def test_a_text_only_batch_reaches_every_trained_part_with_zero_gradients():
    segments = [random_segment(np.random.default_rng(0), 0, 2)]
    model = pruned(METHOD)
    batch = random_batch(model, segments)
    batch.plan = METHOD.plan(segments, 6)
    batch.pixel_values = batch.pixel_values[:1] * 0
    _, grads = loss_and_grads(model, batch)
    for part in ("multi_modal_projector.linear_1.weight", "image_newline", "vision_tower.embeddings.patch_embedding"):
        found = [grad for name, grad in grads.items() if part in name]
        assert found, part
        assert all(not grad.any() for grad in found)


def test_a_probe_takes_once_and_keeps_nothing():
    """A layer that is recomputed holds its probe until the backward pass."""
    probe = _Probe(torch.tensor([1, 3]))
    q, k = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    probe(q, k)
    ranking = probe.ranking(0.5)
    assert torch.equal(ranking.queries, q[[1, 3]]) and torch.equal(ranking.keys, k)
    probe(q + 1, k + 1)
    assert probe.taken is None


def test_a_head_replaced_after_prune_is_named():
    """It would compute logits where the packed forward pass asks it for a loss."""
    model = prune(tiny_model(), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    batch = random_batch(model, [random_segment(np.random.default_rng(0), 1, 1)])
    before = model(batch).loss_sum
    model.resize_token_embeddings(80, mean_resizing=False)
    with pytest.raises(ValueError, match=r"lm_head was replaced after prune .*unprune\(model\) and prune it again"):
        model(batch)
    prune(unprune(model), PyramidDrop(layers=(2, 4), keep=(0.5, 0.25)))
    assert model(batch).loss_sum.isfinite() and before.isfinite()
