"""What the tests do with Trio streams."""

import math

import trio
from trio.testing import memory_stream_pair

RESET_ON_CLOSE = b"\1\0\0\0\0\0\0\0"  # a linger time of 0 seconds (socket(7))


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Read to the end of file."""
    return b"".join([chunk async for chunk in stream])


class MemoryListener(trio.abc.Listener[trio.abc.HalfCloseableStream]):
    """A listener whose clients are in this process."""

    def __init__(self) -> None:
        self.closed = False
        self._connect, self._accept = trio.open_memory_channel[trio.abc.HalfCloseableStream](
            math.inf
        )

    def connect(self) -> trio.abc.HalfCloseableStream:
        client, server = memory_stream_pair()
        self._connect.send_nowait(server)
        return client

    async def accept(self) -> trio.abc.HalfCloseableStream:
        return await self._accept.receive()

    async def aclose(self) -> None:
        self.closed = True
        self._connect.close()
        self._accept.close()
