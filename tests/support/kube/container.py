"""Starts one program as in a container: run by `unshare --mount`, with a JSON description as its only argument.

The root is a new tmpfs into which everything of this machine is mounted, and then the image's and the pod's own folders
at the paths where the container wants them. Network and host names are the caller's (`ip netns exec`).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

_BIND, _REC, _PRIVATE, _REMOUNT, _READ_ONLY = 0x1000, 0x4000, 1 << 18, 0x20, 0x1
_libc = ctypes.CDLL(None, use_errno=True)
_MACHINES = {"proc", "sys", "dev"}
"""Folders of the root that are the machine's."""
_OWN = {"run", "tmp"}
"""Folders of the root that each container has for itself."""


def main() -> None:
    """Make the root and become the program."""
    container = json.loads(sys.argv[1])
    root = Path(container["root"])
    _mount("none", "/", "", _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", 0, "mode=755")
    for mount in container["mounts"]:
        mount["path"] = mount["path"].replace("/var/run/", "/run/")  # a link on every Linux
    wanted = [Path(mount["path"]) for mount in container["mounts"]]
    _mirror(Path("/"), root, wanted)
    for mount in container["mounts"]:
        inside = root / mount["path"].lstrip("/")
        if mount.get("memory_bytes"):
            _mount("tmpfs", inside, "tmpfs", 0, f"size={mount['memory_bytes']}")
        else:
            _mount(mount["source"], inside, "", _BIND | _REC)
            if mount.get("read_only"):
                _mount("none", inside, "", _BIND | _REMOUNT | _READ_ONLY)
    if container["read_only_root"]:
        _mount("none", root, "", _REMOUNT | _READ_ONLY)
    os.chroot(root)
    os.chdir(container.get("workdir", "/"))
    if container.get("user"):
        os.setgroups([])
        os.setgid(container["user"])
        os.setuid(container["user"])
    os.execvpe(container["command"][0], container["command"], container["env"])  # noqa: S606 - that is the purpose


def _mirror(source: Path, target: Path, wanted: list[Path]) -> None:
    """Show `source` at `target`: folders that lead to a wanted path are made anew, all others mounted as they are."""
    is_root = source == Path("/")
    is_own = len(source.parts) > 1 and source.parts[1] in _OWN
    names = {entry.name for entry in os.scandir(source)} if source.is_dir() and not is_own else set()
    names |= {path.relative_to(source).parts[0] for path in wanted if source in path.parents}
    for name in names:
        here, there = source / name, target / name
        if here in wanted:
            there.mkdir()
        elif is_root and name in _OWN:
            there.mkdir(mode=0o1777)
            there.chmod(0o1777)
            _mirror(here, there, wanted)
        elif any(here in path.parents for path in wanted) and not (is_root and name in _MACHINES):
            there.mkdir()
            _mirror(here, there, wanted)
        elif here.is_symlink():
            there.symlink_to(here.readlink())
        elif here.is_dir():
            there.mkdir()
            _mount(here, there, "", _BIND | _REC)
        elif here.is_file() and not is_root:
            there.touch()
            _mount(here, there, "", _BIND)


def _mount(source: str | Path, target: str | Path, kind: str, flags: int, options: str = "") -> None:
    arguments = [os.fsencode(source), os.fsencode(target), kind.encode(), flags, options.encode() or None]
    if _libc.mount(*arguments[:3], ctypes.c_ulong(flags), arguments[4]):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} at {target}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
