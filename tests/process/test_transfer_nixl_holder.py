from __future__ import annotations

import os
import signal

import pytest

from kvmesh.errors import StartupError, TransferError
from kvmesh.transfer.nixl_agent import unavailable
from kvmesh.transfer.nixl_holder import NixlHolder
from kvmesh.transfer.pool import HostPool

pytestmark = [
    pytest.mark.process,
    pytest.mark.nixl,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]


@pytest.fixture
def holder():
    pool = HostPool.create(4, 8192)
    holder = NixlHolder(pool, host="127.0.0.1")
    yield holder
    holder.close()
    pool.close()


def test_addresses_are_those_of_the_serving_process(holder):
    """Consecutive slots lie one chunk apart, and belong to the agent that is described."""
    holder.start()
    serving, addresses = holder.addresses([0, 1, 3])
    described = holder.describe()
    assert [address - described.probe_address for address in addresses] == [0, 8192, 3 * 8192]
    assert described.serving == serving


def test_a_process_that_dies_is_replaced_but_not_over_and_over(holder, monkeypatch):
    """The first death, however early, is made good at once; one that follows soon after it is not."""
    monkeypatch.setattr("kvmesh.transfer.nixl_holder.RESTART_INTERVAL_S", 1e9)
    holder.start()
    first = holder.describe()
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    second = holder.describe()
    assert second.serving == first.serving + 1
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(TransferError, match="ended with -9"):
        holder.describe()


def test_transports_that_do_not_exist_stop_the_start(holder, monkeypatch):
    """UCX_TLS goes to UCX as it is; a host without such a device cannot serve."""
    monkeypatch.setenv("UCX_TLS", "nonsense")
    with pytest.raises(StartupError, match="UCX_TLS"):
        holder.start()


def test_a_closed_holder_stays_closed(holder):
    holder.start()
    holder.close()
    with pytest.raises(TransferError, match="closed"):
        holder.describe()
