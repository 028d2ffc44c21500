"""The router: one OpenAI-compatible address in front of many engines.

A request passes these files: `app.py` (connections, limits, the router's own paths), `request.py` (what the policies
need to know of it), `proxy.py` (choose, send, retry, stream), `policies.py`, `prefix.py` and `kv.py` (who gets it),
`upstream.py` (connections to engines). Beside it run `discovery.py` and `kubernetes.py` (which engines there are),
`health.py` (which of them answer, and what they serve) and `directory.py` (who holds which chunks).

It knows nothing of transfers and of vLLM's internals, and keeps nothing on disk.
"""
