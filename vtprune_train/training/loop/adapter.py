"""Adapter (PEFT) runs: record the base model under ``base/``, verify it on every start, and attach the adapter."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from vtprune_train.config.settings import Config
from vtprune_train.files.disk import naming
from vtprune_train.models import HFModule
from vtprune_train.models.io.build import parts_of, resolve_checkpoint
from vtprune_train.models.io.export import EXPORT, UNEXPORTED
from vtprune_train.models.io.peft import (
    ADAPTED,
    TRAINED,
    Adapted,
    adapt,
    check_quantization,
    continue_adapter,
    is_adapter,
    quantize,
)
from vtprune_train.models.io.provenance import (
    EXTRA,
    Base,
    extra_tensors,
    lay_over,
    load_tensors,
    published_names,
    save_tensors,
    weight_files,
)
from vtprune_train.training import distributed as ranks
from vtprune_train.training.checkpoint.manifest import steps

log = logging.getLogger(__name__)

FOLDER = "base"


def check_adapter(config: Config, device: torch.device) -> None:
    """Fail early if checkpoints have an adapter but the run does not (or vice versa), or if the quantized base cannot
    be built on this machine."""
    checkpoints = steps(config.run_dir / "checkpoints")
    if checkpoints and config.train.resume != "never":
        exports = [checkpoint / name for checkpoint in checkpoints for name in (EXPORT, UNEXPORTED)]
        had_adapter = any(map(is_adapter, exports))  # the newest may be damaged
        if had_adapter != (config.model.peft is not None):
            raise ValueError(
                f"{checkpoints[-1]} was written {'with' if had_adapter else 'without'} an adapter, but model.peft is "
                f"{'not ' if had_adapter else ''}set; restore the setting, or start a new run: run.name=NEW"
            )
    if config.model.peft is not None and config.model.peft.kind == "qlora":
        check_quantization(device)


def attach_adapter(config: Config, model: HFModule, processor: Any) -> None:
    """Record and verify the base model of a ``model.peft`` run, then attach the adapter. Call on all ranks. Raises
    ``ValueError`` if the base or the adapter settings changed since the run started."""
    settings = config.model.peft
    if settings is None:
        return
    names, folder = published_names(model), config.run_dir / FOLDER
    extra = _extra(config, model, names) if config.model.config is None else {}
    ranks.from_rank_0(lambda: _keep_base(config, model, processor, names, extra))
    if config.model.config is not None:
        for file in weight_files(str(folder)):
            if file.name != EXTRA:
                lay_over(model, load_tensors(file, names), str(file))
    extra = load_tensors(folder / EXTRA, names)
    lay_over(model, extra, str(folder / EXTRA))
    if settings.kind == "qlora":
        quantize(model)
    torch.manual_seed(config.run.seed)
    adapt(model, settings)
    source = _adapter_before(config)
    if source is not None:
        continue_adapter(model, settings, source)
    model.config.dtype = model.dtype
    model.__dict__[ADAPTED] = Adapted(Base.read(folder), extra, names)


def _adapter_before(config: Config) -> Path | None:
    """Return the adapter the run's initial model comes from, if any."""
    path = None if config.model.path is None else Path(resolve_checkpoint(config.model.path))
    return path if path is not None and is_adapter(path) else None


def _keep_base(
    config: Config, model: HFModule, processor: Any, names: dict[str, str], extra: dict[str, torch.Tensor]
) -> None:
    """Write ``base/`` on the first start; verify against it on later starts."""
    folder = config.run_dir / FOLDER
    if steps(config.run_dir / "checkpoints"):
        saved = Base.read(folder)
        if config.model.config is not None:
            saved.check(str(config.run_dir))
        else:
            _compare(saved, _record(config), config.run_dir)
        _compare_settings(saved, config)
        return
    with naming(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        if config.model.config is not None:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            record = Base.kept(folder, config.model)
        else:
            record = _record(config)
            save_tensors(extra, names, folder / EXTRA)
        record.write(folder)
    log.info("the adapter's base: %s", ", ".join(f"{record.model[key]} {h}" for key, h in record.sha256.items()))


def _record(config: Config) -> Base:
    """Describe the base model from the settings, or from the adapter being continued."""
    before = _adapter_before(config)
    return Base.of(config.model) if before is None else Base.read(before).trained_by(config.model)


def _extra(config: Config, model: HFModule, names: dict[str, str]) -> dict[str, torch.Tensor]:
    before = _adapter_before(config)
    if before is None:
        return extra_tensors(model, config.model)
    trained_now = {
        name for part, parameters in parts_of(model).items() if part in config.model.train for name, _ in parameters
    }
    inherited = load_tensors(before / EXTRA, names) | load_tensors(before / TRAINED, names)
    return {name: tensor for name, tensor in inherited.items() if name not in trained_now}


def _compare(saved: Base, now: Base, run_dir: Path) -> None:
    for key, recorded in saved.sha256.items():
        current = now.sha256.get(key)
        if current != recorded:
            raise ValueError(
                f"{run_dir} trains an adapter on {saved.model[key]} with SHA-256 {recorded}, but model.{key} is "
                f"{now.model.get(key)} with SHA-256 {current} now; restore the original, or start a new run: "
                "run.name=NEW"
            )


def _compare_settings(saved: Base, config: Config) -> None:
    assert config.model.peft is not None
    before = {f"model.peft.{key}": value for key, value in saved.peft.items() if key != "dropout"}
    before["model.train (the parts)"] = saved.trained
    now = {f"model.peft.{key}": value for key, value in config.model.peft.model_dump().items()}
    now["model.train (the parts)"] = sorted(config.model.train)
    changed = [f"{key}: checkpoint {value!r}, now {now[key]!r}" for key, value in before.items() if now[key] != value]
    if changed:
        raise ValueError(
            f"{config.run_dir} was trained with other adapter settings: {'; '.join(changed)}. Restore them, or start a "
            "new run: run.name=NEW"
        )
