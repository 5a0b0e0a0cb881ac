"""Messages between ranks beside their collectives: JSON, one a line, over a TCP connection."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any


class Wire:
    """One end of a connection. Any thread may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._lines, self._lock = connection, connection.makefile("rb"), threading.Lock()

    def send(self, message: dict[str, Any]) -> bool:
        """Whether the connection took the message; a closed one takes none."""
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError:
            return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """The next message; None once the other end is gone."""
        try:
            line = self._lines.readline()
            return json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Ends the connection; a thread that receives wakes up."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end closed it already
        finally:
            self._socket.close()
