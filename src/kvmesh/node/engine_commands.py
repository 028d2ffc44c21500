"""The engine's end of operations: from the node's words to `PoolOperations`, and its reports back.

Words come on the handle's reading thread; `step` and everything below it run on the thread that owns the pool.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from kvmesh.node.handle import NodeHandle
from kvmesh.node.pool_operations import OperatedPool, PoolOperations
from kvmesh.wire import link
from kvmesh.wire.operations import Report, RunState

log = logging.getLogger("kvmesh.operations")

KeyMaker = Callable[[list[int], str | None], list[bytes]]


class EngineCommands:
    """What an engine does for operators. Made and attached before the handle is started."""

    def __init__(self, node: NodeHandle, *, make_keys: KeyMaker | None, wake: Callable[[], None]) -> None:
        """
        Args:
            node: the handle; its requests come here from now on.
            make_keys: (tokens, cache salt) -> chunk keys, called on the reading thread; None when nobody can say.
            wake: makes an idle engine take a step; called on the reading thread.
        """
        self._node = node
        self._make_keys = make_keys
        self._wake = wake
        self._operations: PoolOperations | None = None
        node.on_request = self._on_request

    def attach(self, pool: OperatedPool, *, pin_max_share: float) -> None:
        """From now on commands are carried out on this pool."""
        self._operations = PoolOperations(pool, pin_max_share=pin_max_share)

    # -- owner's thread ------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether `step` should be called soon."""
        return self._operations is not None and self._operations.has_work()

    def step(self) -> None:
        """Go on with what is to be done, for some milliseconds at most."""
        if self._operations is None or not self._operations.has_work():
            return
        try:
            news = self._operations.step(time.monotonic())
        except Exception as error:  # whatever it is, it must not cost the engine its step
            self._abandon(self._operations, error)
            return
        for operation_id, report in news:
            self._tell(operation_id, report)

    def expire_pins(self) -> None:
        """Before anything is evicted."""
        if self._operations is None:
            return
        try:
            self._operations.expire_pins(time.monotonic())
        except Exception as error:  # as above
            self._abandon(self._operations, error)

    def forget(self) -> None:
        """The pool is thrown away."""
        if self._operations is not None:
            self._operations.forget()

    def _abandon(self, operations: PoolOperations, error: Exception) -> None:
        log.error("operations failed in an unforeseen way and are given up; the engine goes on", exc_info=error)
        for operation_id in operations.abandon():
            self._fail(operation_id, "the engine met an error that nobody foresaw; its log says which")

    # -- reading thread ------------------------------------------------------------------------------------------------

    def _on_request(self, message: link.Operate | link.MakeKeys) -> None:
        if isinstance(message, link.MakeKeys):
            self._answer_keys(message)
            return
        if self._operations is None:
            self._fail(message.operation_id, "the engine has not finished starting")
            return
        give_up_s = time.monotonic() + message.timeout_s
        if not self._operations.submit(message.operation_id, message.command, give_up_s):
            self._fail(message.operation_id, "the engine has too many operations to carry out: try again later")
            return
        self._wake()

    def _answer_keys(self, message: link.MakeKeys) -> None:
        if self._make_keys is None:
            self._node.answer(link.KeysMade(message.number, [], "this engine cannot tell its keys"))
            return
        try:
            keys = self._make_keys(message.tokens, message.cache_salt)
        except Exception as error:  # vLLM's own code ran; whatever it is, it costs this question
            log.exception("keys could not be made tokens=%d", len(message.tokens))
            self._node.answer(link.KeysMade(message.number, [], f"the engine cannot make keys: {error!r}"))
            return
        self._node.answer(link.KeysMade(message.number, keys))

    def _fail(self, operation_id: str, text: str) -> None:
        pinned_chunks = 0 if self._operations is None else self._operations.pinned_chunks
        self._tell(operation_id, Report(state=RunState.FAILED, text=text, pinned_chunks=pinned_chunks))

    def _tell(self, operation_id: str, report: Report) -> None:
        self._node.answer(link.Operated(operation_id, report))
