"""``vtprune checkpoint``: list, verify, convert and prune the checkpoints of a run."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from vtprune_train.files import pickles
from vtprune_train.files.disk import remove
from vtprune_train.models.io.weight_files import hub_kernels
from vtprune_train.pruning import CONFIG_KEY, outside_methods
from vtprune_train.training.checkpoint import manifest
from vtprune_train.training.checkpoint.lock import hold_run

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of the command and their options."""
    actions = parser.add_subparsers(dest="action", required=True)
    for name, what in (
        ("list", "one line for each checkpoint"),
        ("verify", "read every file; exit code 1 if any is wrong or names code"),
    ):
        action = actions.add_parser(name, help=what, description=what)
        action.add_argument("path", help="a run, its checkpoints folder, or one checkpoint")
    what = "the portable form: optimizer state by parameter, for any number of ranks and any ZeRO stage"
    convert = actions.add_parser("convert", help=what, description=what)
    convert.add_argument("path", help="a checkpoint, or a run (its newest)")
    convert.add_argument("--out", metavar="DIR", help="write it there; without, it takes the checkpoint's place")
    what = "delete old checkpoints; never the one `latest` names, nor the newest that is whole"
    prune = actions.add_parser("prune", help=what, description=what)
    prune.add_argument("path", help="a run or its checkpoints folder")
    prune.add_argument("--keep-last", type=_count, metavar="N", help="keep the newest N")
    prune.add_argument("--keep-every", type=_count, metavar="N", help="keep those at multiples of N steps")
    prune.add_argument("--dry-run", action="store_true", help="say what would go")


