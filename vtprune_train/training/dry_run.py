"""The dry run, without weights or network: data checks, lengths, FLOPs, memory and checkpoint size."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vtprune_train.config.errors import ConfigError, pruning_refusal
from vtprune_train.config.settings import Config
from vtprune_train.core.flops import TYPICAL_TEXT, TrainingCost, layers_per_stage, stage_lengths
from vtprune_train.core.stream import Drop
from vtprune_train.models import HFModule
from vtprune_train.models.families import class_of_config
from vtprune_train.models.families.layout import ImageLayout, VisualTokens
from vtprune_train.models.families.videos import written_tokens
from vtprune_train.models.forward.encoder import check_tower
from vtprune_train.models.forward.recompute import typical_stages
from vtprune_train.models.io.build import family_of_config, load_model_config, parts_of, set_trainable
from vtprune_train.models.io.method_parameters import attach
from vtprune_train.models.io.peft import adapt
from vtprune_train.models.io.processors import build_image_processor
from vtprune_train.pruning.attending import check_attending
from vtprune_train.pruning.base import Per, PruningMethod
from vtprune_train.pruning.contract import check_method
from vtprune_train.pruning.describe import in_words, schedule
from vtprune_train.pruning.phases import Phase, Warmup
from vtprune_train.training.check_data import WITHOUT_DATA, any_data_here, check_paths, check_records, check_run_dir
from vtprune_train.training.engine.settings import engine_config, zero_stage
from vtprune_train.training.loop.callbacks.build import callbacks_of
from vtprune_train.training.loop.layout import LONG_VIDEO, SHORT_VIDEO, build_layout
from vtprune_train.training.loop.parts import training_cost
from vtprune_train.training.loop.sample import sample_lines, template_of
from vtprune_train.training.loop.settings import check_phases, with_saved_settings
from vtprune_train.training.loop.trackers import check_trackers
from vtprune_train.training.memory.predict import DTYPE_BYTES, GIB, Estimate, MicroBatch, Parameters
from vtprune_train.training.schedules import check_schedule

log = logging.getLogger(__name__)

WARMUP_POINTS = 64  # number of points at which the cost of a warm-up is sampled


def describe(config: Config, gpus: int = 1, memory: float | None = None, needs_data: bool = False) -> str:
    """Build the dry run's report.

    Args:
        config: the run's settings.
        gpus: number of GPUs.
        memory: GiB of each GPU.
        needs_data: raise an error if none of the data is on this machine. (If part of it is, missing files are
            always an error.)

    Raises:
        ConfigError: the settings do not fit the model, or data is missing or unusable.
    """
    config = with_saved_settings(config)
    settings = engine_config(config)
    check_trackers(config)
    callbacks_of(config)
    check_schedule(config.train)
    check_run_dir(config.run_dir)
    template_of(config.data)
    data = _data(config, needs_data)
    model_config = load_model_config(config.model, offline=True)
    family, loop = family_of_config(model_config)
    with torch.device("meta"):
        model = class_of_config(model_config)(model_config)
    family.check(model)
    if config.model.peft is not None:
        adapt(model, config.model.peft)
    set_trainable(model, config.model.train)
    local = config.model.path if config.model.path and Path(config.model.path).is_dir() else None
    image_processor = build_image_processor(model_config, local, config.model.max_pixels)
    layout = build_layout(config, loop, model_config, image_processor, local)
    num_layers = model_config.text_config.num_hidden_layers
    try:
        config.pruning.fit(model_config.text_config)
        method = config.pruning.build()
        drops = method.drops(num_layers) if method else ()
        per: Per = method.per if method else "video"
        schedule_line = [f"schedule      {schedule(method, num_layers)}"] if method else []
        if method is not None:
            check_method(method, num_layers)
            check_attending(method, model_config.text_config)
            check_tower(model_config, family, method)
            family.warn_without_videos(method, num_layers)
    except ValueError as error:
        raise ConfigError(pruning_refusal(error)) from error
    check_phases(config, model_config)
    if method is not None:
        attach(model, method)
    cost = training_cost(config, model_config)
    batches = _largest_micro_batches(config, layout, () if _has_full_steps(config) else drops, per, num_layers)
    order, level = typical_stages(layout, drops, num_layers), config.train.activation_checkpointing
    estimates = [(Estimate.of(config, model, settings, gpus, batch, order), steps) for batch, steps in batches]
    estimate, steps = max(estimates, key=lambda pair: pair[0].at(level).peak)
    lines = [
        f"run           {config.run_dir}",
        *data,
        f"pruning       {'none' if method is None else in_words(method.settings())}",
        *schedule_line,
        f"decoder       {num_layers} layers of width {cost.decoder.hidden}, "
        f"stages of {layers_per_stage(drops, num_layers)} layers",
        "",
        *_samples(layout, method, cost, config.data.max_length),
        *_whole_training(config, layout, cost),
        "",
        *sample_lines(config, loop, layout),
        "",
        *_parameters(config, model, zero_stage(settings), estimate.parameters),
        "",
        *_worst_micro_batch(config, layout, None if _has_full_steps(config) else method, cost, estimate.batch, steps),
        "",
        *_memory(config, estimate, gpus, memory),
    ]
    return "\n".join(lines)


def _data(config: Config, needed: bool) -> list[str]:
    """Report on the first records of the data."""
    if not config.data.train and not config.data.eval:
        return ["data          none: data.train and data.eval are empty"]
    if not needed and not any_data_here(config):
        return [f"data          NOT CHECKED: none of it is on this machine (data.root={config.data.root})"]
    try:
        check_paths(config)
    except ConfigError as error:
        raise ConfigError(f"{error}\n{WITHOUT_DATA}") from error
    return check_records(config)


def _samples(layout: ImageLayout, method: PruningMethod | None, cost: TrainingCost, max_length: int) -> list[str]:
    """A table of costs for the family's image resolutions, and for a video if the run has videos."""
    header = (
        f"{'image':>12}{layout.unit:>8}{'text':>6}  {'tokens in each stage':<30}{'FLOPs':>7}{'decoder':>9}{'whole':>8}"
    )
    lines = [header, f"{'':56}{'/ dense':>7}{'speed-up':>9}{'':>8}"]
    for size in layout.examples():
        [of] = layout.visual_tokens([size])
        lines.append(_sample_line(f"{size[0]} x {size[1]}", of, TYPICAL_TEXT, method, cost))
    if layout.video is not None:
        lines += _video_lines(layout, method, cost, max_length)
    lines.append("FLOPs / dense: forward and backward of the whole model; speed-ups are FLOP ratios, not measurements")
    return lines


