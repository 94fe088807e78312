"""The accept queue: connections that the kernel has set up but the program has not accepted yet.

To its client, such a connection looks like an accepted one: the client can send (listen(2)).
"""

import select
import socket
import struct
import sys
from array import array
from collections.abc import Iterable
from contextlib import suppress

import trio

SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>; Python has no name for it

# Classic BPF (<linux/filter.h>): opcode, jump if true, jump if false, operand. The filter sees a
# packet from its TCP header on. Byte 13 of the header holds the flags: SYN is 0x02, ACK is 0x10.
INSTRUCTIONS = (
    (0x30, 0, 0, 13),  # load byte 13
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # is it a SYN without an ACK?
    (0x06, 0, 0, 0),  # yes: drop the packet
    (0x06, 0, 0, 0xFFFF_FFFF),  # no: pass all of it
)
DROP_NEW_CONNECTIONS = array("B", b"".join(struct.pack("HBBI", *one) for one in INSTRUCTIONS))


def accept_waiting(listener: trio.socket.SocketType, most: int) -> list[socket.socket]:
    """Accept up to ``most`` connections from the queue in order, without a checkpoint.

    Trio's `accept` lets other tasks run before each connection. This returns plain sockets,
    because making streams takes so long that the queue could fill meanwhile.
    """
    accepted: list[socket.socket] = []
    if any_waiting([listener]):  # A cheap check: an `accept` that fails costs ten times as much.
        with (
            suppress(OSError),  # The queue is empty. Other errors come again in Trio's `accept`.
            socket.fromfd(listener.fileno(), listener.family, listener.type) as duplicate,
        ):
            duplicate.settimeout(0)  # whatever `socket.setdefaulttimeout` says
            while len(accepted) < most:
                accepted.append(duplicate.accept()[0])
    return accepted


def any_waiting(listeners: Iterable[trio.socket.SocketType]) -> bool:
    """Return whether a connection is waiting in the queue of any of these listeners."""
    poll = select.poll()
    for one in listeners:
        if one.fileno() >= 0:  # -1 when closed
            poll.register(one, select.POLLIN)
    return bool(poll.poll(0))


def ignore_new_connections(listener: trio.socket.SocketType) -> bool:
    """Make the kernel drop each packet that opens a connection; return whether it does.

    The client's kernel tries again after a second, and reaches a new server or a closed port.
    Only Linux can do this, and only for TCP (socket(7), ``SO_ATTACH_FILTER``).
    """
    if sys.platform != "linux" or listener.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    program = struct.pack("HP", len(INSTRUCTIONS), DROP_NEW_CONNECTIONS.buffer_info()[0])
    with suppress(OSError):  # The listener is closed, or this is gVisor, which imitates Linux.
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        return True
    return False
