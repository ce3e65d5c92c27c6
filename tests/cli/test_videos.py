"""Videos in ``vtprune generate``, ``eval``, ``show`` and ``export``."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.support.checkpoints import save_folder
from tests.support.video_runs import RECORDS, VideoSetup
from vtprune_train.cli import main
from vtprune_train.evaluation.answering import answers, load
from vtprune_train.evaluation.videos import open_video

QUESTION = "what is shown on the left ?"
HALF = ("--method", "pyramiddrop", "--layers", "2,4", "--keep", "0.5,0.25")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with the processor of a run with videos, and the folder of its data."""
    setup = VideoSetup("qwen3_vl", tmp_path_factory.mktemp("saved"))
    setup.config.data.video.num_frames = 4
    setup.parts().processor.save_pretrained(setup.folder / "model")
    return str(setup.folder / "model"), setup.folder / "clips"


def said(capsys, *options):
    assert main([*map(str, options)]) == 0
    return capsys.readouterr().out.strip()


def wrong(capsys, *options):
    assert main([*map(str, options)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("frames", [(), ("--num_frames", 2), ("--fps", 4)])
def test_generate(saved, capsys, frames):
    model, data = saved
    videos, image = [data / "videos" / f"{n}.mp4" for n in (0, 2)], data / "images" / "1.png"
    prompt = "is <video> or <image> <video> ?"
    loaded = load(model, {"method": "pyramiddrop", "layers": [2, 4], "keep": [0.5, 0.25]})
    changes = {key.strip("-"): value for key, value in zip(frames[::2], frames[1::2], strict=True)}
    loaded.processor.video_processor = loaded.processor.video_processor.changed(**changes)
    media = [Image.open(image).convert("RGB"), *(open_video(path, loaded.processor) for path in videos)]
    assert len(media[1].frames) == {(): 4, ("--num_frames", 2): 2, ("--fps", 4): 12}[frames]
    [expected] = answers(loaded, [(media, prompt)], max_new_tokens=6)
    options = ("--image", image, "--video", *videos, "--prompt", prompt, "--max_new_tokens", 6, *frames)
    assert said(capsys, "generate", "--model", model, *HALF, *options) == expected


def test_wrong_videos(saved, capsys, tmp_path):
    model, data = saved
    start = ("generate", "--model", model, *HALF, "--prompt", QUESTION)
    image, video = data / "images" / "1.png", data / "videos" / "0.mp4"
    (tmp_path / "text.mp4").write_text("no video")
    assert "missing.mp4 cannot be read" in wrong(capsys, *start, "--video", "missing.mp4")
    assert "text.mp4 cannot be read" in wrong(capsys, *start, "--video", tmp_path / "text.mp4")
    assert "1.png is an image; pass it as an image (--image)" in wrong(capsys, *start, "--video", image)
    assert "pass a video as a video (--video)" in wrong(capsys, *start, "--image", video)
    assert "1 video(s) but 2 <video> in the prompt" in wrong(capsys, *start[:-1], "<video> <video> ?", "--video", video)
    assert "0 video(s) but 1 <video> in the prompt" in wrong(capsys, *start[:-1], "a <video> ?")
    both = wrong(capsys, *start, "--video", video, "--fps", 2, "--num_frames", 4)
    assert "fps=2.0 and num_frames=4 are both set" in both
    assert "must be above 0" in wrong(capsys, *start, "--video", video, "--fps", 0)


def test_a_family_without_videos_says_so(saved, capsys, tmp_path):
    video = saved[1] / "videos" / "0.mp4"
    folder = save_folder(tmp_path)
    error = wrong(capsys, "generate", "--model", folder, *HALF, "--prompt", QUESTION, "--video", video)
    assert "0.mp4: LlavaNext models do not take videos here; pass the frames as images" in error


def test_eval(saved, capsys, tmp_path):
    model, data = saved
    options = ("--images", data / "images", "--videos", data / "videos", "--max_new_tokens", 4)
    command = ("eval", "--model", model, *HALF, "--data", data / "train.json", "--batch_size", 4, *options)
    said(capsys, *command, "--out", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == sum(len(texts) // 2 for texts, _, _ in RECORDS)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not results["left_out"]
    loaded = load(model, {"method": "pyramiddrop", "layers": [2, 4], "keep": [0.5, 0.25]})
    video = open_video(data / "videos" / "0.mp4", loaded.processor)
    [expected] = answers(loaded, [([video], RECORDS[0][0][0])], max_new_tokens=4)
    [first] = [line for line in lines if line["key"].startswith("0:1:")]
    assert first["runs"]["pruned"]["answer"] == expected
    said(capsys, *command[:-4], *options[-2:], "--out", tmp_path / "without")
    left_out = json.loads((tmp_path / "without" / "results.json").read_text())["left_out"]
    assert len(left_out) == 3 and "vtprune eval --videos DIR" in left_out[0]["reason"]


def test_show(saved, capsys, tmp_path):
    model, data = saved
    options = ("--image", data / "images" / "0.png", "--video", data / "videos" / "0.mp4", "--prompt", QUESTION)
    files = ("--out", tmp_path / "a.png", "--html", tmp_path / "a.html")
    line = said(capsys, "show", "--model", model, *HALF, *options, *files)
    text = (tmp_path / "a.html").read_text()
    shown = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert [image.get("video") for image in shown["images"]] == [None, 0, 0], "an image, and two steps of two frames"
    assert [image["name"] for image in shown["images"]] == ["", "0.0 s: ", "1.9 s: "]
    counts = [sum(len(image["kept"][stage]) for image in shown["images"]) for stage in range(3)]
    assert line.endswith(f"{counts[0]} visual tokens, kept by stage: {counts[1]}, {counts[2]}")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.std() > 10
    assert "pass --image or --video" in wrong(capsys, "show", "--model", model, *HALF, *options[-2:], *files)


def test_export_keeps_the_frames_of_the_run(saved, capsys, tmp_path):
    model, data = saved
    said(capsys, "export", "--model", model, "--out", tmp_path / "out", "--dtype", "float32")
    settings = json.loads((tmp_path / "out" / "processor_config.json").read_text())["video_processor"]
    assert (settings["num_frames"], settings["fps"], settings["do_sample_frames"]) == (4, None, True)
    start = ("--video", data / "videos" / "0.mp4", "--prompt", QUESTION, "--max_new_tokens", 6)
    assert said(capsys, "generate", "--model", tmp_path / "out", *HALF, *start) == said(
        capsys, "generate", "--model", model, *HALF, *start
    )
