"""Asks nodes over their peer ports: where the directory is in Redis, none of them is connected to this controller.

A connection per question, in a thread of its own: people ask, not requests. The node is shown the format that it told
the directory, and has to be the very instance and incarnation that is meant.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from kvmesh.errors import KVMeshError, PeerCancelledError, PeerClosedError, PeerReadError, PeerTimeoutError
from kvmesh.transfer.base import Deadline
from kvmesh.transfer.link import PeerLink, PeerTarget
from kvmesh.transfer.security import OPEN, PeerSecurity
from kvmesh.wire.control import ControlError
from kvmesh.wire.directory import Member
from kvmesh.wire.peer import FRAME_LIMIT_BYTES, Answered, Ask, Hello

THREADS = 64
CONNECT_S = 3.0
ENVELOPE_BYTES = 256
"""Room for what a frame has beside the question."""


class PeerAsks:
    """The way to nodes that are known from Redis. `ask` and `close` on the controller's loop."""

    def __init__(self, security: PeerSecurity = OPEN) -> None:
        """`security`: the cluster key, and the certificates where peers use TLS."""
        self._security = security
        self._incarnation = secrets.token_hex(8)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvmesh-ask")
        self._lock = threading.Lock()
        self._links: set[PeerLink] = set()
        self._closed = False

    async def ask(self, member: Member, question: bytes, timeout_s: float) -> Answered:
        """One question and its answer, which may be an error of the node's. Raises ControlError."""
        if len(question) + ENVELOPE_BYTES > FRAME_LIMIT_BYTES:
            raise ControlError("question_too_large", f"a question of {len(question)} bytes")
        mine: list[PeerLink] = []
        loop = asyncio.get_running_loop()
        try:
            asking = loop.run_in_executor(self._threads, self._ask, member, question, timeout_s, mine)
        except RuntimeError as error:  # no thread to be had, or none any more
            raise ControlError("stopping" if self._closed else "unreachable", str(error)) from None
        try:
            return await asking
        except asyncio.CancelledError:  # nobody waits any more: the thread is not to, either
            with self._lock:
                for link in mine:
                    link.shut_down()
            raise

    def close(self) -> None:
        """End all questions that are out."""
        with self._lock:
            self._closed = True
            for link in self._links:
                link.shut_down()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, member: Member, question: bytes, timeout_s: float, mine: list[PeerLink]) -> Answered:
        """In a thread. Puts its connection into `mine` while there is one."""
        until_s = time.monotonic() + timeout_s
        target = PeerTarget.of(member)
        ours = Hello.of("controller", self._incarnation, member.format, transports=(), pid=os.getpid())
        try:
            connecting = Deadline(min(until_s, time.monotonic() + CONNECT_S), CONNECT_S)
            link = PeerLink.dial(target, ours, connecting, self._security)
            try:
                with self._lock:
                    if self._closed:
                        raise ControlError("stopping", "the controller is stopping")
                    self._links.add(link)
                    mine.append(link)
                return link.request(Ask(question, timeout_s), Answered, Deadline(until_s, timeout_s))
            finally:
                with self._lock:
                    self._links.discard(link)
                    mine.clear()
                link.close()
        except PeerCancelledError:
            raise ControlError("stopping", "the controller is stopping") from None
        except PeerTimeoutError as error:
            raise ControlError("deadline", str(error)) from None
        except (PeerClosedError, PeerReadError) as error:
            text = f"{error}: it ended meanwhile, or its kvmesh ({member.version}) is too old to be asked"
            raise ControlError("unreachable", text) from None
        except KVMeshError as error:
            raise ControlError("unreachable", str(error)) from None
