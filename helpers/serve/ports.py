"""A port that is taken, said before anything starts."""

from __future__ import annotations

import contextlib
import socket

from helpers.serve.command import tcp_socket
from helpers.serve.errors import ServerStartError


def refuse_taken_port(host: str, port: int) -> None:
    """Say at once, and who has it, what vLLM would say after importing for half a minute."""
    with tcp_socket(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerStartError(
                f"The server cannot listen on {host}, port {port}: {error.strerror}.{_listener(port)} "
                "Choose another SERVER_PORT; 0 takes a free one."
            ) from None


def _listener(port: int) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        for found in psutil.net_connections("tcp"):
            if found.laddr.port == port and found.status == psutil.CONN_LISTEN and found.pid:
                return f" {psutil.Process(found.pid).name()} ({found.pid}) listens there."
    return ""
