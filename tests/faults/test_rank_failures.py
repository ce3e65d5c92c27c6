"""Which rank is to blame: the judges, and the hub with real connections."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vtprune_train.config.errors import ConfigError
from vtprune_train.training import distributed
from vtprune_train.training.faults.rank_failures import (
    CONSEQUENCE_SECONDS,
    EXIT_HUNG,
    SETTLE_SECONDS,
    Failure,
    Hub,
    Place,
    RankConnection,
    reach,
    reason_of_failures,
    reason_of_stall,
)

HOSTS = {0: "a", 1: "a", 2: "b"}


def test_the_first_cause_is_blamed_not_its_victims():
    broken = Failure(0, "a", "RuntimeError: connection closed", in_collective=True)
    gone = Failure(1, "a")
    raised = Failure(2, "b", "KeyError: 'x'", where="step 3, forward")
    assert reason_of_failures([broken, gone, raised]).failed_ranks == (2,)
    assert reason_of_failures([broken, gone]).failed_ranks == (1,)
    assert reason_of_failures([broken]).failed_ranks == (0,)
    stopped = Failure(1, "a", "SIGTERM", terminated=True)
    assert (
        reason_of_failures([broken, stopped]).failed_ranks == reason_of_failures([stopped, broken]).failed_ranks == (0,)
    )
    told = Failure(1, "a", "OSError: full", where="saving", raised_on=0)
    assert reason_of_failures([told, raised]).failed_ranks == (2,), "what a rank raised itself comes first"
    known = reason_of_failures([Failure(0, "a"), told, broken])
    assert known.failed_ranks == (1,) and known.text == "rank 0 failed (saving): OSError: full", (
        "it is gone, its error known"
    )
    reason = reason_of_failures([Failure(0, "a", "ValueError: no", code=2, final=True), raised])
    assert (reason.failed_ranks, reason.code, reason.final) == ((0,), 2, True)
    assert "rank 2 on b" in reason_of_failures([raised]).text and "step 3, forward" in reason_of_failures([raised]).text


def test_a_stall_is_blamed_on_who_did_not_come():
    waiting = Place(9, "step 3, backward", 6.0, "all_reduce", "all_reduce, distributed_c10d.py:1")
    behind = Place(8, "step 3, forward", 6.1, None, "read, tower.py:7")
    reason = reason_of_stall({0: waiting, 1: behind, 2: waiting}, HOSTS, caller=0)
    assert (reason.failed_ranks, reason.code, reason.hung) == ((1,), EXIT_HUNG, True)
    assert "rank 1 on a: step 3, forward, at read, tower.py:7" in reason.text and "in all_reduce" in reason.text
    same_place = Place(9, "step 3, backward", 6.1, None, "sleep, x.py:1")
    assert reason_of_stall({0: waiting, 1: waiting, 2: same_place}, HOSTS, caller=0).failed_ranks == (2,)
    assert reason_of_stall(dict.fromkeys(HOSTS, waiting), HOSTS, caller=0).failed_ranks == (0, 1, 2)
    silent = reason_of_stall({0: waiting, 2: behind}, HOSTS, caller=0)
    assert silent.failed_ranks == (1,) and "does not respond" in silent.text


@pytest.fixture
def connected():
    hub = Hub("127.0.0.1", "token", 3)
    lines = [RankConnection(reach(["127.0.0.1"], hub.port, "token", rank)) for rank in range(3)]
    yield hub, lines
    for line in lines:
        if line.link.open:
            line.link.send("bye")
    for line in lines:
        line.link.close()
    hub.join()


def heard(line, seconds=60.0):
    """The next messages that reach a rank."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if messages := line.poll(0.05):
            return messages
    return []


def next_message(line):
    """The next message alone; the others stay to be read."""
    message, *others = heard(line)
    line.link.keep(others)
    return message


def test_a_closed_connection_is_a_dead_rank(connected):
    _, lines = connected
    lines[1].link.close()
    for rank in (0, 2):
        message = next_message(lines[rank])
        assert (
            message["kind"] == "reason"
            and message["failed_ranks"] == [1]
            and "died without an error" in message["text"]
        )


def failed(line, error, **more):
    line.link.send("failed", **{"error": error, "where": "starting", "code": 2, **more})


