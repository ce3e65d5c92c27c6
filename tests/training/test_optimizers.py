"""Optimizers by name and by path: arguments, errors, states; real runs of a few steps."""

import json
import re

import pytest
import torch
from torch import nn

from tests.support.families import family_model
from tests.support.runner import ROOT, WARM, Runs, assert_same_metrics
from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import load_config, without_effect
from vtprune_train.config.train import TrainConfig
from vtprune_train.models.io.build import set_trainable
from vtprune_train.training.engine.start import check_optimizer
from vtprune_train.training.memory.predict import Parameters, States, Zero
from vtprune_train.training.muon import Muon
from vtprune_train.training.optimizer import OptimizerSpec, bytes_per_element, parameter_groups, set_rates, state_bytes

CPU = torch.device("cpu")
SHORT = ("data.eval=[]", "train.epochs=1", "train.max_steps=4", "run.stop_after=4")
SGD = ("train.optimizer=torch.optim:SGD", "train.optimizer_args={momentum: 0.9}")


def spec(name, **arguments):
    return OptimizerSpec.of(TrainConfig(optimizer=name, optimizer_args=arguments))


def group(*parameters, **settings):
    return {"params": list(parameters), "lr": 1e-3, "weight_decay": 0.0, **settings}


def test_adamw_is_what_it_was():
    adamw = OptimizerSpec.of(TrainConfig(betas=(0.8, 0.9))).build([group(nn.Parameter(torch.zeros(2)))])
    assert type(adamw) is torch.optim.AdamW and adamw.defaults["fused"] and adamw.defaults["betas"] == (0.8, 0.9)
    assert not spec("adamw", fused=False).build([group(nn.Parameter(torch.zeros(2)))]).defaults["fused"]


