"""A node's connections to Redis or Valkey: one server, a Cluster, or a master that Sentinels watch; one interface.

`redis-py` connects, reconnects, retries with back-off and follows a Cluster's moves. What it raises becomes one error
here, RedisTrouble, which says in a word what is wrong and in a sentence what to do.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Awaitable, Mapping, Sequence
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kvmesh.config.redis_url import RedisTarget
from kvmesh.directory.redis_scripts import Script
from kvmesh.errors import StartupError

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

RETRIES = 2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Between the library's retries of one command."""
_T = TypeVar("_T")

Argument = bytes | str | int


class RedisTrouble(Exception):  # noqa: N818  (it says what is wrong, and is no programming error)
    """Redis did not do what it was asked. `kind` is one word for metrics and status."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class RedisLink:
    """Lives on one event loop. `open` before anything else; every method raises RedisTrouble and nothing else."""

    def __init__(self, target: RedisTarget, *, timeout_s: float, connections: int = 64) -> None:
        """Raises StartupError when the `redis` package or a named file is missing.

        Args:
            target: where Redis is.
            timeout_s: longest wait for one answer.
            connections: most connections at a time, to one server.
        """
        self.target = target
        self._timeout_s = timeout_s
        self._connections = connections
        self._options = _options(target, timeout_s)
        self._single: Redis | None = None
        self._cluster: RedisCluster | None = None

    @property
    def is_cluster(self) -> bool:
        """Whether keys are spread over several masters; known once open."""
        return self._cluster is not None

    async def open(self) -> None:
        """Connect, and find out what kind of Redis answers."""
        if self._single is not None or self._cluster is not None:
            return
        try:
            if self.target.kind != "cluster":
                single = self._make_single()
                if not await self._has_cluster(single):
                    self._single = single
                    return
                await single.aclose()
            cluster = self._make_cluster()
            try:
                await cluster.initialize()
            except BaseException:
                await cluster.aclose()
                raise
            self._cluster = cluster
        except Exception as error:
            raise _trouble(error, self.target) from error

    async def close(self) -> None:
        """Close all connections. Whatever goes wrong with that does not matter."""
        for client in (self._single, self._cluster):
            if client is not None:
                with contextlib.suppress(Exception):  # they are gone either way
                    await client.aclose()
        self._single = self._cluster = None

    async def call(self, key: str | bytes, *command: Argument) -> Any:
        """One command on one key; the answer as redis-py gives it, which the caller has to check."""
        return await self._guard(self._execute(key, command))

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """One script over keys of one shard."""
        tail = (len(keys), *keys, *arguments)
        return await self._guard(self._run(script, keys[0], tail))

    async def many(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Many commands, each on the key that is its first argument, in one round trip (to each master)."""
        return await self._guard(self._many(commands))

    async def read_streams(self, positions: Mapping[str, str], *, count: int, block_ms: int) -> Any:
        """Entries after each position; waits up to `block_ms` for the first. All keys have one hash tag, or the
        server is no Cluster.
        """
        command: tuple[Argument, ...] = (
            "XREAD",
            "COUNT",
            count,
            "BLOCK",
            block_ms,
            "STREAMS",
            *positions,
            *positions.values(),
        )
        return await self.call(next(iter(positions)), *command)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _make_single(self) -> Redis:
        from redis.asyncio import Redis  # noqa: PLC0415 - not installed everywhere
        from redis.asyncio.sentinel import Sentinel  # noqa: PLC0415 - as above

        if self.target.kind == "sentinel":
            secured = {name: value for name, value in self._options.items() if name.startswith(("ssl", "socket"))}
            password = _read_secret(self.target.sentinel_password_file)
            watchers = Sentinel(  # type: ignore[no-untyped-call]
                list(self.target.hosts), sentinel_kwargs={**secured, "password": password}
            )
            found: Redis = watchers.master_for(self.target.service, db=self.target.database, **self._options)
            return found
        host, port = self.target.hosts[0]
        return Redis(
            host=host,
            port=port,
            db=self.target.database,
            max_connections=self._connections,
            **self._options,
        )

    def _make_cluster(self) -> RedisCluster:
        from redis.asyncio import RedisCluster  # noqa: PLC0415 - not installed everywhere
        from redis.asyncio.cluster import ClusterNode  # noqa: PLC0415 - as above

        return RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in self.target.hosts],
            require_full_coverage=False,  # a master that is away costs its shards, not all
            max_connections=self._connections,
            **self._options,
        )

    async def _has_cluster(self, client: Redis) -> bool:
        if self.target.kind == "sentinel":
            return False
        from redis.exceptions import ResponseError  # noqa: PLC0415 - not installed everywhere

        try:
            found = await client.execute_command("INFO", "cluster")  # type: ignore[no-untyped-call]
        except ResponseError:  # not allowed to ask
            await client.execute_command("PING")  # type: ignore[no-untyped-call]
            return False
        return isinstance(found, dict) and found.get("cluster_enabled") == 1

    async def _execute(self, key: str | bytes, command: Sequence[Argument]) -> Any:
        if self._cluster is not None:
            node = self._cluster.get_node_from_key(key if isinstance(key, str) else key.decode("latin-1"))
            return await self._cluster.execute_command(*command, target_nodes=node)
        return await self._client().execute_command(*command)  # type: ignore[no-untyped-call]

    async def _run(self, script: Script, key: str, tail: Sequence[Argument]) -> Any:
        from redis.exceptions import NoScriptError  # noqa: PLC0415 - not installed everywhere

        try:
            return await self._execute(key, ("EVALSHA", _digest(script.source), *tail))
        except NoScriptError:  # new to this server, or forgotten in a restart
            return await self._execute(key, ("EVAL", script.source, *tail))

    async def _many(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        client: Any = self._cluster or self._client()
        pipeline = client.pipeline() if self._cluster is not None else client.pipeline(transaction=False)
        async with pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute()
        return answers

    def _client(self) -> Redis:
        if self._single is None:
            raise RedisTrouble("unreachable", f"not connected to {self.target}")
        return self._single

    async def _guard(self, work: Awaitable[_T]) -> _T:
        try:
            return await work
        except RedisTrouble:
            raise
        except Exception as error:
            raise _trouble(error, self.target) from error


def _options(target: RedisTarget, timeout_s: float) -> dict[str, Any]:
    """What every connection is made with. Raises StartupError."""
    try:
        from redis.asyncio.retry import Retry  # noqa: PLC0415 - not installed everywhere
        from redis.backoff import ExponentialWithJitterBackoff  # noqa: PLC0415 - as above
        from redis.exceptions import ConnectionError as RedisConnectionError  # noqa: PLC0415 - as above
    except ModuleNotFoundError:
        raise StartupError("lookup_url", "the package redis", "none installed", "pip install 'kvmesh[redis]'") from None
    options: dict[str, Any] = {
        "username": target.username,
        "password": _read_secret(target.password_file) or target.password,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "retry": Retry(
            ExponentialWithJitterBackoff(cap=LONGEST_PAUSE_S, base=FIRST_PAUSE_S),
            RETRIES,
            supported_errors=(RedisConnectionError,),  # a server that is silent is not asked three times
        ),
        "protocol": 2,
    }
    if target.tls:
        options |= {
            "ssl": True,
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
            "ssl_ca_certs": _existing(target.ca_file),
            "ssl_certfile": _existing(target.cert_file),
            "ssl_keyfile": _existing(target.key_file),
            "ssl_min_version": ssl.TLSVersion.TLSv1_2,
        }
    return options


def _read_secret(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"password file {path}", "a readable file", str(error)) from None


def _existing(path: str | None) -> str | None:
    if path is not None and not Path(path).expanduser().is_file():
        raise StartupError(f"lookup_url: file {path}", "a readable file", "none")
    return path


def _digest(source: str) -> str:
    return sha1(source.encode(), usedforsecurity=False).hexdigest()


def _trouble(error: Exception, target: RedisTarget) -> RedisTrouble:
    """In a word and a sentence what redis-py has met."""
    from redis import exceptions as known  # noqa: PLC0415 - not installed everywhere

    text = str(error)[:300] or type(error).__name__
    upper = text.upper()
    where = str(target)
    if isinstance(error, known.AuthenticationError) or upper.startswith(("WRONGPASS", "NOAUTH")):
        return RedisTrouble("password", f"{where} does not accept the password, or wants one: {text}")
    if isinstance(error, known.NoPermissionError) or "NOPERM" in upper:
        return RedisTrouble("permission", f"{where} forbids a command that the directory needs: {text}")
    if isinstance(error, known.OutOfMemoryError) or "OOM COMMAND" in upper:
        return RedisTrouble("full", f"{where} has no memory left (maxmemory): {text}")
    if isinstance(error, known.BusyLoadingError):
        return RedisTrouble("loading", f"{where} is loading its data: {text}")
    if isinstance(error, known.ReadOnlyError):
        return RedisTrouble("read_only", f"{where} is a replica, or fails over just now: {text}")
    if isinstance(error, known.TimeoutError | TimeoutError):
        return RedisTrouble("silent", f"{where} does not answer: {text}")
    if isinstance(error, known.ClusterDownError | known.RedisClusterException | known.MovedError | known.AskError):
        return RedisTrouble("cluster", f"{where}: the cluster cannot be used: {text}")
    if isinstance(error, known.ConnectionError | OSError):
        kind = "tls" if "SSL" in upper or "CERTIFICATE" in upper else "unreachable"
        return RedisTrouble(kind, f"{where} cannot be reached: {text}")
    if "WRONGTYPE" in upper:
        return RedisTrouble("foreign", f"{where}: a key with one of our names has another program's value: {text}")
    return RedisTrouble("error", f"{where}: {type(error).__name__}: {text}")
