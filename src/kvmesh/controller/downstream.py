"""How far one member has got with the notices that it was sent. Pure: the caller brings the time.

The socket's own queue is counted in frames, hidden, and lost with its connection. So nodes report the bytes they have
received (`Heartbeat.received_bytes`), which tells three things that a socket does not: how much is under way (a window,
as in TCP, keeps a slow member from piling up memory here), whether something was lost, and how late a member is, for
people.
"""

from __future__ import annotations

WINDOW_BYTES = 32 * 1024 * 1024
"""Bulk under way to one member. A part of a snapshot is under 1 MB; at one heartbeat in 2 s this allows 16 MB/s."""
RETRY_S = 0.5
"""Pause after a full socket queue."""
STALLED_HEARTBEATS = 2
"""So many heartbeats without progress, with old bytes missing, and notices count as lost."""
MOST_PATIENT = 32
"""As many for a member that was called lost again and again: what it is sent may be late, not lost, and sending all of
it once more would make it later still.
"""
ANSWER_HEARTBEATS = 8
"""So many heartbeat intervals may the answer to a Register be on its way, behind what else waits there. It is lost only
with its connection, so this is for what nobody has thought of.
"""


class Downstream:
    """One registration of one member."""

    __slots__ = (
        "_blocked_until_s",
        "_due_bytes",
        "_patience",
        "_since_s",
        "_stalled",
        "counted",
        "lost",
        "received_bytes",
        "registration",
        "sent_bytes",
    )

    def __init__(self, registration: int, since_s: float, patience: int = STALLED_HEARTBEATS) -> None:
        """
        Args:
            registration: its number.
            since_s: when it was made.
            patience: the number of heartbeats without progress after which notices count as lost.
        """
        self.registration = registration
        self._since_s = since_s
        self._patience = patience
        self.sent_bytes = 0
        self.received_bytes = 0
        self.counted = False
        """The member has returned our registration number: its counts can be relied on."""
        self.lost = False
        """Something did not reach the member that nothing else will repair: it must register again."""
        self._blocked_until_s = 0.0
        self._due_bytes = 0
        """What had been sent at the heartbeat before."""
        self._stalled = 0

    @property
    def outstanding_bytes(self) -> int:
        """Sent and not yet reported as received; 0 for a member that does not count."""
        return max(0, self.sent_bytes - self.received_bytes) if self.counted else 0

    def open(self, now_s: float) -> bool:
        """Whether Changes and Snapshots may be sent now."""
        return not self.lost and now_s >= self._blocked_until_s and self.outstanding_bytes < WINDOW_BYTES

    def block(self, now_s: float) -> None:
        """The socket's queue is full: leave it alone for a moment."""
        self._blocked_until_s = now_s + RETRY_S

    def acknowledge(self, registration: int, received_bytes: int) -> None:
        """Take what a heartbeat reports. Sets `lost` when bytes are missing and none arrive any more."""
        if registration == 0 and not self.counted:
            return  # does not count
        if registration == self.registration:
            moved = received_bytes > self.received_bytes or not self.counted
            self.counted = True
            self.received_bytes = received_bytes
            fine = moved or received_bytes >= self._due_bytes
        else:
            fine = False  # our Registered has not arrived
        self._stalled = 0 if fine else self._stalled + 1
        self._due_bytes = self.sent_bytes
        if self._stalled >= self._patience:
            self.lost = True

    def awaits_answer(self, now_s: float, heartbeat_interval_s: float) -> bool:
        """Whether our Registered may still be under way, so that a member that asks for it again merely asks twice."""
        is_recent = now_s - self._since_s < ANSWER_HEARTBEATS * heartbeat_interval_s
        return is_recent and not self.lost and not self.counted

    def next_patience(self) -> int:
        """That of the member's next registration."""
        return min(MOST_PATIENT, 2 * self._patience) if self.lost else STALLED_HEARTBEATS
