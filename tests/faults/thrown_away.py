"""Run by two ranks: at every ZeRO stage, accumulate a gradient with a NaN on rank 1, notice it, throw it away, go on.

Writes to the path given, for each case, whether all is bit for bit as if that step had never been.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from torch import nn

from vtprune_train.training import distributed as ranks
from vtprune_train.training.engine.start import start_distributed, start_engine
from vtprune_train.training.optimizer import OptimizerSpec

CASES = {
    "zero0": ({"stage": 0}, {}),
    "zero1": ({"stage": 1}, {}),
    "zero2": ({"stage": 2}, {}),
    "zero3": ({"stage": 3, "stage3_param_persistence_threshold": 10}, {}),
    "zero2 offload": ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}),
    "zero3 offload": ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, {}),
    "zero0 bf16": ({"stage": 0}, {"bf16": {"enabled": True}}),
    "zero1 bf16, sums in float32": (
        {"stage": 1},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "zero2 bf16": ({"stage": 2}, {"bf16": {"enabled": True}}),
    "zero2 bf16, sums in float32": (
        {"stage": 2},
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
}
STEPS = (0, 1, 2)


def start(zero, more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 3))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.5,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **more,
    }
    if more:
        model = model.bfloat16()
    groups = [{"params": list(model.parameters()), "lr": 1e-2}]
    return start_engine(model, groups, OptimizerSpec("adamw", torch.optim.AdamW, {"fused": True}), settings)


def accumulate(engine, step, poisoned):
    """Two micro-steps; the poison comes in the first one, on rank 1."""
    for micro in range(2):
        torch.manual_seed(100 * step + 10 * micro + ranks.rank())
        inputs = torch.randn(4, 7, dtype=next(engine.module.parameters()).dtype)
        if poisoned and micro == 0 and ranks.rank() == 1:
            inputs[0, 0] = float("nan")
        with engine.accumulate(last=micro == 1):
            engine.backward(engine(inputs).float().square().sum())


def whole_norm(engine):
    share = {"share": float(engine.squared_grad_norm())}
    return ranks.sum_over_ranks(share, torch.device("cpu"))["share"] ** 0.5 / engine.loss_scale


def train(engine, poisoned_step=None, left_out=None):
    """Norms of our own and of DeepSpeed's making, and whether the poison was noticed."""
    norms, noticed = [], None
    for step in STEPS:
        if step == left_out:
            continue
        accumulate(engine, step, step == poisoned_step)
        norm = whole_norm(engine)
        if step == poisoned_step:
            noticed = norm != norm
            engine.zero_grad()
            continue
        assert engine.step()
        measured = engine._deepspeed.get_global_grad_norm()
        norms.append((norm, norm if measured is None else float(measured)))
    return norms, noticed


def bits(engine):
    optimizer = engine._deepspeed.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    state = [value for entry in inner.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [p.detach().clone() for p in engine.module.parameters()] + [value.clone() for value in state]


def main(path):
    start_distributed(timeout=120)
    results = {}
    for name, (zero, more) in CASES.items():
        poisoned, clean = start(zero, more), start(zero, more)
        norms, noticed = train(poisoned, poisoned_step=1)
        expected, _ = train(clean, left_out=1)
        ours, theirs = bits(poisoned), bits(clean)
        equal = len(ours) == len(theirs) > 4 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        results[name] = {"noticed": noticed, "equal": equal, "norms": norms, "expected": expected}
    results = ranks.gather(results)
    if os.environ["RANK"] == "0":
        Path(path).write_text(json.dumps(results))
    ranks.shut_down()


main(sys.argv[1])
