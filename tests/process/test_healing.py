"""What heals by itself, and what is refused instead: restarts, cuts, addresses and ids used twice, clocks."""

from __future__ import annotations

import ast
import os
import signal
import threading
from pathlib import Path

import pytest
import zmq

import kvmesh
from kvmesh.bench.chaos.matrix import QUICK, choose, run_matrix
from kvmesh.bench.stand_in import StandInEngine, make_key, stand_in_format
from kvmesh.config import KVMeshConfig
from process.controller_nodes import ControllerProcess, Node, wait_for
from support.stand_ins import CHUNK_BYTES, make_config, running_controller, running_engine
from unit.controller.makers import make_keys, make_member

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

LIGHT_NODES = 48
KEYS = [make_key(f"heal-{number}") for number in range(32)]


class Crowd:
    """Light nodes that live in one thread: they beat, register again when told to, send inventories when asked."""

    def __init__(self, ports: dict[str, int], count: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        kv_format = stand_in_format(CHUNK_BYTES)
        members = [make_member(f"light-{index}", peer_port=1, format=kv_format) for index in range(count)]
        self.nodes = [Node(self._context, ports, member) for member in members]
        self._closing = threading.Event()
        self._rounds = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._live)

    def start(self) -> None:
        for index, node in enumerate(self.nodes):
            node.inventory = make_keys(20, f"{index}-")
            node.register()
        self._thread.start()

    def knows_itself(self) -> bool:
        """Everybody knows exactly what everybody else holds."""
        assert self._error is None, self._error
        return all(
            node.replica.keys_of(other.who[0]) == set(other.inventory)
            for node in self.nodes
            for other in self.nodes
            if other is not node
        )

    def knows(self, instance_id: str, keys: list[bytes]) -> bool:
        return all(node.replica.keys_of(instance_id) >= set(keys) for node in self.nodes)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _live(self) -> None:
        try:
            while not self._closing.is_set():
                for node in self.nodes:
                    node.live()
        except BaseException as error:  # told to whoever waits
            self._error = error


def engine_config(ports: dict[str, int], instance_id: str) -> KVMeshConfig:
    return make_config(
        None,
        instance_id,
        heartbeat_interval_s=0.2,
        enable_controller=True,
        controller_pull_url=f"tcp://127.0.0.1:{ports['pull']}",
        controller_reply_url=f"tcp://127.0.0.1:{ports['reply']}",
    )


def test_controller_restart_under_load_with_fifty_nodes() -> None:
    """Two real nodes and 48 light ones of one format; the controller is killed and comes back empty on its ports.

    While it is away, known chunks are fetched on and on. Afterwards all 50 are members again, everybody knows all
    inventories, and what was published meanwhile is found.
    """
    first = ControllerProcess().wait_started()
    ports = {name: port for name, port in first.ports.items() if name != "http"}
    crowd = Crowd(ports, LIGHT_NODES)
    second = None
    try:
        with (
            running_engine(engine_config(ports, "left")) as left,
            running_engine(engine_config(ports, "right")) as right,
        ):
            crowd.start()
            left.put(KEYS)
            assert right.wait_visible(KEYS)
            assert right.wait_peers(LIGHT_NODES + 1, timeout_s=30)
            wait_for(lambda: crowd.knows_itself() and crowd.knows("left", KEYS), 30)
            first.stop(signal.SIGKILL)
            new = [make_key(f"meanwhile-{number}") for number in range(8)]
            left.put(new)
            for _ in range(20):
                fetch_all_again(right)
            second = ControllerProcess(ports=ports)
            fetch_all_again(right)
            second.wait_started()
            assert right.wait_visible(new, timeout_s=60)
            fetch_all_again(right, new)
            wait_for(lambda: crowd.knows_itself() and crowd.knows("left", KEYS + new), 60)
            listed = {one["instance_id"] for one in second.get("/api/v1/instances?limit=1000")["instances"]}
            assert listed == {"left", "right"} | {node.who[0] for node in crowd.nodes}
            assert right.node.restarts == left.node.restarts == 0
    finally:
        crowd.close()
        for controller in filter(None, (first, second)):
            controller.stop(signal.SIGKILL)


