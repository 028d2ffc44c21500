"""An API server in memory: enough for real Helm and kubectl, and for programs that watch pods.

It serves HTTPS to whoever has the administrator's token, or a service account's, which may do what its Roles say and
nothing else. There is no admission, no scheduler, no garbage collection: `kubelet` does what a cluster's other programs
would.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import queue
import re
import secrets
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import yaml
from typing_extensions import Self

from support.kube import patches, protobuf
from support.kube.store import KINDS, ConflictError, Key, Kind, MissingError, Object, Store

VERSION = {"major": "1", "minor": "34", "gitVersion": "v1.34.0", "platform": "linux/amd64"}
_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
_INITIAL_END = "k8s.io/initial-events-end"
_BY_NAME: dict[tuple[str, str], Kind] = {(kind.group_version, kind.plural): kind for kind in KINDS}


class AnswerError(Exception):
    """An answer that is no success."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class ApiServer:
    """The server, its certificate and its tokens, in a folder. A context manager."""

    def __init__(self, folder: Path, host: str = "127.0.0.1", check: Callable[[Object], None] | None = None) -> None:
        """`check` raises ValueError for an object that is not of Kubernetes' form."""
        self.store = Store()
        self.check = check
        self.folder = folder
        self.host = host
        self.admin_token = secrets.token_hex(16)
        self._accounts: dict[str, tuple[str, str]] = {}
        self.ca_file = folder / "api.pem"
        _make_certificate(self.ca_file, folder / "api.key", host)
        server = _Server((host, 0), _Handler)
        server.api = self
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ca_file, folder / "api.key")
        server.tls = context
        self._server = server
        self.port = server.server_address[1]
        self._thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    def kubeconfig(self, namespace: str = "default") -> Path:
        """A kubeconfig for the administrator, as a file."""
        path = self.folder / "kubeconfig.yaml"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "little",
            "clusters": [
                {"name": "little", "cluster": {"server": self.url, "certificate-authority": str(self.ca_file)}}
            ],
            "users": [{"name": "admin", "user": {"token": self.admin_token}}],
            "contexts": [{"name": "little", "context": {"cluster": "little", "user": "admin", "namespace": namespace}}],
        }
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    def account_token(self, namespace: str, name: str) -> str:
        """A token of a service account."""
        token = secrets.token_hex(16)
        self._accounts[token] = (namespace, name)
        return token

    def authorise(self, token: str, verb: str, kind: Kind, namespace: str) -> None:
        """Raises AnswerError unless the token's owner may do that."""
        if token == self.admin_token:
            return
        account = self._accounts.get(token)
        if account is None:
            raise AnswerError(401, "Unauthorized", "Unauthorized")
        for binding in self.store.list("rolebindings", namespace):
            subjects = {(one.get("namespace", namespace), one["name"]) for one in binding.get("subjects", ())}
            if account not in subjects:
                continue
            role = self.store.get(Key("rbac.authorization.k8s.io/v1", "roles", namespace, binding["roleRef"]["name"]))
            group = kind.group_version.rpartition("/")[0]
            for rule in role["rules"]:
                if group in rule["apiGroups"] and kind.plural in rule["resources"] and verb in rule["verbs"]:
                    return
        raise AnswerError(
            403, "Forbidden", f"{account[1]} cannot {verb} {kind.plural} in {namespace or 'all namespaces'}"
        )


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    api: ApiServer
    tls: ssl.SSLContext

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.stopping = threading.Event()

    def finish_request(self, request, client_address) -> None:
        # The handshake belongs into the connection's own thread: a client that says nothing must not hold others up.
        with contextlib.suppress(OSError):
            self.RequestHandlerClass(self.tls.wrap_socket(request, server_side=True), client_address, self)

    def handle_error(self, request, client_address) -> None:
        pass  # clients that go in the middle of a watch


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        try:
            self._route(body)
        except AnswerError as error:
            self._fail(error.code, error.reason, str(error))
        except MissingError as error:
            self._fail(404, "NotFound", f"{error} not found")
        except ConflictError as error:
            self._fail(409, "AlreadyExists", f"{error} already exists")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815 - the standard library's names

    def _route(self, body: bytes) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        parts = [part for part in url.path.split("/") if part]
        if parts == ["version"]:
            return self._answer(VERSION)
        if parts == ["api"]:
            return self._answer({"kind": "APIVersions", "versions": ["v1"]})
        if parts == ["apis"]:
            return self._answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()})
        if parts[:2] == ["openapi", "v3"]:
            return self._answer(_openapi("/".join(parts[2:])))
        if not parts or parts[0] not in {"api", "apis"}:
            raise AnswerError(404, "NotFound", url.path)
        count = 2 if parts[0] == "api" else 3
        group_version, rest = "/".join(parts[1:count]), parts[count:]
        if not any(kind.group_version == group_version for kind in KINDS):
            raise AnswerError(404, "NotFound", group_version)
        if not rest:
            return self._answer(_resources(group_version))
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        kind = _BY_NAME.get((group_version, rest[0]))
        if kind is None:
            raise AnswerError(404, "NotFound", rest[0])
        return self._serve(kind, namespace, rest[1:], query, body)

    def _serve(self, kind: Kind, namespace: str, rest: list[str], query: dict[str, str], body: bytes) -> None:
        api, store, method = self.server.api, self.server.api.store, self.command
        key = Key(kind.group_version, kind.plural, namespace, rest[0] if rest else "")
        if rest[1:] == ["log"]:
            # A kubelet keeps the log beside the pod's status.
            log = store.get(key).get("log_file")
            return self._text(Path(log).read_text(errors="replace") if log and Path(log).exists() else "")
        watching = query.get("watch") in {"1", "true"}
        verb = {"GET": "get" if rest else "list", "POST": "create", "PUT": "update", "PATCH": "patch"}.get(
            method, "delete"
        )
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        api.authorise(token, "watch" if watching else verb, kind, namespace)
        if method == "GET" and rest:
            return self._answer(store.get(key))
        if method == "GET" and watching:
            return self._watch(kind, namespace, query)
        if method == "GET":
            items = [one for one in store.list(kind.plural, namespace, kind.group_version) if _selected(one, query)]
            metadata = {"resourceVersion": str(store.version)}
            return self._answer(
                {"kind": f"{kind.kind}List", "apiVersion": kind.group_version, "metadata": metadata, "items": items}
            )
        if method == "DELETE":
            return self._answer(store.delete(key))
        return self._write(kind, key, query, body)

    def _write(self, kind: Kind, key: Key, query: dict[str, str], body: bytes) -> None:
        store, content = self.server.api.store, self.headers.get("Content-Type", "")
        change = protobuf.decode(body) if body.startswith(protobuf.MAGIC) else yaml.safe_load(body)
        dry = "dryRun" in query
        if self.command == "POST":
            key = key._replace(name=change["metadata"]["name"])
            new = self._checked({"apiVersion": kind.group_version, "kind": kind.kind, **change})
            return self._answer(new if dry else store.create(key, new), 201)
        if "apply-patch" in content:
            try:
                before = store.get(key)
            except MissingError:
                new = self._checked(patches.apply_patch(None, change))
                return self._answer(new if dry else store.create(key, new), 201)
            after = self._checked(patches.apply_patch(before, change))
            return self._answer(after if dry else store.change(key, lambda _: after))
        if self.command == "PUT":
            return self._answer(store.change(key, lambda _: self._checked(change)))
        patch = patches.strategic_patch if "strategic" in content else patches.merge_patch
        return self._answer(store.change(key, lambda before: self._checked(patch(before, change))))

    def _checked(self, new: Object) -> Object:
        if self.server.api.check is not None:
            try:
                self.server.api.check(new)
            except ValueError as error:
                raise AnswerError(422, "Invalid", str(error)) from error
        return new

    def _watch(self, kind: Kind, namespace: str, query: dict[str, str]) -> None:
        store = self.server.api.store
        since = int(query.get("resourceVersion") or 0)
        events, end = store.watch(since or None)
        try:
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Connection", "close")
            self.end_headers()
            if not since:
                for one in store.list(kind.plural, namespace, kind.group_version):
                    if _selected(one, query):
                        self._event("ADDED", one)
            if query.get("sendInitialEvents") == "true":
                # The mark after which a client knows that it has seen everything that was there.
                metadata = {"resourceVersion": str(store.version), "annotations": {_INITIAL_END: "true"}}
                mark = {"apiVersion": kind.group_version, "kind": kind.kind, "metadata": metadata}
                self._event("BOOKMARK", mark)
            until_s = time.monotonic() + float(query.get("timeoutSeconds") or 300)
            while time.monotonic() < until_s and not self.server.stopping.is_set():
                with contextlib.suppress(queue.Empty):
                    event = events.get(timeout=0.1)
                    same = event.key.plural == kind.plural and (not namespace or event.key.namespace == namespace)
                    if same and _selected(event.object, query):
                        self._event(event.type, event.object)
        finally:
            end()

    def _event(self, what: str, found: Object) -> None:
        self.wfile.write(json.dumps({"type": what, "object": found}).encode() + b"\n")
        self.wfile.flush()

    def _answer(self, found: object, code: int = 200) -> None:
        self._send(json.dumps(found).encode(), "application/json", code)

    def _text(self, text: str) -> None:
        self._send(text.encode(), "text/plain", 200)

    def _send(self, data: bytes, content_type: str, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, code: int, reason: str, message: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
        self._answer({**status, "message": message}, code)


def _groups() -> list[Object]:
    found = []
    for name in dict.fromkeys(kind.group_version for kind in KINDS if "/" in kind.group_version):
        group, _, version = name.partition("/")
        versions = [{"groupVersion": name, "version": version}]
        found.append({"name": group, "versions": versions, "preferredVersion": versions[0]})
    return found


def _resources(group_version: str) -> Object:
    listed = [
        {"name": kind.plural, "singularName": kind.kind.lower(), "namespaced": kind.namespaced, "kind": kind.kind}
        for kind in KINDS
        if kind.group_version == group_version
    ]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": group_version,
        "resources": [{**one, "verbs": _VERBS} for one in listed],
    }


