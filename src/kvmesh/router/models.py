"""`GET /v1/models`: what all backends serve, as one list."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec
from aiohttp import web

from kvmesh.router.answers import RouterError, json_response
from kvmesh.router.backends import BackendState, Fleet, ServedModel
from kvmesh.router.headers import REQUEST_ID, request_lines
from kvmesh.router.upstream import Upstream, UpstreamError

PATH = "/v1/models"
MAX_LIST_BYTES = 4 << 20
TIMEOUT_S = 5.0

Card = dict[str, object]


class _List(msgspec.Struct):
    data: list[Card]


_decoder = msgspec.json.Decoder(_List)


class ModelsRefusedError(Exception):
    """A backend answered with an error. `status` and `body` are its answer."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.body = body


async def ask_models(upstream: Upstream, state: BackendState, headers: bytes, timeout_s: float) -> list[Card]:
    """The model cards of one backend. Raises UpstreamError or ModelsRefusedError."""
    status, body = await fetch(upstream, state, "GET", PATH, headers, timeout_s=timeout_s, limit_bytes=MAX_LIST_BYTES)
    if status != 200:
        raise ModelsRefusedError(status, body)
    try:
        return _decoder.decode(body).data
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UpstreamError("malformed", f"{state.backend.label} sent no list of models: {error}") from None


async def fetch(
    upstream: Upstream,
    state: BackendState,
    method: str,
    path: str,
    headers: bytes = b"",
    body: bytes = b"",
    *,
    timeout_s: float,
    limit_bytes: int,
) -> tuple[int, bytes]:
    """Status and body of a small answer that the router itself wants. Raises UpstreamError."""

    async def ask() -> tuple[int, bytes]:
        answer = await upstream.send(state.backend, method, path, headers, body, timeout_s=timeout_s, repeatable=True)
        try:
            parts, size = [], 0
            while part := await answer.read(timeout_s):
                size += len(part)
                if size > limit_bytes:
                    raise UpstreamError("malformed", f"{state.backend.label} sent more than {limit_bytes} bytes")
                parts.append(part)
            return answer.head.status, b"".join(parts)
        finally:
            answer.close()

    try:
        return await asyncio.wait_for(ask(), timeout_s)
    except asyncio.TimeoutError:
        text = f"{state.backend.label} did not answer {path} within {timeout_s:g} s"
        raise UpstreamError("timeout", text) from None


def served(cards: Sequence[Card]) -> Mapping[str, ServedModel]:
    """What the router remembers of model cards. Entries that are none are left out."""
    found = {}
    for card in cards:
        name, root, parent = (card.get(field) for field in ("id", "root", "parent"))
        if isinstance(name, str):
            found[name] = ServedModel(
                name, root if isinstance(root, str) else "", parent if isinstance(parent, str) else ""
            )
    return found


class ModelList:
    """Answers `/v1/models` by asking every healthy backend with the client's own API key."""

    def __init__(self, fleet: Fleet, upstream: Upstream) -> None:
        self._fleet = fleet
        self._upstream = upstream

    async def answer(self, request: web.BaseRequest, request_id: str) -> web.Response:
        states = self._fleet.candidates()
        if not states:
            raise RouterError(503, "no_backend", "no backend answers its health checks", retry_after_s=1)
        lines = request_lines(request.raw_headers, request_id=request_id, client=request.remote, scheme=request.scheme)
        results = await asyncio.gather(
            *(ask_models(self._upstream, state, lines, TIMEOUT_S) for state in states), return_exceptions=True
        )
        merged: dict[object, Card] = {}
        for result in results:
            if isinstance(result, list):
                for card in result:
                    merged.setdefault(card.get("id"), card)
        if not merged:
            return self._problem(results, request_id)
        response = json_response({"object": "list", "data": list(merged.values())})
        response.headers[REQUEST_ID] = request_id
        return response

    def _problem(self, results: Sequence[list[Card] | BaseException], request_id: str) -> web.Response:
        """Nobody has told of a model: the answer of the first that said why, such as a wrong API key."""
        for result in results:
            if isinstance(result, ModelsRefusedError):
                return web.Response(
                    status=result.status,
                    body=result.body,
                    content_type="application/json",
                    headers={REQUEST_ID: request_id},
                )
        reason = next((str(result) for result in results if isinstance(result, BaseException)), "they serve none")
        raise RouterError(502, "no_models", f"no backend told which models it serves: {reason}")
