"""Configuration: one frozen, typed object, made from file, environment and vLLM's extra config.

    config = load_config()          # raises ConfigError with every problem; log `config.warnings` after it
    config.sources["peer_port"]     # "example1.yaml:7"

`docs/configuration.md` lists every key. One file per subject: `model` (the keys, declared with `keys`), `resolved`
(what follows from them), `ranks` (data-parallel engines), `sources` (reading), `load` (merging and checking),
`combinations` (what does not go together), `foreign` (keys of LMCache and vLLM), `values` (addresses, lists, secrets),
`cluster_key`, `tls`, `controller` (the controller's own flags).
"""

from kvmesh.config.controller import ControllerConfig, MonitorPorts, make_controller_config, parse_monitor_ports
from kvmesh.config.keys import ConfigRow
from kvmesh.config.load import load_config
from kvmesh.config.model import TransferChannel
from kvmesh.config.resolved import DirectoryKind, KVMeshConfig
from kvmesh.config.tls import TlsFiles
from kvmesh.config.values import is_loopback, mask_secrets

__all__ = [
    "ConfigRow",
    "ControllerConfig",
    "DirectoryKind",
    "KVMeshConfig",
    "MonitorPorts",
    "TlsFiles",
    "TransferChannel",
    "is_loopback",
    "load_config",
    "make_controller_config",
    "mask_secrets",
    "parse_monitor_ports",
]
