"""Training as a user starts it: ranks, ZeRO stages, launchers, exports, evaluation."""

import json

import pytest
import torch
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from tests.support.runner import Runs
from vtprune_train import PyramidDrop, prune

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def single(runs):
    """One rank, ZeRO 0, started as a plain script."""
    runs.run("single", "deepspeed=configs/deepspeed/zero0.json")
    return runs.metrics("single")


def assert_same_training(metrics, expected, tolerance=2e-4):
    assert [m["data_digest"] for m in metrics] == [m["data_digest"] for m in expected]
    assert [m["samples"] for m in metrics] == [m["samples"] for m in expected]
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=tolerance), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-3), ours["step"]


def test_what_a_run_leaves(runs, single):
    folder = runs.directory("single")
    for name in ("config.yaml", "metrics.jsonl", "eval.jsonl", "loss.png", "checkpoints/latest"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").iterdir())
    assert [m["step"] for m in single] == list(range(1, 9))
    assert [m["samples"] for m in single] == [6, 6, 6, 2] * 2, "the last step of an epoch takes what is left"
    assert single[-1]["loss"] < single[0]["loss"]
    first = single[0]
    assert first["tokens_stage_0"] > first["tokens_stage_1"] > first["tokens_stage_3"]
    assert 0 < first["flops"] < first["flops_dense"]
    assert first["learning_rates"].keys() == {"projector", "language_model", "vision_tower"}
    assert first["learning_rates"]["projector"] == 0 < single[2]["learning_rates"]["projector"]


def test_without_clipping(runs, single):
    """As in the recipes: DeepSpeed then computes no norm, and the loop's own is recorded."""
    runs.run("unclipped", "train.clip=0.0", "deepspeed=configs/deepspeed/zero2.json", "run.stop_after=2", ranks=2)
    metrics = runs.metrics("unclipped")
    assert metrics[0]["grad_norm"] == pytest.approx(single[0]["grad_norm"], rel=5e-3)
    assert metrics[1]["grad_norm"] > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_like_one(runs, single, stage):
    """Mixed, many-picture and text-only samples; each ZeRO stage; micro-batches of another size."""
    name = f"zero{stage}"
    runs.run(name, f"deepspeed=configs/deepspeed/zero{stage}.json", "data.max_tokens=400", ranks=2)
    assert_same_training(runs.metrics(name), single)
    assert max(m["micro_steps"] for m in runs.metrics(name)) > 1


@pytest.mark.parametrize(
    "settings",
    [
        ("data.max_tokens=300",),
        ("train.activation_checkpointing=false", "data.workers=0"),
        ("pruning.keep=[1.0, 1.0, 1.0]", "REFERENCE", "pruning.method=none"),
    ],
    ids=["smaller micro-batches", "no checkpointing", "keep 1.0 is dense"],
)
def test_equal_updates(runs, single, settings, request):
    name = request.node.callspec.id.replace(" ", "_")
    expected = single
    if "REFERENCE" in settings:
        split = settings.index("REFERENCE")
        runs.run(f"{name}_reference", *settings[split + 1 :], "deepspeed=configs/deepspeed/zero0.json")
        expected, settings = runs.metrics(f"{name}_reference"), settings[:split]
    runs.run(name, *settings, "deepspeed=configs/deepspeed/zero0.json")
    assert_same_training(runs.metrics(name), expected)


def test_deepspeed_launcher_and_bf16(runs, single):
    runs.run("bf16", "model.dtype=bfloat16", "pruning.rank_with=this_layer", ranks=2, launcher="deepspeed")
    metrics = runs.metrics("bf16")
    assert [m["data_digest"] for m in metrics] == [m["data_digest"] for m in single]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    weights = LlavaNextForConditionalGeneration.from_pretrained(runs.checkpoint("bf16") / "hf")
    assert weights.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["single", "zero3"])
