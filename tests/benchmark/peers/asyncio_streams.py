"""The same on the streams of asyncio."""

import asyncio
import os

DELAY = float(os.environ["DELAY"])  # seconds
REPLY = os.environb[b"REPLY"]
BACKLOG = 65_535  # as Trio has it; the 100 of asyncio would measure dropped connections


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1024)
    await asyncio.sleep(DELAY)
    writer.write(REPLY)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def main() -> None:
    port = int(os.environ["PORT"])
    server = await asyncio.start_server(answer, "127.0.0.1", port, backlog=BACKLOG)
    await server.serve_forever()


asyncio.run(main())
