"""Vision towers for images of any size: one variable-length attention call a layer, lengths from the host."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

from tests.support.families import family_inputs, family_model
from tests.support.helpers import PATCH, Reads
from vtprune_train import PyramidDrop, dense, prune, unprune
from vtprune_train.models.families.qwen import TowerShape, frame_lengths, window_lengths
from vtprune_train.models.forward import attention, tower_attention
from vtprune_train.models.forward.tower_attention import TOWER_PREFIX, Segments

NAMES = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]
GRIDS = ((1, 4, 6), (1, 12, 8), (2, 6, 10), (1, 4, 4), (1, 12, 8))  # frames, rows, columns of patches
WINDOW_SIZES = {16, 8, 4}  # of these grids, in patches


def pixels(grids=GRIDS):
    patches = sum(frames * rows * columns for frames, rows, columns in grids)
    return torch.randn(patches, 3 * 2 * PATCH * PATCH, generator=torch.Generator().manual_seed(0))


def tower_of(name, checkpointing=False):
    model = family_model(name)
    if checkpointing:
        model.train()
        model.model.visual.gradient_checkpointing_enable({"use_reentrant": False})
    return model, model.model.visual


def outputs_and_gradients(tower, grids=GRIDS):
    """Every output of the tower, and the gradients of the pixels and all parameters."""
    tower.zero_grad()
    values = pixels(grids).requires_grad_()
    made = tower(values, grid_thw=torch.tensor(grids))
    outputs = [made.last_hidden_state, made.pooler_output, *getattr(made, "deepstack_features", [])]
    generator = torch.Generator().manual_seed(1)
    sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
    return [*(output.detach() for output in outputs), values.grad, *(p.grad.clone() for p in tower.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_equal_transformers(name, checkpointing):
    model, tower = tower_of(name, checkpointing)
    expected = outputs_and_gradients(tower)
    prune(model, None)
    for ours, theirs in zip(outputs_and_gradients(tower), expected, strict=True):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_unprune_and_dense_restore_the_tower(name):
    model, tower = tower_of(name)
    attributes, config = set(tower.__dict__), model.config.vision_config
    assert tower.config is config
    implementation = config._attn_implementation
    before = outputs_and_gradients(tower)
    prune(model, PyramidDrop(layers=(2, 4), keep=(0.5, 0.25), positions="keep"))
    assert tower.config._attn_implementation == TOWER_PREFIX + "varlen_sdpa"
    with dense(model):
        assert all(torch.equal(a, b) for a, b in zip(before, outputs_and_gradients(tower), strict=True))
    assert tower.config._attn_implementation == TOWER_PREFIX + "varlen_sdpa"
    unprune(model)
    assert tower.config is config
    assert config._attn_implementation == implementation
    assert set(tower.__dict__) == attributes
    assert all(torch.equal(a, b) for a, b in zip(before, outputs_and_gradients(tower), strict=True))


def sdpa_calls(monkeypatch, tower):
    """SDPA calls of each layer in one forward pass."""
    calls = []
    sdpa = F.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls[-1] += 1
        return sdpa(*args, **kwargs)

    hooks = [block.register_forward_pre_hook(lambda *_: calls.append(0)) for block in tower.blocks]
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(F, "scaled_dot_product_attention", counted)
        tower(pixels(), grid_thw=torch.tensor(GRIDS))
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_segments_of_equal_length_share_a_call(monkeypatch, name):
    model, tower = tower_of(name)
    frames = frame_lengths(GRIDS)
    segments = [frames, frames]
    if name == "qwen2_5_vl":  # its first layer has windows
        segments[0] = window_lengths(TowerShape.of(tower), GRIDS)
        assert set(segments[0]) == WINDOW_SIZES
    assert sdpa_calls(monkeypatch, tower) == [len(own) for own in segments], "transformers: one call a segment"
    prune(model, None)
    assert sdpa_calls(monkeypatch, tower) == [len(set(own)) for own in segments]


grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4)


@given(grids, st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_lengths_are_those_that_transformers_computes(merged, merge, window):
    own = tuple((frames, rows * merge, columns * merge) for frames, rows, columns in merged)
    grid_thw = torch.tensor(own)
    shape = TowerShape(merge_size=merge, patch_size=PATCH, window_size=window * merge * PATCH)
    _, cu_windows = get_vision_window_index(grid_thw, merge, shape.window_size, PATCH)
    assert window_lengths(shape, own) == tuple(cu_windows.diff().tolist())
    assert frame_lengths(own) == tuple(get_vision_cu_seqlens(grid_thw).diff().tolist())


def test_segments_are_told_by_their_number():
    segments = Segments((4, 6), (4, 2, 4))
    assert segments.within(torch.tensor([0, 4, 10])) == (4, 6)
    assert segments.within(torch.tensor([0, 4, 6, 10])) == (4, 2, 4)
    with pytest.raises(ValueError, match=r"has 1 segments, but the image grids imply 2 or 3"):
        segments.within(torch.tensor([0, 10]))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_from_the_device(name):
    """Forward, recomputation and backward on meta tensors, which hold no data: a read of one is an error. What is
    found without an error (copies to the host) is counted."""
    model, tower = tower_of(name, checkpointing=True)
    grid_thw = torch.tensor(GRIDS)
    prune(model, None)
    tower_attention._inputs_on.cache_clear()
    tower.to("meta")
    values = pixels().to("meta").requires_grad_()
    with Reads() as reads:
        made = tower(values, grid_thw=grid_thw)
        made.pooler_output.sum().backward()
    assert reads.seen == []
    assert values.grad.shape == values.shape
    unprune(model)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        tower(values, grid_thw=grid_thw.to("meta"))


def test_the_same_grids_are_laid_out_once():
    model, tower = tower_of("qwen2_5_vl")
    prune(model, None)
    tower_attention._inputs_on.cache_clear()
    tower_attention._segments.cache_clear()
    for grid in (GRIDS, GRIDS, GRIDS[:2], GRIDS):
        with torch.inference_mode():
            tower(pixels(grid), grid_thw=torch.tensor(grid))
    for function in (tower_attention._inputs_on, tower_attention._segments):
        assert (function.cache_info().misses, function.cache_info().hits) == (2, 2)
    outputs_and_gradients(tower)  # training after an evaluation takes the same tensors


@pytest.mark.parametrize("name", NAMES)
def test_the_models_config_stays_that_of_an_unpruned_tower(name):
    model, tower = tower_of(name)
    expected = outputs_and_gradients(tower)
    prune(model, None)
    assert model.config.vision_config._attn_implementation == "sdpa"
    other = type(tower)._from_config(copy.deepcopy(model.config.vision_config))
    other.load_state_dict(tower.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(other.eval()), expected, strict=True))


def test_a_deep_copy_of_a_pruned_model_has_a_tower_of_its_own():
    model, tower = tower_of("qwen2_5_vl")
    prune(model, None)
    copied = copy.deepcopy(model)
    unprune(model)
    assert tower.config._attn_implementation == "sdpa"
    assert copied.model.visual.config._attn_implementation == TOWER_PREFIX + "varlen_sdpa"
    expected, ours = (outputs_and_gradients(each) for each in (tower, copied.model.visual))
    assert all((a - b).abs().max() <= 1e-5 * a.abs().max() for a, b in zip(expected, ours, strict=True))
    unprune(copied)
    for each in (model, copied):
        holders = [module.config for module in each.model.visual.modules() if hasattr(module, "config")]
        assert len(holders) > 2
        assert all(config is each.config.vision_config for config in holders)


@pytest.mark.parametrize("peft_first", [True, False])
def test_a_tower_that_peft_trains_whole(peft_first):
    model = family_model("qwen2_5_vl")
    inputs = family_inputs("qwen2_5_vl", [["what", 0, "is", 1], ["a", 2, 3]])
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits.detach()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["visual"])
    wrapped = prune(get_peft_model(model, config), None) if peft_first else get_peft_model(prune(model, None), config)
    (trained,) = [part for name, part in model.named_modules() if name.endswith("modules_to_save.default")]
    assert trained.config._attn_implementation == TOWER_PREFIX + "varlen_sdpa"
    logits = wrapped(**inputs).logits
    logits.sum().backward()
    assert (logits - expected)[real].abs().max() < 1e-4
    assert all(parameter.grad is not None for parameter in trained.parameters())
    unprune(wrapped)
    assert trained.config._attn_implementation == "sdpa"
    assert (wrapped(**inputs).logits - expected)[real].abs().max() < 1e-4


def _reference(q, k, v, cu_seqlens, causal):
    bounds = cu_seqlens.tolist()
    parts = [(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(bounds)]
    calls = [[x.transpose(0, 1) for x in part] for part in parts]
    return torch.cat([F.scaled_dot_product_attention(*call, is_causal=causal).transpose(0, 1) for call in calls])


def _varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """The kernel's meaning in plain SDPA: (-1, 0) is causal, (-1, -1) sees all."""
    assert window_size in ((-1, 0), (-1, -1))
    return _reference(q, k, v, cu_q, causal=window_size == (-1, 0))


