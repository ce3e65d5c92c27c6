"""The memory estimate of the dry run and the preflight check.

Counts the bytes of one rank from the model's config, the tokens of a micro-batch and the DeepSpeed settings. What
autograd saves for a layer is exact for eager layers (a test counts it), states and buffers follow DeepSpeed 0.19, and
temporaries within a layer are upper bounds. The CUDA context, NCCL buffers and fragmentation are not counted (see
:data:`RESERVED`). Compiled layers and Liger's kernels save less than counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vtprune_train.config.settings import Config
from vtprune_train.config.train import TrainConfig
from vtprune_train.core import user_code
from vtprune_train.core.flops import DELTA_CHUNK, DecoderGeometry, attending_layers, stage_layers
from vtprune_train.core.stream import PackedBatch
from vtprune_train.models import HFModule
from vtprune_train.models.families import family_of, trained_family
from vtprune_train.models.families.base import normalizes_queries_and_keys
from vtprune_train.models.families.towers import SavedByTower, class_tokens, tile_tower
from vtprune_train.models.forward import head
from vtprune_train.models.forward.recompute import Level, recomputed_layers
from vtprune_train.models.io.placement import whole_shape
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.training import muon
from vtprune_train.training.engine.settings import offloads_optimizer, zero_stage
from vtprune_train.training.memory.pinned import pinned_bytes
from vtprune_train.training.optimizer import parameter_groups, state_bytes

GIB = 2**30
RESERVED = 0.06  # share of a device's memory reserved for what is not counted
ALLREDUCE_ELEMENTS = 5 * 10**8  # DeepSpeed's bucket at ZeRO 0
FOUR_BIT_BYTES = 0.52  # of a weight in NF4: 4 bits and its share of the double-quantized scales
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Zero:
    """The parts of a DeepSpeed config that affect memory.

    Args:
        stage: ZeRO stage.
        ranks: number of ranks that share the states.
        element: bytes of a weight.
        accumulation: bytes of an accumulated gradient.
        bucket: elements of a reduction bucket.
        buckets: number of buckets at a time.
        offloads_optimizer, offloads_weights: whether they are in host memory.
        max_live: most elements that ZeRO-3 keeps gathered at a time.
        sub_group: elements that ZeRO-3 updates at a time.
        norm: whether DeepSpeed computes a gradient norm, in float64.
    """

    stage: int
    ranks: int
    element: int
    accumulation: int
    bucket: int = 0
    buckets: int = 1
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    max_live: int = 10**9
    sub_group: int = 10**9
    norm: bool = True

    @classmethod
    def of(cls, settings: dict[str, Any], dtype: str, ranks: int) -> Zero:
        """Read a DeepSpeed config; missing keys have DeepSpeed's defaults."""
        zero = settings.get("zero_optimization", {})
        stage, element = zero_stage(settings), DTYPE_BYTES[dtype]
        accumulation = settings.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            stage,
            ranks,
            element,
            DTYPE_BYTES[accumulation] if accumulation else element,
            int(float(zero.get("reduce_bucket_size", 5e8))) if stage else ALLREDUCE_ELEMENTS,
            2 if stage in (1, 2) and zero.get("overlap_comm", False) else 1,
            offloads_optimizer(settings),
            zero.get("offload_param", {}).get("device", "none") != "none",
            int(float(zero.get("stage3_max_live_parameters", 1e9))),
            int(float(zero.get("sub_group_size", 1e9))),
            zero.get("compute_grad_norm", True),
        )

    @property
    def whole_gradients(self) -> bool:
        """Whether each rank keeps all gradients in both dtypes, as DeepSpeed's ``BF16_Optimizer`` does (ZeRO-1 with
        bfloat16 weights and float32 accumulation)."""
        return self.stage == 1 and self.accumulation > self.element and not self.offloads_optimizer


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Args:
        groups: number of parameters in each group of the optimizer.
        frozen: parameters that are not trained.
        largest: elements of the largest trained tensor.
        states: bytes of each optimizer state for an element, by group.
        four_bit: frozen parameters that are stored in 4 bits (QLoRA).
        step: temporary bytes of the optimizer's step for an element of the tensor that it updates.
        matrix: elements of the largest matrix that Muon orthogonalizes.
    """

    groups: tuple[int, ...]
    frozen: int
    largest: int
    states: tuple[tuple[float, ...], ...]
    four_bit: int = 0
    step: float = 0.0
    matrix: int = 0

    @property
    def trained(self) -> int:
        return sum(self.groups)

    def bytes_of_weights(self, element: int) -> int:
        """Bytes of all weights; a weight that is not stored in 4 bits takes ``element`` bytes."""
        return element * (self.trained + self.frozen - self.four_bit) + int(FOUR_BIT_BYTES * self.four_bit)

    @classmethod
    def of(
        cls, groups: Sequence[dict[str, Any]], every: Sequence[Any], train: TrainConfig, flat: bool, four_bit: int = 0
    ) -> Parameters:
        """Count the trained parameters in ``groups`` and the frozen ones in ``every`` (all of the model; partitioned
        ones count whole), and find the states of the optimizer in ``train``. ``flat``: whether it gets flat tensors
        (ZeRO 1 to 3)."""
        count = [[_numel(p) for p in group["params"]] for group in groups]
        sums = tuple(sum(numels) for numels in count)
        largest = max(max(numels) for numels in count)
        ndims = [1 if flat else len(whole_shape(group["params"][0])) for group in groups]
        states = tuple(state_bytes(train, group, ndim) for group, ndim in zip(groups, ndims, strict=True))
        # Custom optimizers may use foreach; built-in ones do not.
        step = 4.0 if user_code.is_path(train.optimizer) else 0.0
        matrix = max((max(numels) for numels, group in zip(count, groups, strict=True) if group.get("muon")), default=0)
        return cls(sums, sum(map(_numel, every)) - sum(sums), largest, states, four_bit, step, matrix)

    def states_of(self, parts: Sequence[int]) -> list[int]:
        """Bytes of each optimizer state on a rank that keeps ``parts`` elements of the groups."""
        return [int(size * part) for sizes, part in zip(self.states, parts, strict=True) for size in sizes]


def _numel(parameter: Any) -> int:
    if parameter.dtype == torch.uint8:  # each element has two 4-bit weights
        return 2 * int(parameter.numel())
    return whole_shape(parameter).numel()


def _four_bit(model: HFModule) -> int:
    """Number of weights that QLoRA stores in 4 bits: those of the decoder's linear layers, without the adapter."""
    layers = model.get_submodule(family_of(model).decoder).layers
    return sum(_numel(p) for name, p in layers.named_parameters() if p.ndim == 2 and ".lora_" not in name)


