"""A swarm: many simulated instances in a few processes, over real connections to a directory.

A simulated instance has a member's name, an inventory of made-up keys and whatever a directory's protocol asks of a
node; no pool, no engine and no replica. So a thousand of them fit on one machine, and what is measured is the
directory. What they say and hear is the matter of a `Link`, one per process: `kvmesh.bench.swarm_controller` has that
of the controller, and another directory needs only another link.

    swarm = Swarm(plan, functools.partial(ControllerLink, urls))      a callable that can be pickled
    with contextlib.closing(swarm):
        swarm.start()
        swarm.join()             every instance registers and publishes its inventory
        swarm.publish(5000.0)    events per second from now on, all instances together
        swarm.statistics()

An event is one message of an instance that publishes one chunk and retracts its oldest. The chunk's key contains the
time at which it was sent, so a link that decodes what it hears measures how long news take (`SwarmStatistics.hear`);
the processes of one machine have one clock (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Protocol

from kvmesh.bench.stand_in import stand_in_format
from kvmesh.core.format import Format
from kvmesh.descriptors import raise_descriptor_limit
from kvmesh.errors import StartupError
from kvmesh.wire.directory import Member

KEY = struct.Struct("<QQIIQI")
"""Moment of sending in ns (0: part of the first inventory), number, instance, 0, random, group: 36 bytes."""
MAX_DELAYS = 20_000
"""Delays that one process keeps; beyond it a random choice of all."""
ANSWER_S = 30.0
"""A process of the swarm that says nothing for so long is taken for dead."""
TURN_S = 0.005
"""A process looks at all its connections so often, not more: looking at hundreds of them takes a while, and the
machine's cores are what is to be measured. Delays are known to so much.
"""


@dataclass(frozen=True, kw_only=True)
class SwarmPlan:
    """What a swarm is."""

    instances: int = 1000
    chunks: int = 3000
    """In each instance's inventory, all different."""
    formats: int = 20
    """Instances share within a format; they are dealt out evenly."""
    processes: int = 2
    joins_per_s: float = 250.0
    heartbeat_interval_s: float = 2.0
    chunk_bytes: int = 4 << 20
    seed: int = 1


@dataclass(slots=True)
class SimulatedInstance:
    """One instance. Its link keeps what belongs to the connection in `session`."""

    number: int
    member: Member
    inventory: deque[bytes]
    sequence: int = 0
    session: object = None


