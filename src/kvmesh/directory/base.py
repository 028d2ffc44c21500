"""What a node needs from a directory, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvmesh.wire.directory import Answer, Ask, Changes, FetchReport, Member, NodeStatistics, Snapshot, UseReport


class DirectoryListener(Protocol):
    """The node's side: how it hears of others and what it tells. All methods run on the node's event loop and return
    at once.
    """

    def on_connection(self, connected: bool) -> None:
        """The directory answers, or no longer does. What is known of others stays valid as a hint."""

    def on_member_up(self, member: Member) -> None: ...

    def on_member_down(self, instance_id: str, incarnation: str, reason: str) -> None: ...

    def on_changes(self, changes: Changes) -> bool:
        """Apply another instance's changes; False asks for a snapshot of it."""

    def on_snapshot(self, part: Snapshot) -> bool: ...

    def statistics(self) -> NodeStatistics: ...

    def take_use_report(self, *, whole: bool) -> UseReport | None:
        """How lookups have gone since the last report; None when there is no news. `whole`: for a directory that may
        know nothing of us yet.
        """

    def on_ask(self, ask: Ask, answer: Callable[[Answer], None]) -> None:
        """A question to this node (`kvmesh.wire.control`). `answer` is called once, now or later, on this loop."""


class DirectoryClient(Protocol):
    """A node's connection to a directory. It reconnects for ever by itself and never raises into its caller."""

    @property
    def problem(self) -> str:
        """What is wrong with the directory now, in words; empty when all is well."""

    async def run(self, member: Member) -> None:
        """Join as `member` and serve until cancelled; then leave."""

    def changes_pending(self) -> None:
        """The outbox has something new. Called on the event loop."""

    def follow_inventories(self, wanted: bool) -> None:
        """Whether the listener is to hear what others hold. If not, `ask` says it chunk by chunk; may be called before
        and while `run` runs.
        """

    async def ask(self, keys: Sequence[bytes]) -> dict[bytes, list[tuple[str, str]]] | None:
        """Who holds each of `keys`, as (instance id, incarnation), without those that nobody holds; None when the
        directory cannot be asked now. One round trip; the caller sees to a deadline.
        """

    def leave(self) -> None:
        """Be a member no longer, and stay away for good."""

    def report(self, report: FetchReport) -> None:
        """Tell of a finished fetch; may be lost."""