def _sample_line(label: str, of: VisualTokens, text: int, method: PruningMethod | None, cost: TrainingCost) -> str:
    drops = () if method is None else method.drops(cost.decoder.num_layers)
    per: Per = "video" if method is None else method.per
    visual = np.array([of.total] if of.frames else of.runs)
    frames = np.full(len(visual), of.frames)
    lengths = stage_lengths(np.array([text]), visual, np.zeros(len(visual), dtype=np.int64), drops, frames, per)
    ratio, decoder, whole = _against_dense(lengths, drops, method, cost, of)
    stages = " / ".join(str(n) for n in lengths[0])
    return f"{label:>12}{of.tiles:>8}{text:>6}  {stages:<30}{ratio:>7.3f}{decoder:>8.2f}x{whole:>7.2f}x"


def _video_lines(layout: ImageLayout, method: PruningMethod | None, cost: TrainingCost, max_length: int) -> list[str]:
    """A table row for a 30 s video with the run's sampling, and a description of the video."""
    clip = layout.clip(SHORT_VIDEO)
    [of] = layout.visual_tokens([clip])
    written = written_tokens(layout.placeholder(clip))
    name, length = f"{SHORT_VIDEO.duration:.0f} s video", of.total + TYPICAL_TEXT + written
    too_long = f"; longer than data.max_length={max_length}, see data.video" if length > max_length else ""
    return [
        _sample_line(name, of, TYPICAL_TEXT + written, method, cost),
        f"{name}: {clip.height} x {clip.width}, {len(clip.indices)} of {clip.total} frames, "
        f"{of.frames or len(of.runs)} steps in time, {of.total} visual tokens{too_long}",
    ]


def _has_full_steps(config: Config) -> bool:
    """Whether some steps keep more tokens than the method; memory must suffice for them."""
    varied = (config.pruning.warmup, config.pruning.budgets, config.pruning.curriculum)
    return any(setting is not None for setting in varied) or config.full_token_share > 0


