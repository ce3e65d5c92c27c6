"""Side channel between ranks, independent of the process group, that tells every rank why the job ends.

Every rank keeps one TCP connection to a hub, a thread of rank 0. The OS closes it when a process dies, so the hub
notices immediately; no data is sent while all ranks make progress. A rank that fails or makes no progress reports
to the hub; the hub decides which rank failed first (:class:`EndReason`) and notifies all of them. Messages are JSON
lines.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vtprune_train.config.errors import ConfigError
from vtprune_train.training import distributed as ranks

EXIT_HUNG = 124  # as timeout(1)
SETTLE_SECONDS = 1.0  # the root cause may be reported after its consequences
CONSEQUENCE_SECONDS = 10.0  # seconds a secondary failure waits for its root cause
REPORT_SECONDS = 5.0
CONNECT_SECONDS = 5.0
WELCOME_SECONDS = 60.0  # thousands of ranks may connect at once
DEAD_HOST_SECONDS = 30
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 1000 * DEAD_HOST_SECONDS}


@dataclass(frozen=True)
class Place:
    """Progress of a rank: ``marks`` is its progress counter (comparable across ranks), ``collective`` the collective it
    is waiting in, ``frame`` the current line of its main thread."""

    marks: int = 0
    where: str = "starting"
    seconds: float = 0.0
    collective: str | None = None
    frame: str = ""


@dataclass(frozen=True)
class Failure:
    """A rank that raised ``error``, or died without one (``None``). ``raised_on``: the rank where the error originated,
    if it was propagated from there."""

    rank: int
    host: str
    error: str | None = None
    where: str = ""
    code: int = 1
    final: bool = False
    in_collective: bool = False
    terminated: bool = False
    raised_on: int | None = None

    @property
    def is_consequence(self) -> bool:
        """Whether the failure was caused by another rank: a broken collective, SIGTERM from the launcher, or a
        propagated error."""
        return self.in_collective or self.terminated or self.raised_on is not None


@dataclass(frozen=True)
class EndReason:
    """Why the job ends: the failed ranks, the common exit code, and whether a restart would be pointless."""

    failed_ranks: tuple[int, ...]
    text: str
    code: int
    final: bool = False
    hung: bool = False


def reason_of_failures(failures: Sequence[Failure]) -> EndReason:
    """Pick the root cause from failures in reporting order. Priority: a rank that raised its own error; one that
    reports another rank's error; one that died; finally consequences (broken collective, SIGTERM), where the lowest
    rank wins."""

    def order(failure: Failure) -> tuple[int, int]:
        if failure.raised_on is not None:
            return 1, failure.rank
        if failure.is_consequence:
            return 3, failure.rank
        return (2 if failure.error is None else 0), 0

    first = min(failures, key=order)
    name = f"rank {first.rank} on {first.host}" if first.raised_on is None else f"rank {first.raised_on}"
    if first.error is None:
        text = f"{name} died without an error (killed? out of host memory?)"
    else:
        text = f"{name} failed ({first.where}): {first.error}"
    return EndReason((first.rank,), text, first.code, first.final)


def reason_of_stall(places: Mapping[int, Place], hosts: Mapping[int, str], caller: int) -> EndReason:
    """From the places of all ranks, determine which ranks block the others; a rank in ``hosts`` without a place did
    not respond.

    These are the unresponsive ranks if there are any; otherwise the ranks with the least progress, preferring those not
    waiting in a collective.
    """
    late = [rank for rank in sorted(hosts) if rank not in places]
    if late:
        notes = [f"rank {rank} on {hosts[rank]} does not respond (stopped, or the GIL is blocked)" for rank in late]
    else:
        fewest = min(place.marks for place in places.values())
        late = [rank for rank in sorted(places) if places[rank].marks == fewest]
        late = [rank for rank in late if places[rank].collective is None] or late
        notes = [f"rank {rank} on {hosts[rank]}: {_described(places[rank])}" for rank in late]
    others = [rank for rank in sorted(places) if rank not in late]
    waited = places[caller].seconds if caller in places else 0.0
    first_notes = "; ".join(notes[:4]) + (f"; and {len(notes) - 4} more" if len(notes) > 4 else "")
    text = f"no progress for {waited:.0f} s. {first_notes}."
    if others:
        text += f" {len(others)} other rank(s) are waiting, such as rank {others[0]}: {_described(places[others[0]])}."
    return EndReason(tuple(late), text, EXIT_HUNG, hung=True)


def _described(place: Place) -> str:
    doing = f"waiting in {place.collective}" if place.collective else f"at {place.frame}"
    return f"{place.where}, {doing}"


class JsonConnection:
    """One end of a JSON-lines connection with non-blocking reads."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.open = True
        self._lock = threading.Lock()
        self._buffer = b""
        self._kept: list[dict[str, Any]] = []
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux only; elsewhere a dead host is detected later
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, kind: str, **content: Any) -> None:
        line = json.dumps({"kind": kind, **content}).encode() + b"\n"
        try:
            with self._lock:
                self.socket.sendall(line)
        except OSError:
            self.open = False  # ignore: the reader will see the same error and handle it

    def receive(self) -> list[dict[str, Any]]:
        """Return the received messages; call when the socket is readable. ``open`` becomes false when the peer
        disconnects."""
        kept, self._kept = self._kept, []
        if kept:
            return kept
        try:
            chunk = self.socket.recv(65536)
        except (TimeoutError, BlockingIOError):
            return []
        except OSError:
            chunk = b""
        self.open = self.open and bool(chunk)
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # not a client of this protocol
            self.open = False
            return []

    def keep(self, messages: list[dict[str, Any]]) -> None:
        """Queue messages that arrived together with an awaited reply, for the next :meth:`receive`."""
        self._kept += messages

    def close(self) -> None:
        self.open = False
        self.socket.close()


