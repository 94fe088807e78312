"""A graceful shutdown for servers on Trio, and the demo that ``python -m trio_server`` runs.

* `serve_gracefully` runs one of Trio's servers until `Shutdown.begin` is called.
* `serve_connection` is a handler for one request and one reply. It calls a responder: an async
  function that turns a request into a reply, such as `hello_world`. Write
  ``partial(serve_connection, respond=hello_world, shutdown=stop)``.
* `Account` records each connection as an `Exchange`, and counts each `Outcome`.

This echo server stops gracefully on SIGTERM or Ctrl-C::

    import signal, trio
    from functools import partial
    from trio_server import Shutdown, serve_gracefully

    stop = Shutdown()

    async def receive(stream):
        with stop.move_on_after(30):  # Seconds. In a shutdown, 1 at most.
            return await stream.receive_some()
        return b""  # The time is up.

    async def echo(stream):
        while data := await receive(stream):
            with trio.fail_after(30):  # It is an error if the client does not read.
                await stream.send_all(data)
            if stop.begun:  # Otherwise a client that keeps sending could delay the exit.
                break

    async def stop_on_signals():
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                stop.begin(5 if stop.begun else 30)  # seconds for the handlers

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_on_signals)
            await serve_gracefully(partial(trio.serve_tcp, echo, 1729), stop)
            nursery.cancel_scope.cancel()  # This ends `stop_on_signals`.

    trio.run(main)
"""

from trio_server.account import Account, Exchange, Outcome
from trio_server.connection import Responder, serve_connection
from trio_server.responder import hello_world
from trio_server.server import serve_gracefully
from trio_server.shutdown import Shutdown

__version__ = "3.0.0"

__all__ = [
    "Account",
    "Exchange",
    "Outcome",
    "Responder",
    "Shutdown",
    "hello_world",
    "serve_connection",
    "serve_gracefully",
]
