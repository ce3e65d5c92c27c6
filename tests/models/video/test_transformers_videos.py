"""Frames, pixels, ids and positions of videos equal those of transformers' own video processors."""

import itertools
import json

import numpy as np
import pytest
import torch

from tests.support.families import family_model, tokenizer
from tests.support.family_runs import family_tokenizer, image_processor, written
from tests.support.helpers import PATCH, TILE
from tests.support.torchvision_reference import FOLDER, reference
from tests.support.video_runs import RECORDS, VIDEO_FAMILIES, VIDEOS, VideoSetup
from vtprune_train.data.videos import load_frames, video_header
from vtprune_train.models.families import family_of_type
from vtprune_train.models.families.layout import Clip, VideoHeader
from vtprune_train.models.families.videos import video_settings
from vtprune_train.models.io.processors import open_processor

CLASSES = {
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "qwen3_5": "Qwen3VLVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "llava_next_video": "LlavaNextVideoVideoProcessor",
    "internvl": "InternVLVideoProcessor",
}
TOTALS = (2, 3, 4, 5, 7, 8, 16, 31, 100, 367, 1000, 1801)
RATES = (1.0, 2.0, 8.0, 23.976023976023978, 29.97, 30.0, 60.0)
SETTINGS = ({"fps": 1.0}, {"fps": 2.0}, {"fps": 0.7}, {"num_frames": 2}, {"num_frames": 8}, {"num_frames": 7})
LIMITS = ({"min_frames": 2, "max_frames": 6, "fps": 2.0}, {"min_frames": 10, "max_frames": 33, "fps": 1.0})
SIZES = [(8, 48, 64), (7, 97, 41), (1, 33, 50), (3, 200, 30), (5, 20, 25), (2, TILE, TILE)]  # frames, height, width
LOOKS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2, "rescale_factor": 1 / 200}
# The words of timestamps, and of the frames of InternVL.
MORE = [*"<>0123456789", "seconds", *(f"Frame{number}" for number in range(1, 5))]


def layout_of(name, settings):
    loop = family_of_type(name).loop
    layout = loop.layout(family_model(name).config, image_processor(name))
    return layout.with_videos(video_settings(loop.videos, settings, {}, "here"))


def variants(name):
    """Settings of a video processor."""
    if name.startswith("qwen"):
        small = {"shortest_edge": 28 * 28, "longest_edge": 6 * 56 * 56}
        shape = {"patch_size": PATCH, "merge_size": 2}
        tight = {"cap_pixels_per_frame": True, "max_video_tokens": 5}
        return [
            {"size": {"shortest_edge": 30 * 30, "longest_edge": 70 * 70}, **shape},
            {"size": small, **shape, **LOOKS},
            {"size": small, **shape, **tight},
            {"size": {"shortest_edge": 28, "longest_edge": 10**6}, **shape, "resample": 0},
        ]
    if name == "llava_next_video":
        crop = {"height": TILE, "width": TILE}
        size = {"shortest_edge": TILE}
        return [
            {"size": size, "crop_size": crop},
            {"size": {"shortest_edge": TILE + 5}, "crop_size": crop, **LOOKS},
            {"size": {"shortest_edge": TILE - 5}, "crop_size": crop, "resample": 0},
        ]
    size = {"height": TILE, "width": TILE}
    return [{"size": size}, {"size": size, **LOOKS}, {"size": size, "resample": 0}]


def is_refused(name, frames):
    """Qwen3-VL's processor, which is also that of Qwen3.5, refuses fewer frames than a step."""
    return name in ("qwen3_vl", "qwen3_5") and frames < 2


PIXELS = [
    (name, settings, size)
    for name in VIDEO_FAMILIES
    if name != "qwen2_5_vl"  # its processor is that of Qwen2-VL
    for settings in variants(name)
    for size in SIZES
    if not is_refused(name, size[0])
]
SAMPLED = list(itertools.product(TOTALS, RATES, SETTINGS + LIMITS))


def frames_of(size):
    return torch.from_numpy(np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8))


class WordySetup(VideoSetup):
    """With a tokenizer that has the words around frames, and the processor that an export has."""

    def __init__(self, name, folder):
        super().__init__(name, folder)
        words = family_tokenizer(name) if name == "qwen3_5" else tokenizer(MORE)  # its characters include the words
        if name == "internvl":
            named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
            words.init_kwargs.update(named, video_token="<video>")
        words.save_pretrained(folder / "model")
        open_processor(str(folder / "model"), family_model(name).config).save_pretrained(folder / "exported")
        family_model(name).config.save_pretrained(folder / "exported")

    def job(self):
        """A record with a video for the family's own processor, with all frames."""
        texts, _, videos = RECORDS[0]
        mark = "<|vision_start|><|video_pad|><|vision_end|>" if self.name.startswith("qwen") else "<video>"
        paths = [self.folder / "clips" / "videos" / f"{number}.mp4" for number in videos]
        frames = [
            load_frames(path, range(VIDEOS[n][0]), video_header(path)) for path, n in zip(paths, videos, strict=True)
        ]
        text = written(texts, self.name).replace("<video>", mark)
        return (
            "inputs",
            str(self.folder / "exported"),
            text,
            list(map(torch.from_numpy, frames)),
            [VIDEOS[n][3] for n in videos],
        )


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    return {name: WordySetup(name, tmp_path_factory.mktemp(name)) for name in VIDEO_FAMILIES}