@pytest.mark.parametrize(
    "name, arguments, said",
    [
        ("muon", {"momentun": 1}, r"train.optimizer_args.momentun: muon .* did you mean train.optimizer_args.momentum"),
        ("adamw", {"betas": [0.9, 0.9]}, r"train.optimizer_args.betas: set train.betas instead"),
        ("torch.optim:SGD", {"lr": 1.0}, r"train.optimizer_args.lr: set model.train instead"),
        ("torch.optim:SGDD", {}, r"torch.optim does not define SGDD; did you mean SGD\?"),
        ("torch.nn:Linear", {}, r"train.optimizer='torch.nn:Linear' must be a subclass of Optimizer"),
        ("torch.optim:SGD", {"momentum": -1}, r"cannot be built with train.optimizer_args=.*Invalid momentum value"),
        ("torch.optim:LBFGS", {}, r"a step on a tensor of shape \[65536\] failed, as it would in training: TypeError"),
        ("adamw_8bit", {}, r"adamw_8bit keeps its states on a GPU, but there is no CUDA device here; use"),
        ("torch.optim:Adagrad", {}, r"DeepSpeed rebuilds Adagrad without its parameter groups; use .*zero0.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_before_the_model_is_built(name, arguments, said):
    train = TrainConfig(optimizer=name, optimizer_args=arguments)
    with pytest.raises(ConfigError, match=said):
        check_optimizer(train, {"zero_optimization": {"stage": 2}}, CPU)


def test_an_optimizer_of_shapes_is_warned_of_where_there_are_none(caplog):
    train, stages = TrainConfig(optimizer="torch.optim:Adafactor"), ({}, {"zero_optimization": {"stage": 1}})
    warned = []
    for settings in stages:
        caplog.clear()
        check_optimizer(train, settings, CPU)
        warned.append(
            "treats matrices differently from vectors, but under ZeRO 1 it gets only flat tensors" in caplog.text
        )
    assert warned == [False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["adamw_8bit", "muon", "torch.optim:SGD"])
def test_on_a_gpu(name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    train, device = TrainConfig(optimizer=name), torch.device("cuda")
    spec = check_optimizer(train, {"zero_optimization": {"stage": 2}}, device)
    states = spec.states({"muon": name == "muon"}, 1, device)
    assert all(value.device.type == "cuda" for value in states.values() if isinstance(value, torch.Tensor))
    counted = sum(state_bytes(train, {"muon": name == "muon"}, 1))
    assert sum(bytes_per_element(states)) == pytest.approx(counted, abs=0.05)
    weight = nn.Parameter(torch.randn(512, 128, device=device))
    optimizer = spec.build([group(weight, muon=name == "muon")])
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert weight.isfinite().all() and not torch.equal(weight, before)


def test_8_bit_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, which cannot be imported here .*pip install bitsandb"):
        spec("adamw_8bit")
    assert sum(state_bytes(TrainConfig(optimizer="adamw_8bit"), {}, 1)) == pytest.approx(2.03, abs=0.01)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"train.optimizer: unknown optimizer 'adam'; did you mean adamw\?"):
        load_config("quickstart.yaml", ["train.optimizer=adam"])
    with pytest.raises(ConfigError, match=r"train.schedule: unknown schedule 'cosin'; did you mean cosine\?"):
        load_config("quickstart.yaml", ["train.schedule=cosin"])


def test_an_optimizer_without_decay_or_rates_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bare_optimizers.py").write_text(
        "import torch\n"
        "class NoDecay(torch.optim.Optimizer):\n"
        "    def __init__(self, params, lr):\n        super().__init__(params, {'lr': lr})\n"
        "class NoRate(torch.optim.Optimizer):\n"
        "    def __init__(self, params):\n        super().__init__(params, {})\n"
    )
    parameter = nn.Parameter(torch.zeros(2))
    no_decay = spec("bare_optimizers:NoDecay")
    assert no_decay.build([group(parameter)]).defaults["lr"] == 1e-3
    with pytest.raises(ConfigError, match=r"does not support weight decay; set train.weight_decay=0"):
        no_decay.build([{**group(parameter), "weight_decay": 0.1}])
    with pytest.raises(ConfigError, match=r"has no learning rate 'lr' per parameter group"):
        spec("bare_optimizers:NoRate").build([group(parameter)])


@pytest.mark.parametrize(
    "name, arguments, ndim, expected",
    [
        ("adamw", {}, 1, (4, 4)),
        ("adamw", {"amsgrad": True}, 1, (4, 4, 4)),
        ("torch.optim:SGD", {"momentum": 0.9}, 1, (4,)),
        ("torch.optim:SGD", {}, 1, ()),
        ("torch.optim:Adafactor", {}, 1, (4,)),
        ("torch.optim:Adafactor", {}, 2, (4 / 256, 4 / 256)),
        ("muon", {}, 1, (4, 4)),
    ],
)
def test_states_are_asked_of_the_optimizer(name, arguments, ndim, expected):
    assert state_bytes(TrainConfig(optimizer=name, optimizer_args=arguments), {}, ndim) == expected
    if name == "muon":
        assert state_bytes(TrainConfig(optimizer=name), {"muon": True}, ndim) == (4,)


def test_predicted_memory_follows_the_optimizer():
    zero = Zero.of({"zero_optimization": {"stage": 2}}, "bfloat16", 2)
    weight = nn.Parameter(torch.zeros(1000, 50))

    def states(name, **arguments):
        train = TrainConfig(optimizer=name, optimizer_args=arguments)
        return States.of(zero, Parameters.of([group(weight)], [weight], train, flat=True))

    adamw, sgd, plain = states("adamw"), states("torch.optim:SGD", momentum=0.9), states("torch.optim:SGD")
    assert (adamw.moments, sgd.moments, plain.moments) == (8 * 25_000, 4 * 25_000, 0)
    assert adamw.masters == sgd.masters == plain.masters == 4 * 25_000


def test_a_step_on_a_matrix_that_fails_is_a_warning_where_there_are_only_flat_tensors(tmp_path, caplog):
    (tmp_path / "only_vectors.py").write_text(
        "import torch\n\nclass OnlyVectors(torch.optim.SGD):\n    def step(self, closure=None):\n"
        "        assert self.param_groups[0]['params'][0].ndim == 1, 'not a vector'\n        super().step(closure)\n"
    )
    train = TrainConfig(optimizer=f"{tmp_path}/only_vectors.py:OnlyVectors")
    check_optimizer(train, {"zero_optimization": {"stage": 1}}, CPU)
    assert "AssertionError: not a vector; under ZeRO 1 it gets only flat tensors" in caplog.text


def test_muon_needs_the_matrices_of_a_flat_tensor():
    flat = nn.Parameter(torch.zeros(4))
    flat.grad = torch.ones(4)
    muon = spec("muon").build([group(flat, muon=True)])
    muon.step()  # as for the estimate
    muon.bind({}, CPU)
    with pytest.raises(AssertionError, match="no matrices of a flat tensor"):
        muon.step()


def test_muon_without_matrices_is_named():
    given = ["train.optimizer=muon", "model.train={projector: 0.001}"]
    said = "train.optimizer=muon has no effect: AdamW updates all trained parameters"
    assert [line for line in without_effect(load_config("quickstart.yaml", given)) if line.startswith(said)]
    given = ["train.optimizer=muon", "model.train={language_model: 0.001}"]
    assert not [line for line in without_effect(load_config("quickstart.yaml", given)) if "muon" in line]


def test_muon_takes_the_matrices_inside_the_layers():
    model = family_model("llava_next")
    rates = {"projector": 1e-3, "language_model": 1e-4, "vision_tower": 1e-5}
    set_trainable(model, rates)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, rates, 0.1, "muon")
    orthogonalized = {names[p] for g in groups if g.get("muon") for p in g["params"]}
    assert len(orthogonalized) > 10 and all(".layers." in name for name in orthogonalized)
    assert all(g["part"] in ("language_model", "vision_tower") for g in groups if g.get("muon"))
    others = {names[p] for g in groups if not g.get("muon") for p in g["params"]}
    assert any("embed_tokens" in name for name in others) and any("lm_head" in name for name in others)
    assert not any(name.endswith("proj.weight") and ".layers." in name for name in others)
    plain = parameter_groups(model, rates, 0.1)
    assert sum(len(g["params"]) for g in plain) == len(orthogonalized) + len(others)
    optimizer = spec("muon").build(groups)
    assert isinstance(optimizer, Muon)
    assert set_rates(optimizer.param_groups, rates, 0.5)["vision_tower"] == 5e-6
    assert {g["lr"] for g in optimizer.param_groups if g["part"] == "projector"} == {5e-4}


slow = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("optimizers"))


