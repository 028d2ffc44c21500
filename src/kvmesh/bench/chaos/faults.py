"""The faults. Each is a context manager: the fault is there while the block runs, and is over when it ends.

A fault that heals by itself (a killed process that is started again by whoever watches it) ends at once; what the
harness measures then is the healing.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import time
from collections.abc import Iterator

from kvmesh.bench.chaos.actors import send_signal, stopped
from kvmesh.bench.chaos.frames import Port, shower
from kvmesh.bench.chaos.stage import CHUNK_BYTES, CHUNKS, DOCUMENTS, Stage, wait_until
from kvmesh.bench.cluster import HOST, wait_healthy
from kvmesh.bench.stand_in import stand_in_format
from kvmesh.errors import KVMeshError
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.transfer.security import PeerSecurity
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.peer import Hello

FRAMES_PER_PORT = 1000
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - filled up only where it is a small mount of our own


# -- the peer ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def peer_node_killed(stage: Stage) -> Iterator[None]:
    """Kill -9 of the peer's node."""
    restarts = stage.holder.status().restarts
    send_signal(stage.holder.status().node_pids[:1], signal.SIGKILL)
    yield
    stage.later(lambda: stage.holder.wait_status(lambda now: now.restarts > restarts and bool(now.node_pids)))


@contextlib.contextmanager
def peer_stopped(stage: Stage) -> Iterator[None]:
    """SIGSTOP of the peer's node, later SIGCONT."""
    with stopped(stage.holder.status().node_pids):
        yield


@contextlib.contextmanager
def peer_restarted(stage: Stage) -> Iterator[None]:
    """The peer's engine ends in good order and starts again."""
    stage.holder.close()
    stage.restart_holder()
    yield


@contextlib.contextmanager
def engine_killed(stage: Stage) -> Iterator[None]:
    """Kill -9 of the peer's engine, later started again."""
    stage.holder.status()  # so that its children are known
    stage.holder.kill(node_too=False)
    left = stage.holder.wait_family()
    if left:
        stage.problems.append(f"processes outlive their engine: {left}")
    stage.holder.kill()
    yield
    stage.restart_holder()


@contextlib.contextmanager
def nixl_process_killed(stage: Stage) -> Iterator[None]:
    """Kill -9 of the process that serves NIXL."""
    send_signal(stage.holder.status().node_pids[1:], signal.SIGKILL)
    yield


@contextlib.contextmanager
def own_node_killed(stage: Stage) -> Iterator[None]:
    """Kill -9 of the reader's own node."""
    send_signal(stage.reader.status().node_pids[:1], signal.SIGKILL)
    yield


@contextlib.contextmanager
def own_node_stopped(stage: Stage) -> Iterator[None]:
    """SIGSTOP of the reader's own node, for ever.

    Nobody continues it: its engine has to notice, to kill it and to start another.
    """
    send_signal(stage.reader.status().node_pids, signal.SIGSTOP)
    yield


# -- bytes and slots ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def corrupted_in_flight(stage: Stage) -> Iterator[None]:
    """A proxy changes bytes between the peers.

    Whoever delivered wrong bytes is not asked for that chunk again until it announces it anew, so the end of this is
    that the chunks are evicted and stored anew.
    """
    assert stage.corrupting is not None
    stage.corrupting.is_corrupting = True
    yield
    stage.corrupting.is_corrupting = False
    store_anew(stage)
    if not stage.corrupting.changed:
        stage.problems.append("the proxy had nothing to corrupt")


@contextlib.contextmanager
def slots_spoilt(stage: Stage) -> Iterator[None]:
    """A byte of every chunk changes in the holder's memory.

    Memory that changes behind the checksum; what ends it is that the chunks are evicted and stored anew.
    """
    stage.holder.tell("spoil", first=0, count=DOCUMENTS, chunks=CHUNKS)
    yield
    store_anew(stage)


def store_anew(stage: Stage) -> None:
    """Evict all documents, and store them again, as an engine under pressure would in time."""
    stage.holder.tell("forget", first=0, count=DOCUMENTS, chunks=CHUNKS)
    stage.publish()


