"""What the tests do with Trio streams."""

import trio


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Read to the end of file."""
    return b"".join([chunk async for chunk in stream])
