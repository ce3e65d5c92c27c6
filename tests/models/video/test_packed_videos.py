"""Videos in packed batches: equal to transformers' own model, to single samples and to a slow loop."""

import pytest
import torch

from tests.models.families.test_loop_families import assert_same_gradients, gradients
from tests.support.video_runs import RECORDS, TEXT_ONLY, VIDEO_FAMILIES, VideoSetup, model_inputs
from vtprune_train import PyramidDrop, prune

ALL = range(len(RECORDS))


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def setup(request, tmp_path_factory):
    return VideoSetup(request.param, tmp_path_factory.mktemp(request.param))


def test_nothing_dropped_is_transformers_own_model(setup):
    """Loss and gradients of every part, of samples with videos, images, both and neither."""
    parts = setup.parts()
    collate = setup.collator(parts, None)
    batch = collate(ALL)
    assert not batch.unreadable
    total = torch.zeros(())
    for sample in ALL:
        inputs, labels = model_inputs(collate, sample, parts.model.config)
        loss = parts.model(**inputs, labels=labels).loss * (labels >= 0).sum()
        loss.backward()
        total += loss.detach()
    expected = gradients(parts.model)
    parts.model.zero_grad(set_to_none=True)
    output = prune(parts.model, None)(batch)
    output.loss_sum.backward()
    assert abs(output.loss_sum - total) < 1e-4 * total
    ours = {name: grad for name, grad in gradients(parts.model).items() if name in expected or grad.abs().max() > 0}
    within = 1e-3 if setup.name == "qwen3_5" else 2e-4  # other paddings give other chunks of the delta rule
    assert_same_gradients(ours, expected, within)


@pytest.mark.parametrize("per", ["video", "frame"])
def test_packed_with_dropping_equals_one_by_one(setup, per):
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep", per=per)
    parts = setup.parts()
    collate = setup.collator(parts, method)
    model = prune(parts.model, method).train()
    packed = model(collate(ALL))
    packed.loss_sum.backward()
    together = gradients(model)
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for sample in ALL:
        alone = model(collate([sample])).loss_sum
        alone.backward()
        total += alone.detach()
    assert abs(packed.loss_sum - total) < 1e-4 * total
    assert_same_gradients(together, gradients(model))


@pytest.mark.parametrize("per", ["video", "frame"])
def test_packed_equals_padded(setup, per):
    """The same tokens are kept in training and with the model's own inputs."""
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep", per=per)
    parts = setup.parts()
    collate, dense = setup.collator(parts, method), setup.collator(parts, None)
    model = prune(parts.model, method)
    for sample in ALL:
        inputs, labels = model_inputs(dense, sample, model.config)
        with torch.no_grad():
            padded = model(**inputs, labels=labels).loss * (labels >= 0).sum()
            packed = model(collate([sample])).loss_sum
        assert abs(padded - packed) < 1e-4 * packed, sample


def test_a_batch_without_videos_reaches_every_trained_part(setup):
    """So that ranks with and without a video stay together."""
    parts = setup.parts()
    collate = setup.collator(parts, None)
    model = prune(parts.model, None).train()
    model(collate(ALL)).loss_sum.backward()
    seen = gradients(model).keys()
    model.zero_grad(set_to_none=True)
    model(collate([TEXT_ONLY])).loss_sum.backward()
    assert gradients(model).keys() == seen
