"""``train.py`` with faults: what the environment's FAULTS (JSON) asks for is patched in, then training starts.

``nan_pixels`` and ``nan_gradient``: a global step (from 0) in which rank 1's pictures, or one gradient of it, are NaN;
``nothing_to_learn``: a step whose batches have no token at all; ``leave_out``: steps that are never taken;
``skewed``: a file; rank 0 gets text, rank 1 pictures, and every tenth step rank 0 gets nothing; what came is written to
the file; ``no_memory``: rank 1 finds none in its first forward pass.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from vtprune_train.cli import train_main
from vtprune_train.data.load.loader import StepLoader
from vtprune_train.data.plan.planner import Planner
from vtprune_train.training.loop.trainer import Trainer

FAULTS = json.loads(os.environ["FAULTS"])
RANK = int(os.environ.get("RANK", "0"))
COLLATE, INDEX = [], []  # filled as training starts


def fault_the_batches():
    original = StepLoader.__iter__

    def iterate(self):
        for plan, batches in original(self):
            if RANK == 1 and plan.step == FAULTS.get("nan_pixels"):
                batches[0].pixel_values[0].view(-1)[5] = float("nan")
            if plan.step == FAULTS.get("nothing_to_learn"):
                batches = [COLLATE[0].pack([]) for _ in batches]
            if path := FAULTS.get("skewed"):
                kinds = ["".join("v" if len(b.visual_rows) else "t" if b.sample_ids else "-" for b in batches)]
                with Path(f"{path}.{RANK}").open("a") as file:
                    file.write("".join(kinds) + "\n")
            yield plan, batches

    StepLoader.__iter__ = iterate


def fault_the_gradient():
    original = Trainer.step

    def step(self, now, feed):
        COLLATE[:] = [self.collate]
        handle = None
        if RANK == 1 and now.plan.step == FAULTS.get("nan_gradient"):
            parameter = dict(self.engine.module.named_parameters())["model.language_model.norm.weight"]
            handle = parameter.register_hook(lambda gradient: gradient * float("nan"))
        try:
            return original(self, now, feed)
        finally:
            if handle is not None:
                handle.remove()

    Trainer.step = step


def leave_steps_out():
    original = Planner.plan

    def plan(self, step):
        wanted = step
        for left_out in sorted(FAULTS["leave_out"]):
            wanted += wanted >= left_out
        return dataclasses.replace(original(self, wanted), step=step)

    Planner.plan = plan


def deal_by_kind():
    original = Planner._plan

    def plan(self, step):
        planned = original(self, step)
        samples = np.array(planned.samples)
        has_images = np.bincount(INDEX[0].lengths(samples).span_sample, minlength=len(samples)) > 0
        text, pictures = samples[~has_images].tolist(), samples[has_images].tolist()
        if samples.sum() % 10 == 0:
            text = []
        steps = max(len(text), len(pictures), 1)
        dealt = tuple((tuple(text[m : m + 1]), tuple(pictures[m : m + 1])) for m in range(steps))
        return dataclasses.replace(planned, micro_batches=dealt)

    Planner._plan = plan
    prepare = Trainer.__post_init__

    def note(self):
        INDEX[:] = [self.collate.index]
        prepare(self)

    Trainer.__post_init__ = note


def run_out_of_memory():
    import deepspeed

    def forward(self, *_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.")

    if RANK == 1:
        deepspeed.DeepSpeedEngine.forward = forward


fault_the_batches()
fault_the_gradient()
if "leave_out" in FAULTS:
    leave_steps_out()
if "skewed" in FAULTS:
    deal_by_kind()
if "no_memory" in FAULTS:
    run_out_of_memory()
sys.exit(train_main())