@dataclass(frozen=True)
class States:
    """Bytes of weights, gradients and optimizer on one rank's device.

    Args:
        weights: the model's weights.
        masters: float32 copies of the trained weights.
        moments: the optimizer's states.
        gradients: at the end of the last backward pass of a step; under ZeRO-3 including the bucket, which is kept.
        accumulating: additional gradients during the backward pass of a later micro-batch of the step.
        buckets: reduction buckets, and weights gathered by ZeRO-3, during the backward pass.
        step: size of each temporary tensor of the optimizer step.
        host: bytes in host memory, if states or weights are offloaded.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    accumulating: int
    buckets: int
    step: tuple[int, ...]
    host: int = 0

    @property
    def always(self) -> int:
        return self.weights + self.masters + self.moments

    @classmethod
    def of(cls, zero: Zero, parameters: Parameters, accumulates: bool = True) -> States:
        """Compute the bytes; ``accumulates``: whether a step has several micro-batches.

        Source: ``stage_1_and_2.py``, ``stage3.py``, ``bf16_optimizer.py`` and ``fp16/unfused_optimizer.py`` of
        DeepSpeed 0.19.8 with torch's fused AdamW; ``scripts/measure_zero.py`` measures the same.
        """
        e, a, trained = zero.element, zero.accumulation, parameters.trained
        parts = [-(-group // (zero.ranks if zero.stage else 1)) for group in parameters.groups]
        mine, largest_part, moments = sum(parts), max(parts), sum(parameters.states_of(parts))
        weights = parameters.bytes_of_weights(e)
        masters = 0 if zero.stage == 0 and e == 4 else 4 * mine
        norm = (8 * min(parameters.largest, largest_part) if zero.norm else 0,)
        cast = 4 if e < 4 else 0
        reduced = min(trained, zero.bucket)
        if zero.stage == 0:
            states = cls(weights, masters, moments, e * trained, e * reduced, 0, (cast * trained,))
        elif zero.whole_gradients:
            whole = max(reduced, max(parameters.groups)) if trained > zero.bucket else trained
            states = cls(weights, masters, moments, (4 + e) * trained, (4 + e) * whole, 0, norm)
        elif zero.stage == 3:
            gathered = min(trained + parameters.frozen, zero.max_live) if zero.ranks > 1 or zero.offloads_weights else 0
            largest = min(largest_part, max(zero.sub_group, 1))
            step: tuple[int, ...] = (a * largest, (4 if a < 4 else 0) * largest)
            weights = 0 if zero.offloads_weights else -(-weights // zero.ranks)
            states = cls(weights, masters, moments, a * mine + e * zero.bucket, 0, e * (reduced + gathered), step)
        elif a > e:  # float32 gradients of this rank's partition, accumulated bucket by bucket
            buckets = e * zero.buckets * zero.bucket + (e + 4) * reduced + _oversized(zero, parameters)
            states = cls(weights, masters, moments, a * mine, 0, buckets, norm)
        else:
            buckets = e * (zero.buckets * zero.bucket + reduced) + _oversized(zero, parameters)
            # Whether the first reduction waits for all gradients.
            waits = accumulates or (zero.stage == 1 and zero.buckets == 1)
            more = e * (trained if zero.stage == 1 else mine) if waits else 0
            step = max((e * largest_part, cast * largest_part), norm, key=sum)
            states = cls(weights, masters, moments, e * mine, more, buckets, step)
        if zero.offloads_optimizer:
            return _offloaded(states, zero, parameters, mine)
        updated = largest_part if zero.stage else parameters.largest
        of_optimizer = int(parameters.step * updated) + muon.step_bytes(parameters.matrix)
        return replace(states, step=(*states.step, of_optimizer)) if of_optimizer else states

    @property
    def backward(self) -> int:
        """Bytes without activations at the end of a later micro-batch's backward pass."""
        return self.always + self.gradients + self.accumulating + self.buckets

    @property
    def stepping(self) -> int:
        """Peak bytes of the optimizer step."""
        return self.always + self.gradients + sum(self.step)


