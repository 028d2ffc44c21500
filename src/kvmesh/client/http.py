"""Asking the controller over HTTP: addresses, certificates, tokens, and errors that say what to do.

One thread; every call waits at most its time-out. Nothing is tried twice: the caller is a person, or a loop of its own.
"""

from __future__ import annotations

import contextlib
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

import kvmesh
from kvmesh.client.answers import ApiErrorAnswer, Health
from kvmesh.config.sources import CONTROLLER_CA_VARIABLE, CONTROLLER_VARIABLE
from kvmesh.config.values import is_loopback, parse_host_port
from kvmesh.errors import ApiRefusedError, ConfigError, ConfigProblem, DirectoryUnavailableError

DEFAULT_URL: Final = "http://127.0.0.1:9000"
"""Where `kvmesh controller` listens unless it is told otherwise."""
TIMEOUT_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 256 << 20
"""A lookup of 10,000 keys in a cluster of a thousand instances stays far below."""
_KEY_HINT = "give --cluster-key-file or KVMESH_CLUSTER_KEY"

_START_HINT = f"start one with `kvmesh controller`, or give --controller (or {CONTROLLER_VARIABLE})"

_T = TypeVar("_T")
_ERRNO = re.compile(r"^\[Errno -?\d+\] ")
_CONTROL = re.compile(
    rb"\\\\"  # a backslash that is meant: what follows it is text
    rb"|(?P<control>\\u00(?:[01][0-9a-fA-F]|7[fF]|[89][0-9a-fA-F])|\xc2[\x80-\x9f]|\x7f)"
)
"""Control characters as JSON has them."""


class ControllerTarget(NamedTuple):
    """Where the controller is, and how to know that it is the right one."""

    url: str
    """Scheme, host and port, without a slash at the end."""
    ca_file: str | None = None
    what: str = "controller"
    """Or `node`: its admin port answers in the same way."""

    @classmethod
    def parse(cls, text: str, ca_file: Path | None = None, what: str = "controller") -> ControllerTarget:
        """Read `host:port`, `http://host:port` or `https://host:port`. Raises ConfigError."""
        scheme, separator, rest = text.strip().rpartition("://")
        scheme = scheme if separator else "http"
        problem = None
        try:
            if scheme not in {"http", "https"}:
                raise ValueError(f"the scheme {scheme!r} is not supported, only http and https")
            parse_host_port(rest.rstrip("/"))
        except ValueError as error:
            expected = f"the address of a {what}'s HTTP port, such as 10.0.0.5:9000 or https://controller:9000"
            problem = ConfigProblem(f"--{what}", CONTROLLER_VARIABLE, expected, repr(text[:200]), str(error))
        if problem is not None:
            raise ConfigError([problem])
        if ca_file is not None and not ca_file.is_file():
            found = ConfigProblem("--ca", CONTROLLER_CA_VARIABLE, "a file with certificates (PEM)", str(ca_file))
            raise ConfigError([found])
        return cls(f"{scheme}://{rest.rstrip('/')}", None if ca_file is None else str(ca_file), what)

    @property
    def host(self) -> str:
        """The host alone."""
        return urlsplit(self.url).hostname or ""


