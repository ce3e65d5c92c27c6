"""Answers to prompts with videos: alone, in batches, and against plain transformers."""

from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from transformers import GenerationMixin

from tests.support.families import family_model
from tests.support.video_inputs import video_inputs
from tests.support.video_runs import VIDEO_FAMILIES, VideoSetup
from vtprune_train import PyramidDrop, prune
from vtprune_train.evaluation.answering import GREEDY, Loaded, answers, batch, content_of
from vtprune_train.evaluation.timing import measured_answers
from vtprune_train.evaluation.videos import open_video
from vtprune_train.models.patch import unprune
from vtprune_train.pruning.methods.evs import EVS

HALF = {"layers": (2, 4), "keep": (0.5, 0.25)}
LENGTH = 6
REPEATS_GROUPS = hasattr(GenerationMixin, "_expand_multimodal_outputs")  # of a prompt together: transformers >= 5.18


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


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("method", [EVS(keep=0.3), PyramidDrop(**HALF, per="frame")], ids=lambda method: method.name)
@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video"])
def test_repeated_prompts_drop_the_same_tokens(name, method, settings):
    """The features of videos are computed once and repeated; their grids and frames must be repeated with them."""
    two = ["is", (4, 4, 4), "or", (4, 4, 4), "left ?"]
    texts = [two if REPEATS_GROUPS else two[:2], ["in", (4, 4, 4), "red ?"]]
    inputs, model = video_inputs(name, texts), prune(family_model(name), method)

    def first_logits(**more):
        shown = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 3}
        return model.generate(**inputs, **shown, **more).logits[0]

    single = first_logits(do_sample=False)
    torch.testing.assert_close(first_logits(**settings), single.repeat_interleave(2, dim=0))


@pytest.mark.skipif(not REPEATS_GROUPS, reason="this version of transformers takes no computed features")
def test_videos_without_known_frames_are_refused():
    """Features that the model did not compute while it was pruned."""
    model, inputs = family_model("llava_onevision"), video_inputs("llava_onevision", [["is", (4, 4, 4), "left ?"]])
    features = model.get_video_features(inputs.pop("pixel_values_videos"), return_dict=True)
    with pytest.raises(ValueError, match=r"known for 0 of 1 videos.*pass pixel_values_videos instead"):
        prune(model, EVS())(**inputs, mm_encoder_outputs={"video": features})


def test_rows_of_several_videos_are_refused_where_transformers_mixes_them_up(monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_expand_multimodal_outputs", raising=False)
    model = prune(family_model("llava_onevision"), EVS())
    inputs = video_inputs("llava_onevision", [["is", (4, 4, 4), "or", (4, 4, 4), "left ?"], ["in", (4, 4, 4), "red ?"]])
    with pytest.raises(ValueError, match=r"above 1 with 3 videos in 2 rows.*transformers>=5.18"):
        model.generate(**inputs, max_new_tokens=1, num_beams=2)
