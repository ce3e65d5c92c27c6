"""From settings to a finished run: build everything, then fit."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from vtprune_train.config.load import dump_config, without_effect
from vtprune_train.config.settings import TRAINING_ONLY, Config, ConfigError, PruningConfig, SourceConfig
from vtprune_train.core.flops import DecoderGeometry, TrainingCost
from vtprune_train.data.chat import ChatEncoder, Template
from vtprune_train.data.index import SampleIndex, Source, build_index
from vtprune_train.data.jinja import written_by
from vtprune_train.data.load.collate import Collator
from vtprune_train.data.load.workers import start_server
from vtprune_train.data.plan.planner import Planner, StepCosts
from vtprune_train.data.records import Prompt, read_records
from vtprune_train.data.sources import Bounds
from vtprune_train.data.templates import build_encoder, carry, stop_where_answers_end
from vtprune_train.files.checksums import MANIFEST, damage, seal_as_it_is
from vtprune_train.files.disk import locked, naming, publish, remove, replace_synced
from vtprune_train.models import HFModule
from vtprune_train.models.families import required
from vtprune_train.models.families.layout import ImageLayout
from vtprune_train.models.forward.kernels import compile_model, replace_kernels
from vtprune_train.models.forward.recompute import checkpoint_activations, recomputed_layers, typical_stages
from vtprune_train.models.io.build import (
    family_of_config,
    first_line,
    load_tokenizer,
    resolve_checkpoint,
    saved_pruning,
    set_trainable,
)
from vtprune_train.models.io.peft import open_model
from vtprune_train.models.io.placement import WHOLE, Placement
from vtprune_train.models.io.processors import build_processor
from vtprune_train.models.patch import prune
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.describe import schedule
from vtprune_train.pruning.learned import learns
from vtprune_train.pruning.phases import Phases
from vtprune_train.training import distributed as ranks
from vtprune_train.training.check_data import check_paths, unwritable
from vtprune_train.training.checkpoint.folder import CheckpointFolder
from vtprune_train.training.checkpoint.json_lines import JsonLines
from vtprune_train.training.checkpoint.lock import hold_run
from vtprune_train.training.checkpoint.manifest import STEP, check_export
from vtprune_train.training.checkpoint.manifest import steps as finished_checkpoints
from vtprune_train.training.checkpoint.resume import resume
from vtprune_train.training.engine.settings import engine_config, offloads_optimizer, zero_stage
from vtprune_train.training.engine.sharded import placement_for
from vtprune_train.training.engine.start import check_engine, start_engine
from vtprune_train.training.faults.preflight import preflight
from vtprune_train.training.faults.preflight import wanted as preflight_wanted
from vtprune_train.training.faults.watchdog import Watchdog
from vtprune_train.training.loop.adapter import attach_adapter, check_adapter
from vtprune_train.training.loop.callbacks import Carried, Evaluation, Metrics, Plot, Progress
from vtprune_train.training.loop.sample import first_sample, template_misfits, template_of
from vtprune_train.training.loop.spikes import Spikes
from vtprune_train.training.loop.trackers import Trackers
from vtprune_train.training.loop.trainer import Callback, Trainer
from vtprune_train.training.optimizer import build_optimizer, parameter_groups

log = logging.getLogger(__name__)


def prepare(config: Config, device: torch.device, watchdog: Watchdog, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Build or resume the training that ``config`` describes, up to its first step. The process group stands.

    Raises:
        ValueError: settings or data that cannot be trained with (``ConfigError`` included).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # of every export; the run has its own
    config = with_saved_settings(config)
    settings = engine_config(config)
    check_paths(config)
    check_engine(config, settings, device)
    if ranks.rank() == 0:
        for line in without_effect(config):
            log.warning("%s", line)
    run_dir = config.run_dir
    ranks.from_rank_0(lambda: _make_run_dir(run_dir))
    ranks.check_shared(run_dir, "run.output_dir")
    torch.manual_seed(config.run.seed)
    check_adapter(config, device)
    ranks.from_rank_0(lambda: _check_start(config))
    if config.data.workers:
        start_server()  # which imports for seconds
    parts = build_parts(config, placement_for(config, settings))
    attach_adapter(config, parts.model, parts.processor)
    method = config.pruning.build()
    if method is not None and ranks.rank() == 0:
        log.info("pruning by %s", schedule(method, parts.model.config.get_text_config().num_hidden_layers))
    cost = training_cost(config, parts.model.config)
    collate = build_collator(config, parts, cost, method, "train")
    if ranks.rank() == 0:
        log.info("%s", first_sample(collate))
    warn_of_batch(config.train.global_batch_size, len(collate.index.order()))
    steps = -(-len(collate.index.order()) // config.train.global_batch_size)
    collate.phases = config.phases(config.train.max_steps or config.train.epochs * steps)
    _prepare(config, parts, method, device)
    prune(parts.model, method, attention=config.model.attention)
    compile_model(config, parts.model, device, zero_stage(settings))
    groups = parameter_groups(parts.model, config.model.train, config.train.weight_decay)
    optimizer = build_optimizer(groups, config.train.betas, device, offloads_optimizer(settings))
    engine = start_engine(parts.model, optimizer, settings)

    train = config.train
    checkpoints = CheckpointFolder(run_dir / "checkpoints", train.keep_last, train.save_in_background, train.export)
    identity, config_yaml = _identity(config, collate.index), dump_config(config)
    state = resume(identity, config.train.resume, checkpoints, engine, config_yaml)
    ranks.from_rank_0(lambda: replace_synced(run_dir / "config.yaml", config_yaml))
    held_out = build_collator(config, parts, cost, method, "eval") if config.data.eval else None
    trainer = Trainer(
        config=config,
        engine=engine,
        collate=collate,
        planner=build_planner(config, collate, ranks.world_size()),
        processor=parts.processor,
        checkpoints=checkpoints,
        callbacks=[*build_callbacks(config, held_out), *callbacks],
        device=device,
        state=state,
        watchdog=watchdog,
    )
    if preflight_wanted(config, device):
        preflight(trainer)
    return trainer


def warn_of_batch(global_batch_size: int, samples: int) -> None:
    """Say that a step takes fewer samples than its settings ask for, because there are no more."""
    if global_batch_size > samples and ranks.rank() == 0:
        log.warning(
            "train.global_batch_size=%d is larger than an epoch, which has %d sample(s): every step takes all of them; "
            "lower it to %d or less for more steps",
            global_batch_size, samples, samples,
        )  # fmt: skip


def build_callbacks(config: Config, held_out: Collator | None) -> list[Callback]:
    """What happens around the loop, in this order."""
    run_dir, train = config.run_dir, config.train
    evaluation: Callback = Carried(JsonLines(run_dir / "eval.jsonl"))
    spikes: Callback = Carried(JsonLines(run_dir / "spikes.jsonl"))
    if held_out is not None:
        evaluation = Evaluation(run_dir, held_out)
    if train.spike_threshold is not None:
        spikes = Spikes(run_dir, train.spike_threshold, train.spike_window)
    return [Metrics(run_dir), Progress(), evaluation, Trackers(run_dir), Plot(run_dir), spikes]


def _check_start(config: Config) -> None:
    """Runs that a new run takes weights from are whole; one that resumes has its own."""
    if finished_checkpoints(config.run_dir / "checkpoints"):
        return
    for path in (config.model.path, config.model.projector):
        if path is not None:
            check_export(resolve_checkpoint(path))


@dataclass
class Parts:
    """A model with its processor, the encoder of its conversations and the layout of its pictures."""

    model: HFModule
    processor: Any
    encoder: ChatEncoder
    layout: ImageLayout


def with_saved_settings(config: Config) -> Config:
    """With ``train.init_from``: the model comes from that checkpoint, and so do the pruning settings that the YAML
    does not set; every difference is printed."""
    source = config.train.init_from
    if source is None:
        return with_pruning_rate(config)
    model = config.model.model_copy(
        update={"path": resolve_checkpoint(source), "config": None, "language_model": None, "vision_tower": None,
                "projector": None, "tokenizer": None}
    )  # fmt: skip
    asked = config.pruning.method if "method" in config.pruning.model_fields_set else None
    pruning = merge_pruning(config.pruning, saved_pruning(source, asked))
    return with_pruning_rate(config.model_copy(update={"model": model, "pruning": pruning}))


def with_pruning_rate(config: Config) -> Config:
    """With a rate for the parameters that the method adds: the projector's, where ``model.train`` names none.

    Raises:
        ConfigError: there is no rate for them, or one and no such parameters.
    """
    train, name = config.model.train, config.pruning.method
    if not learns(config.pruning.build()):
        if "pruning" in train:
            raise ConfigError(f"model.train names pruning, but pruning.method={name} adds no parameters; leave it out")
        return config
    if "pruning" in train:
        return config
    if "projector" not in train:
        raise ConfigError(
            f"pruning.method={name} adds parameters, and model.train names neither pruning nor projector, whose rate "
            "they would take; for example model.train={pruning: 1.0e-3, language_model: 2.0e-5}"
        )
    model = config.model.model_copy(update={"train": {**train, "pruning": train["projector"]}})
    return config.model_copy(update={"model": model})


def merge_pruning(asked: PruningConfig, saved: dict[str, Any] | None) -> PruningConfig:
    """The checkpoint's settings, overruled by those set explicitly in ``asked``."""
    saved = saved or {"method": "none"}
    explicit = {key: getattr(asked, key) for key in asked.model_fields_set}
    same_method = explicit.get("method", saved["method"]) == saved["method"]
    try:
        result = PruningConfig(**{**(saved if same_method else {}), **explicit})
    except ValidationError as error:
        reasons = "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ConfigError(f"pruning, with the settings of train.init_from where none are given: {reasons}") from error
    differences = {
        key: (saved.get(key), value)
        for key, value in result.model_dump().items()
        if key in explicit and key not in TRAINING_ONLY and value != saved.get(key)
    }
    if ranks.rank() == 0:
        for key, (before, now) in differences.items():
            log.warning("pruning.%s: the checkpoint was trained with %s, this run uses %s", key, before, now)
        if not differences:
            log.info("pruning settings taken over from the checkpoint: %s", result.model_dump())
    return result