@dataclass(kw_only=True)
class SwarmStatistics:
    """What one process of the swarm has seen, or all together."""

    joined: int = 0
    events_sent: int = 0
    notices: int = 0
    """Frames or messages heard."""
    received_bytes: int = 0
    changes_heard: int = 0
    """By those that decode what they hear."""
    gaps: int = 0
    """Changes that did not continue a sequence, as heard by those that decode."""
    resyncs: int = 0
    refused: int = 0
    late_events: int = 0
    """Events that could not be sent at their time because the process was too slow; not made up for."""
    delays_s: list[float] = field(default_factory=list)
    """From sending an event to hearing of it, as measured by those that decode."""

    def add(self, other: SwarmStatistics) -> None:
        """Sum up."""
        for name in ("joined", "events_sent", "notices", "received_bytes", "changes_heard", "gaps", "resyncs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.refused += other.refused
        self.late_events += other.late_events
        self.delays_s += other.delays_s

    def hear(self, key: bytes, now_ns: int) -> None:
        """Take the delay of one event's key."""
        sent_ns = KEY.unpack_from(key)[0] if len(key) == KEY.size else 0
        if not sent_ns:
            return
        delay_s = (now_ns - sent_ns) / 1e9
        if len(self.delays_s) < MAX_DELAYS:
            self.delays_s.append(delay_s)
        else:
            self.delays_s[random.randrange(MAX_DELAYS)] = delay_s


class Link(Protocol):
    """The connections of one process's instances to a directory. Used from one thread."""

    statistics: SwarmStatistics

    def join(self, instance: SimulatedInstance) -> None:
        """Connect it and register it; publish its inventory. Counts it as joined when it is a member."""

    def publish(self, instance: SimulatedInstance, added: bytes, removed: bytes) -> None:
        """Tell of one event. The instance's inventory and sequence are up to date already."""

    def beat(self, instance: SimulatedInstance) -> None:
        """Its heartbeat is due."""

    def poll(self, timeout_s: float) -> None:
        """Take what has come, waiting for the first of it at most so long."""

    def close(self) -> None:
        """End all connections."""


MakeLink = Callable[[SwarmPlan], Link]
"""Makes a process's link. Called in that process, so it must be possible to pickle it."""


def make_format(number: int, chunk_bytes: int) -> Format:
    """The formats of a swarm differ in the model's name."""
    return stand_in_format(chunk_bytes, model_name=f"swarm-model-{number}")


def make_instance(plan: SwarmPlan, number: int) -> SimulatedInstance:
    """Instance `number` of a swarm. Its keys depend on nothing but the plan's seed and the number."""
    rng = random.Random((plan.seed << 32) | number)
    keys = deque(KEY.pack(0, index, number, 0, rng.getrandbits(64), 0) for index in range(plan.chunks))
    member = Member(
        instance_id=f"swarm-{number:04d}",
        incarnation=secrets.token_hex(8),
        peer_host="127.0.0.1",
        peer_port=1024 + number % 60_000,
        admin_port=0,
        transports=("tcp",),
        format=make_format(number % plan.formats, plan.chunk_bytes),
        slots=max(1, plan.chunks * 5 // 4),
        version="swarm",
    )
    return SimulatedInstance(number, member, keys)


class Swarm:
    """The processes of a swarm. Use from one thread; end with `close`."""

    def __init__(self, plan: SwarmPlan, make_link: MakeLink) -> None:
        self.plan = plan
        self._make_link = make_link
        self._workers: list[_Handle] = []

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def start(self) -> None:
        """Start the processes. They do nothing yet."""
        context = multiprocessing.get_context("spawn")
        for index in range(self.plan.processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(self.plan, index, self._make_link, theirs), name=f"swarm-{index}", daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append(_Handle(process, ours))

    def join(self, timeout_s: float = 120.0) -> float:
        """Have every instance join; returns when all are members, with the seconds that it took."""
        started_s = time.monotonic()
        self._tell("join")
        while self.statistics().joined < self.plan.instances:
            if time.monotonic() - started_s > timeout_s:
                found = self.statistics()
                raise StartupError(
                    f"swarm of {self.plan.instances}",
                    f"all instances to be members within {timeout_s:g} s",
                    f"{found.joined} are, {found.refused} were refused",
                    "look at the directory's log",
                )
            time.sleep(0.05)
        return time.monotonic() - started_s

    def publish(self, events_per_s: float) -> None:
        """From now on so many events per second, all instances together; 0: none."""
        self._tell("publish", events_per_s / self.plan.processes)

    def forget_delays(self) -> None:
        """Measure delays from now on."""
        self._tell("forget")

    def statistics(self) -> SwarmStatistics:
        """All processes together. Raises StartupError when one of them has died."""
        total = SwarmStatistics()
        self._tell("statistics")
        for worker in self._workers:
            total.add(worker.answer())
        return total

    def close(self) -> None:
        """End all processes; what does not end is killed."""
        with contextlib.suppress(StartupError):
            self._tell("stop")
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    def _tell(self, command: str, value: float = 0.0) -> None:
        for worker in self._workers:
            worker.tell(command, value)


class _Handle:
    """Our end of one process of the swarm."""

    def __init__(self, process: multiprocessing.process.BaseProcess, pipe: Connection) -> None:
        self.process = process
        self._pipe = pipe

    def tell(self, command: str, value: float) -> None:
        try:
            self._pipe.send((command, value))
        except OSError:
            raise self._died() from None

    def answer(self) -> SwarmStatistics:
        try:
            if not self._pipe.poll(ANSWER_S):
                raise self._died()
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        assert isinstance(answer, SwarmStatistics)
        return answer

    def end(self) -> None:
        self.process.join(ANSWER_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._pipe.close()

    def _died(self) -> StartupError:
        status = self.process.exitcode
        found = "none, though it lives" if status is None else f"exit status {status}"
        return StartupError(f"swarm process {self.process.name}", f"an answer within {ANSWER_S:g} s", found)


# -- in the processes --------------------------------------------------------------------------------------------------


def _work(plan: SwarmPlan, index: int, make_link: MakeLink, pipe: Connection) -> None:
    """The main function of one process."""
    raise_descriptor_limit()
    with contextlib.closing(make_link(plan)) as link, contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        _Worker(plan, index, link, pipe).run()  # those end it when whoever has started us is gone


class _Worker:
    """The life of one process's instances."""

    def __init__(self, plan: SwarmPlan, index: int, link: Link, pipe: Connection) -> None:
        self._plan = plan
        self._link = link
        self._pipe = pipe
        self._waiting = deque(make_instance(plan, number) for number in range(index, plan.instances, plan.processes))
        self._joined: list[SimulatedInstance] = []
        self._join_due_s: float | None = None
        self._beats: deque[tuple[float, SimulatedInstance]] = deque()
        """When each one's next heartbeat is due, the next one first."""
        self._events_per_s = 0.0
        self._event_due_s = 0.0
        self._number = plan.chunks
        self._turn = 0

    def run(self) -> None:
        while self._obey():
            now_s = time.monotonic()
            self._join_some(now_s)
            self._beat_some(now_s)
            self._publish_some(now_s)
            self._link.poll(0.0)
            time.sleep(max(0.0, TURN_S - (time.monotonic() - now_s)))

    def _obey(self) -> bool:
        """Do what we are told. False: end."""
        while self._pipe.poll():
            command, value = self._pipe.recv()
            if command == "stop":
                return False
            if command == "join":
                self._join_due_s = time.monotonic()
            elif command == "publish":
                self._events_per_s, self._event_due_s = value, time.monotonic()
            elif command == "forget":
                self._link.statistics.delays_s.clear()
            elif command == "statistics":
                self._pipe.send(replace(self._link.statistics, delays_s=list(self._link.statistics.delays_s)))
        return True

    def _join_some(self, now_s: float) -> None:
        while self._waiting and self._join_due_s is not None and self._join_due_s <= now_s:
            instance = self._waiting.popleft()
            self._link.join(instance)
            self._joined.append(instance)
            self._beats.append((now_s + self._plan.heartbeat_interval_s, instance))
            self._join_due_s += self._plan.processes / self._plan.joins_per_s

    def _beat_some(self, now_s: float) -> None:
        while self._beats and self._beats[0][0] <= now_s:
            due_s, instance = self._beats.popleft()
            self._link.beat(instance)
            interval_s = self._plan.heartbeat_interval_s
            self._beats.append((max(due_s + interval_s, now_s + interval_s / 2), instance))  # late ones do not crowd

    def _publish_some(self, now_s: float) -> None:
        if not self._events_per_s or not self._joined:
            return
        late = int((now_s - self._event_due_s) * self._events_per_s) - int(self._events_per_s)
        if late > 0:  # more than a second behind: say so instead of a burst
            self._link.statistics.late_events += late
            self._event_due_s += late / self._events_per_s
        for instance in self._next_publishers(now_s):
            self._number += 1
            key = KEY.pack(time.monotonic_ns(), self._number, instance.number, 0, 0, 0)
            oldest = instance.inventory.popleft() if instance.inventory else b""
            instance.inventory.append(key)
            instance.sequence += 1
            self._link.publish(instance, key, oldest)
            self._link.statistics.events_sent += 1

    def _next_publishers(self, now_s: float) -> Iterator[SimulatedInstance]:
        """In turn, as many as there are events due."""
        while self._event_due_s <= now_s:
            self._event_due_s += 1 / self._events_per_s
            self._turn = (self._turn + 1) % len(self._joined)
            yield self._joined[self._turn]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
