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
