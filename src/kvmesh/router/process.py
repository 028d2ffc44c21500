"""The router as a process: everything on one event loop in the main thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

from aiohttp import web

from kvmesh import __version__
from kvmesh.config.values import format_host_port, is_loopback
from kvmesh.descriptors import raise_descriptor_limit
from kvmesh.errors import StartupError
from kvmesh.logs import configure_logging
from kvmesh.router.app import App, AppSettings
from kvmesh.router.backends import Backend, BackendState, Fleet
from kvmesh.router.config import RouterConfig
from kvmesh.router.directory import Directory
from kvmesh.router.discovery import Discovery, StaticDiscovery
from kvmesh.router.health import HealthChecks
from kvmesh.router.kubernetes import KubernetesDiscovery, find_access
from kvmesh.router.kv import Kv
from kvmesh.router.metrics import RouterMetrics
from kvmesh.router.models import ModelList
from kvmesh.router.overlap import OverlapFinder
from kvmesh.router.policies import LeastLoad, Policy, RoundRobin, Session
from kvmesh.router.prefix import Prefix
from kvmesh.router.proxy import Proxy, ProxySettings
from kvmesh.router.upstream import Upstream, UpstreamError

log = logging.getLogger("kvmesh.router")

BACKLOG = 4096


def run_router(config: RouterConfig) -> None:
    """Run a router until SIGINT or SIGTERM. Blocks; to be called in the main thread, once per process.

    Raises:
        StartupError: the port is taken, the host is no address of this machine, or something configured is not there.
    """
    configure_logging(config.log_level, process="router")
    raise_descriptor_limit()
    with contextlib.closing(_bind(config.host, config.port)) as listener:
        _runner()(_run(config, listener))


def make_policy(config: RouterConfig, rng: random.Random) -> Policy:
    """The configured policy."""
    makers: dict[str, Callable[[], Policy]] = {
        "roundrobin": RoundRobin,
        "leastload": lambda: LeastLoad(rng),
        "session": lambda: Session(rng),
        "prefix": lambda: Prefix(rng, max_blocks=config.prefix_max_blocks),
        "kv": lambda: Kv(rng, fetch_cost=config.kv_fetch_cost),
    }
    return makers[config.policy]()


class Router:
    """All parts of a router, put together."""

    def __init__(self, config: RouterConfig) -> None:
        """Raises StartupError when a part cannot be made."""
        self._config = config
        self.metrics = RouterMetrics(config.policy)
        self.fleet = Fleet(
            recent_half_life_s=config.recent_half_life_s, max_requests_per_backend=config.max_requests_per_backend
        )
        self.upstream = Upstream(connect_timeout_s=config.connect_timeout_s)
        self.policy = make_policy(config, random.Random())
        self.health = HealthChecks(
            self.fleet,
            self.upstream,
            interval_s=config.health_interval_s,
            timeout_s=config.health_timeout_s,
            failures=config.health_failures,
            path=config.health_path,
            api_key=_read_key(config.api_key_file),
        )
        self.directory: Directory | None = None
        finder = None
        if config.policy == "kv":
            self.directory = Directory(config.controller_url, self.metrics, ca_file=config.controller_ca_file)
            finder = OverlapFinder(
                self.directory, self.upstream, timeout_s=config.kv_timeout_s, cache_keys=config.kv_cache_keys
            )
        proxy = Proxy(
            ProxySettings(
                retries=config.retries,
                first_byte_timeout_s=config.first_byte_timeout_s,
                idle_timeout_s=config.idle_timeout_s,
                prefix_block_bytes=config.prefix_block_bytes if config.policy == "prefix" else 0,
            ),
            self.fleet,
            self.policy,
            self.upstream,
            self.metrics,
            on_failure=self._on_failure,
            find_overlap=None if finder is None else finder.find,
        )
        settings = AppSettings(
            max_requests=config.max_requests,
            max_connections=config.max_connections,
            max_body_bytes=config.max_body_bytes,
            max_buffered_bytes=config.max_buffered_bytes,
            body_timeout_s=config.body_timeout_s,
            keepalive_s=config.keepalive_s,
            session_header=config.session_header,
        )
        self.app = App(settings, self.fleet, proxy, ModelList(self.fleet, self.upstream), self.metrics)
        self.discovery = self._make_discovery()
        self.metrics.watch(self.fleet, self.upstream.statistics, time.monotonic)

    async def run_parts(self) -> None:
        """Everything but the server, until cancelled."""
        tasks = [asyncio.create_task(self.discovery.run(self.on_backends), name="discovery")]
        if self.directory is not None:
            tasks.append(asyncio.create_task(self.directory.run(), name="directory"))
        try:
            await asyncio.gather(*tasks)
            await asyncio.Event().wait()  # a static list has nothing more to tell
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.health.close()
            await self.upstream.close()

    def on_backends(self, backends: Sequence[Backend]) -> None:
        """Discovery tells of all backends there are."""
        new, gone = self.fleet.replace(backends)
        for state in gone:
            log.info("backend removed backend=%s address=%s", state.backend.label, state.backend.address)
            self.policy.forget(state.id)
            self.upstream.forget(state.id)
            self.metrics.forget(state.backend.label)
        for state in new:
            log.info("backend added backend=%s address=%s", state.backend.label, state.backend.address)
        self.metrics.backends_added += len(new)
        self.metrics.backends_removed += len(gone)
        self.health.follow(new, gone)

    def _on_failure(self, state: BackendState, error: UpstreamError) -> None:
        self.upstream.forget(state.id)
        self.health.failed(state, str(error), is_away=error.failure == "connect")

    def _make_discovery(self) -> Discovery:
        config = self._config
        if not config.kubernetes_selector:
            return StaticDiscovery(config.static_backends())
        access = find_access(
            api=config.kubernetes_api,
            namespace=config.kubernetes_namespace,
            credentials=Path(config.kubernetes_credentials),
        )
        return KubernetesDiscovery(
            access, selector=config.kubernetes_selector, port=config.kubernetes_port, metrics=self.metrics
        )


async def _run(config: RouterConfig, listener: socket.socket) -> None:
    router = Router(config)
    runner = web.ServerRunner(router.app.server(), handle_signals=False)
    await runner.setup()
    site = web.SockSite(runner, listener, backlog=BACKLOG)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    parts = asyncio.create_task(router.run_parts(), name="parts")
    parts.add_done_callback(lambda _: stopped.set())
    await site.start()
    address = format_host_port(config.host, listener.getsockname()[1])
    log.info("router is up url=http://%s policy=%s version=%s", address, config.policy, __version__)
    if not is_loopback(config.host):
        log.info("bound beyond this machine: whoever reaches %s can use the engines behind it", address)
    try:
        await stopped.wait()
        if not parts.done():
            log.info("stopping requests=%d", router.metrics.inflight)
            await router.app.drain(config.drain_timeout_s)
    finally:
        await runner.cleanup()
        parts.cancel()
        await asyncio.gather(parts, return_exceptions=True)
    if not parts.cancelled() and (error := parts.exception()) is not None:
        raise error


def _read_key(file: str) -> str:
    if not file:
        return ""
    try:
        return Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"api_key_file {file}", "a file with a key", str(error)) from None


def _bind(host: str, port: int) -> socket.socket:
    """Take the port. Raises StartupError that names it when somebody else has it."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise StartupError(f"host {host}", "an address of this machine", str(error)) from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        hint = "choose another host or port"
        raise StartupError(f"port {format_host_port(host, port)}", "a free port", str(error), hint) from error
    listener.setblocking(False)
    return listener


def _runner() -> Callable[[Coroutine[None, None, None]], None]:
    """Use uvloop where it is: it makes the router faster. Without it everything works."""
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        log.warning("uvloop is missing, so the router is slower: pip install 'kvmesh[router]'")
        return asyncio.run
    return uvloop.run
