"""Every method alike: a short training under ZeRO-3, stopped and resumed; gradients; batches and single rows."""

import json
import math
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.families import SPECIAL, family_inputs
from tests.support.helpers import tiny_model
from tests.support.passes import check_singly, text_model_of
from tests.support.phases import make_parts  # noqa: F401
from tests.support.runner import ROOT, Runs, assert_equal_checkpoints, assert_same_metrics
from vtprune_train import prune
from vtprune_train.core.stream import ImageSpan, SegmentLayout
from vtprune_train.data.synthetic import write_dataset
from vtprune_train.models.io.build import set_trainable
from vtprune_train.pruning import METHODS, NONE, method_class
from vtprune_train.pruning.methods.feather import Feather
from vtprune_train.pruning.phases import Phases
from vtprune_train.pruning.schedules.budget import first_that_fits, layer_counts
from vtprune_train.pruning.schedules.stages import earlier

pytestmark = pytest.mark.slow

NAMES = [*METHODS, NONE]
STEPS, STOP = 24, 16
# Before the decoder, without regard to newlines: few of them or none stay.
NEWLINES_GO = ("vtc_cls", "fopru", "prumerge", "cdpruner", "scope", "hiprune", "vispruner")


def small_quickstart() -> dict:
    """``quickstart.yaml`` with a smaller model, which takes a few seconds, and no word of how to prune."""
    tree = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    tree["model"]["config"]["text_config"].update(sizes, num_hidden_layers=4)
    tree["model"]["config"]["vision_config"].update(sizes, num_hidden_layers=2)
    tree["model"]["train"] = {"projector": 1e-2, "language_model": 1e-2, "vision_tower": 3e-3}
    tree["train"].update(global_batch_size=4, epochs=1, save_every=STOP)
    del tree["pruning"], tree["data"]["eval"]
    return {**tree, "deepspeed": "configs/deepspeed/zero3.json"}


