#!/usr/bin/env python
"""Benchmark the data index: write synthetic records, build and open the index, and look up steps.

python scripts/bench_index.py --records 1000000              # build rate, size, memory, open and seek time
python scripts/bench_index.py --words 4 --distinct 1500 --template mistral  # 10 million, short records
python scripts/bench_index.py --records 300000 --shard 10000 --kills 12  # compare with a build that is killed randomly
"""

from __future__ import annotations

import argparse
import filecmp
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from vtprune_train.data.chat import ChatEncoder, get_template  # noqa: E402
from vtprune_train.data.index import SampleIndex, Source, build_index  # noqa: E402
from vtprune_train.data.plan.planner import Planner  # noqa: E402
from vtprune_train.models.families.llava_next import AnyRes  # noqa: E402

VOCABULARY = 8192
LAYOUT = AnyRes(((336, 672), (672, 336), (672, 672)), 336, 14)
BATCH = 512


def words(count: int) -> list[str]:
    """Made-up words of one to four syllables."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "ar", "en", "is", "og")]
    return ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count)]


def write_shards(folder: Path, records: int, mean_words: int, distinct: int | None, shard: int) -> Path:
    """Write JSONL files of ``shard`` records. Question and answer have about ``mean_words`` words in total and are
    slices of one long text. Texts are all different, or sampled from ``distinct`` texts."""
    folder.mkdir(parents=True, exist_ok=True)
    text = " ".join(random.Random(1).choices(words(20_000), k=2_000_000))
    rng = np.random.default_rng(2)
    known = distinct or shard
    for first in range(0, records, shard):
        path = folder / f"shard-{first // shard:04d}.jsonl"
        count = min(shard, records - first)
        if not first or distinct is None:
            all_lengths = rng.lognormal(np.log(mean_words * 2.5), 0.5, (known, 2)).astype(int) + 8
            all_starts = rng.integers(0, len(text) - 20_000, (known, 2))
        chosen = np.arange(count) if distinct is None else rng.integers(0, known, count)
        lengths, starts = all_lengths[chosen], all_starts[chosen]
        if path.exists():  # left from an earlier run; keep it
            continue
        with path.open("w") as file:
            for number in range(count):
                (ask, say), (long, longer) = starts[number].tolist(), lengths[number].tolist()
                file.write(
                    f'{{"id": "r{first + number}", "conversations": [{{"from": "human", "value": '
                    f'"{text[ask : ask + long]}"}}, {{"from": "gpt", "value": "{text[say : say + longer]}"}}]}}\n'
                )
    return folder / "shard-*.jsonl"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``VOCABULARY`` tokens, trained on the same words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words(20_000))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<image>"]
    )


class Peak:
    """Peak private memory of this process and of its children, and total PSS, sampled 20 times per second. Private
    memory leaves out pages of mapped files, which the system may drop at any time; PSS counts them."""

    def __init__(self) -> None:
        self.own = self.child = self.together = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.05):
            self.own, together = max(self.own, private(me)), proportional(me)
            for child in me.children(recursive=True):
                try:
                    self.child = max(self.child, private(child))
                    together += proportional(child)
                except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
                    continue
            self.together = max(self.together, together)


def proportional(process: psutil.Process) -> int:
    """Proportional set size (PSS) in bytes."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def private(process: psutil.Process) -> int:
    """Private resident memory in bytes."""
    memory = process.memory_info()
    return memory.rss - memory.shared


