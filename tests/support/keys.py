"""Cluster keys and certificates for tests.

With KVMESH_CLUSTER_KEY in the environment, all process tests run with that key instead of without one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from pydantic import SecretStr

from kvmesh.config import TlsFiles
from kvmesh.config.cluster_key import CLUSTER_KEY_VARIABLE
from kvmesh.transfer.security import PeerSecurity
from kvmesh.wire.auth import ClusterKey
from kvmesh.wire.curve import CurveKeys

KEY_TEXT, OTHER_KEY_TEXT = "the key of the tests", "some other key, not ours"

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")


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


class Authority:
    """A CA that lives in a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._name = name
        self._openssl(name, "-subj", f"/CN={name}")

    @property
    def ca_file(self) -> str:
        return str(self._folder / f"{self._name}.pem")

    def issue(self, name: str) -> TlsFiles:
        """A certificate for one node."""
        ca_key = str(self._folder / f"{self._name}.key")
        self._openssl(
            name,
            *("-subj", f"/CN={name}", "-CA", self.ca_file, "-CAkey", ca_key),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE"),
        )
        return TlsFiles(str(self._folder / f"{name}.pem"), str(self._folder / f"{name}.key"), self.ca_file)

    def _openssl(self, name: str, *arguments: str) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        files = ["-keyout", str(self._folder / f"{name}.key"), "-out", str(self._folder / f"{name}.pem")]
        subprocess.run([*command, "-days", "2", *files, *arguments], check=True, capture_output=True, timeout=30)
