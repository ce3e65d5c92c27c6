"""Adapters: put in, written, opened, folded in; the base named with its hash; real runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlavaNextForConditionalGeneration

from tests.support.checkpoints import finish, save_images
from tests.support.engines import ALL, Engine, settings_of, started
from tests.support.families import family_inputs, family_model
from tests.support.family_runs import save_checkpoint
from tests.support.helpers import tiny_model, tiny_processor
from tests.support.model_parts import save_parts
from tests.support.runner import TINY, Runs, assert_equal_checkpoints
from vtprune_train import PyramidDrop, dense, prune, unprune
from vtprune_train.cli import main
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import load_config
from vtprune_train.config.model import PeftConfig
from vtprune_train.config.settings import Config
from vtprune_train.evaluation.answering import load
from vtprune_train.models.io.build import parts_of, resolve_checkpoint, set_trainable
from vtprune_train.models.io.peft import adapt, adapted_of, check_quantization, linear_layers, open_adapter
from vtprune_train.models.io.provenance import Base, weights_digest
from vtprune_train.training.dry_run import describe
from vtprune_train.training.engine.weights import full_state_dict, write_export
from vtprune_train.training.loop.parts import training_cost
from vtprune_train.training.loop.settings import with_saved_settings
from vtprune_train.training.optimizer import parameter_groups

pytestmark = pytest.mark.slow

DROP = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25))
TEXTS = [["what is", 0, "?"], ["is a red cat left ?"]]
KINDS = {
    "lora": {},
    "dora": {"kind": "dora"},
    "rslora": {"use_rslora": True, "r": 8},
    "some": {"target_modules": ["q_proj", "down_proj"], "dropout": 0.1},
    "bias": {"bias": "lora_only"},
}


def write(config, parts, step=4):
    """A checkpoint of the run, as far as adapters are concerned."""
    checkpoint = config.run_dir / "checkpoints" / f"step_{step:08d}"
    prune(parts.model, config.pruning.build())
    write_export(parts.model, parts.processor, full_state_dict(Engine(parts.model)), checkpoint / "hf")
    unprune(parts.model)
    finish(checkpoint)
    return checkpoint / "hf"


def trained(config, seed=5):
    """A started run whose trainable parameters moved, and its checkpoint's ``hf/``."""
    parts = started(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parts.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return parts, write(config, parts)


def merge(run, out):
    assert main(["export", "--model", str(run), "--out", str(out), "--merge", "--dtype", "float32"]) == 0


def logits(model, name="llava_next"):
    model.eval()
    with torch.no_grad():
        return model(**family_inputs(name, TEXTS)).logits


def close(one, two, tolerance=1e-5):
    """Relative to the logits' size: these models' weights are large, so that tokens differ."""
    return float((one - two).abs().max() / one.abs().max().clamp(min=1)) < tolerance


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint("llava_next", tmp_path_factory.mktemp("base"))


@pytest.fixture
def own_base(base, tmp_path):
    return shutil.copytree(base, tmp_path / "base")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_opens_merged_and_with_plain_peft(base, tmp_path, kind):
    config = settings_of(tmp_path, {"path": str(base)}, **KINDS[kind])
    parts, hf = trained(config)
    expected, before = logits(parts.model), logits(AutoModelForImageTextToText.from_pretrained(base))
    assert not close(expected, before, 1e-2)
    assert torch.equal(logits(open_adapter(hf, "auto", merge=False)), expected)
    merge(config.run_dir, tmp_path / "m")
    opened, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert close(logits(opened), expected) and opened.config.pruning["layers"] == [2, 4]
    plain = AutoModelForImageTextToText.from_pretrained(base)
    beside = {f"model.{name}": tensor for name, tensor in load_file(hf / "trained.safetensors").items()}
    assert not plain.load_state_dict(beside, strict=False).unexpected_keys
    assert torch.equal(logits(PeftModel.from_pretrained(plain, hf)), expected)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_other_families(tmp_path, name):
    origin = save_checkpoint(name, tmp_path / "base")
    config = settings_of(tmp_path, {"path": str(origin)}, kind="dora", bias="lora_only")
    parts, hf = trained(config)
    assert {part for part, found in parts_of(parts.model).items() if any(p.requires_grad for _, p in found)} == set(ALL)
    expected = logits(parts.model, name)
    assert torch.equal(logits(open_adapter(hf, "auto", merge=False), name), expected)
    assert close(logits(open_adapter(hf, "auto", merge=True), name), expected)
    method = PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep")
    dropped = logits(prune(parts.model, method), name)
    assert close(logits(prune(open_adapter(hf, "auto", merge=True), method), name), dropped)


def test_only_linear_layers_of_the_decoder_are_adapted():
    """The tower has layers of the same names."""
    model = tiny_model()
    assert linear_layers(model) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    before = {name for name, _ in model.named_parameters()}
    adapt(model, settings_of("x", {"path": "x"}).model.peft)
    set_trainable(model, {"lora": 1e-4})
    added = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(added) == 2 * 7 * 6 and all(name.startswith("model.language_model.layers.") for name in added)
    assert {name.replace(".base_layer", "") for name, p in model.named_parameters() if not p.requires_grad} == before
    groups = parameter_groups(model, {"lora": 1e-4}, 0.1)
    assert [(group["part"], group["lr"], len(group["params"])) for group in groups] == [("lora", 1e-4, len(added))]


def test_a_fresh_adapter_changes_nothing_and_pruning_comes_before_or_after():
    plain, model, late = tiny_model().eval(), tiny_model().eval(), prune(tiny_model().eval(), DROP)
    peft = settings_of("x", {"path": "x"}, kind="dora").model.peft
    adapt(model, peft)
    adapt(late, peft)
    assert close(logits(model), logits(plain))
    assert torch.equal(logits(late), logits(prune(model, DROP)))
    with dense(model):
        assert close(logits(model), logits(plain))


@pytest.mark.parametrize("train", [ALL, {"lora": 1e-3}], ids=["all", "lora alone"])
def test_a_base_of_parts_is_made_again(tmp_path, train):
    """A language model without room for <image>, a tower, and the projector of another run."""
    save_parts(tmp_path)
    stage_1 = tiny_model(seed=8)
    stage_1.save_pretrained(tmp_path / "stage1")
    pinpoints = [(28, 56), (56, 28), (56, 56)]
    origin = {
        "language_model": str(tmp_path / "language"),
        "vision_tower": str(tmp_path / "tower"),
        "projector": str(tmp_path / "stage1"),
        "image_grid_pinpoints": pinpoints,
    }
    parts, hf = trained(settings_of(tmp_path, origin, train=train))
    record = json.loads((hf / "base.json").read_text())
    assert record["sha256"].keys() == {"language_model", "vision_tower"}
    shutil.rmtree(tmp_path / "stage1")
    opened = open_adapter(hf, "auto", merge=False)
    for name, value in parts.model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    assert (hf / "base_extra.safetensors").exists() == ("projector" not in train)


def test_rows_added_for_the_image_token_are_kept(tmp_path):
    """The base has fewer rows than the tokenizer has tokens; the new ones are random and in no checkpoint."""
    model = family_model("llava_next")
    model.resize_token_embeddings(20)
    model.config.text_config.vocab_size = 20
    model.save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    config = settings_of(tmp_path, {"path": str(tmp_path / "base")}, train={"lora": 1e-3})
    torch.manual_seed(1)
    parts, hf = trained(config)
    assert parts.model.lm_head.weight.shape[0] == 64
    names = set(load_file(hf / "base_extra.safetensors"))
    assert {name.rpartition("[")[2] for name in names} == {"20:]"} and len(names) == 2
    torch.manual_seed(2)
    opened = open_adapter(hf, "auto", merge=False)
    assert torch.equal(opened.lm_head.weight, parts.model.lm_head.weight)
    torch.manual_seed(3)
    again = started(config)
    assert torch.equal(again.model.lm_head.weight, parts.model.lm_head.weight)


def test_the_hash_is_what_sha256sum_says(base):
    said = subprocess.run("sha256sum *.safetensors | sha256sum", shell=True, cwd=base, capture_output=True, text=True)
    assert said.stdout.split()[0] == weights_digest(str(base))


def test_another_base_is_refused(own_base, tmp_path, capsys):
    config = settings_of(tmp_path, {"path": str(own_base)})
    _, hf = trained(config)
    recorded = Base.read(hf).sha256["path"]
    tensors = load_file(own_base / "model.safetensors")
    tensors["image_newline"][0] += 1
    save_file(tensors, own_base / "model.safetensors", metadata={"format": "pt"})
    now = weights_digest(str(own_base))
    assert recorded != now
    with pytest.raises(ValueError, match=f"SHA-256 {recorded}, but model.path is .*SHA-256 {now} now"):
        started(config)
    with pytest.raises(ValueError, match=f"trained on {own_base} with SHA-256 {recorded}.* have {now} now"):
        load(str(config.run_dir))
    shutil.rmtree(own_base)
    for command in (["generate", "--prompt", "what ?"], ["export", "--merge", "--out", str(tmp_path / "out")]):
        assert main([*command, "--model", str(config.run_dir)]) == 2
        said = capsys.readouterr().err
        assert str(own_base) in said and recorded in said and "Restore it there" in said, command


def test_a_run_with_its_own_base_can_be_moved(tmp_path):
    """A base made from sizes in the YAML is kept once, beside the checkpoints."""
    sizes = {**TINY["model"]["config"]}
    sizes["text_config"] = {**sizes["text_config"], "num_hidden_layers": 6}
    config = settings_of(
        tmp_path, {"config": sizes, "tokenizer": str(save_checkpoint("llava_next", tmp_path / "words"))}
    )
    parts, _ = trained(config)
    moved = tmp_path / "elsewhere"
    config.run_dir.rename(moved)
    opened = open_adapter(resolve_checkpoint(str(moved)), "auto", merge=False)
    for name, value in parts.model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], value), name
    shutil.rmtree(moved / "base")
    with pytest.raises(ValueError, match=r"base .*is missing"):
        open_adapter(resolve_checkpoint(str(moved)), "auto", merge=False)


