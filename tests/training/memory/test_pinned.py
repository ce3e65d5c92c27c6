"""Copies in host memory for checkpoints: cut from few blocks, the same memory for every save."""

import io
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from vtprune_train.training.memory import pinned
from vtprune_train.training.memory.pinned import Arena, HostCopies, Layout, pinned_bytes

GIB = 2**30


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 KiB, and tensors from 16 KiB on in blocks of their own."""
    monkeypatch.setattr(pinned, "BLOCK", 2**16)
    monkeypatch.setattr(pinned, "OWN_BLOCK", 2**14)


def state(seed=0, scale=1):
    """What a checkpoint holds, in kind: dtypes of every alignment, views, tied and empty tensors, plain values."""
    torch.manual_seed(seed)
    flat = torch.randn(9000 * scale)
    tied = torch.randn(3, 5)
    return {
        "weights": {f"w{i}": flat[100 * i : 100 * i + 37] for i in range(20)},
        "transposed": torch.randn(7, 11).t(),
        "half": [torch.randn(13).bfloat16(), torch.randn(1).half(), torch.randn(4000 * scale).double()],
        "odd": (torch.arange(3, dtype=torch.uint8), torch.tensor(True), torch.tensor(7)),
        "tied": [tied, tied],
        "empty": torch.zeros(0, 4),
        "flat": flat,
        "step": 3,
    }


def assert_same(one, two):
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.numel() else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_copies_are_equal_aligned_and_apart(small_blocks):
    copies, source = HostCopies(), state()
    copies.begin()
    made = copies.copy(source)
    copies.finish()
    assert_same(made, source)
    assert made["tied"][0] is made["tied"][1]
    places = sorted({(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors(made)})
    assert all(end <= start for (_, end), (start, _) in pairwise(places)), "two copies overlap"
    assert all(start % pinned.ALIGNMENT == 0 for start, _ in places)
    before = [tensor.clone() for tensor in tensors(made)]
    for tensor in tensors(source):
        tensor.zero_()
    assert all(torch.equal(one, two) for one, two in zip(before, tensors(made), strict=True)), "a copy is a view"


def test_the_same_memory_serves_every_save(small_blocks):
    copies, places = HostCopies(), []
    for seed in range(3):
        copies.begin()
        made = copies.copy(state(seed))
        copies.finish()
        assert_same(made, state(seed))
        places.append([tensor.data_ptr() for tensor in tensors(made)])
        assert copies._arenas[False].num_bytes == pinned_bytes([t.nbytes for t in unique(made)])
    assert places[0] == places[1] == places[2]


def unique(value):
    return list({id(tensor): tensor for tensor in tensors(value)}.values())


def test_sizes_may_change_between_saves(small_blocks):
    copies = HostCopies()
    for scale in (1, 3, 1, 2):
        copies.begin()
        made = copies.copy(state(scale, scale))
        copies.finish()
        assert_same(made, state(scale, scale))
        assert copies._arenas[False].num_bytes == pinned_bytes([t.nbytes for t in unique(made)]), (
            "blocks of an earlier save stay"
        )


def test_files_hold_each_tensor_once_and_nothing_else(small_blocks):
    copies, source = HostCopies(), state()
    copies.begin()
    made = copies.copy(source)
    parts = {"one": made["weights"]["w3"], "two": made["odd"]}
    assert len(saved(parts)) < 4000, "a file brings its whole block along"
    whole = sum(tensor.nbytes for tensor in unique(made))
    assert whole < len(saved(made)) < whole + 1024 * len(unique(made))
    assert_same(torch.load(io.BytesIO(saved(made)), weights_only=False), source)


def test_bytes_of_blocks():
    assert pinned_bytes([]) == 0
    assert pinned_bytes([1]) == pinned.BLOCK == pinned_bytes([pinned.OWN_BLOCK - 64] * 4)
    assert pinned_bytes([pinned.BLOCK // 8] * 8) == pinned.BLOCK, "4096 x 4096 in half precision fills blocks exactly"
    assert pinned_bytes([pinned.OWN_BLOCK + 1]) == pinned.OWN_BLOCK + pinned.PAGE
    layout = Layout()
    assert [layout.place(size) for size in (10, 2**27, 100, 10)] == [(0, 0), (1, 0), (0, 64), (0, 192)]


def test_a_7b_model_on_one_gpu_takes_little_more_than_its_bytes():
    layer = [2 * 4096 * 4096] * 4 + [2 * 4096 * 11008] * 3 + [2 * 4096] * 2
    weights = layer * 32 + [2 * 32064 * 4096] * 2
    flat = [4 * sum(size // 2 for size in weights)] * 3
    exact = sum(weights) + sum(flat)
    rounded = sum(1 << (size - 1).bit_length() for size in weights + flat)
    assert exact <= pinned_bytes(weights + flat) < 1.01 * exact
    assert rounded > 1.25 * exact, "what powers of two would take"


def test_blocks_are_locked_beside_a_gpu_and_unlocked_when_given_back(small_blocks, monkeypatch):
    locked = {}
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: locked.__setitem__(address, size) or 0,
        cudaHostUnregister=lambda address: 0 if locked.pop(address) else 1,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)

    def on_gpu(count):
        return torch.empty(count, device="meta")

    arena = Arena(lock=True)
    arena.begin()
    pieces = [arena.allocate(on_gpu(count)) for count in (10, 5000, 20)]
    assert sum(locked.values()) == arena.num_bytes == 2**16 + 5 * pinned.PAGE
    assert pieces[0].data_ptr() in locked and pieces[1].data_ptr() in locked
    arena.begin()
    arena.allocate(on_gpu(10))
    arena.trim()
    assert list(locked) == [pieces[0].data_ptr()]
    runtime.cudaHostRegister = lambda address, size, flags: 2
    with pytest.raises(RuntimeError, match=r"cannot page-lock .*CUDA error 2"):
        arena.allocate(on_gpu(5000))
