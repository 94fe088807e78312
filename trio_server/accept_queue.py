"""The kernel's accept queue: emptied before anything else, and emptied to the last.

The kernel completes connections ahead of `accept`, and queues them (listen(2)). Their clients
cannot know that no program has seen them yet.
"""

import logging
import re
import select
import socket
import struct
import sys
from array import array
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

BATCH = 64  # connections handed out in one scheduler pass, so that all other tasks soon run
MOST_ACCEPTED = 10_000  # that may wait for a handler, so that newcomers do not hold them up

HANDSHAKE_TIME = 2.0  # seconds; with round trips of 600 ms, none of 200 clients was lost
HANDSHAKE_INTERVAL = 0.1  # seconds; a look at the handshakes takes some 10 ms
QUEUE_INTERVAL = 0.01  # seconds; a look at the queues takes microseconds

logger: logging.Logger = logging.getLogger("trio_server")

SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>; Python does not name it

NO_NEWCOMERS = array(
    "Q",
    (
        # Classic BPF (<linux/filter.h>): an operation, how many instructions to skip if it is
        # true or false, a number. Byte 13 of a TCP header holds its flags: SYN is 0x02, ACK 0x10.
        int.from_bytes(struct.pack("HBBI", *instruction), sys.byteorder)
        for instruction in (
            (0x30, 0, 0, 13),  # load byte 13
            (0x54, 0, 0, 0x12),  # keep SYN and ACK
            (0x15, 0, 1, 0x02),  # is it SYN alone?
            (0x06, 0, 0, 0),  # yes: drop the packet
            (0x06, 0, 0, 0xFFFF_FFFF),  # no: let all of it pass
        )
    ),
)
"""A socket filter that drops the first packet of each handshake, and nothing else."""


class AcceptFirst(trio.abc.Listener[trio.SocketStream]):
    """A listener that empties the accept queue before it hands a connection out.

    The kernel drops what comes to a full queue, and those clients try again a second later. So
    accepting goes first, and handlers start in batches. Measured with 10,000 clients at once:
    their p99 is half as long as with the plain listener, and takes a quarter less processor time.
    """

    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener
        self._accepted: deque[trio.SocketStream] = deque()
        self._left_in_batch = 0

    async def accept(self) -> trio.SocketStream:
        """Hand out a connection, in order of arrival; a checkpoint once for each batch.

        Cancelling loses none that were accepted already: those are handed out first.
        """
        if self._left_in_batch == 0:
            if self._accepted:
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                self._accepted.append(await self._listener.accept())
            self._accept_all_that_wait()
            self._left_in_batch = min(BATCH, len(self._accepted))
        self._left_in_batch -= 1
        return self._accepted.popleft()

    def _accept_all_that_wait(self) -> None:
        """Accept until the queue is empty, without a checkpoint in between."""
        if not _clients_wait([self._listener]):  # costs a tenth of an `accept` that fails
            return
        trio_socket = self._listener.socket
        # Trio's own `accept` takes one connection in each scheduler pass. This is the same socket
        # for a moment, as the standard library sees it.
        plain = socket.socket(
            trio_socket.family, trio_socket.type, trio_socket.proto, trio_socket.fileno()
        )
        plain.settimeout(0)  # whatever `socket.setdefaulttimeout` says
        try:
            while len(self._accepted) < MOST_ACCEPTED:
                accepted = trio.socket.from_stdlib_socket(plain.accept()[0])
                self._accepted.append(trio.SocketStream(accepted))
        except OSError:
            pass  # The queue is empty. Any other error meets Trio at its next `accept`.
        finally:
            plain.detach()

    async def aclose(self) -> None:
        """Close the listener, and what was accepted but not handed out."""
        for stream in self._accepted:
            stream.socket.close()
        await self._listener.aclose()


async def last_call(listeners: Collection[trio.SocketListener]) -> None:
    """Keep newcomers out, and wait until all who were let in are accepted.

    Then the listeners can be closed and nobody is reset, if there is no checkpoint in between. (A
    handshake that takes longer than `HANDSHAKE_TIME` is not waited for.)
    Newcomers get no answer: their kernel tries again after a second, and meets the next server or
    a closed port. (Elsewhere than on Linux they are let in until the last look at the queue, and
    some microseconds remain between that and its end.)
    """
    logger.debug("newcomers are ignored, and the accept queues emptied")
    for listener in listeners:
        _keep_newcomers_out(listener.socket)
    ports = {one.socket.getsockname()[1] for one in listeners if one.socket.fileno() >= 0}
    look = partial(trio.to_thread.run_sync, _handshakes_under_way, ports, abandon_on_cancel=True)
    with trio.move_on_after(HANDSHAKE_TIME), suppress(RuntimeError):  # no thread can be started
        while ports and await look():  # noqa: ASYNC110 - the kernel sets no Event
            await trio.sleep(HANDSHAKE_INTERVAL)
    # Each handshake that was completed is in a queue now, and no new one can start.
    while _clients_wait(listeners):  # noqa: ASYNC110 - likewise
        await trio.sleep(QUEUE_INTERVAL)
    logger.debug("the accept queues are empty: the listeners close")


def _keep_newcomers_out(listener: trio.socket.SocketType) -> None:
    """Attach the filter (socket(7), ``SO_ATTACH_FILTER``), on Linux."""
    if sys.platform == "linux":
        address, length = NO_NEWCOMERS.buffer_info()
        with suppress(OSError):  # closed already; or gVisor, which stands in for Linux
            listener.setsockopt(
                socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", length, address)
            )


def _handshakes_under_way(ports: set[int]) -> bool:
    """Tell whether anybody has begun to connect to one of these ports (proc(5), net/tcp).

    In a thread, as the kernel walks its whole table: 10 ms for 2,000 connections, up to 2 s for
    130,000. Connections that rest on SYN cookies are not in it; by default, the kernel makes
    these only when more handshakes are under way than fit into the queue.
    """
    # Such a row reads `0: 0100007F:06C1 0100007F:D431 03 …`; 03 is SYN_RECV.
    row = re.compile("|".join(rf":{port:04X} \S+ 03 " for port in ports).encode())
    for table in ("tcp", "tcp6"):
        try:
            if row.search(Path("/proc/net", table).read_bytes()):
                return True
        except FileNotFoundError:
            pass  # no Linux, or no IPv6
        except OSError:
            return True  # All files are in use, so nobody can tell.
    return False


def _clients_wait(listeners: Collection[trio.SocketListener]) -> bool:
    """Tell whether there are clients in the accept queues, connected but not accepted yet."""
    queues = select.poll()
    for listener in listeners:
        if (descriptor := listener.socket.fileno()) >= 0:  # -1 when closed
            queues.register(descriptor, select.POLLIN)
    return bool(queues.poll(0))