def test_an_adapter_is_continued_or_folded_in_by_a_new_run(base, tmp_path):
    first = settings_of(tmp_path, {"path": str(base)})
    parts, hf = trained(first)
    expected = logits(parts.model)
    again = {"run": {"name": "more", "output_dir": str(tmp_path)}, "train": {"init_from": str(first.run_dir)}}
    lora = {"r": 4, "alpha": 8}
    more = with_saved_settings(Config(model={"dtype": "float32", "peft": lora, "train": {"lora": 1e-3}}, **again))
    parts, hf = trained(more)
    assert not close(logits(parts.model), expected, 1e-2)
    assert Base.read(hf).model == {"path": str(base)}
    opened = open_adapter(hf, "auto", merge=False)
    assert torch.equal(logits(opened), logits(parts.model)), "projector and tower of the run before are not lost"
    assert torch.equal(logits(started(more).model), expected)
    other = more.model.model_copy(update={"peft": more.model.peft.model_copy(update={"r": 2})})
    with pytest.raises(ValueError, match=r"model.peft.r: saved 4, now 2.*--merge"):
        started(more.model_copy(update={"model": other, "run": more.run.model_copy(update={"name": "other"})}))
    whole = with_saved_settings(Config(model={"dtype": "float32"}, **again))
    assert close(logits(started(whole).model), expected)
    assert not any(".lora_" in name for name, _ in started(whole).model.named_parameters())


