"""A TCP server and a server on a Unix socket. Both end when the socket receives "stop"."""

import signal
from functools import partial

import trio

from trio_server import Shutdown, hello_world, serve_connection, serve_gracefully

ADMIN = trio.Path("admin.sock")
stop = Shutdown()


async def admin(stream: trio.SocketStream) -> None:
    with stop.move_on_after(30):
        if (await stream.receive_some()).strip() == b"stop":
            stop.begin()  # `begin` returns at once. This handler goes on, like all others.
            await stream.send_all(b"stopping\n")


async def stop_on_signals() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            stop.begin(5 if stop.begun else 30)


async def main() -> None:
    handler = partial(serve_connection, respond=hello_world, shutdown=stop)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals)
        async with trio.open_nursery() as servers:
            await servers.start(serve_gracefully, partial(trio.serve_tcp, handler, 1729), stop)
            # The port is ours now, so if the path exists, a server that was killed left it.
            await ADMIN.unlink(missing_ok=True)
            unix = trio.socket.socket(trio.socket.AF_UNIX)
            await unix.bind(str(ADMIN))
            unix.listen()
            local = partial(trio.serve_listeners, admin, [trio.SocketListener(unix)])
            await servers.start(serve_gracefully, local, stop)
        await ADMIN.unlink()  # Trio does not remove it.
        nursery.cancel_scope.cancel()


trio.run(main)
