"""A controller, a reader and holders behind rate-limited links, for benchmarks of what a link's speed decides."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from kvmesh.bench.chaos import network
from kvmesh.bench.cluster import Controller, wait_healthy
from kvmesh.bench.links import Star
from kvmesh.bench.rated_engine import Options, Put, RatedProcess, WaitVisible
from kvmesh.config import KVMeshConfig
from kvmesh.config.model import WireCodec
from kvmesh.errors import StartupError

PEER_PORT = 8200
"""The same everywhere: each node has a namespace of its own."""


class RatedCluster:
    """Use as a context manager: everything is started on entry. Raises StartupError when namespaces cannot be made."""

    def __init__(
        self,
        holders: int,
        *,
        slots: int,
        chunk_bytes: int,
        chunk_tokens: int,
        tokens_per_s: float,
        like_kv: bool = False,
        wire_codec: WireCodec = "none",
        first_net: int = 0,
        **keys: object,
    ) -> None:
        """`keys` are configuration keys of the reader, `wire_codec` is everybody's; `like_kv` makes chunks that shrink
        as KV does; `first_net` is the star's.
        """
        self._wire_codec: WireCodec = wire_codec
        self.star = Star(holders, first_net)
        self._shape = {
            "slots": slots,
            "chunk_bytes": chunk_bytes,
            "chunk_tokens": chunk_tokens,
            "tokens_per_s": tokens_per_s,
            "like_kv": like_kv,
        }
        self._keys = keys
        self._stack = contextlib.ExitStack()
        self.holders: list[RatedProcess] = []

    def __enter__(self) -> RatedCluster:  # noqa: PYI034 - never subclassed
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def put(self, document: str, chunks: int) -> None:
        """Have every holder store a document, and wait until the reader knows it."""
        for holder in self.holders:
            holder.tell(Put(document, chunks))
        self.reader.tell(WaitVisible(document, chunks, len(self.holders)))

    def _open(self) -> None:
        if problem := network.unavailable():
            raise StartupError("rate-limited links", expected="network namespaces", found=problem)
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmesh-rated-")))
        log = self._stack.enter_context((folder / "engines.log").open("ab"))
        self._stack.callback(self.star.close)
        self.star.open()
        self.controller = Controller(folder)
        self.controller.command = [*self.controller.command, "--host", "0.0.0.0", "--insecure"]
        self._stack.callback(self.controller.stop)
        self.controller.start()
        wait_healthy(self.controller, timeout_s=120)
        started = []
        for number, space in enumerate((*self.star.holders, self.star.reader)):
            is_reader = number == len(self.star.holders)
            address = self.star.control_address(number) if is_reader else self.star.holder_address(number)
            config = KVMeshConfig(
                instance_id="reader" if is_reader else f"holder-{number}",
                host=address,
                advertise_host=address,
                peer_port=PEER_PORT,
                insecure=True,
                transfer_channel="tcp",
                enable_controller=True,
                controller_pull_url=f"tcp://{self.star.controller_address(number)}:{self.controller.pull_port}",
                controller_reply_url=f"tcp://{self.star.controller_address(number)}:{self.controller.reply_port}",
                wire_codec=self._wire_codec,
                **(self._keys if is_reader else {"fetch_gate": "off"}),
            )
            options = Options(config=config.to_wire().decode(), **self._shape)  # type: ignore[arg-type]
            process = RatedProcess(options, self.star.inside(space), log.fileno())
            self._stack.callback(process.close)
            started.append(process)
        for process in started:
            process.started()
        self.holders, self.reader = started[:-1], started[-1]
