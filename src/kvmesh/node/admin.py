"""The node's admin port: `/healthz`, `/metrics` and what `admin_requests` and `admin_operations` add, over HTTP. Runs
on the node's event loop.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kvmesh.errors import StartupError
from kvmesh.node import admin_operations, admin_requests
from kvmesh.transfer.coding import CodingStatistics

if TYPE_CHECKING:
    from kvmesh.node.process import Node


MAX_REQUESTS = 64
"""At a time; more are answered with 503."""


class NodeCollector(Collector):
    """The node's counters as Prometheus metrics, read when somebody asks."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        now = self._node.statistics()
        served = self._node.server.statistics()
        for name, text, value in (
            ("kvmesh_node_fetched_chunks", "Chunks fetched from peers.", now.fetched_chunks),
            ("kvmesh_node_fetched_bytes", "Bytes fetched from peers.", now.fetched_bytes),
            ("kvmesh_node_fetches", "Fetch jobs.", now.fetches),
            ("kvmesh_node_fetch_seconds", "Time spent in fetch jobs.", now.fetch_seconds),
            ("kvmesh_node_served_chunks", "Chunks sent to peers.", now.served_chunks),
            ("kvmesh_node_served_bytes", "Bytes sent to peers.", now.served_bytes),
            ("kvmesh_node_protocol_errors", "Connections closed for malformed input.", served.protocol_errors),
            (
                "kvmesh_node_unauthenticated",
                "Connections refused: no cluster key or another one, no certificate, or changed on the way.",
                served.unauthenticated,
            ),
        ):
            yield CounterMetricFamily(name, text, value=value)
        if self._node.coding is not None:
            yield from _coding_metrics(self._node.coding.statistics())
        total = self._node.requests.usage.total
        yield CounterMetricFamily("kvmesh_node_requests", "Requests that the engine told of.", value=total.requests)
        prompts = CounterMetricFamily(
            "kvmesh_node_prompt_chunks", "Whole chunks of prompts, by where they were found.", labels=["found"]
        )
        nowhere = total.chunks - total.device_chunks - total.own_chunks - total.peer_chunks
        for place, chunks in (
            ("device", total.device_chunks),
            ("own_pool", total.own_chunks),
            ("peer", total.peer_chunks),
            ("nowhere", nowhere),
        ):
            prompts.add_metric([place], chunks)
        yield prompts
        lost = self._node.requests.lost_records
        yield CounterMetricFamily("kvmesh_node_lost_request_records", "Requests that were not told of.", value=lost)
        misses = CounterMetricFamily(
            "kvmesh_node_missed_chunks", "Chunks asked for that did not come.", labels=["reason"]
        )
        for reason, count in now.misses.items():
            misses.add_metric([reason], count)
        yield misses
        for name, text, value in (
            ("kvmesh_node_published_chunks", "Chunks this instance publishes now.", now.published_chunks),
            ("kvmesh_node_replica_chunks", "Chunks that others are known to hold.", now.replica_chunks),
            (
                "kvmesh_node_quarantined_chunks",
                "Pairs of chunk and holder not used, because what came was bad.",
                self._node.replica.statistics().quarantined,
            ),
            ("kvmesh_node_peers", "Other instances with our format.", len(self._node.peers)),
            ("kvmesh_node_directory_connected", "1 while the directory answers.", int(self._node.directory_connected)),
        ):
            yield GaugeMetricFamily(name, text, value=value)


def _coding_metrics(now: CodingStatistics) -> Iterable[Metric]:
    """What the wire codec has saved; only of nodes that have one."""
    raw = CounterMetricFamily(
        "kvmesh_node_coded_raw_bytes", "Bytes, in the pool, of chunks that travelled coded.", labels=["direction"]
    )
    wire = CounterMetricFamily(
        "kvmesh_node_coded_wire_bytes", "Bytes, on the wire, of chunks that travelled coded.", labels=["direction"]
    )
    seconds = CounterMetricFamily(
        "kvmesh_node_coding_seconds",
        "Processor time spent on coding what was sent, decoding what was received.",
        labels=["direction"],
    )
    for direction, raw_bytes, wire_bytes, spent_s in (
        ("sent", now.sent_raw_bytes, now.sent_wire_bytes, now.encode_s),
        ("received", now.received_raw_bytes, now.received_wire_bytes, now.decode_s),
    ):
        raw.add_metric([direction], raw_bytes)
        wire.add_metric([direction], wire_bytes)
        seconds.add_metric([direction], spent_s)
    yield from (raw, wire, seconds)


def make_app(node: Node) -> Starlette:
    """The admin application of one node."""
    registry = CollectorRegistry()
    registry.register(NodeCollector(node))

    async def healthz(_: Request) -> Response:
        return JSONResponse(
            {
                "instance_id": node.instance_id,
                "incarnation": node.incarnation,
                "directory_connected": node.directory_connected,
                "directory_problem": node.directory_problem,
                "peers": len(node.peers),
            }
        )

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/metrics", metrics),
            *admin_requests.routes(node),
            *admin_operations.routes(node),
        ]
    )


def bind_admin(host: str, port: int) -> socket.socket:
    """Take the admin port at start. Raises StartupError naming it when somebody else has it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # who is told the port may connect at once; it is answered when the node runs
    except OSError as error:
        listener.close()
        raise StartupError(
            f"admin_port {host}:{port}", expected="a free port", found=str(error), hint="choose another admin_port"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the node's end is decided by its engine or by `kvmesh node`."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


async def serve_admin(node: Node, listener: socket.socket) -> None:
    """Serve until cancelled."""
    config = uvicorn.Config(
        make_app(node),
        log_level="error",  # a warning for each malformed request would let strangers fill the log
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        limit_concurrency=MAX_REQUESTS,
        ssl_certfile=node.config.tls_cert_file,
        ssl_keyfile=node.config.tls_key_file,
    )
    await _Server(config).serve(sockets=[listener])