@dataclass
class _Member:
    link: JsonConnection
    rank: int = -1
    host: str = ""
    left: bool = False


@dataclass
class _Reports:
    """Reports received from the ranks so far."""

    failures: list[Failure] = field(default_factory=list)
    since: float = 0.0
    places: dict[int, Place] = field(default_factory=dict)
    caller: int | None = None
    caller_marks: int = 0
    called: float = 0.0


class Hub:
    """Thread of rank 0 that all ranks connect to. Listens on ``address`` (``""``: every interface) and rejects clients
    without ``token``."""

    def __init__(self, address: str, token: str, world_size: int):
        self.token, self.world_size = token, world_size
        dual = not address and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self.server = socket.create_server((address, 0), family=family, dualstack_ipv6=dual, backlog=4096)
        self.port = self.server.getsockname()[1]
        self._members: dict[int, _Member] = {}
        self._reports = _Reports()
        self._reason: EndReason | None = None
        self._cause_ended = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.server, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="connection hub", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait briefly until every rank has disconnected."""
        self._thread.join(REPORT_SECONDS)

    def leave_in_child(self) -> None:
        """Close inherited connections in a forked child."""
        for key in list(self._selector.get_map().values()):
            os.close(key.fileobj.detach())  # type: ignore[union-attr]

    def _serve(self) -> None:
        try:
            while sum(member.left or not member.link.open for member in self._members.values()) < self.world_size:
                for key, _ in self._selector.select(timeout=0.1):
                    if key.data is not None:
                        self._hear(key.data)
                        continue
                    connection, _ = self.server.accept()
                    connection.settimeout(CONNECT_SECONDS)
                    self._selector.register(connection, selectors.EVENT_READ, _Member(JsonConnection(connection)))
                self._decide()
        finally:
            for member in [key.data for key in list(self._selector.get_map().values()) if key.data is not None]:
                member.link.close()
            self.server.close()

    def _hear(self, member: _Member) -> None:
        for message in member.link.receive():
            if member.rank < 0:
                self._admit(member, message)
                continue
            kind = message.pop("kind")
            if kind == "bye":
                member.left = True
                member.link.send("done")
            elif kind == "failed":
                self._failed(Failure(rank=member.rank, host=member.host, **message))
            elif kind == "place":
                self._reports.places[member.rank] = Place(**message)
            elif kind == "stalled" and self._reports.caller is None:
                reports = self._reports
                reports.caller, reports.caller_marks, reports.called = member.rank, message["marks"], time.monotonic()
                reports.places.clear()
                self._tell("report")
        if not member.link.open:
            self._selector.unregister(member.link.socket)
            member.link.close()
            if member.rank >= 0 and not member.left:
                self._failed(Failure(member.rank, member.host))

    def _admit(self, member: _Member, message: Any) -> None:
        """Accept a connection with the right token; reject all others."""
        token = message.get("token") if isinstance(message, dict) else None
        if not isinstance(token, str) or not secrets.compare_digest(token.encode(), self.token.encode()):
            member.link.open = False
            return
        member.rank, member.host = message["rank"], message["host"]
        self._members[member.rank] = member
        member.link.send("welcome")
        if self._reason is not None:  # another rank failed before this one had joined
            member.link.send("reason", **asdict(self._reason))
            if self._cause_ended:
                member.link.send("cause_ended")

    def _failed(self, failure: Failure) -> None:
        if failure.rank not in {earlier.rank for earlier in self._reports.failures}:
            self._reports.failures.append(failure)
            self._reports.since = self._reports.since or time.monotonic()

    def _decide(self) -> None:
        reports, now = self._reports, time.monotonic()
        if self._reason is not None:
            failed_ranks = [self._members[rank] for rank in self._reason.failed_ranks if rank in self._members]
            if not self._cause_ended and not any(member.link.open for member in failed_ranks):
                self._cause_ended = True  # so the other ranks may exit
                self._tell("cause_ended")
        elif reports.failures:
            if now - reports.since > self._settling():
                self._announce(reason_of_failures(reports.failures))
        elif reports.caller is not None:
            if reports.caller in reports.places and reports.places[reports.caller].marks != reports.caller_marks:
                reports.caller = None  # it made progress in the meantime
                return
            present = {rank: member.host for rank, member in self._members.items() if not member.left}
            if present.keys() <= reports.places.keys() or now - reports.called > REPORT_SECONDS:
                self._announce(reason_of_stall(reports.places, present, reports.caller))

    def _settling(self) -> float:
        """Seconds to wait after the first reported failure for its root cause."""
        failures = self._reports.failures
        if any(failure.error is not None and not failure.is_consequence for failure in failures):
            return 0.0
        if any(failure.error is None for failure in failures) or len(failures) == self.world_size:
            return SETTLE_SECONDS
        return CONSEQUENCE_SECONDS

    def _announce(self, reason: EndReason) -> None:
        self._reason = reason
        self._tell("reason", **asdict(reason))

    def _tell(self, kind: str, **content: Any) -> None:
        """Notify rank 0 last, because its exit also ends this thread."""
        for rank in sorted(self._members, reverse=True):
            if self._members[rank].link.open:
                self._members[rank].link.send(kind, **content)


class RankConnection:
    """A rank's connection to the hub, and in rank 0 the hub itself."""

    def __init__(self, link: JsonConnection, hub: Hub | None = None):
        self.link, self.hub = link, hub
        os.register_at_fork(after_in_child=self._leave_in_child)

    def poll(self, seconds: float) -> list[dict[str, Any]]:
        """Messages that arrive within ``seconds``; the last one is ``gone`` if the hub has exited."""
        self.link.socket.settimeout(seconds)
        messages = self.link.receive()
        return messages if self.link.open else [*messages, {"kind": "gone"}]

    def close(self) -> None:
        """Close the connection after ``bye`` was sent and ``done`` received."""
        if self.hub is not None:
            self.hub.join()
        self.link.close()

    def _leave_in_child(self) -> None:
        """Close the connection in forked children (e.g. of user callbacks); an open copy would hide this rank's
        exit."""
        if self.link.open:
            os.close(self.link.socket.detach())
            if self.hub is not None:
                self.hub.leave_in_child()


