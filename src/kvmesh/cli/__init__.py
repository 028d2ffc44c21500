"""The `kvmesh` command."""

from kvmesh.cli.app import main

__all__ = ["main"]
