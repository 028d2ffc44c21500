from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvmesh
from kvmesh.config import (
    KVMeshConfig,
    MonitorPorts,
    is_loopback,
    load_config,
    make_controller_config,
    mask_secrets,
    parse_monitor_ports,
)
from kvmesh.config.foreign import LMCACHE_KEYS, VLLM_KEYS
from kvmesh.config.model import KEYS, OWN_NAMES
from kvmesh.config.redis_url import parse_redis_url
from kvmesh.config.values import parse_host_port, parse_tcp_url
from kvmesh.errors import ConfigError, ConfigProblem

DATA = Path(__file__).parents[1] / "data"
DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"
CONTROLLER = {"controller_pull_url": "localhost:8300", "controller_reply_url": "localhost:8400"}


def load(text: str = "", *, env: dict[str, str] | None = None, extra: dict[str, object] | None = None) -> KVMeshConfig:
    """A valid minimum from vLLM's extra config, with `text` as the file."""
    return load_config(path=write(text), environ=env or {}, extra={**CONTROLLER, **(extra or {})})


def problems_of(
    text: str = "", *, env: dict[str, str] | None = None, extra: dict[str, object] | None = None
) -> list[ConfigProblem]:
    with pytest.raises(ConfigError) as caught:
        load(text, env=env, extra=extra)
    return list(caught.value.problems)


def only_problem(text: str = "", **sources: object) -> ConfigProblem:
    problems = problems_of(text, **sources)  # type: ignore[arg-type]
    assert len(problems) == 1, problems
    return problems[0]


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str) -> Path:
    path = Path("a.yaml")
    path.write_text(text, encoding="utf-8")
    return path


class TestSeedFiles:
    @pytest.mark.parametrize("variable", ["KVMESH_CONFIG_FILE", "LMCACHE_CONFIG_FILE"])
    @pytest.mark.parametrize("form", ["", "-indented"])
    def test_load_unchanged(self, form: str, variable: str) -> None:
        """LMCache's published P2P example loads as printed (extra_config flattened) and properly indented."""
        first = load_config(environ={variable: str(DATA / f"example1{form}.yaml")})
        assert first.instance_id == "lmcache_instance_1"
        assert first.chunk_tokens == 256
        assert first.pool_size_bytes == 100 * 1024**3
        assert (first.host, first.advertise_host) == ("localhost", "localhost")
        assert (first.peer_port, first.lookup_port, first.admin_port) == (8200, 8201, 8500)
        assert first.transfer_channel == "nixl"
        assert first.directory == "controller"
        assert (first.controller_pull_url, first.controller_reply_url) == (
            "tcp://localhost:8300",
            "tcp://localhost:8400",
        )
        assert first.share
        assert first.fetches
        second = load_config(environ={variable: str(DATA / f"example2{form}.yaml")})
        assert (second.instance_id, second.peer_port, second.admin_port) == ("lmcache_instance_2", 8202, 8501)

    @pytest.mark.parametrize("form", ["", "-indented"])
    def test_key_without_a_meaning_is_named_in_one_warning(self, form: str) -> None:
        config = load_config(path=DATA / f"example1{form}.yaml", environ={})
        assert len(config.warnings) == 1
        assert "lookup_backoff_time" in config.warnings[0]

    def test_ports_may_be_lists(self) -> None:
        text = (DATA / "example1.yaml").read_text().replace("ports: 8200", "ports: [8200, 8210]")
        config = load_config(path=write(text), environ={})
        assert config.peer_port == 8200
        assert config.port_lists == {"peer_port": (8200, 8210)}


