"""Discovery of pods: list and watch at the Kubernetes API server.

    list   all pods with the labels, and the resource version at which the list was true
    watch  every change after that version, one JSON object per line, until the server ends the answer
           BOOKMARK: a newer version, without a change. ERROR 410 (or status 410): the version is too old, list again

While the API server is away, what was known stays, and health checks take out what has died. Credentials are read
anew for each connection, because tokens of service accounts are replaced while a pod runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec

from kvmesh.config.values import format_host_port
from kvmesh.errors import StartupError
from kvmesh.router.discovery import OnBackends
from kvmesh.router.metrics import RouterMetrics
from kvmesh.router.pods import Pod, PodList, PodTable, WatchEvent, WatchStatus

log = logging.getLogger("kvmesh.router")

LIST_PAGE = 500
LIST_TIMEOUT_S = 30.0
WATCH_S = (240, 360)
"""The server is asked to end a watch after a random time in this range, so that not all routers come at once."""
WATCH_SILENCE_S = 30.0
"""Beyond the end that was asked for: a connection that has died without a word is noticed then."""
SHORTEST_WATCH_S = 1.0
RETRY_S = (0.5, 15.0)
"""Pause after a failure: doubled from the first to the second."""
MAX_LINE_BYTES = 4 << 20
_GONE = 410


class KubernetesAccess(NamedTuple):
    """How to reach the API server."""

    url: str
    namespace: str
    credentials: Path
    """Folder with `token` and `ca.crt`, as mounted for a service account."""

    def headers(self) -> dict[str, str]:
        """Read the token, which may have been replaced."""
        try:
            token = (self.credentials / "token").read_text().strip()
        except OSError:
            return {}
        return {"Authorization": f"Bearer {token}"} if token else {}

    def ssl_context(self) -> ssl.SSLContext | bool:
        certificate = self.credentials / "ca.crt"
        return ssl.create_default_context(cafile=str(certificate)) if certificate.is_file() else True


def find_access(
    *, api: str, namespace: str, credentials: Path, environ: Mapping[str, str] | None = None
) -> KubernetesAccess:
    """Take what is configured, and for the rest what a pod is told by its environment.

    Raises:
        StartupError: there is no address or no namespace.
    """
    env = os.environ if environ is None else environ
    if not api:
        host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            hint = "run the router in a pod, or give kubernetes_api"
            raise StartupError("Kubernetes", "the address of an API server", "none in the environment", hint)
        api = f"https://{format_host_port(host, int(port))}"
    if not namespace:
        try:
            namespace = (credentials / "namespace").read_text().strip()
        except OSError as error:
            hint = "give kubernetes_namespace"
            raise StartupError("Kubernetes", "the pods' namespace", str(error), hint) from None
    return KubernetesAccess(api.rstrip("/"), namespace, credentials)


class _TooOldError(Exception):
    """The resource version is no longer known: list again."""


class _WatchError(Exception):
    """The API server did not answer as it should."""


class KubernetesDiscovery:
    """Ready pods with certain labels."""

    def __init__(
        self,
        access: KubernetesAccess,
        *,
        selector: str,
        port: str,
        metrics: RouterMetrics,
        rng: random.Random | None = None,
        retry_s: tuple[float, float] = RETRY_S,
    ) -> None:
        self._access = access
        self._selector = selector
        self._metrics = metrics
        self._table = PodTable(port)
        self._rng = rng or random.Random()
        self._retry_s = retry_s
        self._list_decoder = msgspec.json.Decoder(PodList)
        self._event_decoder = msgspec.json.Decoder(WatchEvent)
        self._pod_decoder = msgspec.json.Decoder(Pod)
        self._status_decoder = msgspec.json.Decoder(WatchStatus)

    async def run(self, on_backends: OnBackends) -> None:
        """List and watch until cancelled."""
        version, failures = "", 0
        self._metrics.discovery_connected = False
        while True:
            began_s = time.monotonic()
            try:
                connector = aiohttp.TCPConnector(ssl=self._access.ssl_context(), limit=4)
                async with aiohttp.ClientSession(
                    connector=connector,
                    headers=self._access.headers(),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    read_bufsize=MAX_LINE_BYTES,
                ) as session:
                    if not version:
                        version = await self._list(session)
                        on_backends(self._table.backends())
                    self._metrics.discovery_connected = True
                    version = await self._watch(session, version, on_backends)
                failures = 0
                continue
            except _TooOldError as error:
                log.info("listing the pods anew: %s", error)
                version = ""
            except (_WatchError, aiohttp.ClientError, asyncio.TimeoutError, OSError, msgspec.MsgspecError) as error:
                self._metrics.discovery_connected = False
                if time.monotonic() - began_s > self._retry_s[1]:
                    failures = 0  # it went well for long
                if not failures:
                    log.warning("the Kubernetes API server fails url=%s: %s", self._access.url, _told(error))
                failures += 1
                # Changes may have been missed in ways that no version shows: begin with a list.
                version = ""
            first_s, longest_s = self._retry_s
            await asyncio.sleep(min(longest_s, first_s * 2 ** min(failures, 10)) * self._rng.uniform(0.5, 1.0))

    @property
    def _pods_url(self) -> str:
        return f"{self._access.url}/api/v1/namespaces/{self._access.namespace}/pods"

    async def _list(self, session: aiohttp.ClientSession) -> str:
        """Read all pods, page by page, and return the version of the list."""
        self._metrics.relists += 1
        pods: list[Pod] = []
        parameters = {"labelSelector": self._selector, "limit": str(LIST_PAGE)}
        while True:
            timeout = aiohttp.ClientTimeout(total=LIST_TIMEOUT_S)
            async with session.get(self._pods_url, params=parameters, timeout=timeout) as answer:
                await _check(answer)
                page = self._list_decoder.decode(await answer.read())
            pods += page.items
            if not page.metadata.continue_:
                self._table.replace(pods)
                return page.metadata.resource_version
            parameters["continue"] = page.metadata.continue_

    async def _watch(self, session: aiohttp.ClientSession, version: str, on_backends: OnBackends) -> str:
        """Follow changes until the server ends the answer, and return the version to go on from."""
        seconds = self._rng.randint(*WATCH_S)
        parameters = {
            "labelSelector": self._selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
        }
        timeout = aiohttp.ClientTimeout(total=seconds + WATCH_SILENCE_S, sock_connect=LIST_TIMEOUT_S)
        began_s, before = time.monotonic(), version
        async with session.get(self._pods_url, params=parameters, timeout=timeout) as answer:
            await _check(answer)
            async for line in _lines(answer.content):
                event = self._event_decoder.decode(line)
                if event.type == "ERROR":
                    status = self._status_decoder.decode(event.object)
                    if status.code == _GONE:
                        raise _TooOldError(status.message)
                    raise _WatchError(f"the watch ended with {status.code} {status.message}")
                pod = self._pod_decoder.decode(event.object)
                version = pod.metadata.resource_version or version
                if event.type in {"ADDED", "MODIFIED", "DELETED"}:
                    known = self._table.backends()
                    self._table.apply(event.type, pod)
                    after = self._table.backends()
                    if after != known:
                        on_backends(after)
        if version == before and time.monotonic() - began_s < SHORTEST_WATCH_S:
            raise _WatchError("the watch ends as soon as it has begun")  # to ask again at once would never end
        return version


async def _check(answer: aiohttp.ClientResponse) -> None:
    if answer.status == 200:
        return
    text = (await answer.content.read(2000)).decode(errors="replace")
    if answer.status == _GONE:
        raise _TooOldError(text[:200])
    hint = ""
    if answer.status in {401, 403}:
        hint = "; the router's service account needs list and watch of pods in this namespace"
    raise _WatchError(f"status {answer.status} {' '.join(text.split())[:300]}{hint}")


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length up to MAX_LINE_BYTES; a line that is not complete at the end is dropped."""
    rest = b""
    while part := await content.readany():
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise _WatchError(f"a line of more than {MAX_LINE_BYTES} bytes")
        for line in lines:
            if line.strip():
                yield line


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
