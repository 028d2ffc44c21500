"""Asking the network without waiting for ever."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading


def resolve(host: str, timeout_s: float) -> list[str] | None:
    """The addresses that a name means here; None when it means none, or when nobody says so in time.

    The system's resolver knows no time-out of ours, so it is asked in a thread that may be left behind.
    """
    answers: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            answers.put(None)
        else:
            answers.put(list(dict.fromkeys(str(one[4][0]) for one in found)))

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    with contextlib.suppress(queue.Empty):
        return answers.get(timeout=timeout_s)
    return None


def connect_error(host: str, port: int, timeout_s: float) -> str | None:
    """What keeps a TCP connection from coming about, in words; None when one does."""
    addresses = resolve(host, timeout_s)
    if not addresses:
        return "the name cannot be resolved"
    try:
        with socket.create_connection((addresses[0], port), timeout=timeout_s):
            return None
    except TimeoutError:
        return f"no answer for {timeout_s:g} s: a firewall drops packets, or the machine is down"
    except ConnectionRefusedError:
        return "refused: nothing listens there"
    except OSError as error:
        return error.strerror or str(error)
