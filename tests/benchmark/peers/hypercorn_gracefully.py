"""hypercorn's code for a single connection, under `serve_gracefully`.

hypercorn does not document the names that are imported here, except `Config`.
"""

import os
import signal
from functools import partial
from typing import Any

import trio
from asgi_app import on_trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext

from trio_server import Shutdown, serve_gracefully


async def stop_on_sigterm(shutdown: Shutdown) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            shutdown.begin()


async def tell_hypercorn(shutdown: Shutdown, context: WorkerContext) -> None:
    await shutdown.wait()
    await trio.sleep(2)  # hypercorn would close connections that were just accepted.
    await context.terminated.set()


async def main() -> None:
    shutdown, context, state = Shutdown(), WorkerContext(None), dict[str, Any]()
    handler = partial(TCPServer, ASGIWrapper(on_trio), Config(), context, state)
    server = partial(trio.serve_tcp, handler, int(os.environ["PORT"]), host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_sigterm, shutdown)
        nursery.start_soon(tell_hypercorn, shutdown, context)
        await serve_gracefully(server, shutdown)
        nursery.cancel_scope.cancel()


trio.run(main)
