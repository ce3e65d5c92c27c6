"""Started on several ranks: writes a small model's checkpoint at every ZeRO stage, or loads one at every stage.

deal.py write FOLDER DTYPE        trains two steps at each stage, saves to FOLDER/zeroN
deal.py read FOLDER DTYPE FORM    loads each of FOLDER/zeroN (form: deepspeed or portable) at each stage, and
                                  compares every number with what was saved

deal.py move FOLDER DTYPE FORM    loads FOLDER/zeroN of the first stage at the second

DEAL_STAGES names the stages, such as 0123; DEAL_TRAIN has the optimizer's settings, as JSON.
"""

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from torch import nn

from vtprune_train.config.train import TrainConfig
from vtprune_train.models.io.export import Plan
from vtprune_train.training.checkpoint import folder as folder_module
from vtprune_train.training.checkpoint import manifest
from vtprune_train.training.checkpoint import resume as resume_module
from vtprune_train.training.checkpoint.folder import CheckpointFolder, TrainerState
from vtprune_train.training.checkpoint.portable import write_portable
from vtprune_train.training.checkpoint.resume import load
from vtprune_train.training.distributed import barrier, gather, rank, shut_down, world_size
from vtprune_train.training.engine import weights as weights_module
from vtprune_train.training.engine.files import MASTER, DeepSpeedFiles
from vtprune_train.training.engine.layout import flat_tensors
from vtprune_train.training.engine.start import start_distributed, start_engine
from vtprune_train.training.optimizer import OptimizerSpec

STAGES = [int(stage) for stage in os.environ["DEAL_STAGES"]]
MUON = {"muon": True} if "muon" in os.environ.get("DEAL_TRAIN", "") else {}
OPTIMIZER = OptimizerSpec.of(TrainConfig(**json.loads(os.environ.get("DEAL_TRAIN", "{}"))))


class Net(nn.Module):
    """Odd sizes (padding in every partition), a frozen layer, a frozen scalar row and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(7, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.single = nn.Parameter(torch.ones(1))
        self.register_buffer("counted", torch.arange(3.0))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.last(self.frozen(self.first(x)).tanh() * self.single) + self.counted.to(x.dtype)


def engine_at(stage, dtype, seed):
    torch.manual_seed(seed)
    net = Net()
    groups = [
        {"params": [net.first.weight, net.last.weight], "lr": 0.05, "weight_decay": 0.1, "part": "a", **MUON},
        {"params": [net.first.bias, net.last.bias, net.single], "lr": 0.05, "weight_decay": 0.0, "part": "b"},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 6},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    if dtype == "bfloat16":  # what is frozen is left out of the files, as of an adapter: every start makes it alike
        net = net.bfloat16()
        nn.init.constant_(net.frozen.weight, 0.25)
        nn.init.constant_(net.frozen.bias, 0.5)
    return start_engine(net, groups, OPTIMIZER, settings)


def train(engine, dtype, steps=2):
    torch.manual_seed(5)
    for _ in range(steps):
        inputs = torch.randn(4, 7).to(getattr(torch, dtype))
        engine.backward(engine(inputs).float().square().mean())
        engine.step()


def numbers(engine):
    """Every trained parameter's float32 tensors and step, put together from all ranks, and what else there is."""
    optimizer = engine._deepspeed.optimizer
    inner, flats = getattr(optimizer, "optimizer", optimizer), flat_tensors(optimizer)
    parts = {}
    for piece in engine.layout().pieces:
        states = inner.state[flats[piece.flat]]
        single = {key: float(value) for key, value in states.items() if not getattr(value, "ndim", 0)}
        for key, tensor in {MASTER: flats[piece.flat], **states}.items():
            if key in single:
                parts.setdefault((piece.name, key), []).append((0, torch.tensor([single[key]])))
                continue
            stretch = tensor.data.flatten()[piece.offset :][: piece.numel].clone()
            parts.setdefault((piece.name, key), []).append((piece.start, stretch))
    whole = {}
    for own in gather(parts):
        for key, stretches in own.items():
            whole.setdefault(key, {}).update(stretches)
    whole = {key: torch.cat([stretches[start] for start in sorted(stretches)]) for key, stretches in whole.items()}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name, "weight"] = parameter.data.detach().clone().flatten()
    whole["counted", "buffer"] = engine.module.counted.clone()
    return whole


class Quiet:
    """Stands for the model's export and its processor."""

    def save_pretrained(self, folder, **_):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "config.json").write_text("{}")


def write(folder, dtype):
    for stage in STAGES:
        engine = engine_at(stage, dtype, seed=1)
        engine.module.save_pretrained = Quiet().save_pretrained
        train(engine, dtype)
        with torch.no_grad():
            engine.module.counted.add_(0.5)
        state = TrainerState(step=2, world_size=world_size(), zero_stage=stage, optimizer=OPTIMIZER.name)
        checkpoints = CheckpointFolder(folder / f"zero{stage}", keep_last=1)
        checkpoints.save(engine, Quiet(), state, "")
        before = numbers(engine)
        train(engine, dtype, steps=1)  # while the thread writes: the copies must not change
        checkpoints.wait()
        if rank() == 0:
            torch.save(before, folder / f"zero{stage}" / "numbers.pt")
            checkpoint = checkpoints.steps()[-1]
            assert manifest.verify(checkpoint) is None, manifest.verify(checkpoint)
            portable = folder / f"zero{stage}" / "portable" / checkpoint.name
            portable.mkdir(parents=True)
            write_portable(DeepSpeedFiles(checkpoint / "deepspeed"), portable / "portable")
            (portable / "trainer.json").write_bytes((checkpoint / "trainer.json").read_bytes())
            entries = {name: manifest.sync_and_hash(portable / name) for name in manifest.files_in(portable)}
            manifest.write_manifest(portable, entries)
        barrier()


def read(folder, dtype, form):
    for source in STAGES:
        kept = torch.load(folder / f"zero{source}" / "numbers.pt")
        checkpoint = folder / f"zero{source}" / ("portable" if form == "portable" else "") / "step_00000002"
        for stage in STAGES:
            engine = engine_at(stage, dtype, seed=2)
            state = load(engine, checkpoint)
            assert (state.world_size, state.zero_stage) == (world_size(), stage)
            found = numbers(engine)
            assert found.keys() == kept.keys(), (source, stage, found.keys() ^ kept.keys())
            for key, value in kept.items():
                assert torch.equal(found[key], value), (source, stage, key, found[key], value)
            train(engine, dtype, steps=1)
            assert engine._deepspeed.global_steps == 3
            barrier()


if __name__ == "__main__":
    start_distributed(timeout=120)
    command, where, dtype, *form = sys.argv[1:]
    folder_module.holds_only_trained = resume_module.holds_only_trained = lambda module: dtype == "bfloat16"
    folder_module.export_plan = weights_module.export_plan = lambda module: Plan({})  # see Quiet
    if command == "write":
        write(Path(where), dtype)
    elif command == "read":
        read(Path(where), dtype, *form)
    else:
        first, second = STAGES
        load(engine_at(second, dtype, seed=2), Path(where) / f"zero{first}" / "step_00000002")
    shut_down()