def _flash_attention_forward(q, k, v, mask, *, is_causal, cu_seq_lens_q, **_):
    return _reference(q[0], k[0], v[0], cu_seq_lens_q, is_causal).unsqueeze(0)


@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_every_backend_lets_a_patch_see_its_whole_segment(monkeypatch, backend):
    """The CUDA kernels, replaced by their meaning, get the arguments of attention without a causal mask."""
    monkeypatch.setattr(attention, "varlen_attn", _varlen_attn)
    monkeypatch.setattr(attention, "_flash_attention_forward", _flash_attention_forward)
    lengths = (16, 8, 16, 4)
    cu_seqlens = torch.tensor([0, 16, 24, 40, 44], dtype=torch.int32)
    q, k, v = torch.randn(3, 1, 2, 44, 8)
    ours, _ = AttentionInterface()[TOWER_PREFIX + backend](
        torch.nn.Module(), q, k, v, None, scaling=8**-0.5, dropout=0.0, is_causal=False, cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens, max_length_q=16, max_length_k=16, segments=Segments(lengths),
    )  # fmt: skip
    expected = _reference(*(x[0].transpose(0, 1) for x in (q, k, v)), cu_seqlens, causal=False)
    assert (ours[0] - expected).abs().max() < 1e-5


def test_compiled_layers_serve_any_grids():
    """The first change of shapes makes them dynamic; no later one compiles again."""
    model, tower = tower_of("qwen2_5_vl")
    prune(model, None)
    batches = [GRIDS, GRIDS[:2], GRIDS[1:], ((1, 20, 8),), ((1, 6, 6), (1, 8, 12), (1, 4, 8)), ((3, 4, 4),)]
    expected = [outputs_and_gradients(tower, own)[1] for own in batches]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for block in tower.blocks:
        block.compile(backend=counter)
    frames = []
    for own, pooled in zip(batches, expected, strict=True):
        assert (outputs_and_gradients(tower, own)[1] - pooled).abs().max() <= 1e-4 * pooled.abs().max()
        frames.append(counter.frame_count)
    assert 0 < frames[0] < frames[1] == frames[-1]


