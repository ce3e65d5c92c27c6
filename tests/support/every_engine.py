"""Run in a process of its own: starts an engine of every ZeRO stage and dtype, and looks for the names that are read.

Writes to the path given, for each: the kind of optimizer, and the error of ``private.check`` (empty without one).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from vtprune_train.config.errors import ConfigError
from vtprune_train.training.engine import private
from vtprune_train.training.engine.start import start_distributed, start_engine
from vtprune_train.training.optimizer import OptimizerSpec

SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = {
    **{f"zero{stage} float32": ("float32", {"stage": stage}, {}) for stage in range(4)},
    **{f"zero{stage} bfloat16": ("bfloat16", {"stage": stage}, {}) for stage in range(4)},
    "zero1 bfloat16, sums in float32": ("bfloat16", {"stage": 1}, SUMS),
    "zero2 offload": ("float32", {"stage": 2, **OFFLOAD}, {}),
    "zero3 offload": ("float32", {"stage": 3, **OFFLOAD}, {}),
}


def start(dtype, zero, more):
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 3)).to(getattr(torch, dtype))
    model[0].bias.requires_grad_(False)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        **more,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    spec = OptimizerSpec("adamw", torch.optim.AdamW, {"fused": True})
    return start_engine(model, [{"params": trained, "lr": 1e-2}], spec, settings)


def main(path):
    start_distributed(timeout=60)
    found = {}
    for name, (dtype, zero, more) in CASES.items():
        kind, error = None, ""
        try:
            engine = start(dtype, zero, more)
            kind = private.optimizer_kind(engine._deepspeed.optimizer)
            assert (engine.zero_stage, engine.dtype) == (zero["stage"], dtype)
        except ConfigError as refused:
            error = str(refused)
        found[name] = {"kind": kind, "error": error}
    Path(path).write_text(json.dumps(found))


main(sys.argv[1])
