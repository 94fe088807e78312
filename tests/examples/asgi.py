"""An ASGI application with lifespan. hypercorn's code serves each connection.

What a client gets when the server receives SIGTERM:

* A request in flight has 30 seconds to be answered in full, even if its reply is a stream. If the
  reply has not begun yet, it gets the header field "Connection: close", so a keep-alive client
  sends no further request.
* A reply that has begun cannot have this field. If such a reply lasts for more than 2 seconds
  after the signal, the next request on its connection is lost. That request may also delay the
  exit by up to 30 seconds.
* An idle keep-alive client is disconnected after 2 seconds.
* A WebSocket client receives a close frame with the code 1001 ("going away").

hypercorn does not document the names that are imported here, except `Config`. This was tried with
hypercorn 0.18.0, HTTP/1.1 and WebSockets. HTTP/2 needs a change: see `tell_hypercorn`.
"""

import math
import signal
from functools import partial
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext

from trio_server import Shutdown, serve_gracefully

stop = Shutdown()


async def app(scope: Any, receive: Any, send: Any) -> None:
    # Your application goes here: a Quart, Starlette or FastAPI app, or a function like this one.
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
    elif scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200})
        await trio.sleep(1)
        await send({"type": "http.response.body", "body": b"Hello World!"})
    else:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "Hello World!"})
        with stop.move_on_after(math.inf):  # A shutdown ends this wait for the client.
            while (await receive())["type"] != "websocket.disconnect":
                pass
        await send({"type": "websocket.close", "code": 1001})


async def stop_on_signals() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            stop.begin(5 if stop.begun else 30)


async def tell_hypercorn(config: Config, context: WorkerContext) -> None:
    await stop.wait()
    # Each reply that begins now has "Connection: close". With HTTP/2, hypercorn 0.18.0 would lose
    # the next request of each connection: if your clients use HTTP/2, remove the line below.
    config.keep_alive_max_requests = 0
    # If hypercorn knew of the shutdown now, it would close connections that it has just accepted.
    await trio.sleep(2)
    await context.terminated.set()  # Now it closes connections that are idle.


async def main() -> None:
    config, context, state = Config(), WorkerContext(None), dict[str, Any]()
    wrapped = ASGIWrapper(app)
    lifespan = Lifespan(wrapped, config, state)
    handler = partial(TCPServer, wrapped, config, context, state)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals)
        nursery.start_soon(tell_hypercorn, config, context)
        await nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        await serve_gracefully(partial(trio.serve_tcp, handler, 1729), stop)
        await lifespan.wait_for_shutdown()
        nursery.cancel_scope.cancel()


trio.run(main)