def cpu_seconds() -> float:
    """CPU seconds of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def build(pattern: Path, cache: Path, workers: int, encoder: ChatEncoder) -> SampleIndex:
    return build_index(
        [Source(pattern, pattern.parent)],
        encoder,
        LAYOUT,
        max_length=4096,
        too_long="error",
        max_bad=0,
        seed=42,
        workers=workers,
        cache_dir=cache,
    )


class Hammer:
    """Builds the index in a separate process group that is killed at random times and restarted.

    Args:
        pattern, workers, encoder: same as for the reference build.
        cache: cache of the reference build.
        seconds: duration of the reference build.
        kills: number of kills.
    """

    def __init__(self, pattern: Path, cache: Path, workers: int, encoder: ChatEncoder, seconds: float, kills: int):
        self.pattern, self.cache, self.workers, self.encoder = pattern, cache, workers, encoder
        self.seconds, self.kills = seconds, kills
        self.mine = cache.with_name(f"{cache.name}-killed")
        self.rng = random.Random(3)
        self.context = multiprocessing.get_context("spawn")
        self.kinds = {"group": 0, "builder": 0, "worker": 0}

    def run(self) -> dict[str, Any]:
        """Repeat until the requested number of kills is reached and at least one build has finished."""
        tables = 0
        shutil.rmtree(self.mine, ignore_errors=True)
        while sum(self.kinds.values()) < self.kills or not tables:
            if self._finishes():
                compare(self.cache, self.mine)
                tables += 1
                shutil.rmtree(self.mine)
        return {**{f"kills_{kind}": count for kind, count in self.kinds.items()}, "equal_tables": tables}

    def _finishes(self) -> bool:
        """Start one build; return True if it finishes."""
        ready, child = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_grouped_build, args=(child, self.pattern, self.mine, self.workers, self.encoder)
        )
        process.start()
        child.close()
        ready.recv()
        if sum(self.kinds.values()) < self.kills:
            process.join(self.rng.uniform(0, 2 * self.seconds / self.kills))
            if process.is_alive():
                self._kill(process.pid or 0)
        process.join()
        return process.exitcode == 0

    def _kill(self, pid: int) -> None:
        pieces = len(list(self.mine.glob("*.building/*.npz")))
        workers = [child.pid for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]
        kind = self.rng.choice(["group", "builder", *(["worker"] if workers else [])])
        if kind == "group":
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid if kind == "builder" else self.rng.choice(workers), signal.SIGKILL)
        self.kinds[kind] += 1
        logging.info("killed the %s with %d piece(s) finished", kind, pieces)


def _grouped_build(ready: Any, pattern: Path, cache: Path, workers: int, encoder: ChatEncoder) -> None:
    os.setsid()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    ready.send(True)
    build(pattern, cache, workers, encoder)


def compare(one: Path, two: Path) -> None:
    """Check that two caches hold the same files, byte for byte.

    Raises:
        SystemExit: if the caches differ.
    """
    names = [sorted(path.relative_to(cache) for path in cache.rglob("*") if path.is_file()) for cache in (one, two)]
    if names[0] != names[1]:
        sys.exit(f"{one} and {two} hold different files: {sorted(set(names[0]) ^ set(names[1]))}")
    for name in names[0]:
        if not filecmp.cmp(one / name, two / name, shallow=False):
            sys.exit(f"{name} differs between {one} and {two}")


def _opened(pattern: Path, cache: Path, encoder: ChatEncoder, queue: Any) -> None:
    """Measure time and memory of opening and seeking in a new process."""
    before = private(psutil.Process())
    begun = time.perf_counter()
    index = build(pattern, cache, 1, encoder)
    result: dict[str, Any] = {"open_seconds": time.perf_counter() - begun}

    def measure(_: int, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = index.lengths(samples).tokens
        return tokens, tokens.astype(float)

    planner = Planner(
        index.order(), measure, longest=index.longest, global_batch_size=BATCH, max_tokens=16384, world_size=8
    )
    steps = planner.steps_per_epoch
    for name, step in (("first", 0), ("middle", steps // 2), ("last", steps - 1), ("epoch_1000", 1000 * steps + 1)):
        result[f"seek_{name}_ms"] = _milliseconds(lambda step=step: planner.order.samples(*_span(planner, step)))
        result[f"plan_{name}_ms"] = _milliseconds(lambda step=step: planner.plan(step))
    result["record_ms"] = _milliseconds(lambda: [index.record(int(s)) for s in planner.order.samples(0, 0, 100)]) / 100
    result["added_mb"] = (private(psutil.Process()) - before) / 1e6
    queue.put(result)


def _span(planner: Planner, step: int) -> tuple[int, int, int]:
    epoch, position = divmod(step, planner.steps_per_epoch)
    return epoch, position * BATCH, (position + 1) * BATCH


def _milliseconds(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begun)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one run."""
    encoder = ChatEncoder(train_tokenizer(), get_template(arguments.template), 2)
    workers, kills = arguments.workers, arguments.kills
    begun = time.perf_counter()
    pattern = write_shards(folder / "data", arguments.records, arguments.words, arguments.distinct, arguments.shard)
    written = time.perf_counter()
    before = cpu_seconds()
    with Peak() as peak:
        index = build(pattern, folder / "cache", workers, encoder)
    seconds, cpu = time.perf_counter() - written, cpu_seconds() - before
    files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_opened, args=(pattern, folder / "cache", encoder, queue))
    process.start()
    opened = queue.get()
    process.join()
    result = {
        "records": len(index),
        "workers": workers,
        "data_gb": sum(path.stat().st_size for path in (folder / "data").iterdir()) / 1e9,
        "write_seconds": written - begun,
        "tokens_per_record": index.total_tokens / len(index),
        "build_seconds": seconds,
        "records_per_second": len(index) / seconds,
        "records_per_cpu_second": len(index) / cpu,
        "index_mb": sum(path.stat().st_size for path in files) / 1e6,
        "bytes_per_record": sum(path.stat().st_size for path in files) / len(index),
        "builder_peak_mb": peak.own / 1e6,
        "worker_peak_mb": peak.child / 1e6,
        "together_peak_pss_mb": peak.together / 1e6,
        **opened,
    }
    if kills:
        logging.info("reference build: %s", rounded(result))
        result |= Hammer(pattern, folder / "cache", workers, encoder, seconds, kills).run()
    return result


def rounded(result: dict[str, Any]) -> str:
    return json.dumps({name: round(value, 4) for name, value in result.items()}, indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--words", type=int, default=40, help="approximate words per record")
    parser.add_argument("--distinct", type=int, help="number of distinct texts (default: all different)")
    parser.add_argument("--template", default="vicuna_v1", help="mistral is the shortest: no system prompt")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where data and index are written; default: temporary")
    parser.add_argument("--shard", type=int, default=250_000, help="records per file")
    parser.add_argument("--kills", type=int, default=0, help="also build with this many kills and compare the results")
    arguments = parser.parse_args()
    if min(arguments.records, arguments.shard) < 1 or arguments.kills < 0:
        parser.error("--records and --shard must be at least 1 and --kills at least 0")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="bench_index-"))
    try:
        result = measure(folder, arguments)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    print(rounded(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
