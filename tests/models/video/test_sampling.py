"""Sampled frames are frames of the video, at every length and rate."""

import numpy as np
import pytest
import transformers

from tests.support.families import family_model
from tests.support.family_runs import image_processor
from tests.support.video_runs import VIDEO_FAMILIES
from vtprune_train.models.families import family_of_type
from vtprune_train.models.families.layout import VideoHeader
from vtprune_train.models.families.videos import crop_offset, video_settings


@pytest.mark.parametrize("name", [name for name in VIDEO_FAMILIES if name != "qwen2_5_vl"])
@pytest.mark.parametrize("changes", [{}, {"fps": 2.0}, {"fps": 0.7}, {"num_frames": 16}, {"num_frames": 7}])
def test_frames_of_every_length(name, changes):
    """The rounding of transformers' expression gives a frame after the last one, for example of 230 frames at 30 per
    second and 367 at 24."""
    sampling = video_settings(family_of_type(name).loop.videos, None, changes, "here").sampling
    for fps in (24.0, 25.0, 30.0):
        for total in (*range(1, 800), *range(800, 6000, 7)):
            indices = np.array(sampling.clip(VideoHeader(48, 64, total, fps, total / fps)).indices)
            assert indices[0] >= 0 and indices[-1] < total, (fps, total)
            assert (np.diff(indices) > 0).all(), (fps, total)


def test_qwen2_5_vl_needs_exact_seconds(monkeypatch):
    loop, model = family_of_type("qwen2_5_vl").loop, family_model("qwen2_5_vl")
    layout = loop.layout(model.config, image_processor("qwen2_5_vl"))
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(
        ValueError, match=r"videos of Qwen2.5-VL need transformers>=5.18: transformers 5.17.0 truncates"
    ):
        layout.with_videos(loop.videos)
    monkeypatch.setattr(transformers, "__version__", "5.18.0")
    assert layout.with_videos(loop.videos).video == loop.videos


@pytest.mark.parametrize(("length", "cropped", "offset"), [(9, 5, -2), (8, 5, -1), (5, 9, 2), (5, 8, 1), (5, 5, 0)])
def test_central_crops(length, cropped, offset):
    """The same pixels as transformers' ``center_crop``, which rounds down the border before a frame."""
    assert crop_offset(length, cropped) == offset
