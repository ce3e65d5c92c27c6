"""The fake itself: it computes what the CPU does, and it reports each thing that it is there to report."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.support.fake_cuda import COPY, READ, CudaTensor, FakeCuda
from vtprune_train.core.stream import to_device


@pytest.fixture
def cuda():
    with FakeCuda() as active:
        yield active


@pytest.fixture
def x(cuda):
    return cuda.put(torch.arange(12.0).view(3, 4) - 5)


WAITS = [
    (READ, "_local_scalar_dense", lambda x: x[0, 0].item()),
    (READ, "_local_scalar_dense", lambda x: float(x.sum())),
    (READ, "_local_scalar_dense", lambda x: "some" if (x > 0).any() else "none"),
    (READ, "_local_scalar_dense", lambda x: [10, 11, 12, 13][x.argmax(dim=1)[0]]),
    (READ, "_local_scalar_dense", lambda x: torch.arange(x.argmax(), device=x.device)),
    (READ, "_to_copy", lambda x: x.tolist()),
    (READ, "_to_copy", lambda x: x.cpu()),
    (READ, "_to_copy", lambda x: x.to("cpu", non_blocking=True)),
    (READ, "copy_", lambda x: torch.empty(3, 4).copy_(x)),
    (READ, "copy_", lambda x: torch.empty(3, 4, pin_memory=True).copy_(x)),
    (READ, "nonzero", lambda x: x.nonzero()),
    (READ, "nonzero", lambda x: torch.where(x > 0)),
    (READ, "index by a boolean mask", lambda x: x[x > 0]),
    (READ, "index_put_ by a boolean mask", lambda x: x.__setitem__(x > 4, x.new_zeros(2))),
    (READ, "masked_select", lambda x: x.masked_select(x > 0)),
    (READ, "_unique2", lambda x: x.unique()),
    (READ, "equal", lambda x: torch.equal(x, x + 1)),
    (READ, "bincount", lambda x: x.long().abs().flatten().bincount()),
    (READ, "multinomial", lambda x: x.abs().multinomial(1)),
    (READ, "repeat_interleave", lambda x: x.repeat_interleave(x.new_ones(3).long(), dim=0)),
    (READ, "segment_reduce", lambda x: torch.segment_reduce(x, "sum", lengths=x.new_ones(3).long(), axis=0)),
    (COPY, "torch.tensor", lambda x: torch.tensor([1, 2], device="cuda")),
    (COPY, "torch.as_tensor", lambda x: torch.as_tensor([1, 2], device=x.device)),
    (COPY, "_to_copy", lambda x: torch.ones(2).to("cuda")),
    (COPY, "_to_copy", lambda x: torch.ones(2).cuda()),
    (COPY, "_to_copy", lambda x: torch.ones(2).to(x)),
    (COPY, "_to_copy", lambda x: torch.ones(2).to(x.device, non_blocking=True)),  # pageable
    (COPY, "_to_copy", lambda x: torch.ones(2).pin_memory().to("cuda:0")),
    (COPY, "_to_copy", lambda x: torch.ones(2).pin_memory().to("cuda", torch.float16, non_blocking=True)),
    (COPY, "_to_copy", lambda x: torch.ones(2, 2).pin_memory()[:, 0].to("cuda", non_blocking=True)),
    (COPY, "copy_", lambda x: x[0].copy_(torch.ones(4))),
    (COPY, "index", lambda x: x[torch.tensor([0, 2])]),
    (COPY, "index", lambda x: x[[0, 2]]),
    (COPY, "index_put_", lambda x: x.__setitem__(torch.tensor([0, 2]), 1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "op", "act"), WAITS, ids=range(len(WAITS)))
def test_a_wait_is_reported_with_its_place(cuda, x, kind, op, act):
    act(x)
    (event,) = cuda.waits
    assert event == (kind, op, f"tests/support/test_fake_cuda.py:{act.__code__.co_firstlineno}")


def test_a_tensor_made_of_numbers_on_the_device_reads_each(cuda, x):
    made = torch.tensor([x[0, 0], x[0, 1]], device="cuda")
    assert [event.kind for event in cuda.waits] == [READ, READ, COPY] and made.elem.tolist() == [-5, -4]


NO_WAITS = [
    lambda x: torch.arange(3, device="cuda"),
    lambda x: torch.full((2,), 1.5, device=x.device) + x.new_zeros(2),
    lambda x: torch.ones(2).pin_memory().to("cuda", non_blocking=True),
    lambda x: torch.ones(2).pin_memory().cuda(non_blocking=True),
    lambda x: torch.ones(3, 4, pin_memory=True).copy_(x, non_blocking=True),
    lambda x: x * torch.tensor(2.0),  # a 0-dim CPU tensor is a number
    lambda x: x.__setitem__((0, slice(1, 3)), 7.0),
    lambda x: x.__setitem__(x > 0, 7.0),
    lambda x: x[0, 1:3].add_(1),
    lambda x: x[x.argmax(dim=0)],
    lambda x: x.repeat_interleave(2, dim=0),
    lambda x: x.repeat_interleave(x.new_ones(3).long(), dim=0, output_size=3),
    lambda x: torch.segment_reduce(x, "sum", lengths=x.new_ones(3).long(), axis=0, unsafe=True),
    lambda x: (len(x), x.shape, x.dtype, x.device.index, str(x)),
    lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 3, 4)] * 3, is_causal=True),
    lambda x: torch.tensor([], device="cuda"),
    lambda x: torch.ones(3).tolist(),
]


@pytest.mark.parametrize("act", NO_WAITS, ids=range(len(NO_WAITS)))
def test_what_does_not_wait_is_not_reported(cuda, x, act):
    act(x)
    assert cuda.waits == []


MIXED = [
    ("add", lambda x: x + torch.ones(4)),
    ("add", lambda x: torch.ones(4) + x[0, 0]),
    ("mm", lambda x: x @ torch.ones(4, 2)),
    ("cat", lambda x: torch.cat([x, torch.ones(1, 4)])),
    ("index_select", lambda x: x.index_select(0, torch.tensor([0, 1]))),
    ("index_select", lambda x: torch.ones(3).index_select(0, x.argmax(dim=0))),
    ("index", lambda x: torch.ones(3)[x.argmax(dim=0)]),
    ("index_put_", lambda x: x.__setitem__(x.argmax(dim=0)[:2], torch.ones(2, 4))),
    ("add_", lambda x: torch.ones(3, 4).add_(x)),
    ("embedding", lambda x: F.embedding(torch.tensor([0, 1]), x)),
]


@pytest.mark.parametrize(("op", "act"), MIXED, ids=range(len(MIXED)))
def test_devices_that_mix_are_refused_with_the_place(cuda, x, op, act):
    place = f"tests/support/test_fake_cuda.py:{act.__code__.co_firstlineno}"
    with pytest.raises(RuntimeError, match=rf"same device, but {op} got .* at {place}"):
        act(x)


def test_numpy_is_refused(cuda, x):
    with pytest.raises(TypeError, match=r"Use Tensor\.cpu\(\) first"):
        x.numpy()


class Careless(torch.autograd.Function):
    """Whose backward pass does ``act`` with its gradient."""

    @staticmethod
    def forward(ctx, x, act):
        ctx.act = act
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        ctx.act(grad)
        return grad, None


def test_backward_passes_are_watched_too(cuda, x):
    x.requires_grad_()
    Careless.apply(x, lambda grad: grad.sum().item()).sum().backward()
    assert [event.kind for event in cuda.waits] == [READ] and x.grad.device == torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="same device, but add got"):
        Careless.apply(x, lambda grad: grad + torch.ones(4)).sum().backward()


def test_layers_that_are_run_again_are_watched_too(cuda, x):
    def layer(x):
        return x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)

    x.requires_grad_()
    total = checkpoint(layer, x, use_reentrant=False).square().sum()
    assert len(cuda.waits) == 1
    total.backward()
    assert len(cuda.waits) == 2


def test_it_computes_what_the_cpu_does():
    def parts():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.GELU(), nn.GroupNorm(2, 8), nn.Linear(5, 6))
        model.add_module("tied", nn.Linear(5, 6))
        model.tied.weight = model[3].weight
        return model, torch.randn(2, 4, 5)

    def loss(model, x):
        hidden = model[2](model[1](model[0](x)))
        hidden = hidden.masked_fill(hidden > 1, 0.5) + hidden.cumsum(dim=-1).sort(dim=-1).values
        hidden[:, 1] = 2.0
        return (model[3](hidden) + model.tied(hidden)).logsumexp(dim=-1).sum()

    model, x = parts()
    expected = loss(model, x)
    expected.backward()
    with FakeCuda() as cuda:
        other = cuda.put(parts()[0])
        assert other.tied.weight is other[3].weight and other.tied.weight.requires_grad
        actual = loss(other, x.pin_memory().to("cuda", non_blocking=True))
        actual.backward()
    assert cuda.waits == []
    assert torch.equal(actual.elem, expected)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad.elem, theirs.grad)


def test_it_is_a_device_only_while_it_is_active(cuda, x):
    assert isinstance(x, CudaTensor) and x.is_cuda and x.device == torch.device("cuda:0")
    cuda.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="outside `with FakeCuda"):
        x + 1
    cuda.__enter__()


@pytest.mark.parametrize("pinned", [False, True])
def test_to_device_copies_everything_without_waiting(cuda, x, pinned):
    """Several dtypes, no elements, no dimension, one tensor twice, something on the device already."""
    tensors = (
        torch.arange(5),
        torch.zeros(0, 2),
        torch.tensor([True, False, True]),
        torch.tensor(2.5),
        torch.ones(3)[::2],
    )
    tensors = tuple(tensor.pin_memory() for tensor in tensors) if pinned else tensors
    value = {"several": tensors, "twice": tensors[0], "array": tensors[0].numpy(), "there": x, "other": 3}
    moved = to_device(value, "cuda")
    assert cuda.waits == []
    assert moved["there"] is x and moved["other"] == 3 and moved["twice"] is moved["several"][0]
    for old, new in zip([*tensors, tensors[0]], [*moved["several"], moved["array"]], strict=True):
        assert isinstance(new, CudaTensor) and new.dtype == old.dtype and torch.equal(new.elem, old)
