"""``vtprune estimate``: hand-computed and published numbers, agreement with the dry run, every documented command."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3Config, LlavaConfig, MixtralConfig, Qwen2VLConfig, Qwen2VLImageProcessorPil

from tests.support.families import family_model
from tests.support.helpers import tiny_config, tiny_model
from tests.support.videos import moving_frames, write_video
from vtprune_train import PyramidDrop
from vtprune_train.bench.costs import ImageTokens, Sample, Subject, estimate, images_of_sample
from vtprune_train.bench.decoder_time import clock
from vtprune_train.cli import main
from vtprune_train.cli.estimate import render
from vtprune_train.config.load import load_config
from vtprune_train.core.flops import DecoderGeometry, TrainingCost, selector_flops
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.models import families
from vtprune_train.models.families.base import Lacks
from vtprune_train.models.families.qwen import MergedPatches
from vtprune_train.models.families.towers import tile_tower
from vtprune_train.models.io.build import load_model_config
from vtprune_train.training.dry_run import describe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NEXT, LLAVA = "llava-hf/llava-v1.6-vicuna-7b-hf", "llava-hf/llava-1.5-7b-hf"
METHOD = PyramidDrop(layers=(2, 4), keep=(0.5, 0.2))


def subject(config=None, method=METHOD, **values):
    return Subject("tiny", config or tiny_config(), method, "the test", **values)


def sample(*visual, tiles=None, **values):
    return Sample(tuple(ImageTokens("picture", count, tiles) for count in visual), **values)


def stdout_of(capsys, *arguments):
    assert main(["estimate", *arguments]) == 0
    return capsys.readouterr().out


def errors_of(capsys, *arguments):
    assert main(["estimate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    title, *lines = captured.err.splitlines()
    assert title == "vtprune estimate:"
    return [line.removeprefix("  ") for line in lines]


@pytest.mark.parametrize(
    ("arguments", "dense", "pruned"),
    [
        (["--config", "configs/llava_next_pdrop.yaml", "--visual_tokens", "2880"], "20.8", "9.46"),
        (["--model", NEXT, "--visual_tokens", "2880"], "20.8", "9.46"),
        (["--model", LLAVA, "--visual_tokens", "576"], "3.82", "1.78"),
        (["--model", LLAVA, "--method", "pyramiddrop", "--layers", "8,16,24"], "3.82", "1.78"),
    ],
)
def test_published_numbers(arguments, dense, pruned, capsys):
    lines = stdout_of(capsys, *arguments, "--published").splitlines()
    assert lines[-1].split(", ")[:2] == [f"  dense {dense} TFLOP", f"pruned {pruned} TFLOP"]
    assert "published" not in stdout_of(capsys, *arguments)


def test_by_hand():
    """Width 32, MLP 48, 4 heads of 8, 2 for keys: a layer costs 64 * 240 a token and 64 n (n + 1) of attention."""
    result = estimate(subject(), sample(10, text=5, answer=4))
    assert [(s.first_layer, s.end_layer, s.visual_tokens, s.text_tokens) for s in result.stages] == [
        (0, 2, 10, 5),
        (2, 4, 5, 5),
        (4, 6, 2, 5),
    ]
    assert [stage.prefill.pruned for stage in result.stages] == [2 * 245760, 2 * 160640, 2 * 111104]
    assert [stage.prefill.dense for stage in result.stages] == [2 * 245760] * 3
    assert result.head == 2 * 32 * 64
    assert result.selector == (15 + 10) * (64 * 16 + 64) + 2 * 64 * 32  # keys and scores of all, queries of one row
    assert result.prefill_decoder.dense == 6 * 245760 + 4096
    assert result.prefill_decoder.pruned == 2 * (245760 + 160640 + 111104) + 4096 + 31296
    assert result.training_decoder.dense == 3 * (6 * 316160 + 4 * 4096)
    assert result.training_decoder.pruned == 3 * (2 * (316160 + 228480 + 177408) + 4 * 4096) + 40000
    assert (result.cache_prompt.dense, result.cache_prompt.pruned) == (6 * 15 * 64, 2 * (15 + 10 + 7) * 64)
    assert (result.cache_answer.dense, result.cache_answer.pruned) == (6 * 18 * 64, 2 * (18 + 13 + 10) * 64)
    assert result.cache_prompt.ratio == 5760 / 4096


def test_several_images_and_batches():
    """Every picture keeps its own floor; a batch is that many times a sample."""
    one, batch = (estimate(subject(), sample(9, 21, text=5, batch=size)) for size in (1, 7))
    assert [stage.visual_tokens for stage in one.stages] == [30, 4 + 10, 1 + 4]
    assert [stage.visual_tokens for stage in batch.stages] == [210, 98, 35]
    for key in ("prefill_decoder", "training_decoder", "cache_prompt", "cache_answer"):
        for side in ("dense", "pruned"):
            assert getattr(getattr(batch, key), side) == pytest.approx(7 * getattr(getattr(one, key), side), rel=1e-12)


@pytest.mark.parametrize("rank_with", ["next_layer", "this_layer"])
def test_selector_as_in_training(rank_with):
    """What the logs of a run count for the same sample."""
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.2), rank_with=rank_with)
    segment = SegmentLayout(24, (ImageSpan(1, 12), ImageSpan(14, 5)), (19,), tuple(range(20, 24)))
    plan, config = method.plan([segment], 6), tiny_config()
    geometry, dense = DecoderGeometry.of(config.text_config), subject(config, PyramidDrop(layers=(2,), keep=(1.0,)))
    cost = TrainingCost(geometry, None, trains_decoder=True, trains_tower=False)
    lengths = np.array([[stage.num_tokens for stage in plan.stages]])
    expected = cost.text(lengths, [2, 2, 2], np.array([4]))[0] + selector_flops(geometry, plan, method)
    result = estimate(subject(config, method), sample(12, 5, text=3, answer=4))
    assert result.training_decoder.pruned == pytest.approx(expected, rel=1e-12)
    assert result.training_decoder.dense == estimate(dense, sample(12, 5, text=3, answer=4)).training_decoder.dense
    assert ("projects keys" in render(result)) == (rank_with == "next_layer")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_gets_the_numbers_of_its_dry_run(path, tmp_path):
    """The row of the image that makes most tokens: text as long, half of it supervised."""
    report = describe(load_config(path.name))
    table = report[report.index("tokens in each stage") :].splitlines()[2:]
    lines = [line for line in table[: table.index("") - 1] if re.match(r" *\d+ x \d+  ", line)]
    rows = [re.split(r"  +", line.strip()) for line in lines]
    stages, speedup = {}, {}
    for size, _, text, tokens, _, _, whole in rows:
        stages[size] = [int(count) - int(text) for count in tokens.split(" / ")]
        speedup[size] = float(whole.rstrip("x"))
    largest = max(stages, key=lambda size: stages[size][0])
    height, width = largest.split(" x ")
    half = int(rows[0][2]) // 2
    arguments = ("--text", str(half + 1), "--answer", str(half), "--json", str(tmp_path / "estimate.json"))
    assert main(["estimate", "--config", path.name, "--resolution", f"{width}x{height}", *arguments]) == 0
    counted = json.loads((tmp_path / "estimate.json").read_text())
    # Tokens that are dropped before the first layer have no stage of their own.
    kept = [stage["visual_tokens"] for stage in counted["stages"]]
    assert kept == stages[largest][len(stages[largest]) - len(kept) :]
    # It also counts the selector and the head.
    assert counted["training_whole"]["ratio"] == pytest.approx(speedup[largest], rel=0.03)


def test_agrees_with_the_dry_run():
    """Same picture, 121 tokens of text of which 60 are supervised; the dry run leaves the selector out."""
    config = load_config("llava_next_pdrop.yaml")
    row = next(line for line in describe(config).splitlines() if "336 x 1008" in line).replace("x", "").split()
    model_config = load_model_config(config.model, offline=True)
    asked = Subject("recipe", model_config, config.pruning.build(), "YAML", tuple(config.model.train))
    (picture,) = images_of_sample(model_config, [(1008, 336)])
    result = estimate(asked, Sample((picture,), text=61, answer=60))
    assert (picture.tiles, [stage.visual_tokens + 121 for stage in result.stages]) == (
        int(row[2]),
        [int(token) for token in row[4:11:2]],
    )
    ranked = [stage.visual_tokens + 121 for stage in result.stages[:-1]]
    selector = sum(result.decoder.selector(tokens, 1, tokens, True) for tokens in ranked)
    whole = result.training_whole
    assert (whole.pruned - selector) / whole.dense == pytest.approx(float(row[11]), abs=6e-4)
    assert whole.dense / (whole.pruned - selector) == pytest.approx(float(row[13]), abs=6e-3)


def test_whole_model_adds_tower_and_projector():
    config = tiny_config()
    tower, pictures = tile_tower(config), images_of_sample(config, [(56, 56), (80, 30)])
    assert [(picture.tokens, picture.tiles) for picture in pictures] == [(88, 5), (16 + 4 * 11, 4)]
    result = estimate(subject(config, trained=("projector",)), Sample(pictures, batch=3))
    assert result.vision == pytest.approx(3 * (tower.tower(9) + tower.projector(9)))
    for whole, decoder in (
        (result.prefill_whole, result.prefill_decoder),
        (result.training_whole, result.training_decoder),
    ):
        assert whole.dense - decoder.dense == pytest.approx(whole.pruned - decoder.pruned)
    step = result.training_whole.dense - result.training_decoder.dense
    assert step == pytest.approx(3 * (tower.tower(9) + 2 * tower.projector(9)))
    all_trained = estimate(
        subject(config, trained=("projector", "language_model", "vision_tower")), Sample(pictures, batch=3)
    )
    step = all_trained.training_whole.dense - all_trained.training_decoder.dense
    assert step == pytest.approx(9 * (tower.tower(9) + tower.projector(9)))


def test_cache_is_what_generation_holds():
    """The bytes that transformers keeps after generating, dense."""
    model, prompt, answer = tiny_model().eval(), 11, 5
    output = model.generate(
        input_ids=torch.ones(2, prompt, dtype=torch.long),
        attention_mask=torch.ones(2, prompt, dtype=torch.long),
        max_new_tokens=answer,
        min_new_tokens=answer,
        do_sample=False,
        return_dict_in_generate=True,
    )
    held = sum(
        tensor.numel() * tensor.element_size()
        for layer in output.past_key_values.layers
        for tensor in (layer.keys, layer.values)
    )
    asked = subject(model.config, None, dtype="float32")
    result = estimate(asked, sample(4, text=prompt - 4, answer=answer, batch=2))
    assert result.cache_answer.dense == result.cache_answer.pruned == held


@pytest.mark.parametrize(
    ("model", "size", "tokens", "seen"),
    [
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "768x384", 729 + 27 * 55, "3 tile(s)"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "644x420", 23 * 15, f"{46 * 30} patches"),
    ],
)
def test_other_families_count_images_tower_and_projector(model, size, tokens, seen, capsys):
    output = stdout_of(capsys, "--model", model, "--resolution", size)
    assert f"{size}: {tokens} tokens of {seen}" in output
    assert "not counted" not in output and output.count("x faster") == 4
    assert "tower and projector" in stdout_of(capsys, "--model", model), "the largest of its examples"


QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"


@pytest.mark.parametrize(
    ("model", "video", "tokens", "seen", "text"),
    [
        # 256 tokens of 2 x 2 patches for each pair of frames, and the start and end of the video.
        (QWEN, "63x448x448", 32 * 256, f"{32 * 1024} patches in 32", 2),
        # Also before each pair "<0.2 seconds>" of 6 tokens (7 from 10 s on: 10.2 to 15.2 s), start and end.
        ("Qwen/Qwen3-VL-8B-Instruct", "32x160x128", 16 * 5 * 4, f"{16 * 80} patches in 16", 2 + 16 * 8 + 6),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "64x640x360", 64 * 14 * 14 + 1, "64 tile(s) in 64", 0),
        # "Frame1: <img>", "</img>" and a newline: 7 tokens, one more from the tenth frame on, no last newline.
        ("OpenGVLab/InternVL3_5-8B-HF", "12x640x360", 12 * 256, "12 tile(s) in 12", 12 * 7 + 3 - 1),
    ],
)  # fmt: skip
def test_tokens_of_a_video(model, video, tokens, seen, text, capsys):
    output = stdout_of(capsys, "--model", model, "--video", video, "--text", "100")
    frames, size = video.split("x", 1)
    assert f"{frames} frames of {size}: {tokens} tokens of {seen} steps in time; {100 + text} text tokens" in output
    assert "not counted" not in output


def test_frames_do_not_attend_to_each_other_in_the_tower(tmp_path, capsys):
    """Per frame, the tower costs as much as for an image, and dropping leaves it as it is."""
    reports = []
    for number, options in enumerate((("--video", "16x448x448"), ("--resolution", "448x448"))):
        file = tmp_path / f"{number}.json"
        stdout_of(capsys, "--model", QWEN, *options, "--json", str(file))
        reports.append(json.loads(file.read_text()))
    video, image = reports
    assert video["sample"]["pictures"][0] | {"label": ""} == {
        "label": "", "tokens": 8 * 256, "tiles": 8 * 1024, "steps": 8, "text": 2,
    }  # fmt: skip
    assert video["vision"] == pytest.approx(8 * image["vision"])
    for side in ("dense", "pruned"):
        whole = video["prefill_whole"][side] - video["prefill_decoder"][side]
        assert whole == pytest.approx(8 * image["vision"])
    assert [stage["visual_tokens"] for stage in video["stages"]] == [2048, 1024, 512, 256]


def test_frames_that_keep_their_share_are_planned_apart(capsys):
    """196 tokens of a frame: int(0.07 * 196) = 13 of each; int(0.07 * (64 * 196 + 1)) = 878 of all, and the newline."""
    model = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    kept = {"video": 878, "frame": 64 * 13}
    for per, count in kept.items():
        options = ("--layers", "2", "--keep", "0.07", "--set", f"per={per}")
        row = stdout_of(capsys, "--model", model, "--video", "64x640x360", *options).split("2-27")[1].split()
        assert int(row[0]) == count


def test_a_video_file_is_sampled_as_in_training(tmp_path, capsys):
    """By its header: 2 frames per second of 3 s."""
    write_video(tmp_path / "clip.mp4", moving_frames(30, (336, 448)), fps=10)
    video = str(tmp_path / "clip.mp4")
    words = "6 frames of 448x336: 576 tokens of 2304 patches in 3 steps in time"
    assert words in stdout_of(capsys, "--model", QWEN, "--video", video)
    both = stdout_of(capsys, "--model", QWEN, "--video", video, "--resolution", "280x280")
    assert "280x280: 100 tokens of 400 patches; 6 frames of 448x336" in both
    run = (
        "--config",
        "qwen2_5_vl_pdrop.yaml",
        f"model.path={QWEN}",
        "data.video.fps=4",
        "data.video.max_pixels=112896",
    )
    assert "12 frames of 448x336: 780 tokens of 3120 patches in 6" in stdout_of(capsys, *run, "--video", video)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    [line] = errors_of(capsys, "--model", QWEN, "--video", video)
    assert "clip.mp4" in line


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (QWEN, ["--video", "448x448"], "--video: '448x448' is neither FRAMESxWIDTHxHEIGHT, for example 64x640x360"),
        (QWEN, ["--video", "9x448x448", "--visual_tokens", "9"], "pass either --video or --visual_tokens, not both"),
        (QWEN, ["--video", "999999x448x448"], "999999 frames have 128000000 visual tokens; an estimate plans at most"),
        (QWEN, ["--video", "2x5000x10"], "more than 200 times as long as wide"),
        (LLAVA, ["--video", "8x336x336"], "--video: LLaVA-1.5 does not take videos: it has no video tokens"),
    ],
)
def test_wrong_videos(model, options, words, capsys):
    [line] = errors_of(capsys, "--model", model, *options)
    assert words in line


def test_images_of_one_sample_are_laid_out_together(capsys):
    model = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
    two = stdout_of(capsys, "--model", model, "--resolution", "768x384", "--resolution", "768x384")
    assert "768x384: 730 tokens of 1 tile(s); 768x384: 730 tokens of 1 tile(s)" in two


def test_what_a_family_lacks_is_said(tmp_path, capsys, monkeypatch):
    untrained = {"loop": Lacks("-"), "geometry": MergedPatches.of}
    listed = [replace(f, **untrained) if f.model_type == "qwen2_vl" else f for f in families.FAMILIES]
    monkeypatch.setattr(families, "FAMILIES", listed)
    Qwen2VLConfig().save_pretrained(tmp_path)
    [line] = errors_of(capsys, "--model", str(tmp_path), "--resolution", "336x336")
    assert "for qwen2_vl with qwen2_vl_vision (" in line and "there is no preprocessor_config.json" in line
    output = stdout_of(capsys, "--model", str(tmp_path), "--visual_tokens", "1000")
    assert "image: 1000 tokens of 4000 patches" in output and "not counted" not in output
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    assert "280x280: 100 tokens of 400 patches" in stdout_of(
        capsys, "--model", str(tmp_path), "--resolution", "280x280"
    )
    gemma = subject(Gemma3Config(text_config={"num_hidden_layers": 6}))
    words = "tower and projector not counted: it holds a gemma3, which is not supported; supported: llava_next"
    assert words in render(estimate(gemma, sample(1000)))


def test_towers_that_are_not_counted():
    pixtral = LlavaConfig(vision_config={"model_type": "pixtral"})
    with pytest.raises(ValueError, match=r"for llava with pixtral \(the vision tower is a pixtral"):
        images_of_sample(pixtral, [(336, 336)])
    result = estimate(subject(), sample(10))
    assert "not counted: the tokens are not a multiple of a tile's 16; give --resolution" in render(result)
    with pytest.raises(ValueError, match="mixtral decoder: mixture-of-experts"):
        estimate(subject(MixtralConfig()), sample(10))
    with pytest.raises(ValueError, match="clip_vision_model decoder: its config has no num_key_value_heads"):
        estimate(subject(tiny_config().vision_config), sample(10))


def test_decoders_with_linear_attention_and_experts():
    """The cache of a linear layer does not grow; default drop points move to layers that attend."""
    config = family_model("qwen3_5").config
    short, long = (estimate(subject(config, None), sample(n, tiles=4 * n)) for n in (100, 300))
    decoder = short.decoder
    states = 3 * decoder.linear.state_values * 2  # layers 0, 6 and 7, in bfloat16
    per_token = 5 * 2 * decoder.kv_heads * decoder.head_dim * 2
    text = short.sample.text
    assert [short.cache_prompt.dense, long.cache_prompt.dense] == [
        states + per_token * (100 + text),
        states + per_token * (300 + text),
    ]
    moe = DecoderGeometry.of(family_model("qwen3_5_moe").config.text_config)
    assert (moe.intermediate, moe.router) == (2 * 24 + 16, 4 + 1)
    assert DecoderGeometry.of(family_model("qwen3_vl_moe").config.text_config).router == 4
    with pytest.raises(ValueError, match="only Llama-like decoders can be timed, and this one has linear attention"):
        clock(decoder, None, sample(10), [1], repeats=1, device=torch.device("cpu"), dtype=torch.float32)


def test_resolution_is_width_first(capsys):
    wide = stdout_of(capsys, "--model", NEXT, "--resolution", "1008x336")
    tall = stdout_of(capsys, "--model", NEXT, "--resolution", "336x1008")
    assert "1008x336: 2328 tokens of 4 tile(s)" in wide
    assert "336x1008: 2376 tokens of 4 tile(s)" in tall, "a newline a row: tall pictures have more rows"
    fixed = stdout_of(capsys, "--model", LLAVA, "--resolution", "20x900", "--resolution", "50x50")
    assert "20x900: 576 tokens of 1 tile(s); 50x50: 576 tokens of 1 tile(s)" in fixed


def checkpoint(folder, **pruning):
    config = tiny_config()
    if pruning:
        config.pruning = pruning
    config.save_pretrained(folder)
    return str(folder)


def test_where_the_pruning_settings_come_from(tmp_path, capsys):
    saved = checkpoint(tmp_path / "saved", method="pyramiddrop", layers=[1, 5], keep=[0.5, 0.25])
    plain = checkpoint(tmp_path / "plain")
    for arguments, words in (
        (["--model", saved], ["layers=[1, 5] keep=[0.5, 0.25]", "saved in the checkpoint"]),
        (["--model", plain], ["2, 3, 4 of 6 it keeps 0.5, 0.25, 0.125", "the checkpoint has no pruning settings"]),
        (["--model", saved, "--keep", "0.3,0.2"], ["layers=[1, 5] keep=[0.3, 0.2]", "the command line, and"]),
        (["--model", saved, "--method", "pyramiddrop"], ["before layers 2, 3, 4 of 6", "the command line"]),
        (["--model", saved, "--method", "none"], ["none", "no selector"]),
        (["--config", "llava_next_dense.yaml"], ["none", "the settings of llava_next_dense.yaml"]),
        (["--config", "quickstart.yaml", "pruning.layers=[2,3,5]"], ["layers=[2, 3, 5]", "settings of quickstart"]),
    ):
        output = stdout_of(capsys, *arguments)
        for word in words:
            assert word in output, arguments


def test_a_new_run_from_a_checkpoint_takes_its_settings(tmp_path, capsys):
    saved = checkpoint(tmp_path / "saved", method="pyramiddrop", layers=[1, 5], keep=[0.5, 0.25])
    (tmp_path / "run.yaml").write_text(f"{{model: {{dtype: float16}}, train: {{init_from: {saved}}}}}")
    output = stdout_of(capsys, "--config", str(tmp_path / "run.yaml"))
    assert "layers=[1, 5] keep=[0.5, 0.25]" in output and "keys and values in float16" in output


def test_dense_against_dense(capsys):
    output = stdout_of(capsys, "--model", NEXT, "--method", "none")
    ratios = re.findall(r"([\d.]+)x (?:faster|smaller)", output)
    assert ratios == ["1.000"] * 6


def test_json(tmp_path, capsys):
    file = tmp_path / "out.json"
    stdout_of(capsys, "--model", LLAVA, "--batch", "2", "--json", str(file))
    report = json.loads(file.read_text())
    assert report["sample"]["pictures"] == [{"label": "336x336", "tokens": 576, "tiles": 1}]
    assert [stage["visual_tokens"] for stage in report["stages"]] == [1152, 576, 288, 144]
    total = report["cache_prompt"]
    assert total["dense"] == 2 * 32 * (576 + 121) * 2 * 4096 * 2
    assert total["ratio"] == total["dense"] / total["pruned"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resolution", "big"], ["--resolution: 'big' is not WIDTHxHEIGHT", "672x336"]),
        (["--resolution", "0x5"], ["--resolution: '0x5'"]),
        (["--text", "-3"], ["--text", "greater than or equal to 1", "'-3'"]),
        (["--answer", "many"], ["--answer", "'many'"]),
        (["--batch", "1" + "0" * 400], ["--batch"]),
        (["--visual_tokens", "576,0"], ["--visual_tokens", "'0'"]),
        (["--visual_tokens", "576", "--resolution", "5x5"], ["either --resolution or --visual_tokens", "not both"]),
        (["--keep", "0.1,0.2,0.3"], ["--keep=[0.1, 0.2, 0.3] increases", "[0.3, 0.2, 0.1]"]),
        (["--keep", "half"], ["--keep", "'half'"]),
        (["--keep", "nan,nan,nan"], ["--keep=[nan, nan, nan]: nan is not in (0, 1]"]),
        (["--layers", "8,16,40"], ["--layers=[8, 16, 40]: layer 40 does not exist in a decoder of 32", "below 32"]),
        (["--layers", "8"], ["--layers=[8] has 1 entries but keep="]),
        (["--method", "pyramid"], ["--method='pyramid' is unknown", "pyramiddrop"]),
        (["--method", "sparsevlm", "--set", "budget=100"], ["budget=100 is not one of 192, 128, 96, 64"]),
        (["--method", "none", "--keep", "0.5"], ["no effect with --method none"]),
        (["--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
        (["--json", "/nowhere/out.json"], ["--json=/nowhere/out.json: cannot write the file (No such file"]),
        (["--repeats", "5"], ["--repeats has no effect without --clock"]),
        (["--method", "fopru", "--set", "layer=99"], ["fopru", "99"]),
        (["train.clip=1"], ["'train.clip=1': key=value only works with --config"]),
    ],
)
def test_wrong_input(arguments, words, capsys):
    lines = errors_of(capsys, "--model", NEXT, *arguments)
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["pass either --config FILE or --model"]),
        (["--model", NEXT, "--config", "quickstart.yaml"], ["pass either"]),
        (["--model", "runs/nowhere"], ["--model=runs/nowhere: no such folder here"]),
        (["--config", "nowhere.yaml"], ["--config: nowhere.yaml does not exist"]),
        (
            ["--config", "llava_next_pdrop.yaml", "--layers", "1,2,3"],
            ["--layers only works with --model", "pruning.layers="],
        ),
        (["--config", "llava_next_pdrop.yaml", "pruning.layers=[8,16,40]"], ["pruning.layers=[8, 16, 40]: layer 40"]),
        (["--config", "llava_next_pdrop.yaml", "prunning.keep=1"], ["prunning: unknown key; did you mean pruning?"]),
    ],
)
def test_wrong_origin(arguments, words, capsys):
    lines = errors_of(capsys, *arguments)
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]


def test_all_that_is_wrong_at_once(capsys):
    lines = errors_of(capsys, "--model", NEXT, "--text", "x", "--resolution", "big", "--keep", "a,0.5", "--dtype", "no")
    assert [line.partition(":")[0] for line in lines] == ["--resolution", "--text", "--keep", "--dtype"]


def test_saved_settings_that_do_not_fit(tmp_path, capsys):
    folder = checkpoint(tmp_path / "saved", method="pyramiddrop", layers=[1, 9], keep=[0.5, 0.25])
    assert errors_of(capsys, "--model", folder)[0].startswith(f"pruning in {folder}: layers=[1, 9]: layer 9 does not")


def test_a_method_that_reads_a_tower_which_does_not_tell(tmp_path, capsys):
    Qwen2VLConfig().save_pretrained(tmp_path)
    [line] = errors_of(capsys, "--model", str(tmp_path), "--visual_tokens", "99", "--method", "visionzip")
    assert (
        "visionzip needs the vision tower's attention, which is not available for Qwen2-VL: it cannot be read "
        "for this family; use a method" in line
    )
    assert "pruning   divprune" in stdout_of(
        capsys, "--model", str(tmp_path), "--visual_tokens", "99", "--method", "divprune"
    )


def test_as_a_user_calls_it(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vtprune_train.cli", "estimate", "--config", "llava_next_pdrop.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == ""
    assert "672x672: 2928 tokens of 5 tile(s)" in done.stdout and "training step, whole model" in done.stdout
    assert list(tmp_path.iterdir()) == []
    wrong = subprocess.run([*command, "--text", "-3"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert len(wrong.stderr.splitlines()) == 2 and "Traceback" not in wrong.stderr


def documented_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "estimate.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("vtprune estimate")]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_command(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoints = tmp_path / "runs" / "llava_next_pdrop" / "checkpoints"
    checkpoint(checkpoints / "step_00000001" / "hf", method="pyramiddrop", layers=[2, 4], keep=[0.5, 0.25])
    (checkpoints / "step_00000001" / "manifest.json").write_text("{}")
    (checkpoints / "latest").write_text("step_00000001\n")
    output = stdout_of(capsys, *shlex.split(command)[2:])
    assert "prefill, whole model" in output and "x faster" in output
    assert ("--json" in command) == (tmp_path / "estimate.json").is_file()
