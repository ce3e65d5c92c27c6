"""Decode workers: the order of batches, bounded queues, and workers that die, fail or hang."""

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vtprune_train.core.plan import plan_stream
from vtprune_train.core.stream import PackedBatch, SegmentLayout
from vtprune_train.data.load.workers import DecodePool, MicroBatch, WorkerError

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


@pytest.fixture
def pool_of():
    pools = []

    def make(count, decode=batch_of, **options):
        tasks = (MicroBatch(number, (number,)) for number in range(count))
        settings = {"workers": 2, "prefetch": 2, "timeout": None, "names": lambda task: [f"id{task.samples[0]}"]}
        pools.append(DecodePool(decode, tasks, **{**settings, **options}))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def taken(pool):
    return list(iter(pool.next, None))


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_batches_come_in_order_and_whole(pool_of):
    before = descriptors()
    pool = pool_of(11, workers=3)
    batches = taken(pool)
    assert [batch.sample_ids[0] for batch in batches] == [f"id{number}" for number in range(11)]
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


def test_no_more_is_decoded_ahead_than_asked(pool_of, tmp_path):
    def noted(task):
        (tmp_path / str(task.samples[0])).touch()
        return batch_of(task)

    pool = pool_of(100, noted, workers=2, prefetch=3)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(number) for number in range(6)]
    pool.next()
    pool.next()
    assert pool.ready >= 5, "decoded batches wait for the rank"


def test_a_slow_worker_shows_in_the_queue(pool_of):
    pool = pool_of(6, lambda task: (time.sleep(0.1), batch_of(task))[1])
    taken(pool)
    assert pool.ready == 0


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_replaced_and_the_batches_are_the_same(pool_of, which, caplog):
    def slowly(task):
        time.sleep(0.02)
        return batch_of(task)

    pool = pool_of(20, slowly)
    first = [pool.next() for _ in range(3)]
    os.kill(pool.workers[1].pid, which)
    rest = taken(pool)
    ids = [batch.sample_ids[0] for batch in first + rest]
    assert ids == [f"id{number}" for number in range(20)]
    assert all(torch.equal(batch.pixel_values, PIXELS + number) for number, batch in enumerate(first + rest))
    who = f"decode worker 1 of rank 0 (process {first[1].sample_ids[1]})"
    assert f"{who} was killed by {which.name} (most likely " in caplog.text
    assert "samples id" in caplog.text and "another one takes its place" in caplog.text
    if which == signal.SIGSEGV:
        assert "in slowly" in caplog.text, "the stack of the crash"


def test_the_next_worker_dies_too(pool_of):
    """A picture that ends every worker must not be tried for ever."""

    def deadly(task):
        if task.samples[0] == 3:
            os._exit(7)
        return batch_of(task)

    pool = pool_of(10, deadly)
    assert [pool.next().sample_ids[0] for _ in range(3)] == ["id0", "id1", "id2"]
    with pytest.raises(WorkerError, match=r"(?s)exited with code 7 while decoding samples id3.*the third worker"):
        pool.next()


def test_an_error_of_decoding_ends_at_once_with_its_traceback(pool_of):
    def broken(task):
        return batch_of(task) if task.samples[0] in (0, 1, 3) else {}["no such key"]

    pool = pool_of(5, broken)
    with pytest.raises(WorkerError, match=r"(?s)decode worker 0 .* failed over samples id2.*in broken.*no such key"):
        taken(pool)


def test_a_hung_worker_is_named_with_its_samples_and_stack(pool_of):
    def stuck_on_a_dead_disk(task):
        while task.samples[0] == 3:
            time.sleep(100)
        return batch_of(task)

    pool = pool_of(10, stuck_on_a_dead_disk, timeout=2)
    began = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        taken(pool)
    pid = pool.workers[1].pid
    said = str(caught.value)
    assert f"decode worker 1 of rank 0 (process {pid}) has not finished a batch for data.worker_timeout=2" in said
    assert "samples id3" in said and "in stuck_on_a_dead_disk" in said
    pool.close()
    assert time.monotonic() - began < 60
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_outlive_what_a_scheduler_sends_and_end_with_their_rank(pool_of):
    """The rank is killed: no process of it stays, not even one that hangs."""
    tell, told = os.pipe()
    rank = os.fork()
    if not rank:
        pool = DecodePool(
            lambda task: time.sleep(1000), iter([MicroBatch(0, (0,))]), workers=2, prefetch=1, timeout=None, names=str
        )
        for worker in pool.workers:
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        os.write(told, " ".join(str(worker.pid) for worker in pool.workers).encode())
        time.sleep(1000)
    pids = [int(pid) for pid in os.read(tell, 100).split()]
    time.sleep(0.3)
    outlived = [running(pid) for pid in pids]
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    assert outlived == [True, True]
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_end_of_the_pool_is_an_error_for_who_waits(pool_of):
    """As the thread that pins batches does, when training stops."""
    pool = pool_of(4, lambda task: time.sleep(1000))
    errors = []

    def wait():
        try:
            pool.next()
        except WorkerError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    pool.kill()
    thread.join(10)
    assert errors == ["the decode workers were ended"]


def test_batches_of_any_size(pool_of):
    """Far more than a socket holds, and more descriptors over time than a process may have."""
    big = torch.from_numpy(np.random.default_rng(0).random((64, 3, 112, 112), dtype=np.float32))

    def large(task):
        made = batch_of(task)
        return type(made)(**{**vars(made), "pixel_values": big, "input_ids": torch.arange(300_000)})

    pool = pool_of(8, large, prefetch=4)
    for batch in itertools.islice(iter(pool.next, None), 8):
        assert torch.equal(batch.pixel_values, big) and batch.input_ids[-1] == 299_999