class DeviceTensors(TorchFunctionMode):
    """Calls of ``torch.tensor`` that make a tensor on a device: copies that the host waits for."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.tensor and (kwargs or {}).get("device") is not None
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next"])
def test_lengths_that_packed_features_return_stay_on_the_host(name):
    model = family_model(name)
    made = family_inputs(name, [["what", 0], ["a", 1, "or", 2]])
    inputs = {key: value for key, value in made.items() if key in ("pixel_values", "image_sizes", "batch_num_images")}
    expected, ours = DeviceTensors(), DeviceTensors()
    with torch.no_grad():
        with expected:
            theirs = model.model.get_image_features(**inputs).pooler_output
        prune(model, None)
        with ours:
            features = model.model.get_image_features(**inputs).pooler_output
    assert (expected.number, ours.number) == (1, 0)
    assert all(torch.equal(a, b) for a, b in zip(features, theirs, strict=True))
    unprune(model)
    assert "pack_image_features" not in model.model.__dict__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: variable-length kernels run on CUDA only")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", [b for b in attention.BACKENDS if b != "varlen_sdpa"])
def test_gpu_tower_equals_transformers(backend, name):
    if reason := attention.unavailable_because(backend, torch.device("cuda"), torch.bfloat16):
        pytest.skip(f"{backend} {reason}")
    model, tower = tower_of(name)
    expected = outputs_and_gradients(tower)[0].cuda()
    model.to("cuda", torch.bfloat16)
    prune(model, None, attention=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = tower(pixels().cuda(), grid_thw=torch.tensor(GRIDS)).last_hidden_state
        ours.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (ours.float() - expected).abs().mean() < 5e-2 * expected.abs().mean()
