"""``vtprune estimate --clock``: what is measured is what was planned, for every method, at every batch size."""

import itertools
import json

import pytest
import torch

from vtprune_train.bench import decoder_time
from vtprune_train.bench.costs import ImageTokens, Sample, Subject, estimate
from vtprune_train.bench.decoder_time import clock, render
from vtprune_train.cli import main
from vtprune_train.config.load import load_config
from vtprune_train.core.flops import DecoderGeometry, is_adaptive
from vtprune_train.models.io.build import load_model_config
from vtprune_train.pruning import METHODS, method_class

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CONFIG = load_model_config(load_config("configs/quickstart.yaml").model)
SIZES = DecoderGeometry.of(CONFIG.get_text_config())
SAMPLE = Sample((ImageTokens("picture", 48, 3), ImageTokens("picture", 20, None)), text=9, answer=5)


def clocked(method, batches=(2,), sample=SAMPLE, **values):
    return clock(SIZES, method, sample, batches, repeats=1, device=CPU, dtype=torch.float32, **values)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_what_was_planned(name):
    method = method_class(name)()
    result = clocked(method)
    works = [(row.work, row.batch) for row in result.rows]
    assert works == [("prefill", 2), ("decoding step", 2), ("training step", 2)]
    assert all(row.dense > 0 and row.pruned > 0 and row.ratio == row.dense / row.pruned for row in result.rows)
    planned = estimate(Subject("quickstart", CONFIG, method, "the test", dtype="float32"), SAMPLE)
    dense, pruned = result.cache_bytes
    assert dense == planned.cache_prompt.dense
    if not is_adaptive(method, SIZES.num_layers):
        assert pruned == pytest.approx(planned.cache_prompt.pruned)
        assert result.visual == pytest.approx(planned.visual)
    else:
        assert 0 < result.visual.cached <= 68 and pruned <= dense


def test_rows_of_all_batch_sizes_and_what_is_printed():
    result = clocked(None, batches=(1, 3))
    assert [row.batch for row in result.rows] == [1, 1, 1, 3, 3, 3]
    assert result.cache_bytes[0] == result.cache_bytes[1]
    text = "\n".join(render(result))
    assert "in float32: a decoder of these sizes with random weights, 1 repeats" in text
    assert "visual tokens taken: enter 68.0, leave 68.0, cached 68.0" in text


def test_a_decoding_step_is_one_of_several(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(decoder_time, "now", lambda device: float(next(ticks)))
    seconds = {row.work: (row.dense, row.pruned) for row in clocked(None).rows}
    assert seconds == {"prefill": (1, 1), "decoding step": (0.25, 0.25), "training step": (1, 1)}


def test_dense_and_pruned_are_not_confused(monkeypatch):
    """Whichever of the two comes first in a repeat."""
    seconds = {"uniform": iter([9.0, 1.0, 2.0]), None: iter([9.0, 4.0, 6.0])}  # the first of each warms up
    generate = decoder_time._generate

    def timed(model, side, *given, counts):
        generate(model, side, *given, counts=False)
        side.add("prefill", next(seconds[side.method and side.method.name]), counts)

    monkeypatch.setattr(decoder_time, "_generate", timed)
    monkeypatch.setattr(decoder_time, "_train", lambda *given, **counts: None)
    uniform = method_class("uniform")()
    result = clock(SIZES, uniform, SAMPLE, [1], repeats=2, device=CPU, dtype=torch.float32)
    assert result.rows == (decoder_time.Clocked("prefill", 1, 5.0, 1.5, 3.5),)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    needed = decoder_time._weight_bytes(SIZES, torch.float32)
    monkeypatch.setattr(decoder_time, "_free_bytes", lambda device: 1.5 * needed)
    result = clocked(None)
    assert [row.work for row in result.rows] == ["prefill", "decoding step"]
    assert render(result)[-1].startswith("training step not measured: with gradients, 8 layers of width ")
    monkeypatch.setattr(decoder_time, "_free_bytes", lambda device: 0.5 * needed)
    with pytest.raises(ValueError, match=r"--clock: 8 layers of width \d+ need .* GB are free on cpu; run --clock on"):
        clocked(None)


def test_command_line(capsys, tmp_path):
    file = tmp_path / "estimate.json"
    command = [
        "estimate",
        "--config",
        "configs/quickstart.yaml",
        "--clock",
        "1,2",
        "--repeats",
        "1",
        "--json",
        str(file),
    ]
    assert main([*command, "pruning.method=sparsevlm"]) == 0
    out = capsys.readouterr().out
    assert "prefill, layers" in out and "training step, layers       2" in out
    clock = json.loads(file.read_text())["clock"]
    assert [row["batch"] for row in clock["rows"]] == [1, 1, 1, 2, 2, 2] and clock["device"] in ("cpu", "cuda")
    assert main([*command, "--clock", "0,x"]) == 2
    error = capsys.readouterr().err
    assert "--clock" in error and "0" in error and "'x'" in error
