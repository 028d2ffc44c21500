"""The controller as a process: HTTP server, ZMQ sockets and registry on one asyncio loop in the main thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator

import uvicorn

from kvmesh import __version__
from kvmesh.config import ControllerConfig
from kvmesh.config.redis_url import parse_redis_target
from kvmesh.config.values import format_host_port
from kvmesh.controller.feed import Feed
from kvmesh.controller.log import log
from kvmesh.controller.redis_watch import RedisWatch
from kvmesh.controller.registry import Registry
from kvmesh.controller.sockets import Sockets, open_sockets
from kvmesh.descriptors import raise_descriptor_limit
from kvmesh.errors import StartupError
from kvmesh.transfer.security import PeerSecurity
from kvmesh.transfer.tls import Tls
from kvmesh.wire.auth import ClusterKey

logger = logging.getLogger(__name__)

SHUTDOWN_S = 1
"""Open HTTP connections and pages get so long to end."""


class LineFormatter(logging.Formatter):
    """`time=... level=... logger=... event=...`, also for libraries that log prose."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows it on lines of its own."""
        text = record.getMessage()
        if not text.startswith("event="):
            text = f"event=log text={json.dumps(text)}"
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = f"time={when}.{int(record.msecs):03d}Z level={record.levelname.lower()} logger={record.name} {text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up_logging(level: int = logging.INFO) -> None:
    """Log to stderr in the controller's format, unless the program has set up logging of its own."""
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    for chatty in ("uvicorn.error", "asyncio", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def run_controller(config: ControllerConfig) -> None:
    """Run a controller until SIGINT or SIGTERM. Blocks; to be called in the main thread, once per process.

    Raises:
        StartupError: a port is taken, the host is no address of this machine, or the `controller` extra is missing.
    """
    set_up_logging()
    for warning in config.warnings:
        log(logger, logging.WARNING, "warning", text=warning)
    raise_descriptor_limit()
    with contextlib.closing(open_sockets(config)) as sockets:
        asyncio.run(_run(config, sockets))


async def _run(config: ControllerConfig, sockets: Sockets) -> None:
    try:
        from kvmesh.controller.api import Context, create_app  # noqa: PLC0415 - not installed everywhere
        from kvmesh.controller.ui import mount  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        raise StartupError(
            "controller", "the packages of its extra", f"no module {error.name}", "pip install 'kvmesh[controller]'"
        ) from None
    key = None if config.cluster_key is None else ClusterKey(config.cluster_key.get_secret_value())
    _check_certificate(config)
    registry = Registry(
        incarnation=secrets.token_hex(8),
        heartbeat_interval_s=config.heartbeat_interval_s,
        instance_timeout_s=config.instance_timeout_s,
    )
    security = PeerSecurity(
        key=None if key is None else key.peer_key(), tls=None if config.peer_tls is None else Tls.load(config.peer_tls)
    )
    feed = Feed(registry, sockets, security=security)
    watch = None
    if config.lookup_url is not None:
        target = parse_redis_target(config.lookup_url)
        watch = RedisWatch(target, cluster_name=config.cluster_name, key=key, registry=registry)
    context = Context(registry, feed, watch=watch, token=None if key is None else key.http_token())
    app = create_app(context)
    mount(app, context)
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_S,
            timeout_keep_alive=5,
            ssl_certfile=config.tls_cert_file,
            ssl_keyfile=config.tls_key_file,
        ),
        on_started=lambda: _log_started(config, sockets, registry),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop, number)
    feed.start()
    watching = None if watch is None else asyncio.create_task(watch.run())
    try:
        await server.serve(sockets=[sockets.http])
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        await feed.stop()
        log(logger, logging.INFO, "stopped", instances=len(registry.instances))


def _check_certificate(config: ControllerConfig) -> None:
    """Raises StartupError, where uvicorn would end in a traceback."""
    if config.tls_cert_file is None or config.tls_key_file is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert_file, config.tls_key_file, lambda: "")
    except (OSError, ValueError) as error:
        raise StartupError(
            f"--tls-cert-file {config.tls_cert_file} with --tls-key-file {config.tls_key_file}",
            "a certificate and its private key, without a password (PEM)",
            str(error),
        ) from None


class _Server(uvicorn.Server):
    """uvicorn, with our signal handling and one wake-up per second instead of ten."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop = asyncio.Event()
        self._on_started = on_started

    def stop(self, number: int) -> None:
        """End `serve`. A second signal ends it at once."""
        log(logger, logging.INFO, "stopping", signal=signal.Signals(number).name)
        self.force_exit = self.should_exit
        self.should_exit = True
        self._stop.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: the loop's handlers call `stop`, and no signal is raised a second time after the end."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and say where we are."""
        await super().startup(sockets)
        self._on_started()

    async def main_loop(self) -> None:
        """Refresh the Date header once a second until told to stop."""
        while not await self.on_tick(0):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 1.0)


def _log_started(config: ControllerConfig, sockets: Sockets, registry: Registry) -> None:
    log(
        logger,
        logging.INFO,
        "started",
        version=__version__,
        page=f"{'http' if config.tls_cert_file is None else 'https'}://"
        f"{format_host_port(config.host, sockets.http_port)}/",
        bound=sockets.address,
        http_port=sockets.http_port,
        pull_port=sockets.pull_port,
        reply_port=sockets.reply_port,
        heartbeat_port=sockets.heartbeat_port,
        heartbeat_interval_s=config.heartbeat_interval_s,
        instance_timeout_s=config.instance_timeout_s,
        incarnation=registry.incarnation,
        cluster_key=config.cluster_key is not None,
    )
