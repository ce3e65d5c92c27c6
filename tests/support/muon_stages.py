"""Started on two ranks: trains a small net by Muon at every ZeRO stage, and compares it with PyTorch's two optimizers.

Needs what ``tests/faults/deal.py`` needs: DEAL_STAGES and DEAL_TRAIN.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.deal import STAGES, Net, engine_at, numbers
from vtprune_train.training.distributed import shut_down
from vtprune_train.training.engine.files import MASTER
from vtprune_train.training.engine.start import start_distributed


def batches():
    torch.manual_seed(5)
    return [torch.randn(64, 7) for _ in range(3)]


def first_step():
    """Weights after one step of ``torch.optim.Muon`` for the matrices and ``torch.optim.AdamW`` for the rest.

    One alone: in bfloat16 the orthogonalization magnifies rounding in directions with little gradient.
    """
    torch.manual_seed(1)
    net = Net()
    matrices, rest = [net.first.weight, net.last.weight], [net.first.bias, net.last.bias, net.single]
    net(batches()[0]).square().mean().backward()
    torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW(rest, lr=0.05, weight_decay=0.0).step()
    return {name: p.detach().flatten() for name, p in net.named_parameters() if p.requires_grad}


def trained(engine, inputs):
    engine.backward(engine(inputs).square().mean())
    engine.step()
    return {name: value for (name, key), value in numbers(engine).items() if key == MASTER}


def assert_equal(weights, expected, place):
    for name, weight in expected.items():
        assert torch.allclose(weights[name], weight, rtol=0, atol=1e-6), (place, name, weights[name], weight)


if __name__ == "__main__":
    start_distributed(timeout=120)
    one, last = first_step(), None
    for stage in STAGES:
        engine = engine_at(stage, "float32", seed=1)
        steps = [trained(engine, inputs) for inputs in batches()]
        assert_equal(steps[0], one, f"ZeRO {stage}, first step")
        last = last or steps[-1]
        assert_equal(steps[-1], last, f"ZeRO {stage}, last step")
        keys = {key for name, key in numbers(engine) if name == "first.weight"}
        assert keys == {MASTER, "weight", "momentum_buffer"}, keys
    shut_down()