def fetch_all_again(engine: StandInEngine, keys: list[bytes] = KEYS) -> None:
    got = engine.get(keys)
    assert (got.local + got.fetched, got.wrong) == (len(keys), 0), got
    engine.forget(keys)


def test_a_restarted_node_announces_its_full_pool_without_hashing_it(tmp_path: Path) -> None:
    """The checksums in the ledger are used again; only what was published while there was no node is hashed.

    Shown by bytes that are wrong while the new node starts, and right again before anybody fetches: had it hashed
    them, its checksums would fit the wrong bytes, and the fetches would be refused as corrupt.
    """
    slots = 64
    old = [make_key(f"old-{number}") for number in range(slots - 8)]
    new = [make_key(f"new-{number}") for number in range(8)]
    with (
        running_controller(tmp_path) as controller,
        running_engine(make_config(controller, "holder"), slots=slots) as holder,
        running_engine(make_config(controller, "reader"), slots=slots) as reader,
    ):
        holder.put(old)
        assert reader.wait_visible(old)
        pid = holder.node.pid
        assert pid is not None
        rows = [holder.pool.row(holder._slots[key]) for key in old]
        os.kill(pid, signal.SIGSTOP)
        for row in rows:
            row[0] ^= 0xFF
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not holder.node.state.alive)
        holder.put(new)
        assert holder.wait_node(restarts=1)
        assert reader.wait_visible(new)
        for row in rows:
            row[0] ^= 0xFF
            row.release()
        assert reader.get_all(old + new), "everything is served with the checksums of before"
        assert holder.ledger.statistics().checksummed == slots


def test_what_was_stored_again_while_the_controller_was_away_is_fetched_again(tmp_path: Path) -> None:
    """A chunk that its holder has evicted is asked for in vain until the reader stops asking. Nobody tells the reader
    one by one what happened while there was no controller, and yet it learns that the chunk is there again.
    """
    with (
        running_controller(tmp_path) as controller,
        running_engine(make_config(controller, "holder", heartbeat_interval_s=0.3)) as holder,
        running_engine(make_config(controller, "reader", heartbeat_interval_s=0.3)) as reader,
    ):
        holder.put(KEYS)
        assert reader.wait_visible(KEYS)
        controller.kill_group()
        wait_for(lambda: not holder.node.state.directory_connected)  # from now on changes are not even sent
        holder.forget(KEYS[:4])

        def has_given_up() -> bool:
            assert reader.get(KEYS[:4]).fetched == 0
            return not any(reader.node.is_visible(key) for key in KEYS[:4])

        wait_for(has_given_up)
        holder.put(KEYS[:4])
        controller.start()
        assert reader.get_all(KEYS, timeout_s=60)


@pytest.mark.parametrize(
    "cells",
    [("address-reused", "duplicate-id", "wrong-incarnation", "clocks-apart"), ("cut-off", "link-cut-one-way")],
    ids=["identities", "namespaces"],
)
def test_faults_of_the_matrix_that_are_about_healing(cells: tuple[str, ...], tmp_path: Path) -> None:
    """An address or an id used twice, a life nobody was told of, clocks apart; a cut from everybody, a one-way cut."""
    chosen = choose([f"tcp/{cell}" for cell in cells], quick=False)
    results = list(run_matrix(chosen, tmp_path, pace=QUICK, seed=3))
    assert len(results) == len(cells)
    for result in results:
        assert not result.failures, result
    if all(result.not_run for result in results):
        pytest.skip(results[0].not_run)


WALL_CLOCK_USERS = {
    "vllm/pool_names.py",  # the times of files
    "doctor/situation.py",  # how far two machines' clocks are apart
    "controller/ui/live.py",  # the time of day, for people
}


def test_no_deadline_reads_a_clock_that_can_jump() -> None:
    """`time.time` and `datetime.now` are used where people or files want to know the time, and nowhere else."""
    root = Path(kvmesh.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                if called in {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}:
                    found.add(path.relative_to(root).as_posix())
    assert found <= WALL_CLOCK_USERS
