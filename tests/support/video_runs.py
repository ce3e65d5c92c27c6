"""Families with videos in the training loop, on one small data set of videos and images."""

from __future__ import annotations

import json

import torch

from tests.support.family_runs import SIZES, Setup, write_records
from tests.support.helpers import PATCH, TILE
from tests.support.videos import moving_frames, write_video
from vtprune_train.models.families.qwen import truncates_seconds

VIDEO_FAMILIES = ("llava_onevision", "llava_next_video", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl")
if truncates_seconds():
    VIDEO_FAMILIES = tuple(name for name in VIDEO_FAMILIES if name != "qwen2_5_vl")
# Frames, height, width and frames per second of each video; the last one has a single frame.
VIDEOS = [(24, 48, 64, 8), (7, 64, 40, 4), (40, 30, 30, 10), (1, 50, 60, 5)]
RECORDS = [
    (["<video> what is shown here ?", "a red cat", "left ?", "no"], [], [0]),
    (["is <image> in <video> ?", "yes", "<video> or a dog", "two"], [1], [1, 2]),
    (["what is a dog ?", "round"], [], []),
    (["<image> red ?", "no"], [2], []),
    (["<video> blue ?", "the left"], [], [3]),
]
TEXT_ONLY = 2


def video_settings(name):
    """Of the checkpoint's video processor, small enough for a test."""
    if name.startswith("qwen"):
        shape = {"patch_size": PATCH, "merge_size": 2}
        frames = 6 if name in ("qwen3_vl", "qwen3_5") else 1
        return {"size": {"shortest_edge": 28 * 28, "longest_edge": frames * 56 * 56}, "fps": 2, **shape}
    if name == "llava_next_video":
        return {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}, "num_frames": 4}
    return {"size": {"height": TILE, "width": TILE}, "num_frames": 4}


def write_video_records(folder):
    """Records with images and videos, in the LLaVA format."""
    write_records(folder)
    (folder / "videos").mkdir()
    for number, (count, height, width, fps) in enumerate(VIDEOS):
        write_video(folder / "videos" / f"{number}.mp4", moving_frames(count, (height, width)), fps=fps)
    records = [
        {
            "id": str(index),
            "image": [f"{number}.png" for number in images],
            "video": [f"{number}.mp4" for number in videos],
            "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)],
        }
        for index, (texts, images, videos) in enumerate(RECORDS)
    ]
    (folder / "train.json").write_text(json.dumps(records))


class VideoSetup(Setup):
    """A checkpoint of the family and records with videos, through the loop's own building."""

    def __init__(self, name, folder):
        super().__init__(name, folder)
        (folder / "model" / "video_preprocessor_config.json").write_text(json.dumps(video_settings(name)))
        write_video_records(folder / "clips")
        data = self.config.data
        source = data.train[0].model_copy(update={"videos": "videos"})
        data = data.model_copy(update={"root": str(folder / "clips"), "train": [source]})
        self.config = self.config.model_copy(update={"data": data})


def model_inputs(collate, sample, config):
    """One sample as keywords of the model's own forward, and its labels."""
    loaded = collate.load(sample, sample)
    batch = collate.pack([loaded])
    inputs = {"input_ids": batch.input_ids[None]} | collate.layout.model_inputs(loaded.images)
    if "mrope_section" in (config.text_config.rope_parameters or {}):
        kinds = (batch.input_ids == config.image_token_id).int() + 2 * (batch.input_ids == config.video_token_id).int()
        inputs["mm_token_type_ids"] = kinds[None]
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.plan.predict_rows + 1] = batch.targets
    return inputs, labels[None]


__all__ = ["RECORDS", "SIZES", "TEXT_ONLY", "VIDEOS", "VIDEO_FAMILIES", "VideoSetup", "model_inputs"]
