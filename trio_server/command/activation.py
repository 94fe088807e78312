"""What a process manager passes in: listening sockets, and where to say that it is ready."""

import os
import socket
import sys
from contextlib import suppress

from trio_server.arguments import MOST_DIGITS

FIRST_INHERITED = 3  # the descriptors before are the standard streams


def inherited_sockets() -> list[socket.socket]:
    """Take over the listening sockets that a process manager passes in (sd_listen_fds(3)).

    Returns:
        The sockets; none when the environment names none, or is meant for another process.
        A descriptor that is not a listening socket ends the process with status 1.
    """
    pid, number = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS"))
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not number:
        return []
    if not (number.isdecimal() and len(number) < MOST_DIGITS):
        sys.exit(
            f"trio-server: LISTEN_FDS={number[:MOST_DIGITS]} is not a number of sockets: unset it"
        )
    return [_take_over(FIRST_INHERITED + index) for index in range(int(number))]


def _take_over(descriptor: int) -> socket.socket:
    """Take over one descriptor, and keep it from programs that this one starts."""
    try:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - it has no name
        listener = socket.socket(fileno=descriptor)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        listening = False
    if not (listening and listener.type == socket.SOCK_STREAM):
        sys.exit(
            f"trio-server: inherited descriptor {descriptor} is not a listening stream socket: "
            "pass one, as with ListenStream= and Accept=no in a systemd socket unit"
        )
    return listener


def notify(state: str) -> None:
    """Tell the process manager about a change of state, if it wants to know (sd_notify(3)).

    A manager that is gone, or so busy that the message finds no room, is not waited for.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # Linux's abstract addresses begin with a zero byte.
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(0)
        manager.sendto(state.encode(), address)