def _openapi(path: str) -> Object:
    """Says that objects are checked here (`fieldValidation`), so that clients need not check them by a schema."""
    if not path:
        paths = {
            _root(kind.group_version): {"serverRelativeURL": f"/openapi/v3/{_root(kind.group_version)}"}
            for kind in KINDS
        }
        return {"paths": paths}
    found = {}
    for kind in KINDS:
        if _root(kind.group_version) == path:
            group, _, version = kind.group_version.rpartition("/")
            names = {"group": group, "version": version, "kind": kind.kind}
            parameters = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
            patch = {"x-kubernetes-group-version-kind": names, "parameters": parameters, "responses": {}}
            found[f"/{path}/namespaces/{{namespace}}/{kind.plural}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "little", "version": "1"}, "paths": found}


def _root(group_version: str) -> str:
    return f"apis/{group_version}" if "/" in group_version else f"api/{group_version}"


def _selected(found: Object, query: dict[str, str]) -> bool:
    labels = found["metadata"].get("labels") or {}
    for term in filter(None, re.split(r",(?![^(]*\))", query.get("labelSelector", ""))):
        match = re.fullmatch(r"\s*([^!=\s]+)\s*(!=|==?)\s*(.*?)\s*", term)
        if match is None:
            raise AnswerError(400, "BadRequest", f"label selector {term!r}")
        if (labels.get(match[1]) == match[3]) == (match[2] == "!="):
            return False
    name = re.fullmatch(r"metadata\.name=(.*)", query.get("fieldSelector", ""))
    return name is None or found["metadata"]["name"] == name[1]


def _make_certificate(certificate: Path, key: Path, host: str) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=little", "-addext", f"subjectAltName=IP:{host},DNS:localhost"]
    subprocess.run(
        [*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=30
    )
