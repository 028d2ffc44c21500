"""Registration with vLLM, by the entry point group `vllm.general_plugins`. Runs in the API server, the engine and every worker."""

from __future__ import annotations

CONNECTOR_NAME = "KVMeshConnector"


def register() -> None:
    """Make `--kv-transfer-config '{"kv_connector": "KVMeshConnector", ...}'` work. Idempotent; imports nothing heavy of ours."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415  (only inside vLLM)

    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR_NAME, "kvmesh.vllm.connector", CONNECTOR_NAME)
