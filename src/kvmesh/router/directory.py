"""What the router knows of the directory: which instances there are, and who holds which chunks.

It asks the controller's HTTP API and is no member of the cluster: nobody sends it inventories, and it costs the
controller nothing but its questions. (A controller that stands beside a Redis directory answers them as well.) While
the controller does not answer, there is no view, and the policy `kv` goes by load.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import aiohttp
import msgspec

from kvmesh.core.block_hashes import HashRule
from kvmesh.core.keys import ChunkKey
from kvmesh.router.metrics import RouterMetrics

log = logging.getLogger("kvmesh.router")

POLL_INTERVAL_S = 2.0
POLL_TIMEOUT_S = 3.0
MAX_ANSWER_BYTES = 64 << 20
MAX_KEYS = 10_000
"""Per lookup: what the controller takes. At 256 tokens per chunk that is 2.5 million tokens."""


class DirectoryInstance(NamedTuple):
    """An instance that publishes chunks."""

    instance_id: str
    incarnation: str
    format_id: str
    rule: HashRule
    problem: str
    """Why the keys of its chunks cannot be made here; empty when they can."""


class Holdings(NamedTuple):
    """Who holds a prefix, in whole chunks, within one format."""

    by_instance: Mapping[str, int]
    together: int
    """Leading chunks of which each is held by somebody."""


class _Format(msgspec.Struct):
    format_id: str
    fields: dict[str, str | int]


class _Instance(msgspec.Struct):
    instance_id: str
    incarnation: str
    state: str
    format: _Format


class _Instances(msgspec.Struct):
    instances: list[_Instance]


class _Prefix(msgspec.Struct):
    chunks: int
    by_instance: dict[str, int]


class _LookupFormat(msgspec.Struct):
    format_id: str
    longest_prefix: _Prefix


class _Lookup(msgspec.Struct):
    formats: list[_LookupFormat]


_instances_decoder = msgspec.json.Decoder(_Instances)
_lookup_decoder = msgspec.json.Decoder(_Lookup)


class DirectoryLookupError(Exception):
    """The controller did not answer, or not as it should."""


class Directory:
    """A view of the controller's directory, kept up to date by `run`."""

    def __init__(self, url: str, metrics: RouterMetrics, *, ca_file: str = "") -> None:
        self._url = url.rstrip("/")
        self._metrics = metrics
        self._metrics.directory_connected = False
        self._ca_file = ca_file
        self._session: aiohttp.ClientSession | None = None
        self._instances: Mapping[str, DirectoryInstance] | None = None

    @property
    def instances(self) -> Mapping[str, DirectoryInstance] | None:
        """By instance id; None while the controller does not answer."""
        return self._instances

    async def run(self) -> None:
        """Poll the controller until cancelled."""
        context = ssl.create_default_context(cafile=self._ca_file) if self._ca_file else True
        connector = aiohttp.TCPConnector(ssl=context, keepalive_timeout=3.0)
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
            self._session = session
            try:
                while True:
                    await self._poll()
                    await asyncio.sleep(POLL_INTERVAL_S)
            finally:
                self._session = None

    async def lookup(self, keys: Sequence[ChunkKey], timeout_s: float) -> Mapping[str, Holdings]:
        """Who holds these chunks, by format id. Raises DirectoryLookupError."""
        body = msgspec.json.encode({"keys": [key.hex() for key in keys[:MAX_KEYS]]})
        try:
            answer = _lookup_decoder.decode(await self._ask("POST", "/api/v1/lookup", body, timeout_s))
        except (msgspec.MsgspecError, RecursionError) as error:
            raise DirectoryLookupError(f"no lookup in the controller's answer: {error}") from None
        except DirectoryLookupError as error:
            self._lost(error)
            raise
        return {
            one.format_id: Holdings(one.longest_prefix.by_instance, one.longest_prefix.chunks) for one in answer.formats
        }

    async def _poll(self) -> None:
        try:
            body = await self._ask("GET", "/api/v1/instances", b"", POLL_TIMEOUT_S)
            listed = _instances_decoder.decode(body).instances
        except (DirectoryLookupError, msgspec.MsgspecError, RecursionError) as error:
            self._lost(error)
            return
        if self._instances is None:
            log.info("directory answers url=%s instances=%d", self._url, len(listed))
        self._instances = {one.instance_id: _instance(one) for one in listed}
        self._metrics.directory_connected = True

    def _lost(self, error: Exception) -> None:
        if self._instances is not None:
            log.warning("directory lost url=%s: %s; requests go by load", self._url, error)
        self._instances = None
        self._metrics.directory_connected = False

    async def _ask(self, method: str, path: str, body: bytes, timeout_s: float) -> bytes:
        if self._session is None:
            raise DirectoryLookupError("not connected yet")
        try:
            async with self._session.request(
                method,
                self._url + path,
                data=body or None,
                headers={"Content-Type": "application/json"} if body else None,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
                allow_redirects=False,
            ) as answer:
                if answer.status != 200:
                    raise DirectoryLookupError(f"{method} {path} answered {answer.status}")
                found = await answer.content.read(MAX_ANSWER_BYTES)
                while part := await answer.content.read(MAX_ANSWER_BYTES - len(found)):
                    found += part
                return found
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise DirectoryLookupError(f"{type(error).__name__} {error}".strip()) from None


def _instance(told: _Instance) -> DirectoryInstance:
    fields = told.format.fields
    rule = HashRule(
        block_tokens=_whole(fields.get("block_tokens")),
        chunk_tokens=_whole(fields.get("chunk_tokens")),
        algorithm=str(fields.get("hash_algorithm", "")),
        seed=str(fields.get("hash_seed", "")),
    )
    problem = rule.problem() or ""
    if ";" in str(fields.get("groups", "")):
        problem = problem or "several KV cache groups"
    return DirectoryInstance(told.instance_id, told.incarnation, told.format.format_id, rule, problem)


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