def build_parts(config: Config, placement: Placement = WHOLE) -> Parts:
    """Tokenizer, model and processor."""
    template = template_of(config.data)
    tokenizer = _tokenizer(config, template)
    model = open_model(config.model, tokenizer, placement)
    _, loop = family_of_config(model.config)
    encoder = build_encoder(template, tokenizer, loop, config.data.image_position, config.data.tokenization)
    if ranks.rank() == 0:
        for line in template_misfits(config, encoder):
            log.warning("%s", line)
    processor = build_processor(model.config, tokenizer, config.model.path, config.model.max_pixels)
    carry(processor, written_by(encoder))
    stop_where_answers_end(model, tokenizer, template, warn=ranks.rank() == 0)
    return Parts(model, processor, encoder, loop.layout(model.config, processor.image_processor))


def _tokenizer(config: Config, template: Template) -> PreTrainedTokenizerBase:
    """The run's tokenizer. Ranks of one machine take turns where it is made and kept; a damaged one is made again, from
    the same data."""
    folder = config.run_dir / "tokenizer"

    def load() -> PreTrainedTokenizerBase:
        return load_tokenizer(config.model, lambda: training_texts(config, template), folder)

    if config.model.config is None:
        return load()
    with locked(config.run_dir / "tokenizer.lock"):
        if folder.exists() and (what := _tokenizer_damage(folder)):
            log.warning("the tokenizer in %s is damaged (%s); training it again", folder, what)
            remove(folder)
        tokenizer = load()
        if not folder.is_dir():
            temporary = folder.with_name("tokenizer.tmp")
            remove(temporary)
            with naming(temporary):
                tokenizer.save_pretrained(str(temporary))
            seal_as_it_is(temporary)
            publish(temporary, folder)
            tokenizer = load()  # so that every rank exports the same files, whichever of them came first
    return tokenizer