@contextlib.contextmanager
def slots_reused(stage: Stage) -> Iterator[None]:
    """The holder evicts and rewrites its slots all the time.

    The holder's pool is too small for what it stores, and every slot changes all the time, also while it is sent.
    """
    stage.holder.tell("churn", documents=3 * DOCUMENTS, chunks=CHUNKS)
    yield
    stage.holder.tell("churn", documents=0, chunks=0)
    stage.publish()


# -- the network -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def link_cut(stage: Stage) -> Iterator[None]:
    """The link between the peers is cut without a word."""
    assert stage.network is not None
    stage.network.cut()
    yield
    stage.network.heal()


@contextlib.contextmanager
def link_cut_one_way(stage: Stage) -> Iterator[None]:
    """Packets from holder to reader vanish."""
    assert stage.network is not None
    stage.network.cut(from_reader=False)
    yield
    stage.network.heal()


@contextlib.contextmanager
def link_slow(stage: Stage) -> Iterator[None]:
    """The link carries 3 Mbit/s.

    A document takes longer than its deadline; what arrives in time is used.
    """
    assert stage.network is not None
    stage.network.slow_down("3mbit")
    yield
    stage.network.heal()


@contextlib.contextmanager
def cut_off(stage: Stage) -> Iterator[None]:
    """The reader is cut off from peer and controller, and dropped.

    From the peer and from the controller, for longer than the controller waits.
    """
    assert stage.network is not None
    stage.network.cut_off_reader()
    yield
    wait_until(lambda: len(stage.controller.instances()) < 2, 20)
    stage.network.heal()


# -- who is who --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def wrong_format(stage: Stage) -> Iterator[None]:
    """An instance with other weights announces the same keys.

    Another model under the same name joins, with the same keys and other bytes.
    """
    stranger = stage.join("stranger", foreign_weights=True, lies=True)
    stranger.tell("put", first=0, count=DOCUMENTS, chunks=CHUNKS)
    yield
    if stranger.status().peers:
        stage.problems.append("the stranger has peers")
    stranger.close()


@contextlib.contextmanager
def wrong_incarnation(stage: Stage) -> Iterator[None]:
    """The peer has a new life that nobody was told of.

    The peer has another life on the same port, and the controller cannot tell anybody.
    """
    with stopped([stage.controller.pid]):
        restarts = stage.holder.status().restarts
        send_signal(stage.holder.status().node_pids[:1], signal.SIGKILL)
        stage.holder.wait_status(lambda now: now.restarts > restarts and bool(now.node_pids))
        yield


@contextlib.contextmanager
def address_reused(stage: Stage) -> Iterator[None]:
    """Another instance has got the dead peer's address.

    The peer's host dies without a word, and another instance gets its address and port.
    """
    stage.holder.status()
    stage.holder.kill()
    other = stage.join("other", peer_port=stage.holder.peer_port)
    other.tell("put", first=0, count=DOCUMENTS, chunks=CHUNKS, series="other ")
    yield
    other.close()
    stage.restart_holder()


@contextlib.contextmanager
def duplicate_id(stage: Stage) -> Iterator[None]:
    """A second instance with the holder's id."""
    double = stage.join("double", instance_id="holder")
    yield
    if not wait_until(lambda: "code=duplicate_instance" in double.log() and "holder" in double.log(), 10):
        stage.problems.append("the second instance was not refused by name")
    double.close()


@contextlib.contextmanager
def clocks_apart(stage: Stage) -> Iterator[None]:
    """The peer's monotonic clock is ten days ahead.

    The holder starts again with a monotonic clock that is ten days ahead of everybody else's.
    """
    stage.holder.close()
    before = stage.holder.prefix
    offset = str(10 * 24 * 3600)
    stage.holder.prefix = (*before, "unshare", "--time", "--monotonic", offset, "--fork", "--kill-child")

    def back() -> None:
        stage.holder.close()
        stage.holder.prefix = before
        stage.restart_holder()

    stage.later(back)
    stage.restart_holder()
    yield