@pytest.fixture(scope="module")
def results(setups, tmp_path_factory):
    """Of all jobs, from one process."""
    if not FOLDER.is_dir():
        pytest.skip(f"transformers' video processors need torchvision in {FOLDER}: run `make ecosystem`")
    jobs = {("sample", name): ("sample", name, SAMPLED) for name in set(CLASSES.values())}
    for name, settings, size in PIXELS:
        jobs["pixels", name, json.dumps(settings), size] = ("pixels", CLASSES[name], settings, frames_of(size))
    for name in VIDEO_FAMILIES:
        jobs["inputs", name] = setups[name].job()
    return dict(zip(jobs, reference(tmp_path_factory.mktemp("reference"), list(jobs.values())), strict=True))


@pytest.mark.parametrize("name", [name for name in VIDEO_FAMILIES if name != "qwen2_5_vl"])
def test_frames(results, name):
    """But for what we limit: transformers refuses videos with fewer frames than ``num_frames`` (or repeats frames, in
    Qwen3-VL), some processors have no ``max_frames``, and of 367 frames at 1 per second it asks for one more."""
    loop = family_of_type(name).loop
    refused = 0
    for (total, fps, settings), expected in zip(SAMPLED, results["sample", CLASSES[name]], strict=True):
        if settings in LIMITS and not name.startswith("qwen"):
            continue
        sampling = video_settings(loop.videos, settings, {}, "here").sampling
        found = list(sampling.clip(VideoHeader(48, 64, total, fps, total / fps)).indices)
        if isinstance(expected, str) or not 0 < len(expected) <= min(total, sampling.max_frames):
            refused += 1
            assert 1 <= len(found) <= total, (total, fps, settings, expected, found)
        else:
            assert found == [index for index in expected if index < total], (total, fps, settings)
    assert refused < len(SAMPLED) / 2


@pytest.mark.parametrize("name", [name for name in VIDEO_FAMILIES if name != "qwen2_5_vl"])
def test_pixels(results, name):
    """Bit by bit, for frames of odd sizes, of both orientations, and smaller than the model's."""
    for family, settings, size in PIXELS:
        if family != name:
            continue
        expected = results["pixels", name, json.dumps(settings), size]
        layout = layout_of(name, settings)
        clip = Clip(*size[1:], tuple(range(size[0])), size[0], 2.0)
        frames = frames_of(size).numpy()
        found = layout.video_pixels(clip, frames)
        assert torch.equal(found, layout.video_pixels(clip, np.stack([layout.resized(clip, f) for f in frames])))
        assert torch.equal(found, expected["pixel_values_videos"].reshape(found.shape)), (settings, size)
        tokens = layout.video_tokens(clip)
        if "video_grid_thw" in expected:
            steps, rows, columns = expected["video_grid_thw"][0].tolist()
            assert (tokens.frames, tokens.grids) == (steps, ((rows // 2, columns // 2),) * steps), (settings, size)
        assert tokens.tiles == len(found), (settings, size)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_whole_sample(setups, results, name):
    """A record from its file, and the family's processor as exported, on the decoded video."""
    expected = results["inputs", name]
    setup = setups[name]
    collate = setup.collator(setup.parts(), None)
    loaded = collate.load(0, 0)
    batch = collate.pack([loaded])
    assert batch.input_ids.tolist() == expected["input_ids"][0].tolist()
    ours = collate.layout.model_inputs(loaded.images)
    for key in sorted(set(expected) - {"input_ids", "attention_mask", "mm_token_type_ids"}):
        found, wanted = torch.as_tensor(ours[key]), torch.as_tensor(expected[key])
        assert torch.equal(found, wanted.to(found.dtype)), key
    if batch.positions is not None:
        model = family_model(name).model
        keys = ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask", "second_per_grid_ts")
        positions, _ = model.get_rope_index(**{key: torch.as_tensor(expected[key]) for key in keys if key in expected})
        assert torch.equal(batch.positions, positions[:, 0])


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_next_video"])
def test_settings_that_change_the_pixels_are_refused(name):
    crops = family_of_type(name).loop.videos.crop is not None
    for step in ("do_resize", "do_normalize", "do_center_crop"):
        value = not crops if step == "do_center_crop" else False
        with pytest.raises(ValueError, match=rf"video processor of here has {step}={value}"):
            layout_of(name, {step: value})
