"""Random frames at a port: what a port scanner, a confused client or an attacker without a key sends."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from typing import NamedTuple

import zmq

TIMEOUT_S = 2.0
FRAMES_PER_CONNECTION = 10


class Port(NamedTuple):
    """Where to send."""

    name: str
    host: str
    port: int
    zmq: bool = False
    """Half of the frames come as well-formed ZMQ messages with random contents."""


def shower(ports: list[Port], frames: int, seed: int) -> dict[str, int]:
    """Send `frames` random frames to each port; returns how many could be handed over, by name."""
    chance = random.Random(seed)
    sent = {}
    for port in ports:
        by_zmq = frames // 2 if port.zmq else 0
        sent[port.name] = _raw(port, frames - by_zmq, chance) + _zmq(port, by_zmq, chance)
    return sent


def _frame(chance: random.Random) -> bytes:
    """Garbage, or garbage that is framed as the peer protocol frames, or a length that lies, or a broken HTTP line."""
    body = chance.randbytes(chance.choice((0, 1, 3, 17, 200, 1500)))
    kind = chance.randrange(4)
    if kind == 0:
        return body
    if kind == 1:
        return struct.pack("<I", len(body)) + body
    if kind == 2:
        return struct.pack("<I", chance.randrange(1 << 32)) + body
    return b"GET /" + body + b"\r\n\r\n"


def _raw(port: Port, frames: int, chance: random.Random) -> int:
    sent = 0
    for start in range(0, frames, FRAMES_PER_CONNECTION):
        with contextlib.suppress(OSError), socket.create_connection((port.host, port.port), TIMEOUT_S) as connection:
            for _ in range(min(FRAMES_PER_CONNECTION, frames - start)):
                connection.sendall(_frame(chance))
                sent += 1
    return sent


def _zmq(port: Port, frames: int, chance: random.Random) -> int:
    if not frames:
        return 0
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sent = 0
    try:
        connection = context.socket(zmq.PUSH if port.name == "controller pull" else zmq.DEALER)
        connection.linger = 500
        connection.sndtimeo = int(TIMEOUT_S * 1000)
        connection.connect(f"tcp://{port.host}:{port.port}")
        for _ in range(frames):
            parts = [_frame(chance) for _ in range(chance.choice((1, 1, 1, 2, 5)))]
            with contextlib.suppress(zmq.Again):
                connection.send_multipart(parts)
                sent += 1
    finally:
        context.destroy()
    return sent