def _whole_training(config: Config, layout: ImageLayout, cost: TrainingCost) -> list[str]:
    """Mean FLOP ratio including warm-up and full-token steps, for the largest image."""
    pruning, method = config.pruning, config.pruning.build()
    if not _has_full_steps(config):
        return []
    size = max(layout.examples(), key=lambda size: layout.tokens([size]))
    tokens, tiles = layout.tokens([size]), layout.tiles([size])
    phases = config.phases(1, cost.decoder.num_layers)

    def mean_step(method: PruningMethod | None) -> float:
        return (
            1.0
            if method is None
            else replace(phases, method=method).mean(lambda phase: _phase_ratio(phase, tokens, tiles, cost))
        )

    lines = [
        f"mean step at {size[0]} x {size[1]}: {mean_step(method):.3f} of dense FLOPs, with "
        f"{replace(phases, warmup=None).describe()}; teachers are counted"
    ]
    if pruning.warmup is not None:
        settings = pruning.warmup
        warmup = Warmup(WARMUP_POINTS, settings.kind, settings.start)
        eased = [
            None if settings.kind == "dense" else method.eased(settings.start, warmup.progress(i))
            for i in range(WARMUP_POINTS)
        ]
        length = f"{settings.steps} steps" if settings.steps else f"{settings.ratio:.3g} of all steps"
        lines.append(f"during the warm-up ({settings.kind}, {length}): {np.mean([mean_step(m) for m in eased]):.3f}")
    return lines