class TestPrecedence:
    def test_extra_then_environment_then_file_then_default(self) -> None:
        """Each source wins over the ones after it, whichever name it uses; `sources` tells which one did."""
        text = "chunk_size: 1\nmax_local_cpu_size: 1\nnegative_cache_s: 1\n"
        config = load(text, env={"KVMESH_CHUNK_TOKENS": "2", "KVMESH_MAX_LOCAL_CPU_SIZE": "2"}, extra={"chunk_size": 3})
        assert (config.chunk_tokens, config.pool_size_gb, config.negative_cache_s) == (3, 2.0, 1.0)
        assert config.stall_timeout_s == 1.0
        assert config.sources["chunk_tokens"] == "extra"
        assert config.sources["pool_size_gb"] == "env KVMESH_MAX_LOCAL_CPU_SIZE"
        assert config.sources["negative_cache_s"] == "a.yaml:3"
        assert "stall_timeout_s" not in config.sources

    def test_own_variable_names_the_file_before_lmcaches(self) -> None:
        Path("own.yaml").write_text("chunk_size: 7\nshare: false\n")
        config = load_config(environ={"KVMESH_CONFIG_FILE": "own.yaml", "LMCACHE_CONFIG_FILE": "other.yaml"})
        assert config.chunk_tokens == 7
        assert any("LMCACHE_CONFIG_FILE is ignored" in warning for warning in config.warnings)

    def test_prefixed_extra_keys(self) -> None:
        """LMCache's users write `lmcache.chunk_size` into vLLM's extra config."""
        assert load(extra={"lmcache.chunk_size": 64}).chunk_tokens == 64
        assert load(extra={"kvmesh.chunk_tokens": 64}).chunk_tokens == 64
        assert load(extra={"extra_config": {"chunk_tokens": 64}}).chunk_tokens == 64

    def test_no_value_counts_as_not_set(self) -> None:
        config = load("p2p_host:\nextra_config:\n", env={"KVMESH_CHUNK_SIZE": ""}, extra={"instance_id": None})
        assert (config.host, config.chunk_tokens, config.instance_id) == ("127.0.0.1", 256, None)

    def test_lists_in_the_environment(self) -> None:
        env = {"KVMESH_NIXL_BACKENDS": "UCX, GDS", "KVMESH_PEER_PORT": "[8200, 8300]"}
        config = load(env=env)
        assert config.nixl_backends == ("UCX", "GDS")
        assert config.port_lists["peer_port"] == (8200, 8300)

    def test_process_environment_is_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVMESH_SHARE", "false")
        assert load_config().sources["share"] == "env KVMESH_SHARE"


class TestValues:
    def test_milliseconds_become_seconds(self) -> None:
        assert load("lookup_timeout_ms: 1500").lookup_timeout_s == 1.5
        assert "in milliseconds" in only_problem("lookup_timeout_ms: soon").expected

    def test_derived_defaults(self) -> None:
        config = load("host: localhost\nheartbeat_interval_s: 4\n")
        assert config.advertise_host == "localhost"
        assert config.instance_timeout_s == 13.0
        assert config.enable_controller

    def test_words_in_any_case(self) -> None:
        config = load("cache_policy: LRU\ntransfer_channel: TCP\nlog_level: DEBUG\n")
        assert (config.cache_policy, config.transfer_channel, config.log_level) == ("lru", "tcp", "debug")

    def test_pool_that_is_off_has_no_bytes(self) -> None:
        assert load("local_cpu: false\nshare: false\n").pool_size_bytes == 0

    @pytest.mark.parametrize(("locations", "fetches"), [("[LocalCPUBackend]", False), ("[pool, peers]", True)])
    def test_retrieve_locations(self, locations: str, fetches: bool) -> None:
        assert load(f"retrieve_locations: {locations}").fetches is fetches

    @pytest.mark.parametrize(
        ("text", "allowed"),
        [
            ("chunk_size: x", "whole number"),
            ("chunk_size: 0", "1 to"),
            ("chunk_size: true", "whole number"),
            ("chunk_size: 1.5", "whole number"),
            ("chunk_size: [1]", "whole number"),
            ("chunk_size: {a: 1}", "whole number"),
            ("max_local_cpu_size: .nan", "a number above 0"),
            ("max_local_cpu_size: .inf", "a number above 0"),
            ("max_local_cpu_size: -1", "a number above 0"),
            ("local_cpu: maybe", "true or false"),
            ("cache_policy: fifo", "lru or arc"),
            ("transfer_channel: rdma", "auto, tcp, shm or nixl"),
            ("p2p_init_ports: 70000", "0 to 65535"),
            ("p2p_init_ports: [8200, x]", "0 to 65535"),
            ("p2p_init_ports: [x]", "0 to 65535"),
            ("p2p_init_ports: []", "0 to 65535"),
            ("p2p_host: a b", "a host name"),
            ("p2p_host: localhost:8200", "a host name"),
            ("p2p_host: 1.2.3", "a host name"),
            ("lmcache_instance_id: 17", "letters"),
            ("lmcache_instance_id: 'a b'", "letters"),
            ("controller_heartbeat_url: localhost", "host:port"),
            ("controller_heartbeat_url: http://localhost:1", "host:port"),
            ("fetch_connections: 0", "1 to 64"),
            ("nixl_backends: []", "a list"),
            ("fetch_timeout_s: 0", "above 0"),
        ],
    )
    def test_wrong_value_names_key_place_found_and_allowed(self, text: str, allowed: str) -> None:
        problem = only_problem(text)
        assert problem.key == text.partition(":")[0]
        assert problem.where == "a.yaml:1"
        assert allowed in problem.expected
        assert problem.found

    def test_blocking_loads_are_refused_with_the_reason(self) -> None:
        assert "never block the scheduler" in only_problem("enable_async_loading: False").hint

    def test_frozen(self) -> None:
        with pytest.raises(ValueError, match="frozen"):
            load().chunk_tokens = 1  # type: ignore[misc]


