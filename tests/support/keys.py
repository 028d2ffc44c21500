"""Cluster keys and certificates for tests.

With KVMESH_CLUSTER_KEY in the environment, all process tests run with that key instead of without one.
"""

from __future__ import annotations

import os

import pytest
from pydantic import SecretStr

from kvmesh.bench.certificates import Authority, has_openssl
from kvmesh.config.cluster_key import CLUSTER_KEY_VARIABLE
from kvmesh.transfer.security import PeerSecurity
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.curve import CurveKeys

__all__ = [
    "KEY_TEXT",
    "OTHER_KEY_TEXT",
    "Authority",
    "environment_curve",
    "environment_key",
    "environment_security",
    "keyed",
    "needs_openssl",
]

KEY_TEXT, OTHER_KEY_TEXT = "the key of the tests", "some other key, not ours"

needs_openssl = pytest.mark.skipif(not has_openssl(), reason="no openssl to make certificates with")


def environment_key() -> SecretStr | None:
    """The key that these tests run with, as a configuration holds it."""
    text = os.environ.get(CLUSTER_KEY_VARIABLE)
    return SecretStr(text) if text else None


def environment_curve() -> CurveKeys | None:
    """The same, for control sockets."""
    key = environment_key()
    return None if key is None else CurveKeys.derive(ClusterKey(key.get_secret_value()))


def environment_security() -> PeerSecurity:
    """The same, for peer connections."""
    key = environment_key()
    return keyed(key.get_secret_value()) if key else PeerSecurity()


def keyed(text: str = KEY_TEXT) -> PeerSecurity:
    """Peer connections with a cluster key and without TLS."""
    return PeerSecurity(key=ClusterKey(text).peer_key())
