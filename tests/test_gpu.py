"""What is right or wrong on a GPU. Without a CUDA device everything here is skipped; ``make gpu`` runs it on one."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench
from gpu_checks.common import BigModel, Check, Report, device_waits
from gpu_checks.loop import Loop
from gpu_checks.numerics import (
    CPU,
    HEADS,
    METHODS_COMPARED,
    MethodRun,
    attention_errors,
    compare_passes,
    greedy_answers,
    run_pass,
    small_geometry,
)
from gpu_checks.speed import compiled, num_graphs, one_pass
from vtprune_train.models.forward import attention
from vtprune_train.pruning import METHODS, method_from_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; run `make gpu` where there is one"),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("backend", attention.BACKENDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_is_near_float64(backend, heads):
    """Output and gradients of q, k and v: rounding to bf16 gives about 3e-3."""
    if reason := attention.unavailable_because(backend, DEVICE, torch.bfloat16):
        pytest.skip(f"{backend} {reason}")
    assert max(attention_errors(backend, DEVICE, *heads)) < 1e-2


@pytest.fixture(scope="module")
def base_and_samples():
    geometry = small_geometry()
    base, anyres = bench.build(geometry, CPU)
    return base, bench.make_samples(geometry, anyres, 4096, CPU)


@pytest.mark.parametrize("name", METHODS_COMPARED)
def test_float32_equals_the_cpu(base_and_samples, name):
    passes = [run_pass(*base_and_samples, METHODS_COMPARED[name], place, torch.float32) for place in (DEVICE, CPU)]
    compared = compare_passes(*passes)
    assert sum(compared["kept_differ"]) == 0
    assert compared["loss_error"] < 1e-5
    assert compared["worst_gradient"][0] < 1e-5


@pytest.mark.parametrize("name", METHODS_COMPARED)
def test_bfloat16_is_as_near_float32_as_on_the_cpu(base_and_samples, name):
    """The same tokens need not be kept: bf16 moves scores that are nearly equal past each other, on either device."""
    method = METHODS_COMPARED[name]
    reference = run_pass(*base_and_samples, method, CPU, torch.float32)
    ours, cpu = (
        compare_passes(run_pass(*base_and_samples, method, place, torch.bfloat16), reference) for place in (DEVICE, CPU)
    )
    assert ours["loss_error"] < 2e-3
    assert ours["worst_gradient"][0] < max(0.1, 2 * cpu["worst_gradient"][0])
    assert sum(ours["kept_differ"]) <= 2 * sum(cpu["kept_differ"]) + 4


@pytest.mark.parametrize("name", METHODS)
def test_the_forward_pass_does_not_wait(name):
    """Between the start of the forward pass and the loss the host never waits, except that each drop of an adaptive
    method tells it how many tokens are left."""
    method = method_from_settings({"method": name})
    run = MethodRun(method, DEVICE)
    run.forward()  # loads kernels
    with device_waits(DEVICE) as waits:
        out = run.forward()
    assert len(waits) <= sum(drop.adaptive for drop in method.drops(12)), waits
    out.loss_sum.backward()
    assert run.finite_gradients()


@pytest.mark.parametrize("name", ["dense", "next_layer"])
def test_answers_equal_the_cpu(name):
    ours, expected = (greedy_answers(place, METHODS_COMPARED[name]) for place in (DEVICE, CPU))
    assert ours.tolist() == expected.tolist()


def test_training_resumes(tmp_path):
    loop = Loop(DEVICE, tmp_path / "runs", tmp_path / "logs")
    loop.folder.mkdir()
    resume = loop.resumed_equals_whole(*loop.quickstart(64, 2), "train.global_batch_size=16", half=2, whole=4)
    assert len(resume["losses"][0]) == 4
    assert resume["losses"][0] == pytest.approx(resume["losses"][1], rel=1e-3)


def test_compiled_layers_equal_eager_and_compile_once(tmp_path):
    check = Check(Report(tmp_path), tmp_path, DEVICE, "tiny", "varlen_sdpa")
    check.big = BigModel.build("tiny", DEVICE)  # float32
    loss, kept, gradient = one_pass(check)
    with compiled(check):
        compiled_loss, compiled_kept, compiled_gradient = one_pass(check)
        graphs = num_graphs()
        one_pass(check, check.big.other_samples(2))
        assert num_graphs() == graphs > 0
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    assert [rows.tolist() for rows in compiled_kept] == [rows.tolist() for rows in kept]
    assert torch.allclose(compiled_gradient, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