class TestUnknownKeys:
    def test_nearest_key_and_the_allowed_ones(self) -> None:
        with pytest.raises(ConfigError) as caught:
            load("share: false\nchunk_sise: 4\n")
        problem = caught.value.problems[0]
        assert (problem.key, problem.where) == ("chunk_sise", "a.yaml:2")
        assert "chunk_size" in problem.hint
        assert all(key in caught.value.hint for key in KEYS)

    def test_in_nested_mapping(self) -> None:
        assert only_problem("extra_config:\n  chunk_sise: 4\n").where == "a.yaml:2"

    def test_misspelt_variable_is_an_error_another_a_warning(self) -> None:
        """Another program may use the prefix, but a slip of the pen must not be ignored."""
        assert only_problem(env={"KVMESH_CHUNK_TOKNES": "4"}).where == "env KVMESH_CHUNK_TOKNES"
        assert any("KVMESH_ZZZ" in warning for warning in load(env={"KVMESH_ZZZ": "4"}).warnings)

    def test_kubernetes_service_variables_are_no_settings(self) -> None:
        """A service called kvmesh-lookup makes Kubernetes set KVMESH_LOOKUP_PORT in every pod."""
        address = "tcp://10.0.0.1:8100"
        env = {
            "KVMESH_LOOKUP_PORT": address,
            "KVMESH_LOOKUP_PORT_8100_TCP": address,
            "KVMESH_LOOKUP_PORT_8100_TCP_ADDR": "10.0.0.1",
            "KVMESH_LOOKUP_SERVICE_HOST": "10.0.0.1",
            "KVMESH_LOOKUP_SERVICE_PORT_HTTP": "8100",
            "KVMESH_PORT": address,
        }
        config = load(env=env)
        assert config.lookup_port is None
        assert len([warning for warning in config.warnings if "enableServiceLinks" in warning]) == len(env)

    def test_lmcache_variables_that_are_not_read_are_named(self) -> None:
        warning = load(env={"LMCACHE_CHUNK_SIZE": "1"}).warnings[0]
        assert "LMCACHE_CHUNK_SIZE" in warning
        assert "KVMESH_CHUNK_TOKENS" in warning

    def test_all_lmcache_keys_in_one_warning(self) -> None:
        names = [name for group in LMCACHE_KEYS.values() for name in group]
        config = load("".join(f"{name}: 1\n" for name in names) + "histogram_bucket_x: [1]\ngpu_to_numa_mapping_: \n")
        (warning,) = config.warnings
        assert all(name in warning for name in [*names, "histogram_bucket_x"])

    def test_groups_of_names_do_not_overlap(self) -> None:
        names = [name for group in LMCACHE_KEYS.values() for name in group]
        assert len(set(names)) == len(names)
        assert not set(names) & set(OWN_NAMES)
        assert not VLLM_KEYS & set(OWN_NAMES)


