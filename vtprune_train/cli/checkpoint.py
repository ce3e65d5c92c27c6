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

LEFTOVERS = (".partial", ".deleting", ".damaged")  # folders of saves or deletions that were interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of the command and their options."""
    actions = parser.add_subparsers(dest="action", required=True)
    for name, what in (
        ("list", "print one line for each checkpoint"),
        ("verify", "read and check every file; exit code 1 if one is damaged or names code to run"),
    ):
        action = actions.add_parser(name, help=what, description=what)
        action.add_argument("path", help="a run, its checkpoints folder, or one checkpoint")
    what = "rewrite with the optimizer state by parameter, for any number of ranks and any ZeRO stage"
    convert = actions.add_parser("convert", help=what, description=what)
    convert.add_argument("path", help="a checkpoint, or a run (its newest checkpoint)")
    convert.add_argument("--out", metavar="DIR", help="output folder (default: replace the checkpoint)")
    what = "delete old checkpoints, but never the one named by `latest` or the newest complete one"
    prune = actions.add_parser("prune", help=what, description=what)
    prune.add_argument("path", help="a run or its checkpoints folder")
    prune.add_argument("--keep-last", type=_count, metavar="N", help="keep the N newest checkpoints")
    prune.add_argument("--keep-every", type=_count, metavar="N", help="keep checkpoints at multiples of N steps")
    prune.add_argument("--dry-run", action="store_true", help="print what would be deleted")


