"""What a step costs beside the model: reads from the device, and sums over ranks."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from tests.support.fake_cuda import DEVICE, READ, FakeCuda
from tests.support.packed import pruned
from tests.support.phases import LAYERS, METHOD, make_parts  # noqa: F401
from vtprune_train.config.run import RunConfig
from vtprune_train.config.train import TrainConfig
from vtprune_train.data.plan.planner import StepPlan
from vtprune_train.models.io.build import set_trainable
from vtprune_train.pruning.phases import Phases
from vtprune_train.training import Callback, distributed
from vtprune_train.training.checkpoint.folder import TrainerState
from vtprune_train.training.loop import step_metrics
from vtprune_train.training.loop.feed import Fetched
from vtprune_train.training.loop.seed import mixed
from vtprune_train.training.loop.trainer import Trainer

STEPS = 3


class Engine:
    """The engine, as far as a step calls it, with SGD."""

    loss_scale = 1.0

    def __init__(self, module):
        self.module = module
        self.param_groups = [{"params": list(module.parameters()), "part": "language_model"}]

    def __call__(self, batch):
        return self.module(batch)

    def accumulate(self, last):
        return nullcontext()

    def backward(self, loss):
        loss.backward()

    def squared_grad_norm(self):
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.stack(torch._foreach_norm(gradients)).double().square().sum()

    def step(self):
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
        return True


class Seen(Callback):
    """What had happened by the end of each step."""

    def __init__(self, happened):
        self.happened, self.after, self.records = happened, [], []

    def on_step(self, trainer, record):
        self.after.append(len(self.happened))
        self.records.append(record)


def train(parts, model, device, happened):
    """Three steps of two micro-batches each; returns what was seen."""
    collate = parts.collator(Phases(METHOD))
    steps = [
        [collate.pack(parts.loaded[:1], step=0), collate.pack(parts.loaded[1:], step=0)],
        [collate.pack(parts.loaded[2:3], step=1), collate.pack([], (("a", "broken"),), step=1)],
        [collate.pack(parts.loaded[:2], step=2), collate.pack(parts.loaded[3:], step=2)],
    ]
    seen = Seen(happened)
    made = Trainer(
        config=SimpleNamespace(
            run=RunConfig(),
            train=TrainConfig(max_steps=STEPS, warmup_ratio=0.0, schedule="constant"),
            model=SimpleNamespace(train={"language_model": 0.01}, dtype="float32"),
        ),
        engine=Engine(model),
        collate=collate,
        eval_collate=None,
        planner=SimpleNamespace(steps_per_epoch=STEPS),
        processor=None,
        checkpoints=SimpleNamespace(failed=False),
        callbacks=[seen],
        trackers=None,
        device=device,
        state=TrainerState(),
        watchdog=SimpleNamespace(mark=lambda *_: None),
    )
    plans = [StepPlan(step, 0, (0, 1), ((), ())) for step in range(STEPS)]
    feed = (
        Fetched(plan, [batch.pin_memory() for batch in batches] if device == DEVICE else batches, 0.5 * plan.step, None)
        for plan, batches in zip(plans, steps, strict=True)
    )
    assert made._steps(feed) == 0 and made.state.step == STEPS
    return seen


def trained_model():
    model = pruned(METHOD, num_layers=LAYERS)
    set_trainable(model, {"projector": 1.0, "language_model": 1.0, "vision_tower": 1.0})
    return model


@pytest.fixture
def reductions(monkeypatch):
    """Sums over ranks, of one rank."""
    seen = []
    monkeypatch.setattr(step_metrics, "device_peak_flops", lambda device: 1e12)
    monkeypatch.setattr(step_metrics, "peak_memory_bytes", lambda device: 0)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor, **_: seen.append(tensor.shape))
    return seen


def test_a_step_reads_once_and_sums_over_ranks_once(parts, reductions):
    """One of several micro-batches, of which one may hold nothing: all that the host learns comes in one read, and
    nothing is copied to the device but without waiting."""
    expected = train(parts, trained_model(), torch.device("cpu"), reductions)
    assert expected.after == [2, 3, 4], "the first step's count, then one sum a step"
    with FakeCuda() as cuda:
        seen = train(parts, cuda.put(trained_model()), DEVICE, cuda.waits)
    places = Counter((event.kind, event.where.partition(":")[0]) for event in cuda.waits)
    assert places == Counter({(READ, "vtprune_train/training/distributed.py"): STEPS + 1}), cuda.waits
    assert seen.after == [2, 3, 4]
    for ours, theirs in zip(seen.records, expected.records, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["data_wait"] == ours["data_wait_longest"] == 0.5 * (ours["step"] - 1)
        for name in ("supervised_tokens", "token_accuracy", "unreadable", "flops", "visual_tokens"):
            assert ours[name] == theirs[name] and ours["supervised_tokens"] > 0, name
    assert [record["unreadable"] for record in seen.records] == [0, 1, 0]


def test_the_seed_of_a_step_is_what_it_has_always_been():
    """Runs of earlier versions resume to the same bits."""
    assert mixed(42, 0, 0) == 2181743763646382610
    assert mixed(42, 7, 1) == 6552058175924057697
    assert mixed(0, 0, 0) == 3010437511937009226
    assert len({mixed(1, step, rank) for step in range(100) for rank in range(8)}) == 800
