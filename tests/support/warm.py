"""A warm parent for training processes: it imports everything once, then forks each run from itself.

Importing torch, transformers and DeepSpeed takes longer than training a tiny model. What is forked is a process group
as a launcher starts it: a leader, and below it one process a rank that runs the script from its first line, with an
environment, a working folder and standard streams of its own. Tests whose subject is a launcher use the real one.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
GRACE = 5.0  # seconds between SIGTERM and SIGKILL to the ranks that are left when one fails


class WarmProcess:
    """The leader of a forked run: what tests use of ``subprocess.Popen``."""

    def __init__(self, connection: socket.socket, args: list[str]):
        self.args, self.connection = args, connection
        self.returncode: int | None = None
        self.pid = struct.unpack("i", connection.recv(4, socket.MSG_WAITALL))[0]

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            # A timeout of 0 would make the socket non-blocking, with another error.
            self.connection.settimeout(timeout if timeout is None else max(timeout, 1e-3))
            try:
                said = self.connection.recv(4, socket.MSG_WAITALL)
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self.returncode = struct.unpack("i", said)[0] if said else -signal.SIGKILL  # the leader was killed
            self.connection.close()
        return self.returncode


class WarmParent:
    """Starts the parent on first use; it ends with this process."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None

    def start(self, argv: list[str], *, ranks: int, cwd: Path, env: dict[str, str], out: int, err: int) -> WarmProcess:
        """Fork a run: ``argv`` is a script and its arguments, ``out`` and ``err`` are file descriptors."""
        if self.socket is None:
            self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, __file__, str(theirs.fileno())]
            # It serves later runs too, so it must not import from folders of the first one.
            subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**env, "PYTHONPATH": str(ROOT)})
            theirs.close()
        ours, leaders = socket.socketpair()
        request = json.dumps({"argv": argv, "ranks": ranks, "cwd": str(cwd), "env": env}).encode()
        socket.send_fds(self.socket, [request], [leaders.fileno(), out, err])
        leaders.close()
        return WarmProcess(ours, argv)


def serve(requests: socket.socket) -> None:
    """Fork a leader for every request until the tests' process is gone."""
    import_everything()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy the memory of everything imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the leaders report for themselves
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            lead(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def import_everything() -> None:
    import datasets.io.generator  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # every engine asks for it, and it is slow
    import matplotlib.pyplot  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from PIL import Image
    from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaNextForConditionalGeneration  # noqa: F401

    import vtprune_train.cli
    import vtprune_train.training.dry_run
    import vtprune_train.training.loop.run  # noqa: F401

    Image.init()
    assert deepspeed.ops.__compatible_ops__  # asks the compiler


def lead(request: dict[str, Any], answer: int, out: int, err: int) -> None:
    """In the leader: start the ranks, end them all when one fails, tell the exit code."""
    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    connection = socket.socket(fileno=answer)
    connection.sendall(struct.pack("i", os.getpid()))
    ranks = request["ranks"]
    port = free_port()
    children = []
    for rank in range(ranks):
        environment = {} if ranks == 1 else rank_environment(rank, ranks, port)
        child = os.fork()
        if child == 0:
            connection.close()
            become_rank(request, environment)
        children.append(child)
    code = wait_for(children)
    # Launchers answer 1 where a rank failed, whatever its own code.
    connection.sendall(struct.pack("i", code if ranks == 1 else int(code != 0)))
    os._exit(0)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become_rank(request: dict[str, Any], environment: dict[str, str]) -> NoReturn:
    """In a rank: run the script as ``python SCRIPT ARGUMENTS`` does, and leave as it does, but for the two seconds in
    which Python frees every object: threads are waited for, exit handlers run, streams are flushed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests beside itself
    os.environ.clear()
    os.environ.update(request["env"] | environment)
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path.insert(0, str(Path(request["argv"][0]).parent))
    code: Any = 0
    try:
        runpy.run_path(request["argv"][0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def wait_for(children: list[int]) -> int:
    """The exit code of the first that fails (negative for a signal); the others are then ended."""
    code, deadline = 0, None
    left = set(children)
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG if deadline is not None else 0)
        if pid:
            left.discard(pid)
            ended = os.waitstatus_to_exitcode(status)
            if ended and deadline is None:
                code, deadline = ended, time.monotonic() + GRACE
                signal_all(left, signal.SIGTERM)
        elif deadline is not None:
            if time.monotonic() > deadline:
                signal_all(left, signal.SIGKILL)
            time.sleep(0.02)
    return code


def signal_all(processes: set[int], number: int) -> None:
    for process in processes:
        os.kill(process, number)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
