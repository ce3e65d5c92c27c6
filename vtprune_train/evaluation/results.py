"""The results of an evaluation.

Each finished sample is written to disk as one line and read again when the evaluation continues. A summary has means
over the samples and ratios of pruned to dense, also as a table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vtprune_train.evaluation.questions import normalized
from vtprune_train.files.disk import replace_synced

SETTINGS = "settings.json"
SAMPLES = "samples.jsonl"
MEANS = ("entering", "leaving", "cached", "prompt_tokens", "prefill_seconds", "cache_bytes")
MEASURES = (  # rows of the table: title, name, factor, format
    ("enter a layer, mean over layers", "entering", 1.0, ".1f"),
    ("leave a layer (as counted in papers)", "leaving", 1.0, ".1f"),
    ("stay in a layer's cache", "cached", 1.0, ".1f"),
    ("decoder prefill, GFLOP per sample", "prefill_flops", 1e-9, ".4g"),
    ("prefill, ms per sample", "prefill_seconds", 1e3, ".2f"),
    ("decoding, ms per token", "decode_seconds_per_token", 1e3, ".2f"),
    ("cache, MiB per sample", "cache_bytes", 2.0**-20, ".3f"),
)


@contextmanager
def open_ledger(folder: Path, settings: dict[str, Any]) -> Iterator[Ledger]:
    """Open the ledger in ``folder`` exclusively; create it if it is missing.

    Raises:
        ValueError: the folder cannot be created, another process uses it, or see :class:`Ledger`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder / ".lock"), timeout=0):
            yield Ledger(folder, settings)
    except Timeout as error:
        raise ValueError(f"--out {folder}: another process is writing to it") from error
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written to ({error})") from error


class Ledger:
    """The folder of one evaluation: ``settings.json`` has its settings, ``samples.jsonl`` the finished samples.

    Args:
        folder: an existing folder.
        settings: plain data, equal whenever this evaluation continues.

    Raises:
        ValueError: the folder has results of other settings, or a line other than the last is broken.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.path = folder / SAMPLES
        self._check(settings)
        self.done: dict[str, dict[str, Any]] = {line["key"]: line for line in self._read()}

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write finished samples (each with its ``key``) to the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.done.update({line["key"]: line for line in lines})

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file atomically."""
        replace_synced(self.folder / name, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())

    def _check(self, settings: dict[str, Any]) -> None:
        settings = json.loads(json.dumps(settings))
        path = self.folder / SETTINGS
        if not path.is_file():
            if self.path.exists():
                raise ValueError(f"--out {self.folder} holds {SAMPLES} without {SETTINGS}; use another folder")
            self.write(SETTINGS, settings)
            return
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); restore it, or use another --out") from error
        changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
        if changed:
            lines = "; ".join(f"{key}: {before.get(key)!r} before, {settings.get(key)!r} now" for key in changed)
            raise ValueError(
                f"--out {self.folder} holds an evaluation with other settings ({lines}); use its settings to continue "
                "it, or use another folder"
            )

    def _read(self) -> list[dict[str, Any]]:
        """The lines on disk; removes an incomplete last line."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(self.path, whole)
        lines = []
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: not JSON ({error}); use another --out") from error
        return lines


def summary(
    lines: Sequence[dict[str, Any]], layers: Sequence[int], left_out: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Means over the lines of ``samples.jsonl``.

    Args:
        lines: at least one line.
        layers: decoder layers before which the pruned model drops.
        left_out: ``(id, reason)`` of samples that could not be evaluated, wholly or in part.

    Returns:
        ``answers``; ``runs``, by name; ``left_out``; and with two runs ``ratios`` (pruned to dense) and ``agreement``
        (share of equal answers).
    """
    names = list(lines[0]["runs"])
    runs = {name: _means([line["runs"][name] for line in lines]) for name in names}
    results: dict[str, Any] = {
        "answers": len(lines),
        "drop_layers": list(layers),
        "runs": runs,
        "left_out": [{"id": sample, "reason": reason} for sample, reason in left_out],
    }
    if len(names) == 2:
        pruned, dense = (runs[name] for name in names)
        pairs = [[normalized(line["runs"][name]["answer"]) for name in names] for line in lines]
        results["agreement"] = sum(one == other for one, other in pairs) / len(lines)
        values = {key: (pruned[key], dense[key]) for _, key, _, _ in MEASURES}
        results["ratios"] = {key: one / two if one is not None and two else None for key, (one, two) in values.items()}
    return results


def _means(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(samples)

    steps = sum(sample["decode_steps"] for sample in samples)
    flops = [sample["prefill_flops"] for sample in samples]
    return {
        "exact_match": mean(sample["exact"] for sample in samples),
        "visual_tokens": [mean(stage) for stage in zip(*(s["visual_tokens"] for s in samples), strict=True)],
        **{key: mean(sample[key] for sample in samples) for key in MEANS},
        "decode_seconds_per_token": sum(sample["decode_seconds"] for sample in samples) / steps if steps else None,
        "prefill_flops": None if flops[0] is None else mean(flops),
    }


def table(results: dict[str, Any]) -> str:
    """The results as text, with one column per run."""
    runs, ratios = results["runs"], results.get("ratios", {})
    rows = [["", *runs, "ratio"]]
    rows.append(["exact match", *(f"{run['exact_match']:.1%}" for run in runs.values()), ""])
    for stage, layer in enumerate([None, *results["drop_layers"]]):
        title = "visual tokens" if layer is None else f"visual tokens from layer {layer}"
        counts = [run["visual_tokens"][min(stage, len(run["visual_tokens"]) - 1)] for run in runs.values()]
        rows.append([title, *(f"{count:.1f}" for count in counts), ""])
    for title, key, factor, form in MEASURES:
        values = ["-" if run[key] is None else format(factor * run[key], form) for run in runs.values()]
        rows.append([title, *values, "" if ratios.get(key) is None else f"{ratios[key]:.3f}"])
    notes = [f"{results['answers']} answers"]
    notes += [f"{results['agreement']:.1%} of them equal"] if ratios else []
    notes += [f"{len(results['left_out'])} sample(s) left out, wholly or in part"] if results["left_out"] else []
    return "\n".join([*aligned(rows if ratios else [row[:-1] for row in rows]), ", ".join(notes)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return ["  ".join(cells).rstrip() for cells in padded]
