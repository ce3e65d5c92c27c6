"""Answers to prompts with videos: alone, in batches, and against plain transformers."""

from contextlib import contextmanager

import pytest
from PIL import Image

from tests.support.video_runs import VIDEO_FAMILIES, VideoSetup
from vtprune_train import PyramidDrop, prune
from vtprune_train.evaluation.answering import GREEDY, Loaded, answers, batch, content_of
from vtprune_train.evaluation.timing import measured_answers
from vtprune_train.evaluation.videos import open_video
from vtprune_train.models.patch import unprune

HALF = {"layers": (2, 4), "keep": (0.5, 0.25)}
LENGTH = 6


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def setup(request, tmp_path_factory):
    return VideoSetup(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def loaded(setup):
    parts = setup.parts()
    parts.processor.tokenizer.padding_side = "left"
    return Loaded(parts.model.eval(), parts.processor, content_of(parts.processor))


@pytest.fixture(scope="module")
def prompts(setup, loaded):
    """Videos of different lengths, a video with an image, two videos, and text alone."""
    image = Image.open(setup.folder / "clips" / "images" / "1.png").convert("RGB")
    video = [open_video(setup.folder / "clips" / "videos" / f"{n}.mp4", loaded.processor) for n in range(4)]
    return [
        ([video[0]], "what is shown here ?"),
        ([image, video[1]], "is <image> in <video> ?"),
        ([video[3]], "<video> blue ?"),
        ([], "what is a dog ?"),
        ([video[1], video[2]], "or <video> a <video> dog"),
    ]


@contextmanager
def pruned(loaded, method):
    prune(loaded.model, method)
    try:
        yield
    finally:
        unprune(loaded.model)


@pytest.mark.parametrize("per", ["video", "frame"])
def test_a_batch_equals_single_prompts(loaded, prompts, per):
    with pruned(loaded, PyramidDrop(**HALF, per=per)):
        together = answers(loaded, prompts, max_new_tokens=LENGTH)
        assert together == [answers(loaded, [prompt], max_new_tokens=LENGTH)[0] for prompt in prompts]
    assert len({*together}) > 1


@pytest.mark.parametrize("per", ["video", "frame"])
def test_keeping_everything_is_plain_generate(loaded, prompts, per):
    settings = {**GREEDY, "max_new_tokens": LENGTH, "pad_token_id": 3}
    for prompt in prompts:
        inputs = batch(loaded, [prompt])
        plain = loaded.model.generate(**inputs, **settings)
        with pruned(loaded, PyramidDrop(layers=(2, 4), keep=(1.0, 1.0), per=per)):
            assert loaded.model.generate(**inputs, **settings).tolist() == plain.tolist()


def test_measured_tokens_of_videos(loaded, prompts):
    """Half of a video's tokens after the first drop, of all frames together."""
    inputs = batch(loaded, prompts[:1])
    [without] = measured_answers(loaded, inputs, 3)
    with pruned(loaded, PyramidDrop(**HALF)):
        [measured] = measured_answers(loaded, inputs, 3)
    whole = measured.visual_tokens[0]
    assert whole == int((inputs["attention_mask"].sum()) - measured_text(loaded, inputs)) > 0
    assert without.visual_tokens == [whole] and measured.visual_tokens[-1] < whole / 2


def measured_text(loaded, inputs):
    ids = {loaded.model.config.image_token_id, getattr(loaded.model.config, "video_token_id", None)}
    return sum(token not in ids for token in inputs["input_ids"][0].tolist())
