"""Clients that behave badly, as a program of its own: hostile.py PORT SECONDS NUMBER_OF_EACH."""

import os
import random
import socket
import sys
from collections.abc import Awaitable, Callable

import trio
from streams import RESET_ON_CLOSE


async def send_without_end(client: trio.SocketStream) -> None:
    while True:
        await client.send_all(bytes(10_000))
        await trio.sleep(0.01)


async def read_nothing(client: trio.SocketStream) -> None:
    await client.send_all(b"GET / HTTP/1.1\r\n\r\n")
    await trio.sleep_forever()


async def trickle(client: trio.SocketStream) -> None:
    while True:
        await client.send_all(b"x")
        await trio.sleep(0.2)


async def reset_at_any_moment(client: trio.SocketStream) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    if random.random() < 0.7:
        await client.send_all(b"x" * random.choice((1, 3000)))
    await trio.sleep(random.random())


async def send_random_bytes(client: trio.SocketStream) -> None:
    await client.send_all(os.urandom(random.randrange(1, 5000)))
    await trio.sleep(random.random())


async def stay_hostile(port: int, behave: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    """Do it again and again: whenever the server has had enough, come back."""
    while True:
        try:
            async with await trio.open_tcp_stream("127.0.0.1", port) as client:
                await behave(client)
        except (OSError, trio.BrokenResourceError):
            await trio.sleep(0.1)


async def main(port: int, seconds: float, number: int) -> None:
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for behave in (
                send_without_end,
                read_nothing,
                trickle,
                reset_at_any_moment,
                send_random_bytes,
            ):
                for _ in range(number):
                    nursery.start_soon(stay_hostile, port, behave)


trio.run(main, int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
