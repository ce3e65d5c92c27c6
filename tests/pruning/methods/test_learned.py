"""A method's own parameters: made, trained, saved, found again; in our folders, exports and adapters."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.support.checkpoints import finish, save_data, save_folder, save_images, save_run, talkative
from tests.support.engines import Engine, settings_of, started
from tests.support.families import family_inputs, family_model
from tests.support.helpers import tiny_model
from tests.support.packed import random_batch, random_segment
from vtprune_train import PyramidDrop, dense, prune, unprune
from vtprune_train.cli import main
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import load_config
from vtprune_train.config.settings import Config
from vtprune_train.evaluation.answering import load
from vtprune_train.models.io.build import parts_of, set_trainable
from vtprune_train.models.io.method_parameters import attach, modules_to_save
from vtprune_train.models.io.peft import open_adapter
from vtprune_train.pruning.combined import Combined
from vtprune_train.pruning.learned import learns
from vtprune_train.pruning.methods.divprune import DivPrune
from vtprune_train.pruning.methods.quecc import QueCC
from vtprune_train.pruning.methods.victor import Victor
from vtprune_train.pruning.methods.videollm_mod import VideoLLMMoD
from vtprune_train.pruning.methods.visionselector import VisionSelector
from vtprune_train.pruning.methods.voco import VoCo
from vtprune_train.training.dry_run import describe
from vtprune_train.training.engine.weights import full_state_dict, write_export
from vtprune_train.training.loop.settings import with_pruning_rate
from vtprune_train.training.optimizer import parameter_groups

VICTOR, MOD = Victor(registers=3, layers=2), VideoLLMMoD(layers=(1, 3), keep=0.5)
BOTH = Combined((Victor(registers=3, layers=5), VideoLLMMoD(layers=(1, 3), keep=0.5)))
SELECTOR, QUECC = VisionSelector(keep=0.4), QueCC(kernel=2)
METHODS = {"victor": VICTOR, "mod": MOD, "visionselector": SELECTOR, "quecc": QUECC}
ALL = {**METHODS, "combined": BOTH}
PLACE = "model.language_model.pruning."
TEXTS = [[0, "what is shown here ? assistant :"], ["a red", 1, "and", 2, "two ? assistant :"]]


def parameters(model):
    return {name.removeprefix(PLACE): p for name, p in model.named_parameters() if name.startswith(PLACE)}


def moved(model, seed=5):
    """The model with other values in its method's parameters, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def written(config, parts):
    """A checkpoint of the run as it stands."""
    checkpoint = config.run_dir / "checkpoints" / "step_00000004"
    write_export(parts.model, parts.processor, full_state_dict(Engine(parts.model)), checkpoint / "hf")
    finish(checkpoint)
    return checkpoint / "hf"


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def logits(model):
    with torch.no_grad():
        return model.eval()(**family_inputs("llava_next", TEXTS)).logits


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_they_follow_from_the_seed_alone(method):
    def made(seed, draws):
        model = tiny_model()
        torch.manual_seed(seed)
        torch.rand(draws)
        state = torch.get_rng_state()
        prune(model, method)
        assert torch.equal(torch.get_rng_state(), state), "the caller's draws are not disturbed"
        return parameters(model)

    assert same(made(1, 0), made(1, 7))
    assert not same(made(1, 0), made(2, 0))


def test_they_are_as_large_as_embeddings_and_of_the_decoder_s_dtype():
    model = tiny_model().to(torch.bfloat16)
    prune(model, Victor(registers=200))
    [registers] = parameters(model).values()
    assert registers.dtype == torch.bfloat16 and registers.requires_grad
    assert registers.float().std().item() == pytest.approx(model.config.text_config.initializer_range, rel=0.05)
    prune(model := tiny_model(), MOD)
    assert all(router.abs().max() < 0.05 for router in parameters(model).values())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_unprune_takes_them_out_and_dense_does_not_use_them(method):
    model = tiny_model()
    before = set(model.state_dict())
    expected = logits(model)
    prune(model, method)
    values = {name: p.detach().clone() for name, p in moved(prune(unprune(model), method)).named_parameters()}
    pruned = logits(model)
    with dense(model):
        assert torch.equal(logits(model), expected)
    assert same(dict(model.named_parameters()), values)
    assert torch.equal(logits(model), pruned)
    unprune(model)
    assert set(model.state_dict()) == before
    assert torch.equal(logits(model), expected)


def test_dense_leaves_a_model_as_it_is_that_is_not_pruned():
    model = tiny_model()
    attach(model, VICTOR)
    with pytest.raises(ValueError, match="not pruned"), dense(model):
        pass
    assert parameters(model)


def test_a_copy_has_its_own():
    model = prune(tiny_model(), VICTOR)
    copied = copy.deepcopy(model)
    before = logits(model)
    moved(copied)
    with dense(copied):
        pass
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(copied), before)


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_saved_and_opened(method, shards, tmp_path, caplog):
    model = moved(prune(tiny_model(), method))
    model.save_pretrained(tmp_path, max_shard_size=shards)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path)
    caplog.clear()
    prune(opened, method)
    assert same(parameters(opened), parameters(model))
    assert torch.equal(logits(opened), logits(model))
    assert not caplog.records