def connect() -> RankConnection:
    """Connect all ranks after the process group is initialized; raises ``ConfigError`` if rank 0 is unreachable."""
    one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))) == ranks.world_size()
    hub: Hub | None = None

    def open_hub() -> tuple[list[str], int, str]:
        nonlocal hub
        hub = Hub("127.0.0.1" if one_machine else "", secrets.token_hex(16), ranks.world_size())
        return ["127.0.0.1"] if one_machine else _own_addresses(), hub.port, hub.token

    addresses, port, token = ranks.from_rank_0(open_hub)
    return RankConnection(reach(addresses, port, token, ranks.rank()), hub)


def reach(addresses: Sequence[str], port: int, token: str, rank: int) -> JsonConnection:
    """Connect to the hub at the first responding address; raises ``ConfigError`` if none responds."""
    reasons = []
    for address in addresses:
        try:
            link = JsonConnection(socket.create_connection((address, port), timeout=CONNECT_SECONDS))
        except OSError as error:
            reasons.append(f"{address}: {error}")
            continue
        link.send("hello", token=token, rank=rank, host=socket.gethostname())
        link.socket.settimeout(WELCOME_SECONDS)
        messages = link.receive()
        if messages and messages[0].get("kind") == "welcome":
            link.keep(messages[1:])
            return link
        link.close()
        reasons.append(f"{address}: another service answers")
    raise ConfigError(
        f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at port {port} ({'; '.join(reasons)}); the "
        "machines of a job must be able to connect to each other on any port"
    )


def _own_addresses() -> list[str]:
    """Candidate addresses of this machine, most likely first."""
    master = os.environ["MASTER_ADDR"]
    addresses = []
    for family, kind, protocol, _, address in socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)  # sends nothing: the kernel only chooses the interface that leads there
            except OSError:
                continue
            addresses.append(probe.getsockname()[0])
    local = [address for address in addresses if address.startswith("127.") or address == "::1"]
    return list(dict.fromkeys([a for a in addresses if a not in local] + [master, socket.gethostname(), *local]))