def _tokenizer_damage(folder: Path) -> str:
    """What is wrong with a run's tokenizer; empty if nothing is."""
    if (folder / MANIFEST).exists():
        return damage(folder)
    try:  # older versions wrote no manifest
        AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more special
        return f"there is no {MANIFEST}, and it cannot be opened: {first_line(error)}"
    return ""


def training_texts(config: Config, template: Template) -> Iterator[str]:
    """Every conversation of the training data as the template writes it, to train a tokenizer on."""
    for source in config.sources("train"):
        prompt = Prompt(**source.prompt.model_dump())
        bounds = Bounds(config.data.max_record_bytes, config.data.max_text_bytes)
        for record in read_records(Path(source.path), source.ignore, bounds):
            if not record.error:
                yield from (text for text, _ in template.pieces(prompt.apply(record).turns))


def cache_dir(config: Config) -> Path:
    """Where the indices of the data are kept.

    Raises:
        ConfigError: it cannot be made or written; says why.
    """
    from datasets import config as datasets_config

    named = config.data.cache_dir
    folder = Path(datasets_config.HF_DATASETS_CACHE) / "vtprune" if named is None else Path(named)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(unwritable("data.cache_dir", folder, error)) from error
    return folder


def training_cost(config: Config, model_config: PreTrainedConfig) -> TrainingCost:
    """How FLOPs are counted for this model and the parts that are trained."""
    decoder, peft = DecoderGeometry.of(model_config.text_config), config.model.peft
    return TrainingCost(
        decoder,
        required(family_of_config(model_config)[0].flops, "training")(model_config),
        trains_decoder="language_model" in config.model.train,
        trains_tower="vision_tower" in config.model.train,
        trains_projector="projector" in config.model.train,
        adapter=decoder.adapter_per_token(peft.r, peft.target_modules) if peft else 0.0,
    )


