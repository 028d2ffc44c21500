"""Certificates for trying TLS out and for measuring it: a CA in a folder, made with the `openssl` program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from kvmesh.config import TlsFiles

VALID_DAYS = 2


def has_openssl() -> bool:
    """Whether certificates can be made here."""
    return shutil.which("openssl") is not None


class Authority:
    """A CA that lives in a folder. Its key lies beside it: for tests and measurements only."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        """Makes the CA's certificate. Raises CalledProcessError."""
        self._folder = folder
        self._name = name
        self._openssl(name, "-subj", f"/CN={name}")

    @property
    def ca_file(self) -> str:
        return str(self._folder / f"{self._name}.pem")

    def issue(self, name: str) -> TlsFiles:
        """A certificate for one node or controller on loopback. Raises CalledProcessError."""
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
        days = ["-days", str(VALID_DAYS)]
        subprocess.run([*command, *days, *files, *arguments], check=True, capture_output=True, timeout=30)