def test_export_opens_in_plain_transformers(runs, single, name):
    if name == "zero3" and not runs.directory(name).exists():
        runs.run(name, "deepspeed=configs/deepspeed/zero3.json", ranks=2)
    folder = runs.checkpoint(name) / "hf"
    model, info = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.pruning["layers"] == [1, 2, 3]
    processor = AutoProcessor.from_pretrained(folder)
    from PIL import Image

    image = Image.open(runs.folder / "data" / "images" / "eval-0-0.png").convert("RGB")
    inputs = processor(images=image, text="USER: <image>\nhow bright? ASSISTANT:", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    with torch.no_grad():
        dense = model(**inputs).logits
        dropped = prune(model, PyramidDrop(layers=(1, 2, 3))).eval()(**inputs).logits
    assert dense.shape == dropped.shape


def test_evaluation_is_recorded(runs, single):
    lines = (runs.directory("single") / "eval.jsonl").read_text().splitlines()
    result = json.loads(lines[-1])
    assert result["step"] == 8 and result["answers"] == 8
    assert 0 <= result["exact_match"] <= 1 and result["loss"] > 0


def test_a_second_start_of_a_finished_run_changes_nothing(runs, single):
    before = runs.checkpoint("single").stat().st_mtime_ns
    evaluated = (runs.directory("single") / "eval.jsonl").read_text()
    runs.run("single", "deepspeed=configs/deepspeed/zero0.json")
    assert runs.metrics("single") == single
    assert runs.checkpoint("single").stat().st_mtime_ns == before
    assert (runs.directory("single") / "eval.jsonl").read_text() == evaluated


def test_fine_tuning_a_checkpoint_takes_its_pruning_over(runs, single):
    text = runs.config.read_text()
    start = text.index("pruning:")
    plain = runs.folder / "no_pruning.yaml"
    plain.write_text(text[:start] + text[text.index("run:", start) :])
    source = runs.directory("single")
    command_config, runs.config = runs.config, plain
    try:
        done = runs.run("tuned", f"train.init_from={source}", "pruning.positions=keep", "train.max_steps=1")
    finally:
        runs.config = command_config
    tuned = json.loads((runs.checkpoint("tuned") / "hf" / "config.json").read_text())["pruning"]
    assert (tuned["layers"], tuned["keep"], tuned["positions"]) == ([1, 2, 3], [0.5, 0.25, 0.125], "keep")
    assert "pruning.positions: the checkpoint was trained with renumber, this run uses keep" in done.stderr
    assert runs.metrics("tuned")[0]["loss"] < single[0]["loss"] - 0.5, "it did not start from the checkpoint's weights"


def test_wrong_settings_exit_2_with_all_errors(runs):
    done = runs.run("wrong", "train.clipp=1", "train.epochs=0", expect=2)
    assert "did you mean train.clip?" in done.stderr and "train.epochs" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_data_exits_2_and_names_the_file(runs):
    done = runs.run("missing", "data.train.0.path=nowhere.json", expect=2)
    assert "nowhere.json does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_stage_1_then_stage_2_from_parts(tmp_path):
    """Projector alignment with `plain`, then instruction tuning that picks its projector up."""
    from tests.support.model_parts import save_parts

    runs = Runs(tmp_path)
    save_parts(tmp_path)
    parts = (
        "model.config=null",
        f"model.language_model={tmp_path / 'language'}",
        f"model.vision_tower={tmp_path / 'tower'}",
        "model.image_grid_pinpoints=[[28,56],[56,28],[56,56]]",
        "pruning.layers=[1, 3, 5]",
        "data.max_tokens=900",
        "data.max_length=600",
        "train.max_steps=3",
        "train.warmup_ratio=0",
        "deepspeed=configs/deepspeed/zero0.json",
    )
    runs.run("stage1", *parts, "data.template=plain", "data.train.0.take=first:1", "model.train={projector: 1e-2}")
    before = LlavaNextForConditionalGeneration.from_pretrained(runs.checkpoint("stage1") / "hf").state_dict()
    language = torch.load(next((runs.checkpoint("stage1") / "deepspeed").glob("*.pt")), weights_only=False)
    assert len(language["optimizer"]["state"]) == 5, "projector (two layers with biases) and image_newline"
    stage_2 = (*parts, f"model.projector={runs.directory('stage1')}", "model.train={language_model: 1e-2}")
    runs.run("stage2", *stage_2)
    after = LlavaNextForConditionalGeneration.from_pretrained(runs.checkpoint("stage2") / "hf").state_dict()
    for name, value in before.items():
        frozen = "language_model" not in name and "lm_head" not in name
        assert torch.equal(value, after[name]) is frozen or "vision_tower" in name, name
    untouched = [name for name in after if "vision_tower" in name]
    assert untouched and all(torch.equal(before[name], after[name]) for name in untouched)


def test_a_non_finite_loss_stops_all_ranks_before_the_update(runs):
    settings = ("model.train={language_model: 1e30}", "train.warmup_ratio=0", "train.clip=0", "train.save_every=1")
    done = runs.run("diverged", *settings, ranks=2, expect=1)
    assert "the loss is nan; no parameter was updated" in done.stderr and "Traceback" not in done.stderr
    saved = runs.checkpoint("diverged")
    assert int(saved.name.removeprefix("step_")) == len(runs.metrics("diverged")) >= 1
