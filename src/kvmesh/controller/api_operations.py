"""`/api/v1/operations`, lookups of prompts, and single chunks: the part of the HTTP API that talks to nodes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Body, Header, Query, Request, Response

from kvmesh.controller import views
from kvmesh.controller.lookups import (
    LOOKUP_EXAMPLES,
    ChunkDetailView,
    LookupRequest,
    describe_chunk,
    lookup_keys,
    lookup_prompt,
)
from kvmesh.controller.operation_bodies import EXAMPLES, OperationBody
from kvmesh.controller.operation_views import OperationsView, OperationView
from kvmesh.controller.operations import MAX_KEPT
from kvmesh.controller.write_guard import require_write

if TYPE_CHECKING:
    from kvmesh.controller.api import Context

MAX_WAIT_S = 60.0


def operations_router(context: Context) -> APIRouter:
    """The routes, to be mounted under /api/v1."""
    router = APIRouter(tags=["operations"])
    operator = context.operator

    @router.post("/operations", status_code=202, responses={200: {"model": OperationView}})
    async def start(
        request: Request,
        response: Response,
        body: Annotated[OperationBody, Body(openapi_examples=EXAMPLES)],
        idempotency_key: Annotated[str | None, Header(max_length=128)] = None,
    ) -> OperationView:
        """Start something: 202 with its id; 200 when this very request has started it already.

        Needs the cluster's token; without a cluster key, a caller on the controller's own machine.
        """
        require_write(context, request)
        operation, is_new = operator.start(body, idempotency_key)
        if not is_new:
            response.status_code = 200
        response.headers["Location"] = f"/api/v1/operations/{operation.operation_id}"
        return operator.view(operation.operation_id)

    @router.get("/operations")
    async def operations(
        state: Annotated[Literal["pending", "running", "done", "partly", "failed"] | None, Query()] = None,
        kind: Annotated[str | None, Query(max_length=20)] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_KEPT)] = 100,
    ) -> OperationsView:
        """What was asked for, newest first."""
        return OperationsView(operations=operator.views(state=state, kind=kind, limit=limit))

    @router.get("/operations/{operation_id}")
    async def operation(
        operation_id: str,
        wait_s: Annotated[
            float, Query(ge=0, le=MAX_WAIT_S, description="Answer when it has ended, or after so long.")
        ] = 0.0,
    ) -> OperationView:
        """How far one is."""
        found = operator.operations.get(operation_id)
        with contextlib.suppress(asyncio.TimeoutError):
            if wait_s:
                await asyncio.wait_for(found.ended.wait(), wait_s)
        return operator.view(operation_id)

    @router.delete("/operations/{operation_id}")
    async def cancel(request: Request, operation_id: str) -> OperationView:
        """Give up what no engine has been handed yet. An operation that has ended stays as it is."""
        require_write(context, request)
        found = operator.operations.cancel(operation_id)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(found.ended.wait(), MAX_WAIT_S)
        return operator.view(operation_id)

    @router.post("/lookup")
    async def lookup(
        body: Annotated[LookupRequest, Body(openapi_examples=LOOKUP_EXAMPLES)],
    ) -> views.LookupView:
        """Who holds the chunks of a prompt (tokens or text), or these keys, and how long the prefix is that can be
        fetched.
        """
        if body.keys is not None or not body.names_chunks:
            return lookup_keys(context.registry, body.keys or [], body.format_id)
        return await lookup_prompt(context.registry, operator.selection, body)

    @router.get("/chunks/{key}")
    async def chunk(key: str) -> ChunkDetailView:
        """One chunk: who holds it, and what the holders themselves say of it."""
        return await describe_chunk(context.registry, operator.asks, key, context.clock())

    return router
