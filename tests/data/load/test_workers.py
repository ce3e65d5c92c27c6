"""Decode workers: the order of batches, bounded queues, and workers that die, fail or hang."""

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing.popen_forkserver import Popen
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.support.runner import ROOT
from vtprune_train.core.plan import plan_stream
from vtprune_train.core.stream import PackedBatch, SegmentLayout
from vtprune_train.data.load.workers import DecodePool, MicroBatch, WorkerError

pytestmark = pytest.mark.slow

PIXELS = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)


def batch_of(task):
    """A batch that tells its task, and who made it."""
    number = task.samples[0]
    return PackedBatch(
        input_ids=torch.full((5,), number),
        visual_rows=torch.zeros(0, dtype=torch.long),
        visual_index=torch.zeros(0, dtype=torch.long),
        pixel_values=PIXELS + number,
        plan=plan_stream([SegmentLayout(length=5, query_offsets=(0,))], (), 2),
        targets=torch.zeros(0, dtype=torch.long),
        answer_of_target=torch.zeros(0, dtype=torch.long),
        num_answers=0,
        sample_ids=(f"id{number}", str(os.getpid())),
    )


def names_of(task):
    return [f"id{task.samples[0]}"]


@dataclass(frozen=True)
class Noted:
    """Leaves a file for every task."""

    folder: Path

    def __call__(self, task):
        (self.folder / str(task.samples[0])).touch()
        return batch_of(task)


def slowly(task):
    time.sleep(0.1)
    return batch_of(task)


def deadly(task):
    if task.samples[0] == 3:
        os._exit(7)
    return batch_of(task)


def broken(task):
    return batch_of(task) if task.samples[0] in (0, 1, 3) else {}["no such key"]


def stuck_on_a_dead_disk(task):
    while task.samples[0] == 3:
        time.sleep(100)
    return batch_of(task)


def never(task):
    time.sleep(1000)


def large(task):
    made = batch_of(task)
    return replace(made, pixel_values=big_pixels(), input_ids=torch.arange(300_000))


def big_pixels():
    return torch.from_numpy(np.random.default_rng(0).random((64, 3, 112, 112), dtype=np.float32))


def leaking(task):
    """A worker whose memory grows until the system kills it: here, at a limit of its own."""
    limit = 4 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    kept = []
    while task.samples[0] == 2:
        kept.append(bytearray(1 << 28))
    return batch_of(task)


@pytest.fixture
def pool_of():
    pools = []

    def make(count, decode=batch_of, **options):
        tasks = (MicroBatch(number, (number,)) for number in range(count))
        settings = {"workers": 2, "prefetch": 2, "timeout": None, "names": names_of}
        pools.append(DecodePool(decode, tasks, **{**settings, **options}))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def taken(pool):
    return list(iter(pool.next, None))