def _count(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the action; returns 1 if ``verify`` finds an error."""
    path = Path(arguments.path).absolute()  # `.` has no name or parent
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
        what = "is not a folder" if path.exists() else "does not exist"
        raise ValueError(f"{path} {what}; name the folder of a run, its checkpoints folder, or one checkpoint")
    if manifest.STEP.match(path.name):
        return [path]
    checkpoints = manifest.steps(path / "checkpoints") or manifest.steps(path)
    if not checkpoints:
        raise ValueError(f"{path} contains no complete checkpoint (a folder step_XXXXXXXX)")
    return checkpoints


def list_checkpoints(path: Path) -> int:
    """Print step, date, size, ranks, ZeRO stage, whether all files exist with their sizes, and the pruning schedule."""
    checkpoints = find(path)
    latest = manifest.named_latest(checkpoints[-1].parent)
    print(f"{'step':>10}  {'written':16}  {'GB':>8}  {'ranks':>5}  {'ZeRO':>4}  {'complete':8}  pruning")
    for checkpoint in checkpoints:
        facts = describe(checkpoint)
        print(
            f"{manifest.step_of(checkpoint):>10}  {facts['written']:16}  {facts['bytes'] / 1e9:>8.3f}  "
            f"{facts['ranks']:>5}  {facts['zero']:>4}  {facts['complete']:8}  {facts['pruning']}"
            f"{'  <- latest' if checkpoint == latest else ''}"
        )
    for leftover in sorted(p for p in checkpoints[-1].parent.iterdir() if p.suffix in LEFTOVERS):
        print(f"leftover: {leftover.name}")
    return 0


def describe(checkpoint: Path) -> dict[str, Any]:
    """The columns of ``list`` for a checkpoint; a dash for what cannot be read."""
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
    """The method or methods and the schedule, in a few words."""
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
    """Read every file of every checkpoint at the path and report the code that they name; no code is run."""
    code = 0
    for checkpoint in find(path):
        wrong = [*manifest.problems(checkpoint), *_pickled_code(checkpoint)]
        if wrong and not checkpoint.is_dir():
            print(f"{checkpoint}: removed meanwhile")  # by a running job
            continue
        print(f"{checkpoint}: {'ok' if not wrong else f'{len(wrong)} error(s)'}")
        for line in wrong:
            print(f"  {line}")
        for line in named_code(checkpoint):
            print(f"  note: {line}")
        code = code or int(bool(wrong))
    return code


def _pickled_code(checkpoint: Path) -> list[str]:
    """A line for each pickle file that names anything other than tensors and numbers."""
    lines = []
    for path in pickles.pickled_files(checkpoint):
        if names := pickles.foreign_names(path):
            lines.append(
                f"{path.relative_to(checkpoint)} names {', '.join(names)}: code that would run if it was unpickled; "
                "training does not write such files"
            )
    return lines


def named_code(checkpoint: Path) -> list[str]:
    """A line for each file that names code which does not run by default when the checkpoint is loaded."""
    lines = []
    for path in sorted(checkpoint.rglob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):  # the check of the manifest reports damage
            continue
        if not isinstance(content, dict):
            continue
        name = path.relative_to(checkpoint)
        lines += [
            f"{name} names the method {method}, code outside of vtprune_train, which runs only if you name it or pass "
            "--trust_remote_code"
            for method in outside_methods(content.get(CONFIG_KEY))
        ]
        if _has_key(content, "auto_map"):
            lines.append(f"{name} names remote code (auto_map), which never runs here")
        lines += [
            f"{name} names a kernel of the hub ({key}={value}), which never runs here"
            for key, value in hub_kernels(content)
        ]
    return lines


def _has_key(content: Any, key: str) -> bool:
    """Whether a nested object contains a key at any depth."""
    if isinstance(content, dict):
        return key in content or any(_has_key(value, key) for value in content.values())
    return isinstance(content, list) and any(_has_key(value, key) for value in content)


def convert_checkpoint(path: Path, out: str | None) -> int:
    """Write a checkpoint in the portable format to a temporary folder, then move it to ``out`` or over the original."""
    source = find(path)[-1]
    if wrong := manifest.verify(source):
        raise ValueError(f"{source} is damaged: {wrong}")
    if (source / "portable").is_dir():
        raise ValueError(f"{source} already has the portable format")
    final = source if out is None else Path(out).resolve()
    if out is not None and final.exists():
        raise ValueError(f"--out {out} already exists; name a new folder")
    if out is not None and not manifest.STEP.match(final.name):
        final = final / source.name
    partial = final.with_name(f"{final.name}.partial")
    in_run = out is None and source.parent.name == "checkpoints"
    held = hold_run(source.parent.parent) if in_run else None  # a running job needs its checkpoints
    try:
        remove(partial)
        partial.mkdir(parents=True)
        write_converted(source, partial)
        manifest.put_in_place(partial, final)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{final} could not be written ({error}); {source} is unchanged") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)
    if out is not None:
        manifest.point_latest(final.parent, final.name)
    log.info("wrote %s in the portable format to %s", source, final)
    return 0


def write_converted(source: Path, partial: Path) -> None:
    """Write ``source`` in the portable format, with a manifest, to ``partial``."""
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
    """Delete the checkpoints that neither rule keeps. Safe during a run, which uses only its newest checkpoint."""
    if keep_last is None and keep_every is None:
        raise ValueError("set --keep-last N, --keep-every N, or both")
    if manifest.STEP.match(path.name):
        raise ValueError(f"{path} is one checkpoint; name the folder of the run")
    checkpoints = find(path)
    kept = set(checkpoints[-keep_last:]) if keep_last else set()
    kept |= {c for c in checkpoints if keep_every and manifest.step_of(c) % keep_every == 0}
    latest = manifest.named_latest(checkpoints[-1].parent)
    complete = next((c for c in reversed(checkpoints) if manifest.verify(c) is None), None)
    kept |= {c for c in (latest, complete, checkpoints[-1]) if c is not None}
    for checkpoint in checkpoints:
        if checkpoint in kept:
            print(f"keep    {checkpoint.name}")
        else:
            print(f"{'would remove' if dry_run else 'remove'}  {checkpoint.name}")
            if not dry_run:
                manifest.remove_checkpoint(checkpoint)
    return 0
