"""A run that trains an adapter: its base named and kept under ``base/``, checked on every start; the adapter put in."""

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
    """Refuse, before anything is built, checkpoints with an adapter for a run without one, or the reverse, and a
    quantized base that cannot be made here."""
    checkpoints = steps(config.run_dir / "checkpoints")
    if checkpoints and config.train.resume != "never":
        exports = [checkpoint / name for checkpoint in checkpoints for name in (EXPORT, UNEXPORTED)]
        had_adapter = any(map(is_adapter, exports))  # the newest may be damaged
        if had_adapter != (config.model.peft is not None):
            raise ValueError(
                f"{checkpoints[-1]} was written {'with' if had_adapter else 'without'} an adapter, but model.peft is "
                f"{'not ' if had_adapter else ''}set; set it as it was, or start a new run: run.name=NEW"
            )
    if config.model.peft is not None and config.model.peft.kind == "qlora":
        check_quantization(device)


def attach_adapter(config: Config, model: HFModule, processor: Any) -> None:
    """Name, check and keep the base of a run with ``model.peft``, then put its adapter in; all ranks call this. A
    ``ValueError`` if the base or the adapter's settings are not what they were when the run began."""
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
    """The adapter that this run continues, if its model comes from one."""
    path = None if config.model.path is None else Path(resolve_checkpoint(config.model.path))
    return path if path is not None and is_adapter(path) else None


def _keep_base(
    config: Config, model: HFModule, processor: Any, names: dict[str, str], extra: dict[str, torch.Tensor]
) -> None:
    """Write ``base/`` at a run's first start, compare with it at a later one."""
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
    """The base that the settings name; that of the adapter which is continued, if there is one."""
    before = _adapter_before(config)
    return Base.of(config.model) if before is None else Base.read(before).trained_by(config.model)


def _extra(config: Config, model: HFModule, names: dict[str, str]) -> dict[str, torch.Tensor]:
    before = _adapter_before(config)
    if before is None:
        return extra_tensors(model, config.model)
    trained_now = {name for part, found in parts_of(model).items() if part in config.model.train for name, _ in found}
    inherited = load_tensors(before / EXTRA, names) | load_tensors(before / TRAINED, names)
    return {name: tensor for name, tensor in inherited.items() if name not in trained_now}


def _compare(saved: Base, now: Base, run_dir: Path) -> None:
    for key, recorded in saved.sha256.items():
        found = now.sha256.get(key)
        if found != recorded:
            raise ValueError(
                f"{run_dir} trains an adapter on {saved.model[key]} with SHA-256 {recorded}, but model.{key} is "
                f"{now.model.get(key)} with SHA-256 {found} now; put the original back, or start a new run: "
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
            f"{config.run_dir} was trained with another adapter: {'; '.join(changed)}. Set them back, or start a new "
            "run: run.name=NEW"
        )
