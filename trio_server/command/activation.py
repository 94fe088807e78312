"""What a process manager passes in: listening sockets, and where to report that it is ready."""

import os
import socket
import sys
from contextlib import suppress

FIRST_INHERITED = 3  # The descriptors 0 to 2 are the standard streams.


def inherited_sockets() -> list[socket.socket]:
    """Return the listening sockets that a process manager passes in (sd_listen_fds(3)).

    There are none if the environment names none, or names those of another process. A descriptor
    that is not a listening socket ends the process with status 1.
    """
    pid, number = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS"))
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not number:
        return []
    try:
        descriptors = range(FIRST_INHERITED, FIRST_INHERITED + int(number))
    except ValueError:
        sys.exit(f"trio-server: LISTEN_FDS={number[:20]} is not a number of sockets: unset it")
    return [_inherited(descriptor) for descriptor in descriptors]


def _inherited(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)  # noqa: FBT003 - the parameter has no name
        listener = socket.socket(fileno=descriptor)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        listening = 0
    if not listening or listener.type != socket.SOCK_STREAM:
        sys.exit(
            f"trio-server: inherited descriptor {descriptor} is not a listening stream socket: "
            "pass one, as with ListenStream= and Accept=no in a systemd socket unit"
        )
    return listener


def notify(state: str) -> None:
    """Report a change of state to the process manager, if there is one (sd_notify(3)).

    This never waits: if the manager has gone or does not read, the message is dropped.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # An abstract address of Linux begins with a zero byte.
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setblocking(False)  # noqa: FBT003 - the parameter has no name
        manager.sendto(state.encode(), address)