@contextlib.contextmanager
def wrong_key(stage: Stage) -> Iterator[None]:
    """Instances with another cluster key, and with none, want to join and to fetch."""
    strangers = [
        stage.join("other-key", lies=True, cluster_key=secrets.token_urlsafe(32)),
        stage.join("no-key", lies=True, cluster_key=None),
    ]
    for stranger in strangers:
        stranger.tell("put", first=0, count=DOCUMENTS, chunks=CHUNKS)
    for key in (None, ClusterKey(secrets.token_urlsafe(32)).peer_key()):
        if _is_let_in(stage, PeerSecurity(key)):
            stage.problems.append("the holder talks to a stranger" + (" with another key" if key else ""))
    yield
    if len(stage.controller.instances()) != 2 or any(stranger.status().peers for stranger in strangers):
        stage.problems.append("a stranger is a member")
    for stranger in strangers:
        stranger.close()


def _is_let_in(stage: Stage, security: PeerSecurity) -> bool:
    holder = stage.holder.status()
    target = PeerTarget("holder", holder.incarnation, HOST, holder.peer_port)
    ours = Hello.of("stranger", "0" * 16, stand_in_format(CHUNK_BYTES))
    try:
        PeerLink.dial(target, ours, Deadline(time.monotonic() + 5, 5), security).close()
    except KVMeshError:
        return False
    return True


# -- the controller ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def controller_killed(stage: Stage) -> Iterator[None]:
    """Kill -9 of the controller, later started again."""
    stage.controller.kill_group()
    yield
    stage.controller.start()
    wait_healthy(stage.controller, timeout_s=120)


@contextlib.contextmanager
def controller_stopped(stage: Stage) -> Iterator[None]:
    """SIGSTOP of the controller, later SIGCONT."""
    with stopped([stage.controller.pid]):
        yield


@contextlib.contextmanager
def gap_of_events(stage: Stage) -> Iterator[None]:
    """What the holder announces is lost.

    What the holder announces is lost on its way; half of the documents are stored meanwhile.
    """
    half = {"first": 0, "count": DOCUMENTS // 2, "chunks": CHUNKS}
    stage.holder.tell("forget", **half)
    time.sleep(0.2)  # for the announcement of that; it need not arrive
    lossy = stage.lossy["holder"]
    lossy.up_loss = 1.0
    stage.holder.tell("put", **half)
    yield
    lossy.up_loss = 0.0
    if not lossy.lost:
        stage.problems.append("nothing was lost")


@contextlib.contextmanager
def gap_of_notices(stage: Stage) -> Iterator[None]:
    """Half of what the controller tells the reader is lost.

    Half of what the controller sends to the reader is lost, while the holder's chunks come and go.
    """
    lossy = stage.lossy["reader"]
    lossy.down_loss = 0.5
    stage.holder.tell("churn", documents=3 * DOCUMENTS, chunks=CHUNKS)
    yield
    stage.holder.tell("churn", documents=0, chunks=0)
    stage.publish()
    lossy.down_loss = 0.0
    if not lossy.lost:
        stage.problems.append("nothing was lost")


# -- machines and strangers --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disks_full(stage: Stage) -> Iterator[None]:
    """No space in /dev/shm, for logs and temporary files; the node is killed, too.

    The disks stay full until all has healed.
    """
    folder = str(stage.folder / "small")
    stage.holder.tell("fill_disks", folders=[SHARED_MEMORY, folder])
    stage.later(lambda: stage.holder.tell("free_disks"))
    send_signal(stage.holder.status().node_pids[:1], signal.SIGKILL)
    yield


@contextlib.contextmanager
def random_frames(stage: Stage) -> Iterator[None]:
    """1,000 random frames at every port of the holder's node and of the controller."""
    holder, controller = stage.holder.status(), stage.controller
    ports = [
        Port("peer", HOST, holder.peer_port),
        Port("lookup", HOST, stage.lookup_ports["holder"]),
        Port("admin", HOST, holder.admin_port),
        Port("controller HTTP", HOST, controller.port),
        Port("controller pull", HOST, controller.pull_port, zmq=True),
        Port("controller reply", HOST, controller.reply_port, zmq=True),
        Port("controller heartbeat", HOST, controller.heartbeat_port, zmq=True),
    ]
    sent = shower(ports, FRAMES_PER_PORT, stage.seed)
    yield
    silent = [name for name, count in sent.items() if not count]
    if silent:
        stage.problems.append(f"nobody listened at: {', '.join(silent)}")
    after = stage.holder.status()
    if after.node_pids[:1] != holder.node_pids[:1] or not controller.is_running():
        stage.problems.append("a process has ended")
