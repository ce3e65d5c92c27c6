"""A callback as a user writes one, outside the package: it counts the hooks it saw and keeps the counts across a
resume."""

import json
from pathlib import Path

import torch.distributed as dist

from vtprune_train.training import Callback, Trainer


class Recorder(Callback):
    def __init__(self, file: str, fail_in: str = ""):
        self.file, self.fail_in = Path(file), fail_in
        self.seen: list[str] = []

    def see(self, trainer: Trainer, hook: str) -> None:
        self.seen.append(f"{hook} {trainer.state.step}")
        rank = dist.get_rank()
        self.file.with_suffix(f".{rank}.json").write_text(json.dumps(self.seen))
        if hook == self.fail_in:
            raise LookupError(f"nothing found in {hook}")

    def on_start(self, trainer):
        self.see(trainer, "on_start")

    def on_step(self, trainer, metrics):
        assert metrics["step"] == trainer.state.step
        self.see(trainer, "on_step")

    def on_skip(self, trainer, metrics):
        self.see(trainer, f"on_skip {metrics['skipped']}")

    def on_evaluate(self, trainer, metrics):
        self.see(trainer, f"on_evaluate {sorted(metrics)[1]}")

    def on_save(self, trainer):
        self.see(trainer, "on_save")

    def on_error(self, trainer, error):
        self.see(trainer, f"on_error {type(error).__name__}")

    def on_end(self, trainer, finished):
        self.see(trainer, f"on_end {finished}")

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = [*state["seen"], "load_state_dict"]


class FailsOnError(Callback):
    def on_error(self, trainer, error):
        raise KeyError("hidden?")


class Skips(Callback):
    """Makes the gradient of step 2 infinite, so that the step is skipped."""

    def on_step(self, trainer, metrics):
        if metrics["step"] == 1:
            parameter = next(p for p in trainer.engine.module.parameters() if p.requires_grad)
            self.handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
        elif metrics["step"] == 2:
            self.handle.remove()


class WrongHook(Callback):
    """Has a hook of transformers' callbacks."""

    def on_step_end(self, trainer):
        raise AssertionError("never called")
