"""A small Kubernetes API server as a process: lists and watches pods over real HTTP, as far as the router asks for it.

    python fake_kubernetes.py PORT TOKEN

POST /control takes `{"pods": {...}}` (a pod by uid, null deletes it), `{"expire": true}` (older versions get 410),
`{"drop": true}` (open watches break off), `{"away": true}` (every call gets 500), `{"bookmark": true}`.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web


class FakeKubernetes:
    def __init__(self, token: str) -> None:
        self.token = token
        self.version = 100
        self.oldest = 0
        self.pods: dict[str, dict] = {}
        self.history: list[tuple[int, str, dict]] = []
        self.watches: set[asyncio.Queue] = set()
        self.away = False
        self.counts = {"lists": 0, "watches": 0}

    async def control(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.away = asked.get("away", False)
        for uid, pod in asked.get("pods", {}).items():
            self._set(uid, pod)
        if asked.get("expire"):
            self.oldest = self.version = self.version + 1000
        for queue in list(self.watches):
            if asked.get("expire"):
                queue.put_nowait(("ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"}))
            if asked.get("bookmark"):
                queue.put_nowait(("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": str(self.version)}}))
            if asked.get("drop") or self.away:
                queue.put_nowait(None)
        return web.json_response(self.counts)

    def _set(self, uid: str, pod: dict | None) -> None:
        self.version += 1
        known = self.pods.pop(uid, None)
        kind = "DELETED" if pod is None else "MODIFIED" if known else "ADDED"
        pod = dict(pod or known or {})
        pod["metadata"] = {**pod.get("metadata", {}), "uid": uid, "resourceVersion": str(self.version)}
        if kind != "DELETED":
            self.pods[uid] = pod
        self.history.append((self.version, kind, pod))
        for queue in self.watches:
            queue.put_nowait((kind, pod))

    async def list_pods(self, request: web.Request) -> web.StreamResponse:
        if self.away:
            return web.json_response({"kind": "Status", "code": 500}, status=500)
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"kind": "Status", "code": 401, "message": "Unauthorized"}, status=401)
        if request.query.get("labelSelector") != "app=vllm" or request.match_info["namespace"] != "space":
            return web.json_response({"kind": "Status", "code": 403, "message": "Forbidden"}, status=403)
        if request.query.get("watch") == "true":
            return await self._watch(request)
        self.counts["lists"] += 1
        names = sorted(self.pods)
        start = int(request.query.get("continue", 0))
        page = names[start : start + 2]  # small pages, so that more than one is asked for
        rest = str(start + 2) if start + 2 < len(names) else ""
        metadata = {"resourceVersion": str(self.version), "continue": rest}
        return web.json_response({"kind": "PodList", "metadata": metadata, "items": [self.pods[uid] for uid in page]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        self.counts["watches"] += 1
        since = int(request.query["resourceVersion"])
        if since < self.oldest:
            return web.json_response({"kind": "Status", "code": 410, "message": "too old"}, status=410)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        queue: asyncio.Queue = asyncio.Queue()
        for version, kind, pod in self.history:
            if version > since:
                queue.put_nowait((kind, pod))
        self.watches.add(queue)
        try:
            while (event := await queue.get()) is not None:
                line = json.dumps({"type": event[0], "object": event[1]}).encode() + b"\n"
                await response.write(line[:40])  # lines come in pieces
                await response.write(line[40:])
        finally:
            self.watches.discard(queue)
        if request.transport is not None:
            request.transport.abort()
        return response


async def _healthz(_: web.Request) -> web.Response:
    return web.Response()


async def main(port: int, token: str) -> None:
    fake = FakeKubernetes(token)
    app = web.Application()
    app.router.add_get("/healthz", _healthz)
    app.router.add_post("/control", fake.control)
    app.router.add_get("/api/v1/namespaces/{namespace}/pods", fake.list_pods)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
