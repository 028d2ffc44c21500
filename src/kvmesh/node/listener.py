"""What a node tells and asks its engine."""

from __future__ import annotations

from kvmesh.core.keys import ChunkKey
from kvmesh.wire import link
from kvmesh.wire.control import ControlError
from kvmesh.wire.operations import AnyCommand


class NodeListener:
    """What an engine hears of its node. The base class ignores everything: a stand-alone node has no engine."""

    def on_visible(self, appeared: list[ChunkKey], vanished: list[ChunkKey]) -> None:
        """Keys that somebody else holds now, or nobody any more."""

    def on_visible_reset(self, keys: list[ChunkKey]) -> None:
        """From now on these are the keys that somebody else holds, and no others."""

    def on_asked(self, held: list[bytes], missing: list[bytes]) -> None:
        """What the directory has said of these keys, which it was asked for."""

    def on_directory(self, state: link.Directory) -> None:
        """Whether the directory answers, and how many peers there are."""

    def operate(self, operation_id: str, command: AnyCommand, timeout_s: float) -> bool:
        """Have the engine carry out a command; it reports to `NodeOperations.reported`. False without an engine."""
        del operation_id, command, timeout_s
        return False

    async def make_keys(self, tokens: list[int], cache_salt: str | None) -> list[bytes]:
        """The keys of a prompt's chunks. Raises ControlError when there is no engine to say."""
        del tokens, cache_salt
        raise ControlError("no_engine", "this node has no engine that could say")

    def on_rates(self, rates: link.Rates) -> None:
        """How fast the peers are."""
