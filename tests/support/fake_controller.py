"""An HTTP server that answers as a controller would, with what the test has put in."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

Answer = object | Callable[["Asked"], tuple[int, object]]


class Asked(NamedTuple):
    """One request, as it came."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: object


class FakeController:
    """`answers` by path, for all methods; a function gets the request and gives status and body."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: dict[str, Answer] = {}
        self.asked: list[Asked] = []
        self.status: dict[str, int] = {}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def refuse(self, path: str, status: int, code: str, message: str, hint: str = "") -> None:
        self.answers[path] = {"error": {"code": code, "message": message, "hint": hint}}
        self.status[path] = status

    def answer(self, asked: Asked) -> tuple[int, object]:
        self.asked.append(asked)
        if asked.path not in self.answers:
            return 404, {"error": {"code": "unknown_endpoint", "message": f"no {asked.path}", "hint": ""}}
        answer = self.answers[asked.path]
        if callable(answer):
            return answer(asked)
        return self.status.get(asked.path, 200), answer


@contextlib.contextmanager
def fake_controller() -> Iterator[FakeController]:
    """One on a free port, with an empty and healthy cluster."""

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(size)
            path, _, query = self.path.partition("?")
            asked = Asked(self.command, path, query, dict(self.headers), json.loads(sent) if sent else None)
            status, body = controller.answer(asked)
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _serve  # noqa: N815 - the server's names

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    controller = FakeController(server.server_address[1])
    controller.answers |= {
        "/healthz": {"status": "ok", "version": "0.1.0", "incarnation": "ab" * 8, "uptime_s": 61.0, "problems": []},
        "/metrics": b"",
        "/api/v1/instances": {"instances": [], "departed": []},
        "/api/v1/totals": {"instances": 0, "formats": 0},
        "/api/v1/incompatibilities": [],
        "/api/v1/fetches": [],
    }
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield controller
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


FORMAT_FIELDS = {
    "model_name": "SmolLM2-135M",
    "model_weights": "w0",
    "kv_dtype": "float32",
    "kv_layout": "NHD/1",
    "block_tokens": 16,
    "chunk_tokens": 256,
    "chunk_bytes": 11_796_480,
    "groups": "all:16",
    "hash_algorithm": "sha256",
    "hash_seed": "",
    "parallel_layout": "tp1",
    "instruction_set": "avx2",
}


def instance(name: str, **changed: object) -> dict[str, object]:
    """One member as `/api/v1/instances` shows it."""
    return {
        "instance_id": name,
        "incarnation": "0123456789abcdef",
        "state": "up",
        "peer_address": "127.0.0.1:8200",
        "admin_address": None,
        "version": "0.1.0",
        "transports": ["tcp"],
        "format": {"format_id": "c7" * 16, "model_name": "SmolLM2-135M", "fields": FORMAT_FIELDS},
        "slots": 1000,
        "chunks": 300,
        "pool_use": 0.3,
        "inventory_known": True,
        "last_contact_age_s": 0.4,
        "member_for_s": 81.2,
        "behind_bytes": 0,
        "corrupt_chunks": 0,
        "statistics": {"fetches": 3, "fetched_chunks": 15, "fetched_bytes": 150_000_000, "misses": {"evicted": 5}},
        "incompatible_count": 0,
        "incompatible_with": [],
        **changed,
    }
