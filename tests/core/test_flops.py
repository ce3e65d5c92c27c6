"""FLOP counts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.helpers import tiny_config, tiny_model
from vtprune_train.core.flops import (
    DecoderGeometry,
    TrainingCost,
    layers_per_stage,
    published_decoder_flops,
    stage_lengths,
)
from vtprune_train.core.stream import Drop
from vtprune_train.models.families.towers import tile_tower


@pytest.mark.parametrize(("tokens", "dense", "dropped"), [(2880, 20.8, 9.46), (576, 3.82, 1.78)])
def test_published_numbers(tokens, dense, dropped):
    stages = [tokens, tokens * 0.5, tokens * 0.25, tokens * 0.125]
    assert published_decoder_flops([tokens], [32], 4096, 11008) / 1e12 == pytest.approx(dense, rel=0.003)
    assert published_decoder_flops(stages, [8] * 4, 4096, 11008) / 1e12 == pytest.approx(dropped, rel=0.01)


def test_decoder_and_tower_against_pytorchs_counter():
    """PyTorch counts full attention; the difference to the causal half is known exactly."""
    model = tiny_model().eval()
    model.set_attn_implementation("eager")  # its products are counted on every device
    decoder, tower = DecoderGeometry.of(model.config.text_config), tile_tower(model.config)
    length = 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.language_model(inputs_embeds=torch.randn(1, length, 32))
    causal, full = 2 * 32 * length * (length + 1), 4 * 32 * length * length
    ours = decoder.num_layers * (float(decoder.layer(np.array(length))) - causal + full)
    assert counter.get_total_flops() == pytest.approx(ours)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.vision_tower(torch.randn(2, 3, 28, 28))
    assert counter.get_total_flops() == pytest.approx(tower.tower(2))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.multi_modal_projector(torch.randn(2, 16, 24))
    assert counter.get_total_flops() == pytest.approx(tower.projector(2))


def test_stage_lengths():
    lengths = stage_lengths(
        np.array([10, 5, 7]), np.array([9, 21, 8]), np.array([0, 0, 2]), (Drop(2, 0.5), Drop(4, 0.1))
    )
    assert lengths.tolist() == [[40, 24, 12], [5, 5, 5], [15, 11, 7]]
    assert layers_per_stage((Drop(2, 0.5), Drop(4, 0.1)), 6) == [2, 2, 2]


def test_frozen_parts_cost_less():
    config = tiny_config()
    geometry = DecoderGeometry.of(config.text_config), tile_tower(config)
    arguments = np.array([[50]]), [6], np.array([2]), np.array([4])
    full = TrainingCost(*geometry, trains_decoder=True, trains_tower=True).sample(*arguments)
    stage_1 = TrainingCost(*geometry, trains_decoder=False, trains_tower=False).sample(*arguments)
    tower, projector = geometry[1].tower(2), geometry[1].projector(2)
    weights = 6 * 50 * geometry[0].per_token + geometry[0].head(4)  # attention has none: its backward pass stays
    assert full[0] - stage_1[0] == pytest.approx(weights + 2 * tower + projector)
