#!/usr/bin/env python
"""Draw the frames of one video of each topic of ``vtprune quickstart --video``, for docs/video_task.md.

python scripts/draw_videos.py docs/images/quickstart_video.png
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vtprune_train.data.synthetic_videos import FRAMES, TOPICS, draw_frames


def draw(path: Path, seed: int) -> None:
    """Write a PNG with a row of frames for each topic."""
    rng, gap = random.Random(seed), ((0, 0), (0, 0), (0, 4), (0, 0))
    figure, rows = plt.subplots(len(TOPICS), figsize=(FRAMES * 1.05, len(TOPICS) * 1.35), layout="constrained")
    for row, scene in zip(rows, (topic(rng) for topic in TOPICS.values()), strict=True):
        row.set_title(f"{scene.question}  {scene.answer}", loc="left", fontsize=9)
        row.imshow(np.concatenate(list(np.pad(draw_frames(scene, 118), gap, constant_values=255)), axis=1))
        row.set_axis_off()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the PNG")
    parser.add_argument("--seed", type=int, default=3, help="of the scenes (default: 3)")
    arguments = parser.parse_args()
    draw(arguments.out, arguments.seed)
