"""The engine's end of operations: whatever happens there, the engine goes on and somebody is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvmesh.bench.stand_in import make_key
from kvmesh.node.engine_commands import EngineCommands, KeyMaker
from kvmesh.wire import link
from kvmesh.wire.operations import ClearChunks, RunState

ID = "a" * 16


class World:
    """A handle that keeps what it is to tell, and a pool in which everything goes wrong."""

    slots, chunk_bytes = 8, 10

    def __init__(self, make_keys: KeyMaker | None = None) -> None:
        self.told: list[link.Operated | link.KeysMade] = []
        self.woken = 0
        self.handle = SimpleNamespace(answer=self.told.append, on_request=None)
        self.commands = EngineCommands(self.handle, make_keys=make_keys, wake=self._wake)  # type: ignore[arg-type]

    def _wake(self) -> None:
        self.woken += 1

    def keys(self) -> list[bytes]:
        return [make_key("a")]

    def state(self, key: bytes) -> None:
        raise ZeroDivisionError

    def ask(self, message: link.Operate | link.MakeKeys) -> None:
        self.handle.on_request(message)


def test_before_the_pool_is_there() -> None:
    world = World()
    world.ask(link.Operate(ID, ClearChunks(), 5.0))
    [told] = world.told
    assert isinstance(told, link.Operated)
    assert told.report.state is RunState.FAILED
    assert not world.commands.has_work()


def test_a_bug_costs_the_operation_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.commands.attach(world, pin_max_share=0.5)  # type: ignore[arg-type]
    world.ask(link.Operate(ID, ClearChunks(), 5.0))
    assert world.woken == 1
    assert world.commands.has_work()
    world.commands.step()
    [told] = world.told
    assert isinstance(told, link.Operated)
    assert (told.operation_id, told.report.state) == (ID, RunState.FAILED)
    assert "unforeseen" in caplog.text
    assert not world.commands.has_work()


def test_keys() -> None:
    def make_keys(tokens: list[int], salt: str | None) -> list[bytes]:
        if not tokens:
            raise ZeroDivisionError
        return [make_key(f"{tokens} {salt}")]

    world = World(make_keys)
    world.ask(link.MakeKeys(1, [1, 2], "s"))
    world.ask(link.MakeKeys(2, [], None))
    good, bad = world.told
    assert isinstance(good, link.KeysMade)
    assert isinstance(bad, link.KeysMade)
    assert (good.keys, good.error) == ([make_key("[1, 2] s")], "")
    assert "ZeroDivisionError" in bad.error
