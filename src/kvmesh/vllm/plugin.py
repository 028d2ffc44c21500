"""Registration with vLLM, by its entry point group for plugins. Runs in the API server, the engine and every worker."""

from __future__ import annotations

CONNECTOR_NAME = "KVMeshConnector"


def register() -> None:
    """Make `--kv-transfer-config '{"kv_connector": "KVMeshConnector", ...}'` work.

    Idempotent, since vLLM may run plugins twice in a process. Imports nothing heavy of ours.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR_NAME not in KVConnectorFactory._registry:  # noqa: SLF001 - registering twice is an error there
        KVConnectorFactory.register_connector(CONNECTOR_NAME, "kvmesh.vllm.connector", CONNECTOR_NAME)
