"""The files for TLS: settings only, nothing is read here."""

from __future__ import annotations

from typing import NamedTuple


class TlsFiles(NamedTuple):
    """PEM files: our certificate (with what is between it and the CA), its key, and the CA that all peers' are of."""

    cert_file: str
    key_file: str
    ca_file: str
