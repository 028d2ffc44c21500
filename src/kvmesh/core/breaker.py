"""A circuit breaker per peer: leave a peer that just failed alone, then try it with one request. Pure: time is passed
in.
"""

from __future__ import annotations

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0


class Breaker:
    """Closed while things work. A fault opens it for a pause that doubles with each further fault; after the pause one
    probe is let through (half open), whose result closes it or opens it again.

    Owned by one thread.
    """

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._open_until_s = 0.0
        self._probing = False

    def allows(self, now_s: float) -> bool:
        """Whether a request may be sent now. In the half-open state only until `begin` was called."""
        if not self._pause_s:
            return True
        return now_s >= self._open_until_s and not self._probing

    def begin(self) -> None:
        """A request is being sent; in the half-open state it is the probe."""
        self._probing = bool(self._pause_s)

    def succeeded(self) -> None:
        self._pause_s, self._probing = 0.0, False

    def undecided(self) -> None:
        """The request ended without saying anything about the peer, such as for lack of time: another may probe."""
        self._probing = False

    def failed(self, now_s: float, *, again: bool = False) -> None:
        """A request met a fault. `again`: the peer is known for it, so it gets the longest pause at once."""
        self._pause_s = LONGEST_PAUSE_S if again else min(self._pause_s * 2 or FIRST_PAUSE_S, LONGEST_PAUSE_S)
        self._open_until_s = now_s + self._pause_s
        self._probing = False

    @property
    def is_open(self) -> bool:
        """True from a fault until a success, the half-open state included."""
        return bool(self._pause_s)
