"""Damages files of a run between two starts."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(max(1, len(content)))])


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero_tail(path: Path, rng: random.Random) -> None:
    """Zero the end of a file, as if its last blocks were never written."""
    content = path.read_bytes()
    kept = rng.randrange(max(1, len(content)))
    path.write_bytes(content[:kept].ljust(len(content), b"\0"))


def zero_body(path: Path, rng: random.Random) -> None:
    """Zero everything after the first 128 bytes, or all of a smaller file."""
    del rng
    content = path.read_bytes()
    path.write_bytes(content[:128].ljust(len(content), b"\0") if len(content) > 128 else bytes(len(content)))


def remove(path: Path, rng: random.Random) -> None:
    del rng
    path.unlink()


def garbage(path: Path, rng: random.Random) -> None:
    """Append bytes."""
    with path.open("ab") as file:
        file.write(rng.randbytes(40))


def lose_middle_lines(path: Path, rng: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    gone = rng.randrange(max(1, len(lines) - 1))
    path.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))


def lose_last_lines(path: Path, rng: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: rng.randrange(max(1, len(lines)))]))


HOW: dict[str, Callable[[Path, random.Random], None]] = {
    "truncate": truncate,
    "flip": flip,
    "zero_tail": zero_tail,
    "zero_body": zero_body,
    "remove": remove,
    "garbage": garbage,
    "lose_middle_lines": lose_middle_lines,
    "lose_last_lines": lose_last_lines,
}


def candidates(target: str, run: Path, cache: Path, newest: Path | None) -> list[Path]:
    """The existing files that a fault may damage."""
    patterns = {
        "metrics.jsonl": (run, "metrics.jsonl"),
        "eval.jsonl": (run, "eval.jsonl"),
        "latest": (run, "checkpoints/latest"),
        "run.lock": (run, "run.lock"),
        "config.yaml": (run, "config.yaml"),
        "tokenizer": (run, "tokenizer/*"),
        "index column": (cache, "index-*/*.npy"),
        "index manifest": (cache, "index-*/manifest.json"),
        "index piece": (cache, "index-*.building/*.npz"),
        "selection": (cache, "index-*/selection-*/*"),
    }
    if target in ("checkpoint", "manifest"):
        assert newest is not None
        files = [path for path in newest.rglob("*") if path.is_file()]
        files = [path for path in files if (path.name == "manifest.json") == (target == "manifest")]
    else:
        folder, pattern = patterns[target]
        files = [path for path in folder.glob(pattern) if path.is_file()]
    return sorted(files)


def apply(how: str, target: str, pick: float, run: Path, cache: Path, newest: Path | None) -> Path | None:
    """Damage one file, selected by ``pick``, and return it; ``None`` if there is none."""
    if target == "leftover":
        return leave(run / "checkpoints", how)
    files = candidates(target, run, cache, newest)
    if not files:
        return None
    path = files[int(pick * len(files))]
    HOW[how](path, random.Random(pick))
    return path


def leave(folder: Path, suffix: str) -> Path:
    """Create files that an interrupted save or deletion leaves."""
    leftover = folder / f"step_00000099{suffix}"
    (leftover / "deepspeed").mkdir(parents=True)
    (leftover / "deepspeed" / "half.pt").write_bytes(b"half")
    return leftover