def ids(batches):
    return [batch.sample_ids[0] for batch in batches]


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def named_segments(*pids):
    """What processes map of /dev/shm that still has a name there: it would stay if all were killed at once."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids).splitlines()
    return [line for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")]


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_batches_come_in_order_and_whole(pool_of):
    taken(pool_of(1))  # the server that workers are forked from stays
    before = descriptors()
    pool = pool_of(11, workers=3)
    batches = taken(pool)
    assert ids(batches) == [f"id{number}" for number in range(11)]
    assert len({batch.sample_ids[1] for batch in batches}) == 3, "the workers take turns"
    for number, batch in enumerate(batches):
        assert torch.equal(batch.pixel_values, PIXELS + number) and torch.equal(
            batch.input_ids, torch.full((5,), number)
        )
        assert batch.plan.stages[0].segment_lengths == (5,)
    assert pool.next() is None
    batches[0].pixel_values.add_(1)  # its memory is its own
    del batches, batch
    pool.close()
    assert descriptors() == before


def test_workers_are_forked_from_a_process_without_threads(pool_of):
    pool = pool_of(2)
    taken(pool_of(1))
    parents = {psutil.Process(process.pid).ppid() for process in pool.processes}
    assert len(parents) == 1 and os.getpid() not in parents
    server = psutil.Process(parents.pop())
    assert server.ppid() == os.getpid() and "forkserver" in " ".join(server.cmdline())
    assert server.num_threads() == 1
    assert any("libtorch" in mapping.path for mapping in server.memory_maps()), "it has imported what workers need"


def test_the_rank_s_random_numbers_are_its_own(pool_of):
    state = torch.random.get_rng_state()
    taken(pool_of(3))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_more_is_decoded_ahead_than_asked(pool_of, tmp_path):
    pool = pool_of(100, Noted(tmp_path), workers=2, prefetch=3)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(number) for number in range(6)]
    pool.next()
    pool.next()
    assert pool.ready >= 5, "decoded batches wait for the rank"


def test_a_slow_worker_shows_in_the_queue(pool_of):
    pool = pool_of(6, slowly)
    taken(pool)
    assert pool.ready == 0


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGSEGV])
def test_after_a_worker_is_killed_the_batches_are_the_same(pool_of, which, caplog):
    pool = pool_of(20, slowly, prefetch=9)  # the worker has much to do when it is killed
    first = [pool.next() for _ in range(3)]
    before = [process.pid for process in pool.processes]
    os.kill(before[1], which)
    rest = taken(pool)
    assert ids(first + rest) == [f"id{number}" for number in range(20)]
    assert all(torch.equal(batch.pixel_values, PIXELS + number) for number, batch in enumerate(first + rest))
    who = f"decode worker 1 of rank 0 (process {first[1].sample_ids[1]})"
    assert f"{who} was killed by {which.name} (most likely " in caplog.text
    assert "samples id" in caplog.text and "the workers are restarted" in caplog.text
    if which == signal.SIGSEGV:
        assert "in _worker_loop" in caplog.text, "the stack of the crash"
    assert not any(map(running, before))


def test_the_server_that_forks_workers_is_killed(pool_of, caplog):
    pool = pool_of(12, slowly)
    batches = [pool.next()]
    before = [process.pid for process in pool.processes]
    os.kill(psutil.Process(before[0]).ppid(), signal.SIGKILL)
    batches += taken(pool)
    assert ids(batches) == [f"id{number}" for number in range(12)]
    assert "the workers are restarted" in caplog.text
    deadline = time.monotonic() + 20
    while any(map(running, before)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("times", [2, 3])
def test_workers_that_are_killed_while_they_start(pool_of, monkeypatch, times):
    """Their pipe breaks before they are there."""
    launch, broken = Popen._launch, [BrokenPipeError("Broken pipe")] * times

    def launch_later(popen, process):
        if broken:
            raise broken.pop()
        launch(popen, process)

    monkeypatch.setattr(Popen, "_launch", launch_later)
    if times < 3:
        assert ids(taken(pool_of(5))) == [f"id{number}" for number in range(5)]
    else:
        with pytest.raises(WorkerError, match="decode workers of rank 0 cannot be started: Broken pipe"):
            pool_of(5)


def test_many_deaths_at_any_moment_change_nothing(pool_of, caplog):
    pool = pool_of(30, slowly, workers=2)
    rng, batches = random.Random(0), []
    for number in range(30):
        if number % 6 == 2:
            time.sleep(rng.random() / 10)
            os.kill(pool.processes[rng.randrange(2)].pid, signal.SIGKILL)
        batches.append(pool.next())
    assert ids(batches) == [f"id{number}" for number in range(30)] and pool.next() is None
    assert caplog.text.count("the workers are restarted") >= 3


def test_a_batch_that_ends_every_worker_is_not_tried_for_ever(pool_of):
    pool = pool_of(10, deadly)
    assert ids(pool.next() for _ in range(3)) == ["id0", "id1", "id2"]
    with pytest.raises(WorkerError, match=r"(?s)exited with code 7 while decoding samples id3.*the third worker"):
        pool.next()


@pytest.mark.parametrize(("decode", "said"), [(broken, "in broken.*no such key"), (leaking, "in leaking.*MemoryError")])
def test_an_error_of_decoding_ends_at_once_with_its_traceback(pool_of, decode, said):
    pool = pool_of(5, decode)
    with pytest.raises(WorkerError, match=rf"(?s)decode worker 0 .* failed on samples id2.*{said}"):
        taken(pool)


def test_a_hung_worker_is_named_with_its_samples_and_stack(pool_of):
    taken(pool_of(1))
    pool = pool_of(10, stuck_on_a_dead_disk, timeout=10)
    began = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        taken(pool)
    pid = pool.processes[1].pid
    said = str(caught.value)
    assert f"decode worker 1 of rank 0 (process {pid}) has not finished a batch for data.worker_timeout=10" in said
    assert "samples id3" in said and "in stuck_on_a_dead_disk" in said
    pool.close()
    assert time.monotonic() - began < 60
    assert not running(pid)


RANK = """
import time
from tests.data.load.test_workers import MicroBatch, DecodePool, never, names_of

if __name__ == "__main__":
    tasks = iter([MicroBatch(0, (0,))])
    pool = DecodePool(never, tasks, workers=2, prefetch=1, timeout=None, names=names_of)
    print(*(process.pid for process in pool.processes), flush=True)
    time.sleep(1000)
"""


def test_workers_outlive_what_a_scheduler_sends_and_end_with_their_rank(tmp_path):
    """The rank is killed: no process of it stays, not even one that hangs."""
    (tmp_path / "rank.py").write_text(RANK)
    command, env = [sys.executable, str(tmp_path / "rank.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    rank = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pids = [int(pid) for pid in rank.stdout.readline().split()]
    helpers = [process.pid for process in psutil.Process(rank.pid).children()]
    for pid in (*pids, *helpers):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    time.sleep(1)
    outlived = [running(pid) for pid in (*pids, *helpers)]
    assert not named_segments(rank.pid, *pids, *helpers)
    rank.kill()
    said = rank.communicate(timeout=30)[1]
    assert len(pids) == 2 and all(outlived) and not said, said
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in (*pids, *helpers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_batches_are_pinned_by_the_loader_s_thread(pool_of, monkeypatch):
    """As if there were a GPU: the host's part of it."""
    pinned = []

    def pin(tensor):
        pinned.append(threading.current_thread())
        return tensor.clone()

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    pool = pool_of(9, slowly, pin=True)
    batches = [pool.next() for _ in range(3)]
    os.kill(pool.processes[0].pid, signal.SIGKILL)
    batches += taken(pool)
    assert ids(batches) == [f"id{number}" for number in range(9)]
    assert all(torch.equal(batch.pixel_values, PIXELS + number) for number, batch in enumerate(batches))
    assert len(pinned) >= 9 * 2 and threading.main_thread() not in pinned
    pool.close()
    assert not any(thread.is_alive() for thread in pinned)


def test_batches_of_any_size(pool_of):
    """Far more than a socket holds, and more descriptors over time than a process may have."""
    pool = pool_of(8, large, prefetch=4)
    for batch in itertools.islice(iter(pool.next, None), 8):
        assert torch.equal(batch.pixel_values, big_pixels()) and batch.input_ids[-1] == 299_999
