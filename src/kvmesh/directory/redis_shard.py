"""What a follower knows of one shard (`kvmesh.wire.redis_layout`). Pure."""

from __future__ import annotations

from kvmesh.wire.redis_layout import ShardKeys

REWIND_MS = 10_000
"""After trouble the streams are read again from so much earlier: a promoted replica's clock may be behind."""


class Shard:
    """What is known of one shard. `members` holds incarnations by id, `sequences` the last change applied."""

    def __init__(self, keys: ShardKeys) -> None:
        self.keys = keys
        self.who_id = self.log_id = ""
        """Last entries seen; empty before the first audit."""
        self.epoch: bytes | None = None
        self.members: dict[str, str] = {}
        self.sequences: dict[str, int] = {}
        self.behind: dict[str, int] = {}
        """Sequence at the last audit of those that were behind it."""
        self.unconfirmed_until_s: float | None = None
        """The shard was lost: members that it does not name are kept until then, for they are about to come back."""
        self.audit_at_s = 0.0

    def rewind(self) -> None:
        """After trouble: look at everything, and read what came lately once more. Repetitions do no harm."""
        self.audit_at_s = 0.0
        self.who_id, self.log_id = (_earlier(position) for position in (self.who_id, self.log_id))

    def audit_soon(self, at_s: float) -> None:
        """Compare everything at `at_s`, unless that happens earlier anyway."""
        self.audit_at_s = min(self.audit_at_s, at_s)

    def forget(self, instance_id: str) -> None:
        """What is known of an instance's inventory no longer holds."""
        self.sequences.pop(instance_id, None)
        self.behind.pop(instance_id, None)


def _earlier(position: str) -> str:
    milliseconds = position.partition("-")[0]
    return f"{max(0, int(milliseconds) - REWIND_MS)}-0" if milliseconds.isdigit() else position
