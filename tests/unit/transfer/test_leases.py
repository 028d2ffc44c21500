from __future__ import annotations

import math
import threading
import time

import pytest

from kvmesh.core.reasons import MissReason
from kvmesh.errors import PeerCancelledError, PeerConnectError, PeerTimeoutError
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.leases import FetchBook, Leases
from support.transfer_holder import items

FOREVER = Deadline(math.inf, math.inf)
PAST = Deadline(0.0, 0.0)


class Connection:
    def __init__(self):
        self.quiet = True
        self.closed = False
        self.interrupted = False

    def is_quiet(self):
        return self.quiet

    def shut_down(self):
        self.interrupted = True

    def close(self):
        self.closed = True


def make(limit=2, keep=2, dial=None):
    return Leases(dial or (lambda _: Connection()), peer="p", keep=keep, limit=limit)


def test_a_connection_given_back_is_lent_again():
    leases = make()
    first = leases.take(FOREVER, wait=True)
    leases.give_back(first.connection)
    second = leases.take(FOREVER, wait=True)
    assert (first.is_fresh, second.is_fresh) == (True, False)
    assert second.connection is first.connection
    assert leases.connects == 1


def test_an_idle_connection_that_the_peer_closed_is_replaced():
    leases = make()
    first = leases.take(FOREVER, wait=True).connection
    leases.give_back(first)
    first.quiet = False
    assert leases.take(FOREVER, wait=True).is_fresh
    assert first.closed


def test_a_fresh_one_on_request_closes_the_idle_ones():
    leases = make()
    both = [leases.take(FOREVER, wait=True).connection for _ in range(2)]
    for connection in both:
        leases.give_back(connection)
    assert leases.take(FOREVER, wait=True, fresh=True).is_fresh
    assert all(connection.closed for connection in both)
    assert leases.open == 1


def test_beyond_the_limit_there_is_none_or_a_wait_until_the_deadline():
    leases = make(limit=1)
    leases.take(FOREVER, wait=True)
    assert leases.take(FOREVER, wait=False) is None
    with pytest.raises(PeerTimeoutError):
        leases.take(PAST, wait=True)


@pytest.mark.parametrize("how", ["give_back", "discard"])
def test_who_waits_gets_the_place_of_who_leaves(how):
    leases = make(limit=1)
    first = leases.take(FOREVER, wait=True).connection
    got = []
    waiter = threading.Thread(target=lambda: got.append(leases.take(FOREVER, wait=True)))
    waiter.start()
    getattr(leases, how)(first)
    waiter.join()
    assert got[0].is_fresh is (how == "discard")
    assert leases.open == 1


def test_a_failed_dial_frees_its_place():
    calls = []

    def dial(_):
        calls.append(1)
        raise PeerConnectError("p")

    leases = make(limit=1, dial=dial)
    for _ in range(2):
        with pytest.raises(PeerConnectError):
            leases.take(Deadline(time.monotonic() + 5, 5), wait=True)
    assert len(calls) == 2


def test_close_interrupts_what_is_lent_and_closes_the_rest():
    leases = make()
    lent, idle = (leases.take(FOREVER, wait=True).connection for _ in range(2))
    leases.give_back(idle)
    leases.close()
    leases.close()
    assert idle.closed
    assert lent.interrupted
    assert not lent.closed  # by its borrower, which may be in the middle of a call
    leases.give_back(lent)
    assert lent.closed
    with pytest.raises(PeerCancelledError):
        leases.take(FOREVER, wait=True)


def test_a_connection_made_during_close_is_closed():
    """No connection outlives the transport, whatever the order of things."""
    connection = Connection()

    def dial(_):
        leases.close()
        return connection

    leases = make(dial=dial)
    with pytest.raises(PeerCancelledError):
        leases.take(FOREVER, wait=True)
    assert connection.closed
    assert leases.open == 0


class SlowDial:
    """Makes connections when it is let, whatever the deadline; counts them."""

    def __init__(self):
        self.may_go_on = threading.Event()
        self.calls = 0

    def __call__(self, deadline):
        self.calls += 1
        assert deadline.remaining_s() > 1, "it has time of its own"
        assert self.may_go_on.wait(20)
        return Connection()


@pytest.mark.parametrize("closes", [False, True])
def test_who_waits_for_a_slow_dial_leaves_at_its_deadline(closes):
    """The connection that comes too late is for the next one, who makes no other; after `close` it is for nobody."""
    dial = SlowDial()
    leases = Leases(dial, peer="p", keep=2, limit=2, longest_dial_s=20.0)
    with pytest.raises(PeerTimeoutError):
        leases.take(Deadline(time.monotonic() + 0.01, 1.0), wait=True)
    assert leases.take(FOREVER, wait=False) is None
    taken = []

    def take():
        try:
            taken.append(leases.take(FOREVER, wait=True))
        except PeerCancelledError as error:
            taken.append(error)

    waiting = threading.Thread(target=take)
    waiting.start()
    if closes:
        leases.close()
    dial.may_go_on.set()
    waiting.join(20)
    assert (dial.calls, isinstance(taken[0], PeerCancelledError)) == (1, closes)
    if not closes:
        assert not taken[0].is_fresh
        leases.give_back(taken[0].connection)
    assert leases.open == (0 if closes else 1)


def test_a_slow_dial_that_is_waited_for_and_one_that_fails():
    dial = SlowDial()
    dial.may_go_on.set()
    leases = Leases(dial, peer="p", keep=2, limit=2, longest_dial_s=20.0)
    assert leases.take(FOREVER, wait=True).is_fresh

    def fail(_):
        raise PeerConnectError("p")

    leases = Leases(fail, peer="p", keep=2, limit=1, longest_dial_s=20.0)
    for _ in range(3):
        with pytest.raises(PeerConnectError):
            leases.take(FOREVER, wait=True)


def test_a_book_hands_out_runs_in_prefix_order_until_its_end():
    book = FetchBook(items(5), None)
    assert [book.take(2), book.take(2)] == [range(2), range(2, 4)]
    book.end(MissReason.PEER_LOST)
    book.end(MissReason.DEADLINE)
    assert book.take(2) == range(0)
    for index in range(4):
        book.hit(index, bytes(16))
    assert [outcome.reason for outcome in book.close()] == [None] * 4 + [MissReason.PEER_LOST]


def test_a_book_reports_each_item_once_and_in_order():
    """However the items were decided, the caller hears of a prefix without gaps, and of all of it by the end."""
    heard = []
    book = FetchBook(items(4), lambda outcome: heard.append(outcome.item.slot))
    book.take(4)
    book.hit(2, bytes(16))
    book.report()
    assert heard == []
    book.hit(0, bytes(16))
    book.report()
    assert heard == [0]
    book.miss(1, MissReason.STALE)
    book.report()
    assert heard == [0, 1, 2]
    book.close()
    assert heard == [0, 1, 2, 3]