class TestFile:
    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("chunk_size: [", "expected"),
            ("- a\n- b\n", "a list"),
            ("just words", "plain text"),
            ("a: 1\n---\nb: 2\n", "another document"),
            ("? [a]\n: 1\n", "a list"),
            ("chunk_size: !!python/object:os.system 1", "constructor"),
            ("chunk_size: &a [*a, *b]", "undefined alias"),
            ("[" * 5000, "RecursionError"),
        ],
    )
    def test_broken_yaml(self, text: str, found: str) -> None:
        """One problem that names the file, and no complaint about settings that could not be read."""
        problem = only_problem(text)
        assert problem.key == "file"
        assert problem.where.startswith("a.yaml")
        assert found in problem.found

    def test_value_that_holds_itself(self) -> None:
        """A list that contains itself is refused like any other value, in comparisons too."""
        problems = problems_of("chunk_size: &a [*a]\nchunk_tokens: &b [*b]\n")
        assert [(problem.key, problem.found[:6]) for problem in problems] == [
            ("chunk_tokens", "a list"),
            ("chunk_size", "a list"),
        ]

    def test_missing_file_names_the_variable(self) -> None:
        with pytest.raises(ConfigError, match=r"KVMESH_CONFIG_FILE names it") as caught:
            load_config(environ={"KVMESH_CONFIG_FILE": "none.yaml"})
        assert len(caught.value.problems) == 1

    @pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"#" * (1 << 21)])
    def test_bytes_that_are_no_settings(self, data: bytes) -> None:
        Path("b.yaml").write_bytes(data)
        with pytest.raises(ConfigError, match=r"b\.yaml"):
            load_config(path=Path("b.yaml"), environ={})

    def test_folder_instead_of_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="directory"):
            load_config(path=tmp_path, environ={})

    def test_key_given_twice(self) -> None:
        """YAML parsers take the last of two equal keys without a word."""
        assert "a.yaml:1" in only_problem("chunk_size: 1\nchunk_size: 1\n").found

    def test_own_name_and_alias(self) -> None:
        assert load("chunk_size: 4\nchunk_tokens: 4\n").chunk_tokens == 4
        assert "a.yaml:1" in only_problem("chunk_size: 1\nchunk_tokens: 2\n").found

    @given(st.text(alphabet=st.sampled_from("abs:_-[]{}&*!? \n'\"#0123,.") | st.characters(codec="utf-8"), max_size=80))
    def test_any_text_loads_or_is_refused(self, text: str) -> None:
        """Whatever the file holds, the answer is a configuration or a ConfigError."""
        with contextlib.suppress(ConfigError):
            load(text)

    @given(
        st.sampled_from(sorted(OWN_NAMES)),
        st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists),
    )
    def test_any_value_loads_or_is_refused(self, key: str, value: object) -> None:
        """Whatever vLLM's extra config holds, too."""
        with contextlib.suppress(ConfigError):
            load(extra={key: value})