@slow
def test_muon_is_that_of_pytorch_at_every_stage(runs):
    """Two ranks, between which ZeRO divides a matrix: the weights of torch.optim.Muon and AdamW."""
    log = runs.folder / "muon.log"
    env = {**runs.environment(), "DEAL_STAGES": "0123", "DEAL_TRAIN": json.dumps({"optimizer": "muon"})}
    script = ROOT / "tests" / "support" / "muon_stages.py"
    with log.open("w+b") as said:
        process = WARM.start([str(script)], ranks=2, cwd=ROOT, env=env, out=said.fileno(), err=said.fileno())
        assert process.wait(timeout=280) == 0, log.read_text()[-4000:]


@slow
@pytest.mark.parametrize("name, settings", [("sgd", SGD), ("muon", ("train.optimizer=muon", "train.clip=0.5"))])
def test_one_and_two_ranks_train_alike_and_resume_on_either(runs, name, settings):
    common = (*SHORT[:3], *settings)
    runs.run(f"{name}_one", *common)
    whole = runs.metrics(f"{name}_one")
    assert len(whole) == 4 and whole[-1]["loss"] < whole[0]["loss"]
    for stage in (2, 3):
        at_stage = (*common, f"deepspeed=configs/deepspeed/zero{stage}.json")
        runs.run(f"{name}_{stage}", *at_stage, "run.stop_after=2", ranks=2)
        runs.run(f"{name}_{stage}", *at_stage, ranks=1)
        for ours, theirs in zip(runs.metrics(f"{name}_{stage}"), whole, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3), (stage, ours["step"])
            assert ours["learning_rates"] == theirs["learning_rates"]
    # As many ranks: the same to the last bit.
    runs.run(f"{name}_again", *common, "run.stop_after=2")
    runs.run(f"{name}_again", *common)
    assert_same_metrics(runs.metrics(f"{name}_again"), whole)


@slow
def test_another_optimizer_does_not_continue_a_checkpoint(runs):
    runs.run("changed", *SHORT[:3], "run.stop_after=1")
    done = runs.run("changed", *SHORT[:3], *SGD, expect=2)
    said = " ".join(done.stderr.split())
    assert (
        "was trained with train.optimizer=adamw, now it is torch.optim:SGD, which cannot use the states of adamw"
        in said
    )
    assert "run.name=NEW train.init_from=" in said
    done = runs.run("changed", *SHORT[:3], "model.train.language_model=null", expect=2)
    said = " ".join(done.stderr.split())
    assert "distributing its state" not in said and "rank 0: ValueError" not in said
    assert re.search(
        r"step_\d+ trains other parameters \(\d+ differ, the first: [\w.]+\); restore model.train and model.peft, or "
        r"start a new run: run.name=NEW train.init_from=\S+/step_", said,
    )  # fmt: skip
    done = runs.run("changed", *SHORT[:3], "train.optimizer_args={amsgrad: true}", expect=2)
    assert "the checkpoint has no max_exp_avg_sq; restore train.optimizer_args" in " ".join(done.stderr.split())
