"""Prompts with videos: the ids and inputs of the family's own processor equal those of training."""

import pytest
import torch
from PIL import Image

from tests.support.video_runs import RECORDS, VIDEO_FAMILIES, VideoSetup, model_inputs
from vtprune_train.data.chat import Turn
from vtprune_train.evaluation.answering import Loaded, batch, content_of
from vtprune_train.evaluation.videos import open_video
from vtprune_train.models.io.processors import open_processor

WITH_VIDEOS = [number for number, (_, _, videos) in enumerate(RECORDS) if videos]


@pytest.fixture(scope="module", params=VIDEO_FAMILIES)
def setup(request, tmp_path_factory):
    return VideoSetup(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def parts(setup):
    return setup.parts()


def prompt_of(setup, processor, record, turns=None):
    """The record's media, and its conversation up to the last answer."""
    texts, images, videos = RECORDS[record]
    media = [Image.open(setup.folder / "clips" / "images" / f"{n}.png").convert("RGB") for n in images]
    media += [open_video(setup.folder / "clips" / "videos" / f"{n}.mp4", processor) for n in videos]
    turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)][:turns]
    return media, turns


@pytest.mark.parametrize("record", WITH_VIDEOS)
def test_inputs_equal_those_of_training(setup, parts, record):
    collate = setup.collator(parts, None)
    expected, labels = model_inputs(collate, record, parts.model.config)
    parts.processor.tokenizer.padding_side = "left"
    loaded = Loaded(parts.model, parts.processor, content_of(parts.processor))
    inputs = batch(loaded, [prompt_of(setup, parts.processor, record, -1)])
    length = int((labels[0] != -100).nonzero()[-1]) + 1
    prompt = inputs["input_ids"].shape[1]
    assert inputs["input_ids"].tolist() == expected["input_ids"][:, :prompt].tolist()
    assert (labels[0, prompt:length] != -100).all(), "the prompt ends where the last answer starts"
    assert {*inputs} - {"attention_mask"} == {*expected}
    for name in {*expected} - {"input_ids", "mm_token_type_ids"}:
        torch.testing.assert_close(torch.as_tensor(inputs[name]), expected[name], rtol=0, atol=0, msg=name)


def test_metadata_of_videos(setup, parts):
    """Nested like the videos, and complete."""
    processor = parts.processor.video_processor
    video = open_video(setup.folder / "clips" / "videos" / "0.mp4", parts.processor)
    plain = dict(video.metadata)
    made = [processor([video.frames], video_metadata=metadata) for metadata in (plain, [plain], [[video.metadata]])]
    for other in made[1:]:
        assert torch.equal(
            torch.as_tensor(other["pixel_values_videos"]), torch.as_tensor(made[0]["pixel_values_videos"])
        )
    for key in ("total_num_frames", "fps", "frames_indices"):
        for metadata in ({k: v for k, v in plain.items() if k != key}, {**plain, key: None}):
            with pytest.raises(ValueError, match=r"1 video\(s\) need as many video_metadata"):
                processor([video.frames], video_metadata=[metadata])
    with pytest.raises(ValueError, match=r"1 video\(s\) need as many video_metadata"):
        processor([video.frames], video_metadata=["0.mp4"])


def test_a_saved_processor_prepares_videos_as_the_run(setup, parts, tmp_path):
    """With the run's sampling, and with another one that is asked for."""
    setup.config.data.video.num_frames = 3
    try:
        run = setup.parts().processor
    finally:
        setup.config.data.video.num_frames = None
    run.save_pretrained(tmp_path)
    saved = open_processor(str(tmp_path), parts.model.config)
    assert saved.video_processor.layout == run.video_processor.layout != parts.processor.video_processor.layout
    assert run.video_processor.to_dict()["num_frames"] == 3
    assert saved.to_dict() == run.to_dict()
    saved.video_processor = saved.video_processor.changed(fps=4)
    video = open_video(setup.folder / "clips" / "videos" / "0.mp4", saved)
    assert len(video.frames) == 12, "4 frames per second of 24 frames at 8 per second"