def build_data_index(config: Config, parts: Parts, which: Literal["train", "eval"]) -> SampleIndex:
    """Index the training or evaluation data; all ranks call this.

    Raises:
        ValueError: no file is named, ranks do not find the same (they would plan different steps and wait for each
            other for ever), or see :func:`vtprune_train.data.index.build_index`.
    """
    if not config.sources(which):
        raise ValueError(f"data.{which} names no file; for example [{{path: train.json, images: images}}]")
    index = build_index(
        [_source(source) for source in config.sources(which)],
        parts.encoder,
        parts.layout,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
        max_bad=config.data.max_bad,
        seed=config.run.seed,
        workers=max(1, config.data.workers),
        cache_dir=cache_dir(config),
        unsupervised=config.data.unsupervised,
        max_image_pixels=config.data.max_image_pixels,
        max_bad_share=config.data.max_bad_share,
        bounds=Bounds(config.data.max_record_bytes, config.data.max_text_bytes),
    )
    ranks.check_same(f"{index.identity()}, {index.total_tokens} tokens", f"the samples of data.{which}")
    return index


def _source(config: SourceConfig) -> Source:
    return Source(
        path=Path(config.path),
        images=Path(config.images),
        take=config.take,
        weight=config.weight,
        prompt=Prompt(**config.prompt.model_dump()),
        name=config.name or "",
        ignore=tuple(config.ignore),
    )


def build_collator(
    config: Config, parts: Parts, cost: TrainingCost, method: PruningMethod | None, which: Literal["train", "eval"]
) -> Collator:
    """Index the data and make its collator."""
    return Collator(
        index=build_data_index(config, parts, which),
        encoder=parts.encoder,
        layout=parts.layout,
        image_processor=parts.processor.image_processor,
        method=method,
        cost=cost,
        max_image_pixels=config.data.max_image_pixels,
    )


def build_planner(config: Config, collate: Collator, world_size: int) -> Planner:
    """The planner of the training data: cost counts what a step's own passes do, after dropping."""
    index = collate.index
    return Planner(
        index.order(),
        StepCosts(index, collate.cost, collate.phases or Phases(collate.method)),
        longest=index.longest,
        global_batch_size=config.train.global_batch_size,
        max_tokens=config.data.max_tokens,
        world_size=world_size,
    )


def _make_run_dir(run_dir: Path) -> None:
    """The run's folder, for this run alone, without the tokenizer of an earlier start that came to no checkpoint.

    Raises:
        ConfigError: it cannot be made or written; says why.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        hold_run(run_dir)
    except OSError as error:
        raise ConfigError(unwritable("run.output_dir", run_dir, error)) from error
    saved = any(STEP.match(path.name) for path in (run_dir / "checkpoints").glob("step_*"))
    if not saved:
        remove(run_dir / "tokenizer")


def _prepare(config: Config, parts: Parts, method: PruningMethod | None, device: torch.device) -> None:
    model = parts.model
    replace_kernels(config, model, device)
    set_trainable(model, config.model.train)
    level = config.train.activation_checkpointing
    if level != "none":
        num_layers = model.config.get_text_config().num_hidden_layers
        drops = method.drops(num_layers) if method is not None else ()
        checkpoint_activations(model, recomputed_layers(level, *typical_stages(parts.layout, drops, num_layers)))
    model.to(device)


def _identity(config: Config, index: SampleIndex) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes it: it decides which samples a step holds."""
    return {
        "run.seed": config.run.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "data.train": [_source_identity(source) for source in config.data.train],
        "data.template": config.data.template,
        "data.system": config.data.system,
        "data.image_position": config.data.image_position,
        "data.tokenization": config.data.tokenization,
        "data.max_length": config.data.max_length,
        "number and hash of the samples": index.identity(),
        "pruning": config.pruning.identity(),
    }


def _source_identity(source: SourceConfig) -> dict[str, Any]:
    """Without what older checkpoints do not know, where it is not used."""
    return {key: value for key, value in source.model_dump().items() if key != "ignore" or value}
