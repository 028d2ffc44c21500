"""One request's way through: choose a backend, send, try another one while nothing has come back, stream.

What the client sees when a backend fails:

    before the first byte of a body   another backend is asked, if the request may be repeated; otherwise 502 or 504
    after it, a stream of events      an event with an error in OpenAI's form, and the end of the stream
    after it, anything else           the connection breaks off, because nothing else says "incomplete" in HTTP

The head of an answer is held back until its first byte: vLLM sends it before prefill, and an engine that dies while
prefilling costs the client nothing but time then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http import HttpVersion11

from kvmesh.router.answers import RouterError
from kvmesh.router.backends import BackendState, Fleet
from kvmesh.router.client_watch import ClientWatch
from kvmesh.router.headers import answer_headers, request_lines
from kvmesh.router.load import Ticket
from kvmesh.router.metrics import GONE, RouterMetrics
from kvmesh.router.owners import ResponseOwners
from kvmesh.router.policies import Choice, Overlap, Policy, Query
from kvmesh.router.request import BYTES_PER_TOKEN, Facts, text_blocks
from kvmesh.router.upstream import Answer, Upstream, UpstreamError

log = logging.getLogger("kvmesh.router")

RETRY_AFTER_S = 1
MAX_DEATHS = 2
"""Backends that may break off one request before it is given up: it may be the request that they die of."""
_UNAVAILABLE = 503
_STATUS = {"connect": (502, "backend_unreachable"), "closed": (502, "backend_failed")}
_STATUS |= {"timeout": (504, "backend_timeout"), "malformed": (502, "backend_failed")}

FindOverlap = Callable[[Facts, list[BackendState]], Awaitable[tuple[Overlap | None, str]]]
"""For the policy `kv`: what of the prompt is held where, or why that is not known."""


class _Response(web.StreamResponse):
    """An answer whose head leaves together with the first part of its body, which is here already."""

    _send_headers_immediately = False  # aiohttp's own Response does the same; without it only a packet more is sent


@dataclass(frozen=True)
class ProxySettings:
    """The part of RouterConfig that is needed here."""

    retries: int
    first_byte_timeout_s: float
    idle_timeout_s: float
    prefix_block_bytes: int = 0
    """0: no policy looks at text."""


@dataclass
class _Sent:
    """A request that a backend has begun to answer."""

    state: BackendState
    ticket: Ticket
    answer: Answer
    first: bytes
    """First part of the body; empty when there is none."""

    def end(self) -> None:
        self.ticket.end()
        self.answer.close()


class Proxy:
    """Forwards requests. Lives on the event loop."""

    def __init__(
        self,
        settings: ProxySettings,
        fleet: Fleet,
        policy: Policy,
        upstream: Upstream,
        metrics: RouterMetrics,
        *,
        on_failure: Callable[[BackendState, UpstreamError], None],
        find_overlap: FindOverlap | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_failure` is told of backends that have failed, so that they are checked at once."""
        self._settings = settings
        self._fleet = fleet
        self._policy = policy
        self._upstream = upstream
        self._metrics = metrics
        self._on_failure = on_failure
        self._find_overlap = find_overlap
        self._clock = clock
        self._owners = ResponseOwners()

    async def forward(
        self, request: web.BaseRequest, target: str, facts: Facts, body: bytes, request_id: str
    ) -> web.StreamResponse:
        """Answer a request from a backend. Raises RouterError while the client has not got a byte."""
        started_s = self._clock()
        query = await self._query(facts)
        lines = request_lines(request.raw_headers, request_id=request_id, client=request.remote, scheme=request.scheme)
        sent = await self._send(facts, query, target, lines, body, started_s)
        try:
            return await self._stream(request, sent, request_id, started_s)
        finally:
            sent.end()

    async def _query(self, facts: Facts) -> Query:
        settings = self._settings
        overlap, problem, blocks = None, "", []
        if self._find_overlap is not None:
            overlap, problem = await self._find_overlap(facts, self._fleet.candidates(facts.model))
        if settings.prefix_block_bytes:
            blocks = text_blocks(facts, settings.prefix_block_bytes)
        return Query(
            prompt_tokens=facts.prompt_tokens if overlap is None else overlap.prompt_tokens,
            session=facts.session,
            blocks=blocks,
            block_tokens=settings.prefix_block_bytes // BYTES_PER_TOKEN,
            overlap=overlap,
            overlap_problem=problem,
        )

    async def _send(
        self, facts: Facts, query: Query, target: str, lines: bytes, body: bytes, started_s: float
    ) -> _Sent:
        """Find a backend that begins to answer."""
        tried: list[str] = []
        deaths = 0
        problem: RouterError | None = None
        while len(tried) <= self._settings.retries:
            candidates = self._fleet.candidates(facts.model, without=tried)
            if not candidates:
                break
            if problem is not None:
                self._metrics.retries[problem.code] += 1
            choice = self._choose(facts, query, candidates)
            state = next(candidate for candidate in candidates if candidate.id == choice.id)
            self._metrics.choices[choice.reason] += 1
            if query.overlap is not None:
                self._metrics.overlap_tokens["cached"] += choice.cached_tokens
                self._metrics.overlap_tokens["computed"] += query.prompt_tokens - choice.cached_tokens
            ticket = state.load.start(choice.work_tokens, self._clock())
            try:
                sent = await self._try(facts, state, ticket, target, lines, body, started_s)
            except UpstreamError as error:
                ticket.end()
                problem = self._failed(state, error)
                deaths += error.was_seen
                is_safe = not error.was_seen or (facts.is_repeatable and error.failure != "timeout")
                if not is_safe or deaths >= MAX_DEATHS:
                    raise problem from None
                tried.append(state.id)
                continue
            except BaseException:
                ticket.end()
                raise
            can_move = facts.is_repeatable and len(tried) < self._settings.retries
            if sent.answer.head.status == _UNAVAILABLE and can_move:
                tried.append(state.id)
                if self._fleet.candidates(facts.model, without=tried):
                    sent.end()
                    problem = RouterError(_UNAVAILABLE, "backend_unavailable", f"{state.backend.label} is unavailable")
                    continue
            return sent
        raise problem or self._nobody(facts)

    def _choose(self, facts: Facts, query: Query, candidates: list[BackendState]) -> Choice:
        owner = self._owners.owner(facts)
        if owner is not None and any(candidate.id == owner for candidate in candidates):
            return Choice(owner, "owner", query.prompt_tokens)
        return self._policy.choose(query, candidates, self._clock())

    async def _try(
        self,
        facts: Facts,
        state: BackendState,
        ticket: Ticket,
        target: str,
        lines: bytes,
        body: bytes,
        started_s: float,
    ) -> _Sent:
        until_s = started_s + self._settings.first_byte_timeout_s
        answer = await self._upstream.send(
            state.backend,
            facts.method,
            target,
            lines,
            body,
            timeout_s=max(0.001, until_s - self._clock()),
            repeatable=facts.is_repeatable,
        )
        try:
            first = await answer.read(max(0.001, until_s - self._clock()))
        except BaseException:
            answer.close()
            raise
        ticket.first_byte()
        self._owners.learn(facts, first, state.id)
        self._metrics.first_byte_s.observe(self._clock() - started_s)
        return _Sent(state, ticket, answer, first)

    def _failed(self, state: BackendState, error: UpstreamError) -> RouterError:
        status, code = _STATUS[error.failure]
        self._on_failure(state, error)
        return RouterError(status, code, f"no answer from an engine: {error}")

    def _nobody(self, facts: Facts) -> RouterError:
        if not len(self._fleet):
            text = "the router knows no backend: look at --backends or at the pods' labels"
        elif not self._fleet.healthy():
            text = f"none of {len(self._fleet)} backends answers its health checks: /kvmesh/backends says why"
        else:
            text = "all backends are busy: come again, or raise max_requests_per_backend"
        del facts
        return RouterError(_UNAVAILABLE, "no_backend", text, retry_after_s=RETRY_AFTER_S)

    # -- the answer ----------------------------------------------------------------------------------------------------

    async def _stream(
        self, request: web.BaseRequest, sent: _Sent, request_id: str, started_s: float
    ) -> web.StreamResponse:
        head = sent.answer.head
        headers = answer_headers(head.headers, request_id=request_id)
        response = _Response(status=head.status, reason=head.reason, headers=headers)
        if "Content-Length" not in headers and request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        await response.prepare(request)
        part, ending = sent.first, b""
        watch = ClientWatch(request, self._settings.idle_timeout_s)
        try:
            while part and not sent.answer.at_end:
                ending = part[-2:]
                watch.writes()
                await response.write(part)
                watch.has_written()
                part = await sent.answer.read(self._settings.idle_timeout_s)
            watch.writes()
            await response.write_eof(part)  # the last part and the end in one packet
        except UpstreamError as error:
            await self._break_off(request, response, sent, error, ending)
        finally:
            watch.end()
        label = GONE if sent.state.draining else sent.state.backend.label
        self._metrics.requests[label, str(head.status)] += 1
        self._metrics.request_s.observe(self._clock() - started_s)
        return response

    async def _break_off(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        sent: _Sent,
        error: UpstreamError,
        ending: bytes,
    ) -> None:
        """The backend has failed in the middle of its answer."""
        self._metrics.broken_streams += 1
        label = sent.state.backend.label
        log.warning("answer broken off backend=%s: %s", label, error)
        self._on_failure(sent.state, error)
        if (
            response.content_type == "text/event-stream"
            and response.chunked
            and "Content-Encoding" not in response.headers
        ):
            _, code = _STATUS[error.failure]
            told = RouterError(502, code, f"the engine failed in the middle of its answer: {error}")
            # The event that was under way is not complete; an empty line ends it.
            await response.write((b"" if ending == b"\n\n" else b"\n\n") + told.event())
            await response.write_eof()
            return
        response.force_close()
        if request.transport is not None:
            request.transport.abort()
        await asyncio.sleep(0)  # the server's own handling of the lost connection ends this request
