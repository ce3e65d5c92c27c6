"""Small collective helpers."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vtprune_train.config.errors import ConfigError
from vtprune_train.core.stream import to_device

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Failed = TypeVar("Failed", bound=BaseException)
SHARED_SECONDS = 10.0  # files become visible with a delay on network file systems


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(
    values: dict[str, float], device: torch.device, on_device: dict[str, Tensor] | None = None
) -> dict[str, float]:
    """Sum named numbers over all ranks (float64), in one reduction and one read from ``device``.

    Args:
        values: numbers of this rank; every rank must give the same names in the same order.
        device: this rank's device.
        on_device: more such numbers that are still on the device, as tensors [].
    """
    names, scalars = [*values], [torch.tensor(list(values.values()), dtype=torch.float64)]
    for name, scalar in (on_device or {}).items():
        names.append(name)
        scalars.append(scalar.double().reshape(1))
    total = torch.cat(to_device(tuple(scalars), device))
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def from_rank_0(make: Callable[[], Result]) -> Result:
    """Call ``make`` on rank 0 and broadcast the result; an error is raised on all ranks."""
    if not dist.is_initialized():
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise raised_on(0, box[1])
    return box[0]


def raised_on(source: int, error: Failed) -> Failed:
    """Mark an error raised on all ranks as originating from rank ``source``."""
    if rank() != source:
        error.raised_on = source  # type: ignore[attr-defined]
    return error


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def check_same(value: Any, what: str) -> None:
    """Raise ``ValueError`` on all ranks if values differ; the message names ``what`` and two hosts."""
    answers = gather((socket.gethostname(), value))
    for number, (host, other) in enumerate(answers):
        if other != answers[0][1]:
            error = ValueError(
                f"{what} differ between ranks: {answers[0][1]} on rank 0 ({answers[0][0]}), {other} on rank {number} "
                f"({host}); all machines of the job must have the same files"
            )
            raise raised_on(0, error)


def check_shared(folder: Path, key: str) -> None:
    """Check that ``folder`` (setting ``key``) is shared by all machines by writing a file on rank 0.

    Raises:
        ConfigError: some hosts cannot see it; the message names them.
    """
    if world_size() == 1:
        return
    token = folder / from_rank_0(lambda: f".shared-{secrets.token_hex(8)}")
    from_rank_0(token.touch)
    deadline = time.monotonic() + SHARED_SECONDS
    while not (is_visible := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    answers = gather((socket.gethostname(), is_visible))
    if rank() == 0:
        token.unlink()
    blind = sorted({host for host, sees in answers if not sees})
    if blind:
        error = ConfigError(
            f"{key}: {folder.resolve()} of rank 0 on {answers[0][0]} is not visible on {', '.join(blind[:8])}; "
            "use a file system that all machines of the job share"
        )
        raise raised_on(0, error)


def shut_down() -> None:
    """Destroy the process group on all ranks, so that its threads do not outlive the interpreter."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