class TestCombinations:
    def test_sharing_without_directory(self) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(environ={})
        (problem,) = caught.value.problems
        assert problem.key == "share"
        assert "enable_controller" in problem.hint
        assert "share: false" in problem.hint

    def test_no_sharing_needs_no_directory(self) -> None:
        config = load_config(environ={"KVMESH_SHARE": "0"})
        assert (config.directory, config.fetches) == ("none", False)

    def test_controller_without_addresses(self) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config(environ={"KVMESH_ENABLE_CONTROLLER": "true"})
        assert [problem.expected.split()[0] for problem in caught.value.problems] == [
            "controller_pull_url",
            "controller_reply_url",
        ]

    @pytest.mark.parametrize(
        ("text", "key"),
        [
            ("peer_port: 8200\nlookup_port: 8200\n", "lookup_port"),
            ("wire_codec: int8\ntransfer_channel: shm\n", "wire_codec"),
            ("p2p_init_ports: [8200, 8300]\nlmcache_worker_ports: [8500, 8200]\n", "lmcache_worker_ports"),
            ("peer_port: [8200, 8200]\n", "peer_port"),
            ("local_cpu: false\n", "local_cpu"),
            ("host: 0.0.0.0\ninsecure: true\n", "host"),
            ("host: 10.0.0.1\n", "host"),
            ("tls_cert_file: a.pem\n", "tls_cert_file"),
            ("tls_ca_file: a.pem\ntls_key_file: b.pem\n", "tls_key_file"),
            ("instance_timeout_s: 1\n", "instance_timeout_s"),
            ("controller_heartbeat_url: tcp://localhost:8300\n", "controller_heartbeat_url"),
            ("controller_heartbeat_url: [localhost:1, localhost:2]\n", "controller_heartbeat_url"),
            ("cluster_key_file: no/such/file\n", "cluster_key_file"),
            ("cluster_key_file: no/such/file\nhost: 10.0.0.1\n", "cluster_key_file"),
        ],
    )
    def test_impossible(self, text: str, key: str) -> None:
        problem = only_problem(text)
        assert problem.key == key
        assert problem.where.startswith("a.yaml")

    def test_free_ports_may_be_equal(self) -> None:
        assert load("peer_port: 0\nlookup_port: 0\n").lookup_port == 0

    def test_all_problems_at_once(self) -> None:
        """Unknown keys, wrong values and impossible combinations come in one error."""
        text = "chunk_size: x\nfoo: 1\npeer_port: 1\nlookup_port: 1\ntransfer_channel: rdma\nmax_local_cpu_size: y\n"
        keys = {problem.key for problem in problems_of(text)}
        assert keys == {"chunk_size", "foo", "lookup_port", "transfer_channel", "max_local_cpu_size"}

    def test_no_problem_that_only_follows_from_another(self) -> None:
        """A controller address with a typing error is not reported as missing too."""
        with pytest.raises(ConfigError) as caught:
            load_config(
                path=write("enable_controller: true\ncontroller_pull_url: nowhere\ncontroller_reply_ur: localhost:1\n"),
                environ={},
            )
        assert [problem.key for problem in caught.value.problems] == ["controller_reply_ur", "controller_pull_url"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("host: 10.0.0.1\ninsecure: true\n", "insecure: true says that this is meant"),
            ("host: 10.0.0.1\ninsecure: true\n", "INSECURE"),
            ("enable_controller: false\nshare: false\nlocal_cpu: false\n", "does nothing"),
            ("share: false\n", "not used"),
            ("controller_heartbeat_url: 10.0.0.9:1\nstall_timeout_s: 20\n", "stall_timeout_s"),
            ("retrieve_locations: [RemoteBackend]\n", "RemoteBackend"),
            ("retrieve_locations: [pool]\n", "fetches none"),
        ],
    )
    def test_doubtful(self, text: str, said: str) -> None:
        assert any(said in warning for warning in load(text).warnings)

    def test_loopback_announced_to_another_machine(self) -> None:
        config = load(extra={"controller_pull_url": "ctrl:8300", "controller_reply_url": "ctrl:8400"})
        assert any("other machines" in warning for warning in config.warnings)

    def test_contradictions_with_vllms_own_keys(self) -> None:
        extra: dict[str, object] = {
            "cpu_bytes_to_use": 1,
            "block_size": 16,
            "eviction_policy": "arc",
            "offload_prompt_only": False,
            "spec_name": "OtherSpec",
            "blocks_per_chunk": 2,
            "secondary_tiers": [],
        }
        said = "\n".join(load(extra=extra).warnings)
        for key in set(extra) - {"secondary_tiers"}:
            assert f"extra {key} = " in said

    def test_vllms_own_keys_that_agree(self) -> None:
        """A worker sees the extra config after the connector has filled it."""
        extra: dict[str, object] = {
            "cpu_bytes_to_use": 5 * 1024**3,
            "block_size": 256,
            "eviction_policy": "LRU",
            "offload_prompt_only": True,
            "spec_name": "KVMeshSpec",
            "spec_module_path": "kvmesh.vllm.spec",
        }
        assert load(extra=extra).warnings == ()