def _oversized(zero: Zero, parameters: Parameters) -> int:
    """Bytes of a gradient that is larger than a bucket; it is kept separately until the pass ends."""
    return zero.element * parameters.largest if parameters.largest > zero.bucket else 0


def _offloaded(states: States, zero: Zero, parameters: Parameters, mine: int) -> States:
    """``states`` with master weights, optimizer states and accumulated gradients moved to host memory; the device keeps
    buckets and one gradient."""
    host = states.masters + states.moments + 4 * mine + zero.element * mine
    if zero.offloads_weights:
        host += zero.element * -(-(parameters.trained + parameters.frozen) // zero.ranks)
    if zero.stage == 3:
        host += zero.accumulation * mine
    buckets = states.buckets + zero.element * parameters.largest
    stays = zero.element * zero.bucket if zero.stage == 3 else 0
    return replace(states, masters=0, moments=0, gradients=stays, accumulating=0, buckets=buckets, step=(), host=host)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of a layer for each of its tokens.

    Args:
        saved: activations that autograd keeps for the backward pass.
        input: the layer's input, which is all that is kept if the layer is recomputed.
        backward: peak of additional memory in the backward pass of the layer.
    """

    saved: int
    input: int
    backward: int

    @classmethod
    def of_decoder(cls, config: Any, element: int, trained: bool, copies_output: bool) -> LayerBytes:
        """A Llama-like layer (Llama, Mistral, Qwen2, Qwen3) as implemented in transformers.

        Saved tensors, in the model's dtype unless noted:

        - for each of two RMSNorms: the input (float32), 1 / RMS (float32), the normalized input and the output;
        - attention: queries, keys, values, output and log-sum-exp (float32), norms of queries and keys if the model
          has them, and a copy of the output if the backend ``copies_output`` (``varlen_sdpa``);
        - MLP: gate, SiLU(gate), up and their product.

        Linear layers and norms with frozen weights do not save their inputs. ``element``: bytes of an activation.
        """
        g = DecoderGeometry.of(config)
        if g.gated:
            return cls._of_gated(g, element, trained, copies_output)
        q, k = g.heads * g.head_dim, g.kv_heads * g.head_dim
        if_trained = element if trained else 0
        norms = 2 * (4 * g.hidden + 4 + 2 * if_trained * g.hidden)
        if normalizes_queries_and_keys(config):
            norms += (4 + if_trained) * (q + k) + 4 * (g.heads + g.kv_heads)
        attention = element * 2 * (q + k) + 4 * g.heads + (if_trained * q if copies_output else 0)
        mlp = (3 * element + if_trained) * g.intermediate
        # Gradients in the MLP, while all other tensors are still saved.
        backward = 2 * element * (g.intermediate + g.hidden)
        return cls(norms + attention + mlp, element * g.hidden, backward)

    @classmethod
    def _of_gated(cls, g: DecoderGeometry, element: int, trained: bool, copies_output: bool) -> LayerBytes:
        """An attention layer of Qwen3.5: its norms save float32 products with their weights; the output gate saves
        itself, the attention's output and their product."""
        q, k = g.heads * g.head_dim, g.kv_heads * g.head_dim
        saved = cls._shared(g, element, trained)
        saved += (6 * element + (4 + element if trained else 0) - (0 if copies_output else element)) * q
        saved += (2 * element + 4 + (4 if trained else 0)) * k + 8 * g.heads + 4 * g.kv_heads
        return cls(saved, element * g.hidden, 2 * element * (g.intermediate + g.hidden))

    @classmethod
    def of_linear(cls, config: Any, element: int, trained: bool) -> LayerBytes:
        """A linear attention layer of Qwen3.5, for transformers' PyTorch code (kernels save much less): the delta rule
        computes in float32 and saves five products within each chunk and the state after it. Padding of short samples
        is not counted."""
        g = DecoderGeometry.of(config)
        assert g.linear is not None
        a = g.linear
        keys, expanded, values = a.key_heads * a.key_dim, a.value_heads * a.key_dim, a.value_heads * a.value_dim
        rule = (8 * element + 16) * expanded + (3 * element + 24 + (2 * element if trained else 0)) * values
        rule += (20 * DELTA_CHUNK + 32 + element + (4 if trained else 0)) * a.value_heads
        state = 4 * a.value_heads * a.key_dim * a.value_dim // DELTA_CHUNK
        saved = cls._shared(g, element, trained) + 4 * element * keys + rule + state
        # Gradients of two products within a chunk, and of the rule's inputs and output.
        backward = 2 * element * (g.intermediate + g.hidden)
        backward = max(backward, 8 * DELTA_CHUNK * a.value_heads + 8 * (expanded + values))
        return cls(saved, element * g.hidden, backward)

    @staticmethod
    def _shared(g: DecoderGeometry, element: int, trained: bool) -> int:
        """Bytes saved by the norms and the MLP of a layer of Qwen3.5."""
        norms = (8 + (8 + 2 * element if trained else 0)) * g.hidden + 8
        return norms + (4 if trained else 3) * element * g.intermediate

    @classmethod
    def of_tower(cls, saved: SavedByTower, element: int) -> LayerBytes:
        """A trained layer of a vision tower, with activations of ``element`` bytes."""
        c, m = saved.hidden, saved.intermediate
        return cls(saved.raw_bytes + element * saved.elements, element * c, 2 * element * (m + c))


@dataclass(frozen=True)
class Geometry:
    """Bytes of a model's decoder layers, head and tower. ``tower`` and ``projector`` are per token of the tower,
    ``rotary`` (tables of cosines and sines) per token of a stage."""

    layers: tuple[LayerBytes, ...]
    tower: LayerBytes | None
    tower_layers: int
    tower_tokens: int
    projector: int
    hidden: int
    rotary: int
    vocab: int
    element: int
    trains_head: bool

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @classmethod
    def of(
        cls, model_config: Any, dtype: str, train: Sequence[str], attention: str, method: PruningMethod | None = None
    ) -> Geometry:
        """Read a model config, for weights of ``dtype``, the parts in ``train`` (``model.train``) and the decoder's
        ``attention`` backend. With an adapter, layers are counted as trained, although their norms are frozen and save
        slightly less; the difference allows for the adapter's activations. A ``method`` that shortens the tower is
        counted with the dense tower, which some of its steps may run."""
        text, e = model_config.text_config, DTYPE_BYTES[dtype]
        tower = trained_family(model_config.model_type, "this config")[1].saved(model_config)
        change = None if method is None else method.needs.tower
        flows = "vision_tower" in train
        if change is not None and change.learns:
            longest = max(max(pair) for pair in change.lengths(tile_tower(model_config)))
            tokens = max(tower.tokens, longest + class_tokens(model_config.vision_config))
            tower, flows = replace(tower, tokens=tokens), True
        trained = "language_model" in train
        adapts = trained or "lora" in train
        layers = [LayerBytes.of_decoder(text, e, adapts, attention.endswith("varlen_sdpa"))] * text.num_hidden_layers
        if (attending := attending_layers(text)) is not None:
            linear = LayerBytes.of_linear(text, e, adapts)
            layers = [layer if index in attending else linear for index, layer in enumerate(layers)]
        return cls(
            tuple(layers),
            LayerBytes.of_tower(tower, e) if flows else None,
            tower.layers,
            tower.tokens,
            e * tower.projector if trained or {"projector", "lora", "vision_tower"} & set(train) else 0,
            text.hidden_size,
            2 * e * DecoderGeometry.of(text).head_dim,
            text.vocab_size,
            e,
            trained,
        )


@dataclass(frozen=True)
class MicroBatch:
    """The sizes that determine activations: ``tokens`` and ``layers`` [stages], ``tiles`` of images and video
    frames (patches for towers that take images of any size), ``visual`` tokens before dropping, and
    supervised ``rows``."""

    tokens: tuple[int, ...]
    layers: tuple[int, ...]
    tiles: int
    visual: int
    rows: int

    @classmethod
    def of(cls, batch: PackedBatch) -> MicroBatch:
        """The sizes of a planned batch."""
        plan = batch.plan
        tokens = tuple(stage.num_tokens for stage in plan.stages)
        tiles = len(batch.pixel_values) + (0 if batch.video_pixels is None else batch.video_pixels.shape[1])
        return cls(tokens, tuple(stage_layers(plan)), tiles, len(batch.visual_rows), len(batch.targets))


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Args:
        stages: saved for the backward pass by each stage's decoder layers.
        tower: saved by the tower, the projector and the merge of image features into the text.
        head: kept from the loss to the backward pass: gradients of the head's weight and input.
        peak: largest sum, in the head or in the backward pass of a layer, including its recomputation.
        working: the part of ``peak`` that is not saved: the layer's recomputed activations and temporaries, or the
            head's logits and float32 weight gradient.
        where: the layer or head of the peak.
    """

    stages: tuple[int, ...]
    tower: int
    head: int
    peak: int
    working: int
    where: str

    @classmethod
    def of(cls, geometry: Geometry, batch: MicroBatch, recomputed: Sequence[int], tower_too: bool) -> Activations:
        """Count a micro-batch whose decoder layers ``recomputed`` (and with ``tower_too`` the tower's) are recomputed
        in the backward pass."""
        tokens = np.repeat(batch.tokens, batch.layers)
        again = np.isin(np.arange(geometry.num_layers), recomputed)
        sizes = np.array([(layer.saved, layer.input, layer.backward) for layer in geometry.layers])
        saved, inputs, backward = sizes.T
        kept = np.where(again, inputs, saved) * tokens
        stages = [int(part.sum()) for part in np.split(kept, np.cumsum(batch.layers)[:-1])]
        stages = [size + geometry.rotary * tokens for size, tokens in zip(stages, batch.tokens, strict=True)]
        seen = batch.tiles * geometry.tower_tokens
        tower = seen * geometry.projector + geometry.element * batch.visual * geometry.hidden
        tower_working = 0
        if geometry.tower is not None:
            tower_layer = geometry.tower
            tower += seen * geometry.tower_layers * (tower_layer.input if tower_too else tower_layer.saved)
            tower_working = seen * (tower_layer.backward + (tower_layer.saved if tower_too else 0))
        head_kept, head_working = _head(geometry, batch.rows)
        rotary = np.repeat(np.cumsum(batch.tokens), batch.layers) * geometry.rotary
        below = tower + np.cumsum(kept) + rotary
        working = (backward + np.where(again, saved - inputs, 0)) * tokens
        peaks = {f"decoder layer {i}": (int(below[i]), int(working[i])) for i in range(geometry.num_layers)}
        peaks["head"] = (int(below[-1]), head_kept + head_working)
        peaks["tower"] = (tower, tower_working)
        where = max(peaks, key=lambda name: sum(peaks[name]))
        return cls(tuple(stages), tower, head_kept, sum(peaks[where]), peaks[where][1], where)


def _head(geometry: Geometry, rows: int) -> tuple[int, int]:
    """Bytes that the loss keeps for the backward pass, and the peak of additional memory while it is computed."""
    e, weight = geometry.element, geometry.vocab * geometry.hidden
    chunk = min(rows, head.default_chunk_rows(geometry.vocab))
    kept = e * rows * geometry.hidden + (e * weight if geometry.trains_head else 0)
    working = chunk * geometry.vocab * 8 + (4 * weight if geometry.trains_head else 0)
    return kept, max(working, kept)


@dataclass(frozen=True)
class Prediction:
    """One rank's memory in a step. ``pinned`` is host memory for saves in the background."""

    states: States
    activations: Activations
    pinned: int = 0

    @property
    def backward(self) -> int:
        return self.states.backward + self.activations.peak

    @property
    def stepping(self) -> int:
        return self.states.stepping

    @property
    def peak(self) -> int:
        return max(self.backward, self.stepping)

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        if self.stepping > self.backward:
            return "the optimizer's step"
        return f"the backward pass ({self.activations.where})"

    @property
    def unit(self) -> tuple[int, str]:
        """Bytes of the unit of the table, and its name: MiB if the peak is below 10 GiB."""
        return (GIB, "GiB") if self.peak >= 10 * GIB else (GIB // 1024, "MiB")

    def lines(self) -> list[str]:
        """A table of memory by kind."""
        states, saved = self.states, self.activations
        rows = [
            ("weights", states.weights),
            ("float32 master weights", states.masters),
            ("optimizer states", states.moments),
            ("gradients", states.gradients),
            ("gradients of the current micro-batch", states.accumulating),
            ("buckets and gathered weights", states.buckets),
            ("activations, by stage", sum(saved.stages)),
            ("tower and projector", saved.tower),
            (f"temporaries of {saved.where}", saved.working),
            ("temporaries of the optimizer step", sum(states.step)),
        ]
        scale, unit = self.unit
        lines = [f"  {name:<36}{size / scale:>9.2f} {unit}" for name, size in rows]
        lines[6] += f": {' / '.join(f'{size / scale:.2f}' for size in saved.stages)}"
        for name, size in (("host memory, offloaded", states.host), ("pinned host memory for saves", self.pinned)):
            lines += [f"  {name:<36}{size / scale:>9.2f} {unit}"] if size else []
        return lines


@dataclass(frozen=True)
class Estimate:
    """Everything that a prediction needs except the level of recomputation; ``order`` is the result of
    :func:`~vtprune_train.models.forward.recompute.typical_stages`."""

    zero: Zero
    parameters: Parameters
    geometry: Geometry
    batch: MicroBatch
    order: tuple[Sequence[int], Sequence[int]]
    pinned: int = 0

    @classmethod
    def of(
        cls,
        config: Config,
        model: HFModule,
        settings: dict[str, Any],
        ranks: int,
        batch: MicroBatch,
        order: tuple[Sequence[int], Sequence[int]],
    ) -> Estimate:
        """Create the estimate of a run with these DeepSpeed ``settings`` on ``ranks`` GPUs. ``model`` has
        ``requires_grad`` set and may be on the ``meta`` device."""
        train = config.train
        groups = parameter_groups(model, config.model.train, train.weight_decay, train.optimizer)
        zero = Zero.of(settings, config.model.dtype, ranks)
        packed = config.model.peft is not None and config.model.peft.kind == "qlora"
        parameters = Parameters.of(
            groups, list(model.parameters()), train, zero.stage > 0, _four_bit(model) if packed else 0
        )
        attention = str(getattr(model.config.get_text_config(), "_attn_implementation", None) or "")
        method = config.pruning.build()
        geometry = Geometry.of(model.config, config.model.dtype, list(config.model.train), attention, method)
        saved = [zero.element * _numel(p) for p in model.parameters() if p.requires_grad or config.model.peft is None]
        if zero.stage == 3:
            saved = [-(-sum(saved) // ranks)]
        if not zero.offloads_optimizer:
            parts = [-(-group // (ranks if zero.stage else 1)) for group in parameters.groups]
            for part, states in zip(parts, parameters.states, strict=True):
                saved += [4 * part, *(int(size * part) for size in states)]
        return cls(zero, parameters, geometry, batch, order, pinned_bytes(saved))

    def at(self, level: Level, accumulates: bool = True) -> Prediction:
        """Predict with ``train.activation_checkpointing=level``; ``accumulates``: whether a step has several
        micro-batches."""
        layers = recomputed_layers(level, *self.order)
        activations = Activations.of(self.geometry, self.batch, layers, level != "none")
        return Prediction(States.of(self.zero, self.parameters, accumulates), activations, self.pinned)

    def least_that_fits(self, memory: int) -> Level | None:
        """The level with the least recomputation that fits into ``memory`` bytes minus :data:`RESERVED`; ``None`` if
        none fits."""
        levels: list[Level] = ["none", "first_stage", *range(1, self.geometry.num_layers), "all"]
        for level in sorted(levels, key=lambda level: len(recomputed_layers(level, *self.order))):
            if self.at(level).peak <= memory * (1 - RESERVED):
                return level
        return None

    def advice(self, memory: int) -> str:
        """Message about the level that fits into ``memory`` bytes."""
        level = self.least_that_fits(memory)
        if level is None:
            return f"no level of train.activation_checkpointing fits {memory / GIB:.0f} GiB (estimate)"
        return f"fits {memory / GIB:.0f} GiB with train.activation_checkpointing={level} (estimate)"
