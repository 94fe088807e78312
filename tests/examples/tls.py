"""A TLS server. On a shutdown, it also answers the clients waiting in the accept queue.

Its first argument is a file with a certificate and its private key.
"""

import signal
import ssl
import sys
from functools import partial

import trio

from trio_server import Shutdown, hello_world, serve_connection, serve_gracefully

stop = Shutdown()


async def stop_on_signals() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            stop.begin(5 if stop.begun else 30)


async def main() -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(sys.argv[1])
    respond = partial(hello_world, delay=1)  # a responder
    handler = partial(serve_connection, respond=respond, shutdown=stop)
    server = partial(trio.serve_ssl_over_tcp, handler, 1729, context)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals)
        await serve_gracefully(server, stop)
        nursery.cancel_scope.cancel()  # This ends `stop_on_signals`.


trio.run(main)