def _count(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Do one of the actions; 1 if ``verify`` found something wrong."""
    path = Path(arguments.path).absolute()  # `.` has neither a name nor a parent to tell a run's folder by
    if arguments.action == "list":
        return list_checkpoints(path)
    if arguments.action == "verify":
        return verify_checkpoints(path)
    if arguments.action == "convert":
        return convert_checkpoint(path, arguments.out)
    return prune_checkpoints(path, arguments.keep_last, arguments.keep_every, arguments.dry_run)


def find(path: Path) -> list[Path]:
    """The checkpoints at a path, oldest first."""
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; name a run's folder, its checkpoints folder, or one checkpoint")
    if manifest.STEP.match(path.name):
        return [path]
    found = manifest.steps(path / "checkpoints") or manifest.steps(path)
    if not found:
        raise ValueError(f"{path} holds no finished checkpoint (a folder step_XXXXXXXX)")
    return found


def list_checkpoints(path: Path) -> int:
    """Print step, date, size, ranks, ZeRO stage, whether all files are there with their sizes, and the schedule."""
    found = find(path)
    latest = manifest.named_latest(found[-1].parent)
    print(f"{'step':>10}  {'written':16}  {'GB':>8}  {'ranks':>5}  {'ZeRO':>4}  {'complete':8}  pruning")
    for checkpoint in found:
        facts = describe(checkpoint)
        print(
            f"{manifest.step_of(checkpoint):>10}  {facts['written']:16}  {facts['bytes'] / 1e9:>8.3f}  "
            f"{facts['ranks']:>5}  {facts['zero']:>4}  {facts['complete']:8}  {facts['pruning']}"
            f"{'  <- latest' if checkpoint == latest else ''}"
        )
    for leftover in sorted(p for p in found[-1].parent.iterdir() if p.suffix in (".partial", ".deleting", ".damaged")):
        print(f"also there: {leftover.name}")
    return 0


def describe(checkpoint: Path) -> dict[str, Any]:
    """What ``list`` shows of a checkpoint; a dash for what cannot be read."""
    facts: dict[str, Any] = {"ranks": "-", "zero": "-", "pruning": "-", "complete": "no", "bytes": 0}
    written = (checkpoint / manifest.MANIFEST).stat().st_mtime if (checkpoint / manifest.MANIFEST).is_file() else 0
    facts["written"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(written)) if written else "-"
    try:
        files = manifest.read_manifest(checkpoint)
        facts["bytes"] = sum(entry["size"] for entry in files.values())
        sizes = {name: (checkpoint / name).stat().st_size for name in files if (checkpoint / name).is_file()}
        facts["complete"] = "yes" if sizes == {name: entry["size"] for name, entry in files.items()} else "no"
        state = json.loads((checkpoint / "trainer.json").read_text())
        portable = (checkpoint / "portable").is_dir()
        facts["ranks"], facts["zero"] = ("any", "any") if portable else (state["world_size"], state["zero_stage"])
        facts["pruning"] = schedule(yaml.safe_load((checkpoint / "config.yaml").read_text())["pruning"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        log.debug("%s: %s", checkpoint, error)
    return facts


def schedule(pruning: dict[str, Any]) -> str:
    """A method, or several, and the schedule in a few words."""
    method = pruning["method"]
    if isinstance(method, list):
        return " + ".join(schedule(part) for part in method)
    if method == "none":
        return "none"
    keep, layers = (
        [] if value is None else value if isinstance(value, list) else [value]
        for value in (pruning.get("keep"), pruning.get("layers", pruning.get("layer")))
    )
    words = [method, "/".join(map(str, keep))]
    if layers:
        words.append("at " + ",".join(map(str, layers)))
    elif method == "pyramiddrop":
        words.append("evenly")
    return " ".join(filter(None, words))


def verify_checkpoints(path: Path) -> int:
    """Read every file of every checkpoint at the path, and say what code they name; none of it is run."""
    code = 0
    for checkpoint in find(path):
        wrong = [*manifest.problems(checkpoint), *_pickled_code(checkpoint)]
        if wrong and not checkpoint.is_dir():
            print(f"{checkpoint}: removed meanwhile")  # by the running job, which keeps the newest
            continue
        print(f"{checkpoint}: {'ok' if not wrong else f'{len(wrong)} wrong'}")
        for line in wrong:
            print(f"  {line}")
        for line in named_code(checkpoint):
            print(f"  note: {line}")
        code = code or int(bool(wrong))
    return code


def _pickled_code(checkpoint: Path) -> list[str]:
    """A line for each file that names more than tensors and numbers, wherever it lies in the checkpoint."""
    lines = []
    for path in pickles.pickled_files(checkpoint):
        if names := pickles.foreign_names(path):
            lines.append(
                f"{path.relative_to(checkpoint)} names {', '.join(names)}, code that reading it as a pickle would run; "
                "training writes no such file"
            )
    return lines


def named_code(checkpoint: Path) -> list[str]:
    """A line for each file that names code which opening the checkpoint does not run unasked."""
    lines = []
    for path in sorted(checkpoint.rglob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):  # damage is the manifest's matter
            continue
        if not isinstance(content, dict):
            continue
        name = path.relative_to(checkpoint)
        lines += [
            f"{name} names the method {method}, code outside of vtprune_train, which is run where you name it yourself "
            "or give --trust_remote_code"
            for method in outside_methods(content.get(CONFIG_KEY))
        ]
        if _has_key(content, "auto_map"):
            lines.append(f"{name} names code of its own (auto_map), which is never run here")
        lines += [
            f"{name} names a kernel of the hub ({key}={value}), which is never run here"
            for key, value in hub_kernels(content)
        ]
    return lines


def _has_key(content: Any, key: str) -> bool:
    """Whether an object has a key, itself or anywhere inside."""
    if isinstance(content, dict):
        return key in content or any(_has_key(value, key) for value in content.values())
    return isinstance(content, list) and any(_has_key(value, key) for value in content)


def convert_checkpoint(path: Path, out: str | None) -> int:
    """Write the portable form of a checkpoint beside it, and let it take its place or that of ``out``."""
    source = find(path)[-1]
    if wrong := manifest.verify(source):
        raise ValueError(f"{source} is damaged: {wrong}")
    if (source / "portable").is_dir():
        raise ValueError(f"{source} has the portable form already")
    final = source if out is None else Path(out).resolve()
    if out is not None and final.exists():
        raise ValueError(f"--out {out} exists; name a folder that is made here")
    if out is not None and not manifest.STEP.match(final.name):
        final = final / source.name
    partial = final.with_name(f"{final.name}.partial")
    in_run = out is None and source.parent.name == "checkpoints"
    held = hold_run(source.parent.parent) if in_run else None  # a running job counts on its checkpoints
    try:
        remove(partial)
        partial.mkdir(parents=True)
        write_converted(source, partial)
        manifest.put_in_place(partial, final)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{final} could not be written ({error}); {source} is untouched") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)
    if out is not None:
        manifest.point_latest(final.parent, final.name)
    log.info("the portable form of %s is in %s", source, final)
    return 0


def write_converted(source: Path, partial: Path) -> None:
    """Fill ``partial`` with the portable form of ``source``, its manifest included."""
    from vtprune_train.training.checkpoint.portable import PORTABLE, open_state, write_portable

    write_portable(open_state(source), partial / PORTABLE)
    for name in manifest.read_manifest(source):
        if not name.startswith("deepspeed/"):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, partial / name)
    manifest.write_manifest(
        partial, {name: manifest.sync_and_hash(partial / name) for name in manifest.files_in(partial)}
    )


def prune_checkpoints(path: Path, keep_last: int | None, keep_every: int | None, dry_run: bool) -> int:
    """Delete what neither rule keeps; safe beside a running job, which only ever looks at its newest."""
    if keep_last is None and keep_every is None:
        raise ValueError("say what to keep: --keep-last N, --keep-every N, or both")
    if manifest.STEP.match(path.name):
        raise ValueError(f"{path} is one checkpoint; name the run")
    found = find(path)
    kept = set(found[-keep_last:]) if keep_last else set()
    kept |= {c for c in found if keep_every and manifest.step_of(c) % keep_every == 0}
    latest = manifest.named_latest(found[-1].parent)
    whole = next((c for c in reversed(found) if manifest.verify(c) is None), None)
    kept |= {c for c in (latest, whole, found[-1]) if c is not None}
    for checkpoint in found:
        if checkpoint in kept:
            print(f"keep    {checkpoint.name}")
        else:
            print(f"{'would remove' if dry_run else 'remove'}  {checkpoint.name}")
            if not dry_run:
                manifest.remove_checkpoint(checkpoint)
    return 0