def test_a_rank_that_joins_after_another_failed_is_told():
    """On a loaded machine a rank may fail before the others have joined."""
    hub = Hub("127.0.0.1", "token", 2)
    early = RankConnection(reach(["127.0.0.1"], hub.port, "token", 1))
    failed(early, "ValueError: a file is missing")
    assert next_message(early)["failed_ranks"] == [1]
    early.link.close()
    late = RankConnection(reach(["127.0.0.1"], hub.port, "token", 0))
    reason = next_message(late)
    assert reason["failed_ranks"] == [1] and "a file is missing" in reason["text"]
    assert next_message(late) == {"kind": "cause_ended"}
    late.link.close()
    hub.join()


def test_what_arrives_with_the_welcome_is_not_lost():
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as thread:
        reached = thread.submit(reach, ["127.0.0.1"], server.getsockname()[1], "token", 0)
        connection, _ = server.accept()
        with connection:
            connection.sendall(b'{"kind": "welcome"}\n{"kind": "reason"}\n')
            assert reached.result().receive() == [{"kind": "reason"}]


def test_an_error_told_to_all_waits_for_the_rank_that_raised_it(connected):
    _, lines = connected
    failed(lines[1], "OSError: full", raised_on=0)
    assert heard(lines[2], SETTLE_SECONDS) == []
    failed(lines[0], "OSError: full")
    assert next_message(lines[2])["failed_ranks"] == [0]


@pytest.mark.parametrize("consequence", ["in_collective", "terminated"])
def test_a_consequence_that_is_heard_of_first_waits_for_its_cause(connected, consequence):
    """Longer than a killed process needs to go on a loaded machine."""
    _, lines = connected
    failed(lines[0], "RuntimeError: connection closed by peer", **{consequence: True})
    assert heard(lines[2], SETTLE_SECONDS + 0.5) == []
    lines[1].link.close()
    assert next_message(lines[0])["failed_ranks"] == [1]


def test_consequences_on_all_ranks_are_judged_without_a_cause(connected):
    _, lines = connected
    for line in reversed(lines):  # in whatever order they arrive
        failed(line, "SIGTERM", terminated=True)
    began = time.monotonic()
    assert next_message(lines[1])["failed_ranks"] == [0]
    assert time.monotonic() - began < CONSEQUENCE_SECONDS


def test_the_end_of_the_cause_is_told(connected):
    _, lines = connected
    failed(lines[1], "KeyError: 'x'")
    assert next_message(lines[0])["failed_ranks"] == [1]
    assert heard(lines[0], 0.5) == [], "it has not ended yet"
    lines[1].link.close()
    assert next_message(lines[0]) == {"kind": "cause_ended"}


def test_a_rank_that_takes_its_leave_is_not_missed(connected):
    _, lines = connected
    lines[1].link.send("bye")
    assert heard(lines[1]) == [{"kind": "done"}]
    lines[1].link.close()
    assert heard(lines[0], 1.5) == []


def test_roll_call_waits_for_answers_and_forgives_who_goes_on(connected):
    _, lines = connected
    lines[0].link.send("stalled", marks=4)
    for line in lines:
        assert heard(line) == [{"kind": "report"}]
    for line in lines:
        line.link.send("place", **vars(Place(5)))
    assert heard(lines[0], 0.5) == [], "the caller went on meanwhile"
    lines[0].link.send("stalled", marks=5)
    for rank, line in enumerate(lines):
        assert heard(line) == [{"kind": "report"}]
        line.link.send("place", **vars(Place(5 - (rank == 2))))
    assert next_message(lines[1])["failed_ranks"] == [2]


def test_a_forked_child_does_not_hold_the_connection(connected):
    """Loader workers outlive a killed rank by seconds."""
    _, lines = connected
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    lines[1].link.close()
    assert next_message(lines[0])["failed_ranks"] == [1]
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_strangers_are_refused(connected):
    hub, lines = connected
    with pytest.raises(ConfigError, match="another service answers"):
        reach(["127.0.0.1"], hub.port, "guess", 1)
    for garbage in (b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b'{"kind": "failed"}\n', b"\xff\n"):
        with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
            stranger.sendall(garbage)
            assert stranger.recv(10) == b"", "it is sent away"
    assert heard(lines[0], 0.3) == []
    with pytest.raises(ConfigError, match=r"rank 7 .* cannot reach rank 0 at port 1"):
        reach(["127.0.0.1"], 1, "token", 7)


def test_a_run_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda answer: [answer, ("node1", False)])
    with pytest.raises(ConfigError, match=r"run.output_dir: .* is not visible on node1; use a file system"):
        distributed.check_shared(tmp_path, "run.output_dir")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(distributed, "gather", lambda answer: [answer, answer])
    distributed.check_shared(tmp_path, "run.output_dir")
