"""Configuration from files, environment and the connector: a configuration, or ConfigError. Nothing else."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fuzz.effort import fuzz
from kvmesh.config import KVMeshConfig, load_config
from kvmesh.config.controller import make_controller_config, parse_monitor_ports
from kvmesh.errors import ConfigError

SEED = """
chunk_size: 256
local_cpu: True
max_local_cpu_size: 5
enable_async_loading: True
enable_p2p: True
p2p_host: "localhost"
p2p_init_ports: 8200
p2p_lookup_ports: 8201
transfer_channel: "tcp"
enable_controller: True
lmcache_instance_id: "lmcache_instance_1"
controller_pull_url: "localhost:8300"
controller_reply_url: "localhost:8400"
lmcache_worker_ports: 8500
extra_config:
  lookup_backoff_time: 0.001
"""
KEYS = [*KVMeshConfig.model_fields, *yaml.safe_load(SEED), "lookup_url", "distributed_url", "peer_ports", "nonsense"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.binary(max_size=8)
    | st.sampled_from(["tcp", "nixl", "auto", "localhost:1", "tcp://h:1", "[::1]:9", "h:99999", "0.0.0.0", "~", "${X}"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
settings_of_ours = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(["noise", "text", "settings", "changed", "tags"]))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    if kind == "text":
        return draw(st.text("abc:- \n\t{}[]&*!|>'\"%@`#?,0123456789_", max_size=120)).encode()
    if kind == "settings":
        return yaml.safe_dump(draw(settings_of_ours)).encode()
    if kind == "tags":
        name = draw(st.sampled_from(KEYS))
        value = draw(
            st.sampled_from(
                [
                    "!!python/object/apply:os.system ['true']",
                    "!!python/name:os.system",
                    "!!timestamp 9999-99-99",
                    "!!int 0x" + "f" * 5000,
                    "!!float 1:2:3",
                    "!!set {a, b}",
                    "!!binary '='",
                    "&a [*a]",
                    "&a {b: *a}",
                    "[" * 3000,
                    "{a: " * 2000,
                    "9" * 5000,
                    "1e999",
                    "<<: 1",
                ]
            )
        )
        return f"{name}: {value}\n".encode()
    text = bytearray(SEED.encode())
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(text) - 1))
        text[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return bytes(text)


@given(document=documents())
@fuzz(250)
def test_files(tmp_path: Path, document: bytes) -> None:
    """A configuration that survives the way to the node, or ConfigError."""
    file = tmp_path / "config.yaml"
    file.write_bytes(document)
    with contextlib.suppress(ConfigError):
        config = load_config(path=file, environ={})
        assert KVMeshConfig.from_wire(config.to_wire()) == config


@pytest.mark.parametrize("value", ["0x" + "f" * 5000, "[0x" + "f" * 5000 + "]"])
def test_a_number_that_cannot_be_written_out_is_a_problem_like_any_other(tmp_path: Path, value: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"chunk_size: {value}\n")
    with pytest.raises(ConfigError, match="chunk_size"):
        load_config(path=file, environ={})


environment = st.dictionaries(
    st.sampled_from([f"{prefix}_{key.upper()}" for prefix in ("KVMESH", "LMCACHE") for key in KEYS]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
    | st.sampled_from(["[1, 2]", "{", "true", "1e400", "!!python/name:os", "/", "tcp"]),
    max_size=5,
)


@given(extra=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), values, max_size=6), environ=environment)
@fuzz(150)
def test_extra_keys_and_environment(extra: dict[str, object], environ: dict[str, str]) -> None:
    environ.pop("KVMESH_CONFIG_FILE", None)
    with contextlib.suppress(ConfigError):
        load_config(extra=extra, environ=environ)


@given(
    text=st.text(max_size=60)
    | st.sampled_from(['{"pull": 1}', "[" * 2000, '{"pull": 1e400, "reply": NaN}', '{"pull":1,"pull":2}', "9" * 5000])
)
@fuzz(150)
def test_the_controllers_ports(text: str) -> None:
    with contextlib.suppress(ConfigError, ValueError):
        parse_monitor_ports(text)


@given(
    host=st.text(max_size=20) | st.sampled_from(["127.0.0.1", "::1", "[::1]", "localhost", "a b", "%", "0.0.0.0"]),
    port=st.integers(),
)
@fuzz(100)
def test_the_controllers_address(host: str, port: int) -> None:
    with contextlib.suppress(ConfigError):
        make_controller_config(host=host, port=port, environ={})