def _phase_ratio(phase: Phase, visual: list[int], tiles: list[int], cost: TrainingCost) -> float:
    """FLOPs of a typical sample in a phase, relative to a dense step."""
    num_layers, text, supervised = cost.decoder.num_layers, np.array([TYPICAL_TEXT]), np.array([TYPICAL_TEXT // 2])

    def lengths(drops: Sequence[Drop]) -> tuple[np.ndarray, list[int]]:
        return stage_lengths(text, np.array(visual), np.zeros(1, dtype=np.int64), drops), layers_per_stage(
            drops, num_layers
        )

    pruned = lengths(phase.drops(num_layers))
    flops = cost.sample(*pruned, np.array(tiles), supervised, method=phase.method)[0]
    if phase.teacher is not None:
        flops += cost.forward_text(*lengths(phase.teacher.drops(num_layers)), supervised)[0]
        flops += cost.teacher_vision(np.array(tiles), None, phase.teacher.method, phase.method).sum()
    return float(flops / cost.sample(*lengths(()), np.array(tiles), supervised)[0])


def _against_dense(
    lengths: np.ndarray, drops: Sequence[Drop], method: PruningMethod | None, cost: TrainingCost, of: VisualTokens
) -> tuple[float, float, float]:
    """FLOP ratio of the whole model, and ideal speed-ups of the decoder and the whole model."""
    num_layers = cost.decoder.num_layers
    layers = layers_per_stage(drops, num_layers)
    decoder = float(cost.decoder.stages(lengths, layers).sum())
    decoder_dense = float(cost.decoder.stages(lengths[:, :1], [num_layers]).sum())
    supervised = np.array([TYPICAL_TEXT // 2])
    vision, dense_vision = (
        float(cost.vision(np.array([of.tiles]), np.array([of.frames]), tower_of)[0]) for tower_of in (method, None)
    )
    whole = float(cost.text(lengths, layers, supervised)[0]) + vision
    dense = float(cost.text(lengths[:, :1], [num_layers], supervised)[0]) + dense_vision
    return whole / dense, decoder_dense / decoder, dense / whole


def _parameters(config: Config, model: HFModule, stage: int, counted: Parameters) -> list[str]:
    lines, total, trained = [], 0, 0
    for part, parameters in parts_of(model).items():
        if not parameters:
            continue
        count = sum(p.numel() for _, p in parameters)
        rate = config.model.train.get(part)
        state = f"trained, learning rate {rate:g}" if rate else "frozen"
        if part == "unused":
            state = "frozen: after the layer whose features are used, so it gets no gradient"
        lines.append(f"{part:<16}{_millions(count):>14} parameters, {state}")
        total += count
        trained += count if rate else 0
    element = DTYPE_BYTES[config.model.dtype]
    export = (total if config.model.peft is None else trained) * element
    master = (4 * trained if element == 2 or stage else 0) + sum(counted.states_of(counted.groups))
    written = 0 if config.train.export == "never" else export
    size = written + export + master
    scale, unit = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    lines.append(f"{'trainable':<16}{_millions(trained):>14} of {_millions(total)}")
    lines.append(
        f"{'checkpoint':<16}{size / scale:>13.3f} {unit}: export {written / scale:.3f}, weights for resuming "
        f"{export / scale:.3f}, optimizer {master / scale:.3f}; the last {config.train.keep_last} are kept"
    )
    return lines


def _millions(count: int) -> str:
    """A number of parameters in millions, or in thousands if it is smaller."""
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.2f} k"


def _most_samples(config: Config) -> int:
    """Number of samples of ``max_length`` in the largest micro-batch, which is part of a step."""
    return min(max(1, config.data.max_tokens // config.data.max_length), config.train.global_batch_size)


def _largest_micro_batches(
    config: Config, layout: ImageLayout, drops: Sequence[Drop], per: Per, num_layers: int
) -> list[tuple[MicroBatch, int]]:
    """The largest micro-batches that the limits allow: samples of ``max_length`` up to ``max_tokens`` and
    ``global_batch_size``, each with one image of the largest resolution; if the run has videos, also samples each with
    a long video. Returned with the number of steps in time of each sample's video."""
    largest = max(layout.examples(), key=lambda size: layout.tokens([size]))
    of_image, limit, count = layout.visual_tokens([largest])[0], config.data.max_length, _most_samples(config)
    filled = [(min(of_image.total, limit), of_image.tiles, 0)]
    if layout.video is not None:
        [of] = layout.visual_tokens([layout.clip(LONG_VIDEO)])
        share = min(1.0, limit / of.total)  # a shorter video if this one does not fit
        filled.append((min(of.total, limit), math.ceil(share * of.tiles), math.ceil(share * of.frames)))
    layers, batches = tuple(layers_per_stage(drops, num_layers)), []
    for visual, tiles, steps in filled:
        text, frames = np.full(count, limit - visual), np.full(count, steps)
        lengths = stage_lengths(text, np.full(count, visual), np.arange(count), drops, frames, per)
        tokens = tuple(lengths.sum(axis=0).tolist())
        batches.append((MicroBatch(tokens, layers, count * tiles, count * visual, count * (limit - visual)), steps))
    return batches


def _worst_micro_batch(
    config: Config, layout: ImageLayout, method: PruningMethod | None, cost: TrainingCost, batch: MicroBatch, steps: int
) -> list[str]:
    drops = () if method is None else method.drops(cost.decoder.num_layers)
    per: Per = "video" if method is None else method.per
    count = _most_samples(config)
    text, visual = np.full(count, batch.rows // count), np.full(count, batch.visual // count)
    tiles, frames = np.full(count, batch.tiles // count), np.full(count, steps)
    lengths = stage_lengths(text, visual, np.arange(count), drops, frames, per)
    flops = cost.sample(lengths, batch.layers, tiles, text, frames=frames, method=method).sum()
    return [
        f"worst micro-batch: {count} sample(s) of data.max_length={config.data.max_length} tokens "
        f"({visual[0]} visual, {text[0]} text), {batch.tiles} {layout.unit}"
        + (f", each with a video of {steps} steps in time" if steps else ""),
        f"  tokens in each stage {' / '.join(str(n) for n in batch.tokens)}, "
        f"{flops / 1e12:.3g} TFLOP forward and backward",
    ]


def _memory(config: Config, estimate: Estimate, gpus: int, memory: float | None) -> list[str]:
    """Memory per GPU for the worst micro-batch, and the level of recomputation that fits."""
    level = config.train.activation_checkpointing
    prediction = estimate.at(level)
    scale, unit = prediction.unit
    lines = [
        f"estimated memory per GPU, {gpus} GPU(s) (set by --gpus): the worst micro-batch (not the first of its step), "
        f"ZeRO stage {estimate.zero.stage}, train.activation_checkpointing={level}",
        *prediction.lines(),
        f"  {'peak':<36}{prediction.peak / scale:>9.2f} {unit}, in {prediction.phase}",
    ]
    if memory is None:
        return [*lines, "  pass --memory GiB to see which train.activation_checkpointing fits"]
    return [*lines, f"  {estimate.advice(int(memory * GIB))}"]
