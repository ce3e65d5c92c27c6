"""Evaluation with the images and videos of other samples: a video is exchanged for a video."""

import pytest
import torch

from tests.support.video_runs import RECORDS, VideoSetup
from vtprune_train.training.loop.evaluate import exchange_images

ONE_VIDEO = [0, 4]  # of RECORDS; their videos have different lengths


@pytest.mark.parametrize("family", ["llava_next_video", "qwen3_vl", "internvl"])
def test_a_video_is_exchanged_for_another_video(family, tmp_path):
    """Of samples with equally many; the text stays, except for Qwen3-VL's timestamps."""
    setup = VideoSetup(family, tmp_path)
    parts = setup.parts()
    collate = setup.collator(parts, None)
    partners = exchange_images(collate)
    assert partners == [4, 1, 2, 3, 0], [len(videos) for _, _, videos in RECORDS]
    exchanged = collate(ONE_VIDEO, [partners[sample] for sample in ONE_VIDEO])
    own = collate(ONE_VIDEO)
    assert not exchanged.unreadable and torch.equal(exchanged.targets, own.targets)
    first, last = own.visual_rows.shape, exchanged.visual_rows.shape
    assert first == last, "the same videos together"
    assert not torch.equal(own.input_ids, exchanged.input_ids), "the longer video is in the other sample"
