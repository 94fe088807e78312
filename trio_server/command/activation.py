"""The process manager: take the sockets that it passes in, and report the state to it."""

import os
import socket
import sys
from contextlib import suppress

import trio


def inherited_listeners() -> list[trio.SocketListener]:
    """Return the listeners that a process manager passes in (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        descriptors = range(3, 3 + int(os.environ["LISTEN_FDS"]))  # 0 to 2: the standard streams
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        return [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in sockets]
    except (KeyError, OSError, ValueError) as error:
        sys.exit(
            "trio-server: LISTEN_FDS must be the number of listening stream sockets that are "
            f"passed in, as with ListenStream= and Accept=no in a systemd socket unit ({error})"
        )


def notify(state: str) -> None:
    """Report a change of state to the process manager (sd_notify(3)).

    If there is none, or it does not read, the message is dropped.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):  # An abstract Linux address begins with a zero byte.
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(0)
        manager.sendto(state.encode(), address)
