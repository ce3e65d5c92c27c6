#!/usr/bin/env python
"""Estimate FLOPs and GPU hours of the training recipes at LLaVA-NeXT-7B's sizes, beside the published hours, and write
a Markdown table.

    python scripts/estimate_recipes.py                 # docs/recipes/estimate.md

Both stages are estimated for an average sample: 2,242 visual tokens (an image of 672 x 480) and 121 text tokens; the
published averages are 2,268 and 121. The achieved TFLOP/s of a GPU are those with which the dense recipe takes the
published 366 GPU hours, so the hours of the others are FLOP ratios, not measurements.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vtprune_train.bench.costs import Cost, Sample, Subject, images_of, images_of_sample  # noqa: E402
from vtprune_train.bench.run_cost import run_cost  # noqa: E402
from vtprune_train.config.load import load_config  # noqa: E402
from vtprune_train.config.settings import Config  # noqa: E402
from vtprune_train.core.flops import DecoderGeometry  # noqa: E402
from vtprune_train.models.io.build import load_model_config  # noqa: E402

DENSE_HOURS = 366.0  # A100-80G, both stages (arXiv 2410.17247)
SIZE, TEXT, ANSWER = (672, 480), 61, 60
SAMPLES = {"stage 1": 558_000, "stage 2": 1_000_000}
PRETRAIN = "llava_next_pretrain.yaml"


@dataclass(frozen=True)
class Recipe:
    """The settings files of both stages, with overrides of the first, and the published cost."""

    title: str
    instruct: str
    pretrain: str = PRETRAIN
    overrides: tuple[str, ...] = ()
    published: str = "-"


RECIPES = (
    Recipe("dense", "llava_next_dense.yaml", overrides=("pruning={method: none}",), published="366 h"),
    Recipe("PyramidDrop", "llava_next_pdrop.yaml", published="218 h (1.68 x)"),
    Recipe(
        "DUET", "llava_next_duet.yaml", overrides=("pruning=configs/llava_next_duet.yaml",),
        published="1.45 x (LLaVA-1.5)",
    ),
    Recipe(
        "DualSpeed", "llava_next_dualspeed.yaml", "llava_next_dualspeed_pretrain.yaml",
        published="4.0 x, against padded batches",
    ),
    Recipe("EPIC", "llava_next_epic.yaml", overrides=("pruning={method: none}",)),
    Recipe("any budget", "llava_next_any_budget.yaml", overrides=("pruning.budgets=[0.1, 1.0]",)),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "recipes" / "estimate.md", help="file to write")
    arguments = parser.parse_args()
    steps = {recipe.title: stages(recipe) for recipe in RECIPES}
    whole = sum(count * cost.dense for count, cost in zip(SAMPLES.values(), steps["dense"], strict=True))
    rate = whole / (DENSE_HOURS * 3600)
    lines = [
        "| recipe | stage 1, TFLOP per sample | stage 2, TFLOP per sample | FLOPs, both stages | GPU hours | published |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        costs = steps[recipe.title]
        total = sum(count * cost.pruned for count, cost in zip(SAMPLES.values(), costs, strict=True))
        numbers = " | ".join(f"{cost.pruned / 1e12:.1f}" for cost in costs)
        lines.append(
            f"| {recipe.title} | {numbers} | {total / whole:.3f} ({whole / total:.2f} x less) | "
            f"{total / rate / 3600:.0f} | {recipe.published} |"
        )
    lines += ["", f"Rate: {rate / 1e12:.0f} TFLOP/s per GPU."]
    print("\n".join(lines))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(lines) + "\n")
    return 0


def stages(recipe: Recipe) -> list[Cost]:
    """The mean training step of both stages for one sample."""
    return [
        mean_step(load_config(recipe.pretrain, list(recipe.overrides))),
        mean_step(load_config(recipe.instruct, [])),
    ]


def mean_step(config: Config) -> Cost:
    """The mean training step of a run for one average sample."""
    model_config = load_model_config(config.model, offline=True)
    method = config.pruning.build()
    subject = Subject(
        "", model_config, method, "", trained=tuple(config.model.train), max_pixels=config.model.max_pixels
    )
    sample = Sample(images_of_sample(model_config, [SIZE], [], images_of(model_config)), TEXT, ANSWER)
    phases = config.phases(1, DecoderGeometry.of(model_config.get_text_config()).num_layers)
    return run_cost(subject, sample, phases).step


if __name__ == "__main__":
    sys.exit(main())
