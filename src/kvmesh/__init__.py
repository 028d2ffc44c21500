"""kvmesh: LLM serving engines reuse each other's KV cache, peer to peer.

`docs/architecture.md` follows one request through the system and names the file of each step.
"""

__version__ = "0.1.0"
