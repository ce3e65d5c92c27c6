"""``scripts/count_kernels.py``: counts of small functions by hand, and the whole script at tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import count_kernels

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def meta(*shape, **more):
    return torch.empty(*shape, device="meta", **more)


def test_a_product_and_its_gradients():
    x, weight = meta(10, 4, requires_grad=True), torch.nn.Parameter(meta(6, 4))
    counted = count_kernels.count(lambda: torch.nn.functional.linear(x, weight).relu(), [weight])
    # Two kernels: the product reads x and the weight, and its result is read again; 4 bytes a number.
    assert counted.forward.kernels == 2
    assert counted.forward.read == 4 * (40 + 24 + 60)
    assert counted.forward.written == 4 * (60 + 60)
    assert counted.forward.saved == 4 * (40 + 60)  # x and the result of relu; the weight is a parameter
    assert counted.backward.kernels == 3  # relu's and two products
    assert weight.grad is None


def test_views_and_allocations_launch_nothing_and_expanded_tensors_are_read_once():
    x = meta(1, 8, requires_grad=True)
    counted = count_kernels.count(lambda: x.view(8).unsqueeze(0).expand(100, 8) + torch.empty(100, 8, device="meta"))
    assert counted.forward.kernels == 1
    assert counted.forward.read == 4 * (8 + 800)


def test_a_gather_reads_what_it_returns():
    table, index = meta(1000, 8, requires_grad=True), meta(5, dtype=torch.int64)
    counted = count_kernels.count(lambda: table.index_select(0, index))
    assert counted.forward.read == 5 * 8 + 4 * 40


def test_ranges_are_counted_by_themselves():
    x = meta(8, requires_grad=True)

    def run():
        y = x * 2
        with record_function("vtprune::choose"):
            return y * 3 + 1

    counted = count_kernels.count(run)
    assert counted.forward.kernels == 3
    assert counted.by_range["vtprune::choose"].kernels == 2
    assert counted.by_range["vtprune::rank"].kernels == 0


def test_the_script(tmp_path):
    path = tmp_path / "count.json"
    command = [sys.executable, "scripts/count_kernels.py", "--geometry", "tiny", "--samples", "3", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(path.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert report["tokens"] == 3 * (520 + 121)
    layers = [rows[f"decoder layer, {backend}"] for backend in ("varlen_sdpa", "varlen_torch")]
    # One call a segment and the joining of their outputs, against a single call.
    assert layers[0]["forward"]["kernels"] > layers[1]["forward"]["kernels"]
    dense, dropped = rows["decoder of 4 layers, dense"], rows["the same, PyramidDrop, next_layer"]
    assert dense["forward"]["kernels"] == pytest.approx(4 * layers[1]["forward"]["kernels"], abs=20)
    assert dropped["forward"]["saved"] < 0.6 * dense["forward"]["saved"]
    selector = rows["its selector, next_layer"]["forward"]
    assert 0 < selector["kernels"] <= dropped["forward"]["kernels"] - dense["forward"]["kernels"]
    small, large = (rows[f"head of 500 words, {chunk} rows a chunk"]["forward"] for chunk in (8, 16))
    assert small["kernels"] > large["kernels"]
    assert "saved kB a row" in done.stdout