class TestDataParallel:
    def test_ports_from_lists_or_offset(self) -> None:
        config = load("instance_id: a\npeer_port: [8200, 8210]\nadmin_port: 8500\n")
        second = config.for_data_parallel_rank(1, 2)
        assert (second.instance_id, second.peer_port, second.admin_port) == ("a-dp1", 8210, 8501)
        assert second.lookup_port is None
        assert config.for_data_parallel_rank(0).instance_id == "a-dp0"

    def test_one_rank_changes_nothing(self) -> None:
        config = load("instance_id: a")
        assert config.for_data_parallel_rank(0, 1) is config

    def test_free_port_stays_free_and_no_id_stays_none(self) -> None:
        config = load("peer_port: 0").for_data_parallel_rank(3)
        assert (config.peer_port, config.instance_id) == (0, None)

    @pytest.mark.parametrize(
        ("text", "rank"),
        [
            ("peer_port: [8200, 8210]", 2),
            ("peer_port: 65535", 1),
            ("peer_port: 8200\nlookup_port: 8201", 1),
            (f"instance_id: {'a' * 126}", 1),
        ],
    )
    def test_what_cannot_be(self, text: str, rank: int) -> None:
        config = load(text)
        with pytest.raises(ConfigError):
            config.for_data_parallel_rank(rank)

    def test_not_twice(self) -> None:
        with pytest.raises(ValueError, match="already"):
            load().for_data_parallel_rank(1).for_data_parallel_rank(1)


class TestHandingOn:
    def test_wire_round_trip(self) -> None:
        text = "peer_port: [8200, 8210]\nnixl_backends: [UCX, GDS]\nremote_url: x\nfetch_timeout_s: 0.1\n"
        config = load(text)
        copy = KVMeshConfig.from_wire(config.to_wire())
        assert copy == config
        assert copy.warnings == config.warnings
        assert copy.for_data_parallel_rank(1) == config.for_data_parallel_rank(1)

    @pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b'{"chunk_tokens": "x"}', b'{"other": 1}'])
    def test_garbage_is_refused(self, data: bytes) -> None:
        with pytest.raises(ConfigError):
            KVMeshConfig.from_wire(data)

    def test_describe_tells_value_and_source_of_every_key(self) -> None:
        rows = {row.key: row for row in load("chunk_size: 64\nhost: localhost\n").describe()}
        assert list(rows) == list(KEYS)
        assert rows["chunk_tokens"][1:3] == (64, "a.yaml:1")
        assert rows["advertise_host"][1:3] == ("localhost", "default")
        json.dumps([row._asdict() for row in rows.values()])

    def test_no_password_is_shown(self) -> None:
        config = KVMeshConfig(lookup_url="redis://user:hunter2@host:6379/0")
        shown = str(config) + repr(config) + str(config.describe())
        assert "hunter2" not in shown
        assert "host:6379" in str(config.describe())
        text = (
            "lookup_url: redis://:hunter2@h\ncontroller_pull_url: x://me:hunt/er2@h\npeer_port: ['a://b:hunter2@c']\n"
        )
        assert "hunt" not in str(problems_of(text)).lower()

    @given(st.text(alphabet="abcdefghij/:@?!", min_size=4).filter(lambda text: not set(text) <= set("/:@?!*")))
    def test_mask(self, password: str) -> None:
        assert mask_secrets(f"redis://user:{password}@host:1/0") == "redis://***@host:1/0"

    def test_a_node_needs_no_yaml(self) -> None:
        """Importing the package does not load the YAML parser: a node gets its configuration from its engine."""
        code = "import sys, kvmesh.config; sys.exit('yaml' in sys.modules)"
        env = {**os.environ, "PYTHONPATH": str(Path(kvmesh.__file__).parents[1])}
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "url"),
        [
            ("localhost:8300", "tcp://localhost:8300"),
            ("tcp://localhost:8300", "tcp://localhost:8300"),
            ("tcp://localhost:8300/", "tcp://localhost:8300"),
            ("[::1]:8300", "tcp://[::1]:8300"),
            (" my_host-1.example:1 ", "tcp://my_host-1.example:1"),
        ],
    )
    def test_tcp(self, text: str, url: str) -> None:
        assert parse_tcp_url(text) == url
        assert parse_tcp_url(url) == url

    @pytest.mark.parametrize(
        "text", ["", ":1", "a", "a:", "a:0", "a:65536", "a:+1", "a:1_0", "::1:80", "a/b:1", "ws://a:1", "a:²"]
    )
    def test_not_tcp(self, text: str) -> None:
        with pytest.raises(ValueError):
            parse_tcp_url(text)

    @given(st.text(max_size=40))
    def test_host_port_parses_or_refuses(self, text: str) -> None:
        try:
            host, port = parse_host_port(text)
        except ValueError:
            return
        assert host
        assert 1 <= port <= 65535

    def test_redis(self) -> None:
        assert parse_redis_url("host:6379") == "redis://host:6379"
        assert parse_redis_url("rediss://:pw@host:6379/1") == "rediss://:pw@host:6379/1"
        for bad in ("http://host:1", "redis://", "host"):
            with pytest.raises(ValueError):
                parse_redis_url(bad)

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.8.8.8", "::1"])
    def test_loopback(self, host: str) -> None:
        assert is_loopback(host)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example", "localhost.example"])
    def test_not_loopback(self, host: str) -> None:
        assert not is_loopback(host)