@pytest.mark.parametrize(
    ("method", "count"), [(Victor(registers=4), 1), (VoCo(tokens=3), 1), (VideoLLMMoD(layers=(1, 2), keep=0.5), 2)]
)
def test_parameters_that_do_not_fit_start_fresh(method, count, tmp_path, caplog):
    """Another number of them, and another method whose parameters have the same names and shapes."""
    moved(prune(tiny_model(), VICTOR)).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    caplog.clear()
    torch.manual_seed(3)
    prune(model, method)
    [record] = caplog.records
    assert f"{method.name} has trained parameters, but {tmp_path} does not have them" in record.message
    assert f"{count} of {count} tensors" in record.message
    fresh = tiny_model()
    torch.manual_seed(3)
    assert same(parameters(prune(fresh, method)), parameters(model))


COMMANDS = {
    "generate": ["--prompt", "what ?"],
    "show": ["--prompt", "what ?", "--out", "{}/shown.png"],
    "eval": ["--data", "{}/val.json", "--images", "{}/images"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("saved", "asked", "way_out"),
    [
        (None, ["--method", "victor"], "pruning.method=victor and"),
        (VICTOR, ["--set", "registers=4"], "pruning.method=victor and"),
        (VICTOR, ["--method", "[divprune, voco]"], "pruning.method=[divprune, voco] and"),
    ],
    ids=["never", "another_size", "another_method"],
)
def test_nothing_answers_with_parameters_that_were_never_trained(command, saved, asked, way_out, tmp_path, capsys):
    save_folder(tmp_path / "hf", saved)
    save_data(tmp_path, records=3)
    given = [word.format(tmp_path) for word in COMMANDS[command]]
    picture = [] if command == "eval" else ["--image", str(tmp_path / "images" / "0.png")]
    assert main([command, "--model", str(tmp_path / "hf"), *picture, *given, *asked]) == 2
    said = capsys.readouterr().err
    assert f"has trained parameters, but {tmp_path / 'hf'} does not have them" in said and way_out in said


def test_an_export_of_settings_without_their_parameters_is_refused(tmp_path, capsys):
    save_folder(tmp_path / "hf", VICTOR)
    settings_file = tmp_path / "hf" / "config.json"
    config = json.loads(settings_file.read_text())
    config["pruning"]["registers"] = 5
    settings_file.write_text(json.dumps(config))
    assert main(["export", "--model", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]) == 2
    assert "victor has trained parameters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_our_loading_is_silent(tmp_path, caplog, capfd):
    save_folder(tmp_path / "hf", VICTOR)
    caplog.clear()
    caplog.set_level(logging.INFO)
    loaded = load(str(tmp_path / "hf"), device="cpu")
    assert parameters(loaded.model).keys() == {"weight"}
    said = caplog.text + "".join(capfd.readouterr())
    assert "UNEXPECTED" not in said and "fresh" not in said


def test_generate_and_export_carry_them(tmp_path, capsys):
    model = moved(prune(talkative(), VICTOR))
    unpruned = copy.deepcopy(model)
    run = save_run(tmp_path / "run", VICTOR)
    hf = run / "checkpoints" / "step_00000008" / "hf"
    unpruned.save_pretrained(hf)
    [picture] = save_images(tmp_path / "pictures", 1)
    (run / "checkpoints" / "step_00000008" / "manifest.json").unlink()
    finish(run / "checkpoints" / "step_00000008")
    for dtype, out in (("float32", tmp_path / "32"), ("bfloat16", tmp_path / "16")):
        assert main(["export", "--model", str(run), "--out", str(out), "--dtype", dtype]) == 0
        opened = prune(AutoModelForImageTextToText.from_pretrained(out))
        kind = getattr(torch, dtype)
        assert same(parameters(opened), {name: p.to(kind) for name, p in parameters(model).items()})
    answers = set()
    for path in (run, tmp_path / "32"):
        capsys.readouterr()
        said = ["--image", str(picture), "--prompt", "what is shown on the left ?", "--max_new_tokens", "8"]
        assert main(["generate", "--model", str(path), *said]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("part", ["projector", "lora"])
def test_an_adapter_s_checkpoint_holds_them(method, part, tmp_path):
    model = tiny_model()
    (tmp_path / "base").mkdir()
    save_folder(tmp_path / "base", None, model)
    config = settings_of(tmp_path, {"path": str(tmp_path / "base")}, {"lora": 1e-3, part: 1e-3, "pruning": 1e-3})
    parts = started(config)
    prune(parts.model, method)
    moved(parts.model)
    expected, values = logits(parts.model), parameters(parts.model)
    hf = written(config, parts)
    assert load_file(hf / "pruning.safetensors").keys() == {f"pruning.{name}" for name in values}
    for merge in (False, True):
        opened = open_adapter(hf, "auto", merge=merge)
        prune(opened)
        assert same(parameters(opened), values)
        torch.testing.assert_close(logits(opened), expected, atol=1e-4, rtol=1e-4)
    assert main(["export", "--model", str(hf), "--out", str(tmp_path / "m"), "--merge", "--dtype", "float32"]) == 0
    assert same(parameters(prune(AutoModelForImageTextToText.from_pretrained(tmp_path / "m"))), values)


def test_they_are_a_part_of_their_own():
    model = tiny_model()
    set_trainable(model, {"projector": 1e-3})
    prune(model, MOD)
    assert [name for name, _ in parts_of(model)["pruning"]] == [f"{PLACE}1.weight", f"{PLACE}3.weight"]
    assert not any("pruning" in name for name, _ in parts_of(model)["language_model"])
    groups = {group["part"]: group for group in parameter_groups(model, {"projector": 1e-3, "pruning": 5e-3}, 0.0)}
    assert groups["pruning"]["lr"] == 5e-3
    assert {id(p) for p in groups["pruning"]["params"]} == {id(p) for p in parameters(model).values()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for part in ("projector", "pruning") for name, _ in parts_of(model)[part]}


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("drops", [True, False], ids=["pruned", "all_tokens"])
def test_what_gets_a_gradient(method, images, drops):
    """Only what is trained; on text alone and on a step that drops nothing zero, not none, which would let ranks (and
    steps under ZeRO-3) part ways."""
    model = tiny_model().train()
    set_trainable(model, {"projector": 1e-3})
    prune(model, method)
    batch = random_batch(model, [random_segment(np.random.default_rng(i), images, 2) for i in range(2)])
    if drops:
        batch.plan = method.plan(batch.plan.outline.segments, 6)
    model(batch).loss_sum.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for part in ("projector", "pruning") for name, _ in parts_of(model)[part]}
    for name, parameter in parameters(model).items():
        assert bool(parameter.grad.any()) == (drops and images > 0), name


def test_a_rate_for_them():
    def settings_(method, **train):
        config = Config(model={"path": "x", "train": train})
        object.__setattr__(config.pruning, "build", lambda: method)
        return config

    assert with_pruning_rate(settings_(VICTOR, projector=2e-3)).model.train == {"projector": 2e-3, "pruning": 2e-3}
    given = {"projector": 2e-3, "pruning": 1e-4}
    assert with_pruning_rate(settings_(VICTOR, **given)).model.train == given
    assert with_pruning_rate(settings_(PyramidDrop(), projector=2e-3)).model.train == {"projector": 2e-3}
    with pytest.raises(ConfigError, match="has no learning rate for pruning"):
        with_pruning_rate(settings_(VICTOR, language_model=1e-3))
    with pytest.raises(ConfigError, match="adds no parameters; remove it"):
        with_pruning_rate(settings_(PyramidDrop(), **given))


def test_who_learns():
    assert learns(VICTOR) and learns(MOD) and learns(VoCo()) and learns(SELECTOR) and learns(QUECC)
    assert learns(Combined((PyramidDrop(), Victor())))
    assert not learns(PyramidDrop()) and not learns(None)


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_peft_s_own_saving_takes_them_where_it_is_told(method, tmp_path, caplog):
    base, inputs = family_model("llava_next").eval(), family_inputs("llava_next", TEXTS)
    plain = copy.deepcopy(base)
    prune(get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"])), method)
    names = modules_to_save(prune(base, method))
    assert f"does not save: prune first, then get_peft_model(model, LoraConfig(modules_to_save={names}" in caplog.text
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=names))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and ".pruning." in name}
    adapted.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert trained and all(adapted.get_parameter(name).grad.any() for name in trained)
    with torch.no_grad():
        for parameter in map(adapted.get_parameter, trained):
            parameter.add_(0.5)
    adapted.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(prune(plain, method), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, adapted.eval()(**inputs).logits)


def test_the_original_code_s_folder_has_no_place_for_them(tmp_path, caplog, capsys):
    save_folder(tmp_path / "hf", VICTOR)
    asked = ["convert", "--model", str(tmp_path / "hf"), "--to", "original", "--vision_tower", "clip"]
    asked += ["--out", str(tmp_path / "out")]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "cannot store the learned parameters of victor" in said and "--without_learned" in said
    assert not (tmp_path / "out").exists()
    assert main([*asked, "--without_learned"]) == 0
    assert "the learned parameters of victor are left out" in caplog.text


def test_a_dry_run_counts_them():
    report = describe(load_config("quickstart.yaml", ["pruning.method=victor", "pruning.registers=1000"]))
    [line] = [line for line in report.splitlines() if line.startswith("pruning ") and " parameters, " in line]
    assert "trained, learning rate 0.0015" in line


def test_a_combination_s_share_counts_the_summary():
    assert Combined((DivPrune(keep=0.5), VoCo())).input_share(32) < 1e-3