class ControllerApi:
    """The controller's HTTP API. For one thread; close it."""

    def __init__(
        self,
        target: ControllerTarget,
        *,
        token: Callable[[], str | None] = lambda: None,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Connects nowhere yet. Raises ConfigError when the CA's file is no good.

        Args:
            target: the controller.
            token: gives the token for calls that change something, asked when the first of them is made.
            timeout_s: longest wait for a connection, and between two pieces of an answer.
            transport: stands in for the network, in tests.
        """
        self.target = target
        self._token = token
        self._http = httpx.Client(
            base_url=target.url,
            timeout=timeout_s,
            verify=_trust(target),
            transport=transport,
            # A proxy of the environment knows nothing of this machine's loopback.
            trust_env=not is_loopback(target.host),
            headers={"User-Agent": f"kvmesh/{kvmesh.__version__}"},
        )

    def close(self) -> None:
        """Drop the connection."""
        self._http.close()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def get(self, path: str, kind: type[_T], **query: str | float | None) -> _T:
        """Ask for one answer of the given type. `query` without the Nones.

        Raises DirectoryUnavailableError when nobody answers, or not in a way that a controller does, and
        ApiRefusedError when the answer is an error.
        """
        return self.decode(self.get_raw(path, **query), kind)

    def get_if_known(self, path: str, kind: type[_T], **query: str | float | None) -> _T | None:
        """The same; None from a controller that does not know this call. Raises as `get` otherwise."""
        try:
            return self.get(path, kind, **query)
        except ApiRefusedError as refused:
            if refused.code == "unknown_endpoint":
                return None
            raise

    def get_raw(self, path: str, **query: str | float | None) -> bytes:
        """The same, as the JSON text that came."""
        return self._ask("GET", path, query=query).content

    def post(self, path: str, body: object, kind: type[_T]) -> _T:
        """Ask with a body, and change nothing. Raises as `get`."""
        return self.decode(self.post_raw(path, body), kind)

    def post_raw(self, path: str, body: object) -> bytes:
        """The same, as the JSON text that came."""
        return self._ask("POST", path, body=body).content

    def change(self, method: str, path: str, body: object = None, *, idempotency_key: str | None = None) -> bytes:
        """Have something changed, showing the cluster's token; the JSON text that came.

        With `idempotency_key`, the same call made twice is carried out once. Raises as `get`, and ConfigError for a bad
        key.
        """
        token = self._token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        try:
            return self._ask(method, path, body=body, headers=headers).content
        except ApiRefusedError as refused:
            if refused.status == httpx.codes.UNAUTHORIZED and not token:
                raise ApiRefusedError(refused.thing, refused.found, _KEY_HINT, refused.status, refused.code) from None
            raise

    def health(self) -> Health:
        """`/healthz`, also when it says that the controller is not well. Raises DirectoryUnavailableError."""
        answer = self._send("GET", "/healthz", {}, None, {})
        if answer.status_code not in {httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE}:
            self._refuse(answer)
        return self.decode(answer.content, Health)

    def date(self) -> str | None:
        """The controller's clock, as HTTP's Date header tells it. Raises DirectoryUnavailableError."""
        answer = self._send("GET", "/healthz", {}, None, {})
        return str(answer.headers["Date"]) if "Date" in answer.headers else None

    def decode(self, content: bytes, kind: type[_T]) -> _T:
        """An answer as a typed value, which may be shown on a terminal. Raises DirectoryUnavailableError."""
        try:
            return _decode(content, kind)
        except (msgspec.MsgspecError, ValueError) as error:
            raise self._no_controller(f"something else: {error}") from None

    # -- inside --------------------------------------------------------------------------------------------------------

    def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int | float | None] | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        answer = self._send(method, path, query or {}, body, headers or {})
        if answer.is_error:
            self._refuse(answer)
        return answer

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int | float | None],
        body: object,
        headers: Mapping[str, str],
    ) -> httpx.Response:
        content = None if body is None else msgspec.json.encode(body)
        sent = {**headers, "Content-Type": "application/json"} if content is not None else dict(headers)
        parameters = {name: value for name, value in query.items() if value is not None}
        with self._explained():
            request = self._http.build_request(method, path, params=parameters, content=content, headers=sent)
            answer = self._http.send(request, stream=True)
            try:
                return httpx.Response(
                    answer.status_code, headers=answer.headers, content=self._read(answer), request=request
                )
            finally:
                answer.close()

    def _read(self, answer: httpx.Response) -> bytes:
        """The whole answer; who answers may be anybody, so not without a limit."""
        pieces, size = [], 0
        for piece in answer.iter_bytes():
            pieces.append(piece)
            size += len(piece)
            if size > MAX_ANSWER_BYTES:
                raise self._no_controller(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        answer.headers.pop("Content-Encoding", None)  # undone while reading
        return b"".join(pieces)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the network, in words that say what to do."""
        thing = f"{self.target.what} at {self.target.url}"
        hint = "give the admin_port of a node that runs" if self.target.what == "node" else _START_HINT
        try:
            yield
        except httpx.TimeoutException as error:
            found = f"none in time ({type(error).__name__})"
            hint = f"look whether its machine, its process and the network between are well; {hint}"
            raise DirectoryUnavailableError(thing, "an answer", found, hint) from None
        except httpx.ConnectError as error:
            found = _ERRNO.sub("", str(error)) or "no connection"
            if "CERTIFICATE_VERIFY_FAILED" in found:
                hint = f"give the CA of its certificate: --ca FILE (or {CONTROLLER_CA_VARIABLE})"
            elif "WRONG_VERSION_NUMBER" in found or "record layer failure" in found:
                hint = "it speaks plain HTTP: write http:// instead of https://"
            raise DirectoryUnavailableError(thing, "an answer", found, hint) from None
        except httpx.RemoteProtocolError as error:
            hint = "it may speak TLS: try https://; or it is another program" if self._is_plain() else hint
            raise DirectoryUnavailableError(thing, "an answer by HTTP", str(error), hint) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise DirectoryUnavailableError(thing, "an answer", str(error) or type(error).__name__, hint) from None

    def _is_plain(self) -> bool:
        return self.target.url.startswith("http:")

    def _refuse(self, answer: httpx.Response) -> None:
        thing = f"{self.target.what} at {self.target.url}"
        try:
            told = _decode(answer.content, ApiErrorAnswer).error
        except (msgspec.MsgspecError, ValueError):
            found = f"HTTP {answer.status_code} {answer.reason_phrase}"
            hint = "is this the HTTP port of a controller (--port), and nothing between that changes answers?"
            raise ApiRefusedError(thing, found, hint, answer.status_code) from None
        raise ApiRefusedError(thing, told.message, told.hint, answer.status_code, told.code)

    def _no_controller(self, found: str) -> DirectoryUnavailableError:
        hint = "give --controller the HTTP port of a kvmesh controller (--port), of a version near this one's"
        return DirectoryUnavailableError(
            f"controller at {self.target.url}", "a kvmesh controller's answer", found, hint
        )


def _trust(target: ControllerTarget) -> ssl.SSLContext | bool:
    """Whose certificates count. Raises ConfigError."""
    if target.ca_file is None:
        return target.url.startswith("https:")  # reading the system's certificates takes a while
    try:
        return ssl.create_default_context(cafile=target.ca_file)
    except OSError as error:  # ssl.SSLError is one
        expected = "certificates of a CA (PEM)"
        problem = ConfigProblem("--ca", CONTROLLER_CA_VARIABLE, expected, f"{target.ca_file}: {error}")
        raise ConfigError([problem]) from None


def _decode(content: bytes, kind: type[_T]) -> _T:
    """JSON without control characters: instances choose their names and users their request ids, and none of them may
    tell a terminal what to do.
    """
    clean = _CONTROL.sub(lambda found: b"?" if found["control"] else found[0], content)
    return msgspec.json.decode(clean, type=kind)
