"""A graceful shutdown for servers on Trio, and the demo that ``python -m trio_server`` runs.

* `serve_gracefully` runs one of Trio's servers until `Shutdown.begin` is called.
* `serve_connection` is a handler: one request and one reply, which a responder makes. A responder
  is an async function from request to reply. `hello_world` is one.
* `Account` has an `Exchange` for each connection, and counts the connections by `Outcome`.

This echo server stops gracefully on SIGTERM or Ctrl-C, and immediately on a second signal::

    import signal, trio
    from functools import partial
    from trio_server import Shutdown, serve_gracefully

    stop = Shutdown()

    async def echo(stream):
        while True:
            with stop.move_on_after(30) as wait:  # Once the shutdown begins, 1 s is left.
                data = await stream.receive_some()
            if wait.cancelled_caught or not data:
                break
            await stream.send_all(data)  # This work is outside the block, so it may finish.
            if stop.begun:
                break

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_gracefully, partial(trio.serve_tcp, echo, 1729), stop)
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                await anext(signals)  # After this block, a signal ends the program at once.
            stop.begin()

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
