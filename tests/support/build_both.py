"""Builds checkpoints whole and sharded on two ranks, and prints ``equal NAME`` for each that is the same both ways.

torchrun --nproc_per_node 2 build_both.py CHECKPOINT ...
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import distributed
from transformers import AutoTokenizer

from vtprune_train.config.model import ModelConfig
from vtprune_train.models.io.build import build_model
from vtprune_train.models.io.placement import placement_of, whole_shape
from vtprune_train.training.engine.sharded import Sharded, is_partitioned
from vtprune_train.training.engine.start import start_distributed

SETTINGS = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_optimization": {"stage": 3}}


def compare(folder: Path, dtype: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = ModelConfig(path=str(folder), dtype=dtype)
    built, states = [], []
    for placement in (None, Sharded({**SETTINGS, "bf16": {"enabled": dtype == "bfloat16"}}, getattr(torch, dtype))):
        torch.manual_seed(3)
        built.append(build_model(config, tokenizer, *([placement] if placement else [])))
        states.append(torch.get_rng_state())
    whole, sharded = built
    assert torch.equal(*states), "random numbers drawn"
    one, two = (dict(model.named_parameters(remove_duplicate=False)) for model in built)
    assert one.keys() == two.keys()
    assert whole.config.to_dict() == sharded.config.to_dict()
    assert whole.training == sharded.training
    for name, parameter in two.items():
        assert is_partitioned(parameter) and parameter.ds_tensor.numel() <= one[name].numel() // 2 + 1, name
        assert whole_shape(parameter) == one[name].shape, name
        with placement_of(sharded).whole([parameter]):
            assert torch.equal(parameter, one[name]) and parameter.dtype == one[name].dtype, name
    buffers = dict(whole.named_buffers())
    assert buffers.keys() == dict(sharded.named_buffers()).keys()
    for name, buffer in sharded.named_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype, name


if __name__ == "__main__":
    start_distributed(60)
    for number, argument in enumerate(sys.argv[1:]):
        for dtype in ("float32", "bfloat16")[: 1 + (number == 0)]:
            compare(Path(argument), dtype)
        if os.environ["RANK"] == "0":
            print("equal", argument, flush=True)
    distributed.destroy_process_group()
