"""The least that serves on Trio: no limits, no time-outs, no log, no shutdown."""

import os

import trio

DELAY = float(os.environ["DELAY"])  # seconds
REPLY = os.environb[b"REPLY"]


async def answer(stream: trio.SocketStream) -> None:
    await stream.receive_some(1024)
    await trio.sleep(DELAY)
    await stream.send_all(REPLY)


async def main() -> None:
    await trio.serve_tcp(answer, int(os.environ["PORT"]), host="127.0.0.1")


trio.run(main)