def test_changed_settings_on_resume_are_named(base, tmp_path):
    trained(settings_of(tmp_path, {"path": str(base)}))
    with pytest.raises(
        ValueError, match=r"model.peft.r: checkpoint 4, now 2; model.train \(the parts\): .*'projector'"
    ):
        started(settings_of(tmp_path, {"path": str(base)}, train={"lora": 1e-3}, r=2))
    started(settings_of(tmp_path, {"path": str(base)}, dropout=0.5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.train={language_model: 2e-5, lora: 2e-4}"],
            r"train has a rate for language_model, which peft freezes",
        ),
        (["model.train={projector: 2e-5}"], r"train has no rate for the adapter of peft"),
        (["model.peft=null"], r"train has a rate for lora, but no adapter is set"),
        (["model.peft.kind=ia3"], r"model.peft.kind: .*'lora', 'dora' or 'qlora'"),
        (["model.peft.rank=4"], r"model.peft.rank: unknown key"),
        (["model.peft.r=0"], r"model.peft.r"),
        (["model.peft.dropout=1.0"], r"model.peft.dropout"),
        (["model.peft.target_modules=[]"], r"set it to null to adapt all linear layers"),
    ],
)
def test_settings_that_make_no_sense(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("llava_next_pdrop_lora.yaml", overrides)


@pytest.mark.parametrize("target", ["lm_head", "fc1", "q_prj"])
def test_targets_outside_the_decoder_are_refused(target):
    with pytest.raises(
        ConfigError, match=rf"'{target}' is not a linear layer of the language model's decoder; it has q_proj"
    ):
        describe(load_config("llava_next_pdrop_lora.yaml", [f"model.peft.target_modules=[{target}]"]))


def test_the_published_recipe_counts_right():
    """r 128 on all linear layers of Llama-7B: 128 x 32 x (4 (4096 + 4096) + 3 (4096 + 11008)) parameters."""
    config = load_config("llava_next_pdrop_lora.yaml")
    assert (config.model.peft.r, config.model.peft.alpha, config.model.train["lora"]) == (128, 256, 2e-4)
    assert config.model.train["projector"] == 2e-5
    report = describe(config)
    assert f"lora            {128 * 32 * (4 * 8192 + 3 * 15104) / 1e6:>12.2f} M parameters, trained" in report
    assert "language_model" in report and "memory" in report
    with pytest.raises(ConfigError, match="cannot be partitioned by ZeRO-3"):
        describe(
            load_config(
                "llava_next_pdrop_lora.yaml", ["model.peft.kind=qlora", "deepspeed=configs/deepspeed/zero3.json"]
            )
        )


def test_frozen_matrices_cost_no_weight_gradient():
    """Counted against PyTorch's own counter, forward and backward of the decoder's linear layers."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model()
    config = settings_of("x", {"path": "x"})
    layer = model.model.language_model.layers[0].mlp
    x = torch.randn(1, 10, 32, requires_grad=True)
    adapt(model, config.model.peft)
    set_trainable(model, {"lora": 1e-3})
    with FlopCounterMode(display=False) as counter:
        model.model.language_model.layers[0].mlp(x).sum().backward()
    frozen, adapter = 2 * 10 * 3 * 32 * 48, 2 * 10 * 4 * 3 * (32 + 48)
    assert layer is model.model.language_model.layers[0].mlp
    assert counter.get_total_flops() == 2 * frozen + 3 * adapter
    cost = training_cost(config, model.config)
    assert 10 * cost.decoder.adapter_per_token(4, ["gate_proj", "up_proj", "down_proj"]) == adapter
    assert not cost.trains_decoder and cost.adapter > 0


def test_without_bitsandbytes_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError, match=r"qlora needs bitsandbytes.*requirements-gpu.txt, or use model.peft.kind=lora"
    ):
        check_quantization(torch.device("cpu"))


def test_export_says_what_to_do(base, tmp_path, capsys):
    config = settings_of(tmp_path, {"path": str(base)})
    trained(config)
    model = ["--model", str(config.run_dir), "--out", str(tmp_path / "out")]
    for options, word in (([], "--merge"), (["--merge", "--part", "projector"], "no effect with --part")):
        assert main(["export", *model, *options]) == 2
        assert word in capsys.readouterr().err
    assert main(["export", "--model", str(base), "--out", str(tmp_path / "out"), "--merge"]) == 2
    assert "has no adapter; remove --merge" in capsys.readouterr().err
    assert main(["export", *model, "--part", "projector"]) == 0


def test_the_page(tmp_path, monkeypatch, capsys):
    """Its commands and its code, on a run of the name that it uses."""
    save_checkpoint("llava_next", tmp_path / "base")
    config = settings_of(tmp_path / "runs", {"path": str(tmp_path / "base")})
    run = config.run.model_copy(update={"name": "llava_next_pdrop_lora"})
    parts, _ = trained(config.model_copy(update={"run": run}))
    [image] = save_images(tmp_path / "drawn", 1)
    image.rename(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "peft.md").read_text()
    blocks = re.findall(r"```(bash|python)\n(.*?)```", page, re.DOTALL)
    lines = [
        line for kind, body in blocks if kind == "bash" for line in body.splitlines() if line.startswith("vtprune")
    ]
    assert len(lines) == 4
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    names: dict = {}
    [code] = [body for kind, body in blocks if kind == "python"]
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(parts.model))
    table = page.partition("| key of")[2].partition("\n\n")[0]
    keys = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", table, re.MULTILINE)
    assert {key for pair in keys for key in pair if key} == set(PeftConfig.model_fields)


def test_models_of_plain_peft_are_still_what_they_were():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert adapted_of(model) is None and adapted_of(model.get_base_model()) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


ADAPTER = ("model.peft={r: 4, alpha: 8, dropout: 0.1}", "data.eval=[]", "train.max_steps=4")
ZERO3 = "deepspeed={zero_optimization: {stage: 3, stage3_param_persistence_threshold: 0}}"


def test_train_resume_merge_and_open(runs, tmp_path):
    """Resumed to the bit; small on disk; what is left opens in plain transformers with the loop's logits."""
    wide = ("model.config.text_config.hidden_size=256", "model.config.text_config.intermediate_size=704")
    settings = (
        *ADAPTER,
        "model.peft.r=2",
        *wide,
        "model.train={lora: 3.0e-3, projector: 3.0e-3, vision_tower: 1.0e-3}",
    )
    runs.run("whole", *settings)
    runs.run("parted", *settings, "run.stop_after=2")
    runs.run("parted", *settings)
    assert_equal_checkpoints(runs.checkpoint("whole"), runs.checkpoint("parted"))
    metrics = runs.metrics("whole")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[0]["learning_rates"].keys() == {"lora", "projector", "vision_tower"}
    state = torch.load(next((runs.checkpoint("whole") / "deepspeed").glob("mp_rank*")), weights_only=False)["module"]
    held = (".lora_", "multi_modal_projector", "image_newline", "vision_tower")
    assert state and all(any(word in name for word in held) for name in state)
    runs.run("full", *ADAPTER[1:], *wide, "train.max_steps=1")
    small, full = (disk_size(runs.checkpoint(name)) for name in ("whole", "full"))
    assert small < 0.05 * full, (small, full)

    out = tmp_path / "merged"
    merge(runs.directory("whole"), out)
    loaded = load(str(runs.directory("whole")))
    assert any(".lora_" in name for name, _ in loaded.model.named_parameters())
    assert loaded.model.config.pruning["layers"] == [1, 2, 3]
    image = Image.new("RGB", (70, 40), "red")
    inputs = loaded.processor(images=image, text="<image>\nhow bright is number 3?", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with dense(loaded.model), torch.no_grad():
        expected = loaded.model(**inputs).logits
        merged = LlavaNextForConditionalGeneration.from_pretrained(out)(**inputs).logits
    assert (merged - expected).abs().max() < 1e-5
    done = runs.run("parted", *settings, "model.peft=null", "model.train={projector: 1.0e-2}", expect=2)
    assert "was written with an adapter, but model.peft is not set" in done.stderr


def disk_size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_two_ranks_and_zero_3_train_dora_like_one_rank(runs):
    """DoRA reads its base's partitioned weights outside their own layer's forward."""
    settings = (
        *ADAPTER,
        "model.peft.kind=dora",
        "model.peft.dropout=0",
        "model.train={lora: 1.0e-2, projector: 1.0e-2}",
    )
    runs.run("dora", *settings, "deepspeed=configs/deepspeed/zero0.json")
    runs.run("dora3", *settings, ZERO3, "run.stop_after=2", ranks=2)
    runs.run("dora3", *settings, ZERO3, ranks=2)
    losses = [[m["loss"] for m in runs.metrics(name)] for name in ("dora", "dora3")]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    one, two = (load_file(runs.checkpoint(n) / "hf" / "adapter_model.safetensors") for n in ("dora", "dora3"))
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=1e-3) for k in one)
