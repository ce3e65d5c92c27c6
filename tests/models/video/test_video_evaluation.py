"""Evaluation during training on records with videos."""

import numpy as np
import pytest
import torch

from tests.support.video_runs import RECORDS, VIDEO_FAMILIES, VideoSetup
from vtprune_train import PyramidDrop, prune
from vtprune_train.training.loop.evaluate import evaluate, exchange_images
from vtprune_train.viz.draw import ImageStages
from vtprune_train.viz.draw_video import VideoStages
from vtprune_train.viz.evaluation_images import _questions, draw_kept
from vtprune_train.viz.show import look

SETTINGS = {"max_tokens": 600, "device": torch.device("cpu"), "workers": 0, "mark": lambda _: None}


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def setup(request, tmp_path_factory):
    return VideoSetup(request.param, tmp_path_factory.mktemp(request.param))


def test_evaluation_and_its_images(setup):
    """The loss of a batch, also with exchanged videos; and the frames of what is drawn."""
    parts = setup.parts()
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep")
    collate = setup.collator(parts, method)
    model = prune(parts.model, method)
    everything = np.arange(len(RECORDS))
    partners = exchange_images(collate)
    assert partners == [4, 1, 2, 3, 0], "two samples have one video; the others have no partner"
    for samples, shuffled in ((everything, False), (partners, True)):
        batch = collate(everything, samples)
        with torch.no_grad():
            expected = model.eval()(batch).loss_sum / len(batch.targets)
        result = evaluate(model, collate, shuffle_images=shuffled, **SETTINGS)
        assert result["loss"] == pytest.approx(float(expected), rel=1e-5) and result["unreadable"] == 0
    assert len(draw_kept(model, collate, images=4, device=torch.device("cpu"))) == 2
    first, second = _questions(collate, 4)
    [video] = look(model, collate.image_processor, first.inputs, first.images, collate.layout)
    assert isinstance(video, VideoStages) and video.counts[0] == collate.index.lengths([0]).span_tokens.sum()
    assert video.counts[1] == sum(len(frame.kept[1]) for frame in video.frames) < video.counts[0]
    items = look(model, collate.image_processor, second.inputs, second.images, collate.layout)
    assert [type(item) for item in items] == [ImageStages, VideoStages, VideoStages]
    assert sum(item.counts[0] for item in items) == collate.index.lengths([1]).span_tokens.sum()