class Quickstart(Runs):
    """Training by ``quickstart.yaml`` on drawn pictures."""

    def __init__(self, folder: Path):
        super().__init__(folder, num_train=1)
        shutil.rmtree(folder / "data")
        write_dataset(folder / "data", num_train=4 * STEPS, num_eval=1, seed=7)
        self.config.write_text(yaml.safe_dump(small_quickstart()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Quickstart(tmp_path_factory.mktemp("methods"))


def built(name):
    """The method by its name alone."""
    return None if name == NONE else method_class(name)()


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_under_zero_3_and_resumes_bit_for_bit(runs, name):
    """A fresh process that finds only an earlier checkpoint ends as the run did that went on."""
    runs.run(name, f"pruning.method={name}", ranks=2)
    metrics, whole = runs.metrics(name), runs.checkpoint(name)
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    losses = [m["loss"] for m in metrics]
    assert all(map(math.isfinite, losses))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    if name != NONE:
        exported = json.loads((whole / "hf" / "config.json").read_text())
        assert exported["pruning"]["method"] == name

    stopped = runs.directory(f"{name}_resumed")
    shutil.copytree(runs.directory(name), stopped)
    shutil.rmtree(stopped / "checkpoints" / whole.name)
    (stopped / "checkpoints" / "latest").write_text(f"step_{STOP:08d}")
    runs.run(f"{name}_resumed", f"pruning.method={name}", ranks=2)
    assert_same_metrics(runs.metrics(f"{name}_resumed"), metrics)
    assert_equal_checkpoints(runs.checkpoint(f"{name}_resumed"), whole)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_what_is_trained_and_nothing_else(parts, name):
    """Also where the tower is frozen and read, and where a micro-batch has no picture."""
    model = prune(tiny_model(), built(name)).train()
    set_trainable(model, {"projector": 1.0, "language_model": 1.0, "pruning": 1.0})
    collate = parts.collator(Phases(built(name)))
    model(collate.pack(parts.loaded, step=0)).loss_sum.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {key for key in trained if "vision_tower" in key} == set()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == set(trained)
    without = {key for key, p in trained.items() if not p.grad.any()}
    assert without <= {"model.image_newline"} if name in NEWLINES_GO else not without, "no gradient reaches them"
    assert all(p.grad.isfinite().all() for p in trained.values())
    learned = [key for key in trained if ".pruning." in key]
    makes = name != NONE and built(name).module(32, 6) is not None
    assert bool(learned) == makes

    model.zero_grad()
    model(collate.pack([parts.loaded[1]], step=0)).loss_sum.backward()  # text alone
    assert {key for key, p in trained.items() if p.grad is None} == set(), "a rank without pictures would hang ZeRO"


PROMPTS = [
    [0, "what is shown here ? assistant :"],
    ["a red", 1, "and", 2, "two ? assistant :"],
    ["what is a dog ? assistant :"],
    [3, "left ? yes assistant :"],
]


def new_tokens(model, prompts):
    inputs = family_inputs("llava_next", prompts)
    settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": list(range(len(SPECIAL)))}
    with torch.no_grad():
        return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_four_generates_what_four_single_runs_do(name):
    """Pictures of several sizes, two of them in one row, and a row without; padded on the left."""
    torch.manual_seed(3)  # of parameters that the method adds
    model = prune(tiny_model().eval(), built(name)).eval()
    model.generation_config.pad_token_id = 3
    singles = torch.cat([new_tokens(model, [prompt]) for prompt in PROMPTS])
    assert torch.equal(new_tokens(model, PROMPTS), singles)
    assert len({tuple(row) for row in singles.tolist()}) > 2, "answers depend on the prompt"


@pytest.mark.parametrize("num_layers", [2, 6, 8, 32, 40])
@pytest.mark.parametrize("name", METHODS)
def test_the_name_alone_fits_any_depth(name, num_layers):
    method = built(name)
    drops, keys = method.drops(num_layers), method.key_layers(num_layers)
    assert drops or keys
    assert [drop.layer for drop in drops] == sorted(drop.layer for drop in drops)
    assert all(0 <= layer < num_layers for layer in [*(drop.layer for drop in drops), *keys])
    assert 0 < method.input_share(num_layers) <= 1


# as published, or as the method's page says of those that are ours
DEFAULTS = {
    "pyramiddrop": {"keep": [0.5, 0.25, 0.125], "rank_with": "next_layer", "positions": "renumber"},
    "sparsevlm": {"count": "fixed", "recycle": "mean", "positions": "renumber", "heads": 1.0, "gravity": False},
    "plphp": {"keep": 0.4, "delta": 0.3, "alpha": 0.25, "beta": 0.1},
    "fastv": {"keep": 0.5, "rank_with": "this_layer", "positions": "keep"},
    "dart": {"keep": 0.25, "image_pivots": 4, "text_pivots": 4, "rank_with": "this_layer", "positions": "keep"},
    "feather": {"keep": [0.378, 0.034], "stride": 3, "rank_with": "this_layer", "positions": "keep"},
    "prumerge": {"keep": None, "spatial": 0.0, "positions": "renumber"},
    "fopru": {"keep": 0.25, "strategy": "rank", "positions": "renumber"},
    "vtc_cls": {"keep": 0.25, "layers": 8, "positions": "renumber"},
    "visionzip": {"keep": 192 / 576, "contextual": 30 / 192, "positions": "renumber"},
    "divprune": {"keep": 0.098, "positions": "renumber"},
    "cdpruner": {"keep": 64 / 576, "positions": "renumber"},
    "scope": {"keep": 64 / 576, "alpha": 1.0, "positions": "renumber"},
    "hiprune": {"keep": 192 / 576, "alpha": 0.1, "object_layer": None, "positions": "renumber"},
    "vispruner": {"keep": 128 / 576, "important": 0.5, "positions": "renumber"},
    "idpruner": {"keep": 0.25, "balance": 0.5, "at_once": 1, "positions": "renumber"},
    "evs": {"keep": 0.3, "positions": "keep"},
    "vidcom2": {"keep": 0.25, "positions": "renumber"},
    "dycoke": {"keep": 0.3, "positions": "renumber"},
    "prunevid": {"keep": None, "tau": 0.8, "segments": 0.25, "clusters": 0.5, "positions": "renumber"},
    "videollm_mod": {"keep": 0.2},
    "victor": {"registers": 8},
    "voco": {"tokens": 2, "hide": "all_before"},
    "hidrop": {"keep": [count / 576 for count in (215, 10, 5, 1)], "differentiable": True},
    "lvlm_csp": {"keep": [0.16, 0.1], "scatter": "own"},
    "zipvl": {"tau": 0.975, "keep": 1.0},
    **{name: {"keep": 0.5, "layer": 0, "positions": "keep"} for name in ("random", "uniform", "pool")},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_name_alone_means_the_published_settings(name):
    settings = built(name).settings()
    assert {key: settings[key] for key in DEFAULTS[name]} == DEFAULTS[name]


def own_settings(name):
    """Without ``per``, which all methods have and the base class describes."""
    return [setting for setting in fields(method_class(name)) if setting.name != "per"]


@pytest.mark.parametrize("name", METHODS)
def test_its_page_names_every_setting_and_its_paper(name):
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    words = " ".join(page.split())
    assert all(f"`{setting.name}`" in words for setting in own_settings(name))
    title, _, number = method_class(name).paper.partition(" (arXiv ")
    assert title == "baseline" or (title in words.replace("[[CLS]", "[CLS]") and number.rstrip(")") in words)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_described(name):
    """What is no setting (a saved one would be taken for one) is not among a method's fields."""
    described = (method_class(name).__doc__ or "").partition("Args:")[2]
    for setting in own_settings(name):
        assert f" {setting.name}: " in described, setting.name


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "voco"])
def test_a_budget_means_the_same_for_all(name, share):
    """Tokens that enter a layer of 32, on average, by the counts of an image; and where one is dropped, some stay."""
    if name == "dycoke" and share < 0.25:
        pytest.skip("a fourth of the frames stay whole")
    method = built(name).for_budget(share, 32)
    assert share - 1 / 32 < method.input_share(32) < share + 1e-3  # Victor moves by a layer
    if method.key_layers(32):
        return
    drops = method.drops(32)
    entering = sum(layer_counts(drops, 32, 576)[0]) / 32 / 576
    assert method.input_share(32) - 0.005 < entering < method.input_share(32) + 0.015  # registers come on top
    assert all(drop.kept(576, 576) for drop in drops if drop.ranked and drop.keep), "nothing is left to rank for"


@pytest.mark.parametrize("num_layers", [6, 32])
@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm", "feather", "lvlm_csp"])
def test_a_small_budget_does_not_go_to_the_first_layers_alone(name, num_layers):
    """Drops come earlier before they keep less than half of what the method keeps; on six layers there is no room."""
    method, default = built(name).for_budget(0.25, num_layers), built(name)
    before = getattr(default, "keep", None) or default.shares
    assert all(now > (0.3 if num_layers == 6 else 0.5) * old for now, old in zip(method.keep, before, strict=True))


def small(lengths, key=0):
    """A question behind images of so many tokens."""
    spans, offset = [], 2
    for length in lengths:
        spans.append(ImageSpan(offset, length, ((1, length),)))
        offset += length + 1
    return SegmentLayout(offset + 4, tuple(spans), (offset + 1,), (offset + 2,), key=key)


def test_where_all_keep_little_the_one_with_most_room_is_taken():
    methods = [Feather(layers=layers, keep=(1.0, 1.0)) for layers in ((2, 3), (1, 2))]
    assert first_that_fits(methods, 0.2, 32).layers == (1, 2)


def test_earlier_layers_are_in_proportion():
    assert list(earlier((4, 8, 9))) == [(3, 6, 7), (2, 4, 5), (1, 2, 3)]
    assert list(earlier((1, 2))) == []


@pytest.mark.parametrize("name", [name for name in METHODS if not built(name).needs.encoder_layers])
def test_images_of_one_token_and_of_none(name):
    """Of some of them nothing stays; a batch is its samples all the same."""
    segments = [small(lengths, key) for key, lengths in enumerate(([1], [1, 2], [], [0, 3], [7]))]
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(sum(s.length for s in segments), 32, generator=generator, dtype=torch.float64)
    text_model = text_model_of()
    if (module := built(name).module(32, 6)) is not None:
        text_model.pruning = module.double()
    check_singly(text_model, built(name), segments, embeds)