class TestController:
    def test_seeds_flag(self) -> None:
        text = '{"pull": 8300, "reply": 8400, "heartbeat": 8082}'
        assert parse_monitor_ports(text) == MonitorPorts(8300, 8400, 8082)
        assert parse_monitor_ports('{"pull":8300,"reply":8400}') == MonitorPorts(8300, 8400, None)
        config = make_controller_config(monitor_ports=text)
        assert (config.host, config.port, config.pull_port, config.heartbeat_port) == ("localhost", 9000, 8300, 8082)
        assert config.warnings == ()

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{'pull': 8300}", "double quotes"),
            ("8300", "a JSON object"),
            ("[]", "a JSON object"),
            ("", "JSON such as"),
            ("[" * 100_000, "JSON such as"),
            ('{"pull": 8300}', "--monitor-ports reply"),
            ('{"pull": 8300, "reply": "8400"}', "'8400'"),
            ('{"pull": true, "reply": 8400}', "True"),
            ('{"pull": 70000, "reply": 8400}', "70000"),
            ('{"pull": 1, "reply": 2, "hartbeat": 3}', "'hartbeat'"),
            ('{"pull": 1, "pull": 2, "reply": 3}', "twice"),
        ],
    )
    def test_bad_flag(self, text: str, said: str) -> None:
        with pytest.raises(ConfigError) as caught:
            parse_monitor_ports(text)
        assert said in str(caught.value)

    def test_all_problems_at_once(self) -> None:
        with pytest.raises(ConfigError) as caught:
            make_controller_config(
                host="a b", port=-1, monitor_ports="{}", heartbeat_interval_s=5, instance_timeout_s=1
            )
        assert len(caught.value.problems) == 5

    def test_ports_must_differ(self) -> None:
        with pytest.raises(ConfigError, match="another port than --port"):
            make_controller_config(port=8300)
        assert make_controller_config(port=0, monitor_ports=MonitorPorts(0, 0, 0)).port == 0

    def test_beyond_loopback_without_a_key_must_be_meant(self) -> None:
        """Refused with the ways out; with --insecure it starts and says what that means, with a key it just starts."""
        with pytest.raises(ConfigError, match=r"--cluster-key-file .*--insecure"):
            make_controller_config(host="0.0.0.0", environ={})
        assert "INSECURE" in make_controller_config(host="0.0.0.0", insecure=True, environ={}).warnings[0]
        keyed = make_controller_config(host="0.0.0.0", environ={"KVMESH_CLUSTER_KEY": "k" * 16})
        assert not keyed.warnings
        assert keyed.cluster_key is not None

    def test_tls_files_go_together(self) -> None:
        with pytest.raises(ConfigError, match="--tls-key-file"):
            make_controller_config(tls_cert_file="a.pem", environ={})

    def test_heartbeats_decide_the_timeout(self) -> None:
        assert make_controller_config(heartbeat_interval_s=1.0).instance_timeout_s == 4.0


class TestDocumentation:
    def test_table_and_model_agree(self) -> None:
        """Every key stands in docs/configuration.md with its aliases, variable, default, allowed values and meaning."""
        rows = re.findall(r"^\| `\w+` \|.*\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
        expected = [
            f"| `{key.name}` | {', '.join(f'`{alias}`' for alias in key.aliases) or '-'} | `KVMESH_{key.name.upper()}` "
            f"| {key.default} | {key.allowed} | {key.meaning} |"
            for key in KEYS.values()
        ]
        assert rows == expected

    def test_foreign_keys_are_listed(self) -> None:
        text = DOCS.read_text(encoding="utf-8")
        for name in [*VLLM_KEYS, *(name for group in LMCACHE_KEYS.values() for name in group)]:
            assert f"`{name}`" in text
