"""The range of vLLM versions that kvmesh supports. Imports nothing of vLLM, so that anybody may ask."""

from __future__ import annotations

from typing import Final

from packaging.version import Version

from kvmesh.errors import VersionError

SUPPORTED_FROM: Final = Version("0.31")
SUPPORTED_BELOW: Final = Version("0.34.dev0")


def check_version(found: Version) -> None:
    """Raise VersionError when this vLLM is not supported."""
    if not SUPPORTED_FROM <= Version(found.base_version) < SUPPORTED_BELOW:
        raise VersionError(
            "vLLM",
            expected=f"a version from {SUPPORTED_FROM} to 0.33",
            found=str(found),
            hint="install a supported vLLM, or a kvmesh that supports this one",
        )
