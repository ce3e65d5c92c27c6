"""Models built one parameter at a time, and exports written one tensor at a time, in one process."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from tests.support.families import family_model
from tests.support.family_runs import NAMES, save_checkpoint
from tests.support.helpers import tiny_config
from tests.support.model_parts import TEXT_TYPES
from vtprune_train.models.io.build import open_whole
from vtprune_train.models.io.export import INDEX, Plan, plan_of, stored, write_tensors, write_weights
from vtprune_train.models.io.in_pieces import Deferred
from vtprune_train.models.io.placement import WHOLE, Placement


class Emptied(Placement):
    """Takes the values of what is placed, and counts what is held at that time."""

    sharded = True

    def __init__(self, held):
        self.values, self.held, self.most_held = {}, held, 0

    def place(self, parameter):
        self.most_held = max(self.most_held, sum(p.numel() for p in self.held() if not p.is_meta))
        self.values[parameter] = parameter.data.clone()
        parameter.data = torch.empty(0, dtype=parameter.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_from_pretrained_hands_each_weight_over_before_it_reads_the_next(tmp_path, name, monkeypatch):
    """Fails where a version of transformers sets its parameters by another function."""
    save_checkpoint(name, tmp_path)
    whole, made = family_model(name), []
    create = type(whole).__init__
    monkeypatch.setattr(type(whole), "__init__", lambda self, config: (create(self, config), made.append(self))[0])
    placement = Emptied(lambda: made[0].parameters())
    model = open_whole(AutoModelForImageTextToText, str(tmp_path), torch.float32, "here", placement)
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    parameters = dict(model.named_parameters())
    assert set(placement.values) == set(parameters.values()) - tables
    largest = max(value.numel() for value in placement.values.values())
    assert placement.most_held <= sum(table.numel() for table in tables) + largest
    for key, value in whole.named_parameters():
        assert torch.equal(placement.values.get(parameters[key], parameters[key]), value), key


@pytest.mark.parametrize("text_type", TEXT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deferred_weights_are_those_of_a_model_made_at_once(text_type, dtype):
    config = tiny_config(text_type)
    torch.manual_seed(3)
    whole, drawn = AutoModelForImageTextToText.from_config(config, dtype=dtype), torch.rand(1)
    torch.manual_seed(3)
    with Deferred() as deferred:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    assert all(parameter.is_meta for parameter in model.parameters())
    deferred.make(model, WHOLE)
    assert torch.equal(torch.rand(1), drawn), "what is drawn next"
    for kind in ("named_parameters", "named_buffers"):
        one, two = dict(getattr(whole, kind)()), dict(getattr(model, kind)())
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)


def test_deferred_operations_on_parts_and_shared_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3, padding_idx=1)
            self.scale = nn.Parameter(torch.randn(3) * 2)
            self.linear = nn.Linear(3, 5, bias=False)
            self.linear.weight = self.table.weight
            nn.init.trunc_normal_(self.table.weight, std=0.5)
            with torch.no_grad():
                self.table.weight[2].fill_(7)
                self.scale.mul_(3)

    torch.manual_seed(0)
    whole = Odd()
    torch.manual_seed(0)
    with Deferred() as deferred:
        model = Odd()
    deferred.make(model, WHOLE)
    assert model.linear.weight is model.table.weight
    for name, value in whole.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name


def test_a_file_is_that_of_safetensors(tmp_path):
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "z.é": torch.arange(4),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
    }
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    plan = {name: stored(name, tensor) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "written", plan, lambda wanted: tensors[wanted.name])
    assert (tmp_path / "written").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_an_export_is_that_of_save_pretrained(tmp_path, name, size, monkeypatch):
    """Names, files and index; also of a model whose embeddings are tied."""
    monkeypatch.setattr("vtprune_train.models.io.export.FILE_SIZE", size)
    model = family_model(name)
    if name == "llava":
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path / "expected", max_shard_size=size)
    (tmp_path / "written").mkdir()
    plan, weights = plan_of(model), model.state_dict()
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    write_weights(plan, tmp_path / "written", lambda wanted: weights[wanted.name])
    files = sorted(path.name for path in (tmp_path / "expected").glob("model*"))
    assert files == sorted(path.name for path in (tmp_path / "written").iterdir())
    assert (INDEX in files) is (size == "20KB")
    for file in files:
        assert (tmp_path / "expected" / file).read_bytes() == (tmp_path / "written" / file).read_bytes(), file
