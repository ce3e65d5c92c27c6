"""From settings to a finished run: build everything, then fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from vtprune_train.config.errors import ConfigError
from vtprune_train.config.load import dump_config, without_effect
from vtprune_train.config.settings import Config
from vtprune_train.data.index import SampleIndex
from vtprune_train.data.load.workers import start_server
from vtprune_train.files.disk import remove, replace_synced
from vtprune_train.models.forward.calls import state_of
from vtprune_train.models.forward.kernels import compile_model, replace_kernels
from vtprune_train.models.forward.recompute import checkpoint_activations, recomputed_layers, typical_stages
from vtprune_train.models.io.build import resolve_checkpoint, set_trainable
from vtprune_train.models.patch import prune
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.describe import schedule
from vtprune_train.training import distributed as ranks
from vtprune_train.training.check_data import check_paths, unwritable
from vtprune_train.training.checkpoint.folder import CheckpointFolder
from vtprune_train.training.checkpoint.lock import hold_run
from vtprune_train.training.checkpoint.manifest import STEP, check_export
from vtprune_train.training.checkpoint.manifest import steps as finished_checkpoints
from vtprune_train.training.checkpoint.resume import resume
from vtprune_train.training.engine.settings import engine_config, zero_stage
from vtprune_train.training.engine.sharded import placement_for
from vtprune_train.training.engine.start import check_engine, check_optimizer, start_engine
from vtprune_train.training.faults.preflight import needs_preflight, preflight
from vtprune_train.training.faults.watchdog import Watchdog
from vtprune_train.training.loop.adapter import attach_adapter, check_adapter
from vtprune_train.training.loop.callback import Callback
from vtprune_train.training.loop.callbacks.build import build_callbacks, callbacks_of
from vtprune_train.training.loop.data import build_collator, build_planner
from vtprune_train.training.loop.parts import Parts, build_parts, training_cost
from vtprune_train.training.loop.sample import first_sample
from vtprune_train.training.loop.settings import check_phases, with_saved_settings
from vtprune_train.training.loop.trackers import Trackers, check_trackers
from vtprune_train.training.loop.trainer import Trainer
from vtprune_train.training.optimizer import parameter_groups
from vtprune_train.training.schedules import check_schedule

log = logging.getLogger(__name__)


def prepare(config: Config, device: torch.device, watchdog: Watchdog, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Build or resume the training described by ``config``, up to its first step. The process group must be
    initialized.

    Raises:
        ValueError: invalid settings or data (including ``ConfigError``).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # transformers would show one at every export
    config = with_saved_settings(config)
    settings = engine_config(config)
    check_paths(config)
    check_engine(config, settings, device)
    optimizer = check_optimizer(config.train, settings, device)
    check_schedule(config.train)
    check_trackers(config)
    configured = callbacks_of(config)
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
        start_server()  # slow import
    parts = build_parts(config, placement_for(config, settings))
    attach_adapter(config, parts.model, parts.processor)
    config.pruning.fit(parts.model.config.get_text_config())
    check_phases(config, parts.model.config)
    method = config.pruning.build()
    if method is not None and ranks.rank() == 0:
        log.info("pruning by %s", schedule(method, parts.model.config.get_text_config().num_hidden_layers))
    cost = training_cost(config, parts.model.config)
    collate = build_collator(config, parts, cost, method, "train")
    if ranks.rank() == 0:
        log.info("%s", first_sample(collate))
    warn_of_batch(config.train.global_batch_size, len(collate.index.order()))
    steps = -(-len(collate.index.order()) // config.train.global_batch_size)
    collate.phases = config.phases(config.train.max_steps or config.train.epochs * steps, cost.decoder.num_layers)
    _prepare(config, parts, method, device)
    prune(parts.model, method, attention=config.model.attention)
    state_of(parts.model).tokenizer = collate.encoder.tokenizer
    compile_model(config, parts.model, device, zero_stage(settings))
    groups = parameter_groups(parts.model, config.model.train, config.train.weight_decay, optimizer.name)
    engine = start_engine(parts.model, groups, optimizer, settings)

    train = config.train
    checkpoints = CheckpointFolder(run_dir / "checkpoints", train.keep_last, train.save_in_background, train.export)
    identity, config_yaml = _identity(config, collate.index), dump_config(config)
    state = resume(identity, config.train.resume, checkpoints, engine, config_yaml)
    ranks.from_rank_0(lambda: replace_synced(run_dir / "config.yaml", config_yaml))
    trackers = Trackers(config)
    trainer = Trainer(
        config=config,
        engine=engine,
        collate=collate,
        eval_collate=build_collator(config, parts, cost, method, "eval") if config.data.eval else None,
        planner=build_planner(config, collate, ranks.world_size()),
        processor=parts.processor,
        checkpoints=checkpoints,
        callbacks=build_callbacks(config, trackers, configured, callbacks),
        trackers=trackers,
        device=device,
        state=state,
        watchdog=watchdog,
    )
    if needs_preflight(config, device):
        preflight(trainer)
    return trainer


def warn_of_batch(global_batch_size: int, samples: int) -> None:
    """Warn if the dataset is smaller than the global batch size."""
    if global_batch_size > samples and ranks.rank() == 0:
        log.warning(
            "train.global_batch_size=%d is larger than an epoch of %d sample(s), so every step takes all of them; set "
            "it to at most %d for more steps",
            global_batch_size, samples, samples,
        )  # fmt: skip


def _check_start(config: Config) -> None:
    """Check the checkpoints whose weights a new run starts from (not needed when resuming)."""
    if finished_checkpoints(config.run_dir / "checkpoints"):
        return
    for path in (config.model.path, config.model.projector):
        if path is not None:
            check_export(resolve_checkpoint(path))


def _make_run_dir(run_dir: Path) -> None:
    """Create and lock the run folder, and remove the tokenizer of an earlier start that never reached a checkpoint."""
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
    """Settings that must match between a checkpoint and the resuming run, because they determine the samples of each
    step."""
    return {
        "run.seed": config.run.seed,
        "train.global_batch_size": config.train.global_batch_size,
        # Omit settings that older checkpoints lack, if they are not used.
        "data.train": [
            {key: value for key, value in source.model_dump().items() if key not in ("ignore", "reader") or value}
            for source in config.data.train
        ],
        "data.template": config.data.template,
        "data.system": config.data.system,
        "data.image_position": config.data.image_position,
        "data.tokenization": config.data.tokenization,
        "data.max_length": config.data.max_length,
        "number and hash of the samples": index.identity(),
        "pruning": config.pruning.identity(),
    }
