from __future__ import annotations

import pytest

from kvmesh.errors import StartupError
from kvmesh.transfer import factory
from kvmesh.transfer.factory import choose, choose_name, has_rdma, offered
from kvmesh.transfer.link import PeerTarget
from kvmesh.transfer.pool import HostPool
from kvmesh.transfer.tcp import TcpTransport
from support.transfer_holder import hello

ALL, BOTH, TCP = ("shm", "nixl", "tcp"), ("nixl", "tcp"), ("tcp",)


@pytest.mark.parametrize(
    ("channel", "ours", "theirs", "rdma", "name", "because"),
    [
        ("tcp", BOTH, BOTH, True, "tcp", "transfer_channel is tcp"),
        ("auto", BOTH, BOTH, True, "nixl", "RDMA device"),
        ("auto", ALL, ALL, True, "nixl", "RDMA device"),
        ("auto", BOTH, BOTH, False, "tcp", "no RDMA device"),
        ("auto", BOTH, TCP, True, "tcp", "peer does not offer"),
        ("auto", TCP, BOTH, True, "tcp", "not available here"),
        ("nixl", BOTH, BOTH, False, "nixl", "transfer_channel is nixl"),
        ("nixl", BOTH, TCP, False, "tcp", "peer does not offer"),
        ("shm", ALL, TCP, True, "tcp", "does not offer shm"),
        ("shm", ALL, ALL, True, "tcp", "not on this host"),
    ],
)
def test_what_cannot_be_had_is_replaced_and_the_reason_is_told(channel, ours, theirs, rdma, name, because):
    """Memory cannot be shared here: nixl where both offer it and it pays, otherwise tcp."""
    choice = choose_name(channel, ours, theirs, why_not_shared=lambda: "not on this host", rdma=rdma)
    assert choice.name == name
    assert because in choice.reason


@pytest.mark.parametrize(
    ("channel", "theirs", "name"),
    [("auto", ALL, "shm"), ("shm", ALL, "shm"), ("auto", BOTH, "nixl"), ("nixl", ALL, "nixl"), ("tcp", ALL, "tcp")],
)
def test_memory_is_shared_where_it_can_be_and_was_not_ruled_out(channel, theirs, name):
    assert choose_name(channel, ALL, theirs, why_not_shared=lambda: None, rdma=True).name == name


def test_tcp_is_always_offered(monkeypatch):
    monkeypatch.setattr(factory, "unavailable", lambda: None)
    assert offered("tcp", rdma=True) == ("tcp",)
    assert offered("shm", rdma=True) == ("shm", "tcp")
    assert offered("auto", rdma=False) == ("shm", "tcp")
    assert offered("auto", rdma=True) == ("shm", "nixl", "tcp")
    assert offered("nixl", rdma=False) == ("nixl", "tcp")


def test_nixl_that_cannot_be_imported_stops_the_start_only_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(factory, "unavailable", lambda: "NIXL: not installed")
    assert offered("auto", rdma=True) == ("shm", "tcp")
    with pytest.raises(StartupError, match="not installed"):
        offered("nixl")


def test_a_host_without_the_device_folder_has_no_rdma(tmp_path):
    assert not has_rdma(tmp_path / "infiniband")
    assert not has_rdma(tmp_path)
    (tmp_path / "mlx5_0").mkdir()
    assert has_rdma(tmp_path)


def test_choose_makes_the_transport():
    pool = HostPool.create(1, 4096)
    chosen = choose("auto", PeerTarget("b", "0" * 16, "127.0.0.1", 1, TCP), hello(4096), pool, host="127.0.0.1")
    assert isinstance(chosen.transport, TcpTransport)
    assert chosen.reason == "the peer does not offer nixl"
    chosen.transport.close()
    pool.close()
