"""A concurrent TCP server on Trio, and the graceful shutdown that Trio itself does not have.

Run it with ``python -m trio_server``, or build on it:

* `serve_tcp` and `serve_listeners` resemble Trio's. They take a ``shutdown``, log a handler's
  exception instead of raising it, and own the nursery of the handlers.
* `Shutdown` stops them: no more connections, idle clients get a second, all others may finish.
* `serve_connection` is a handler for them: one request, one reply, made by a responder. An
  `Outcome` is what came of it; `Connections` counts.
* `hello_world` is the responder of the command.

Start a server with ``await nursery.start(partial(serve_tcp, handler, port, shutdown=shutdown))``.
The package logs to the logger ``trio_server``.
"""

from trio_server.account import Connections, Outcome
from trio_server.connection import Responder, serve_connection
from trio_server.responder import hello_world
from trio_server.server import serve_listeners, serve_tcp
from trio_server.shutdown import Shutdown

__version__ = "2.0.0"

__all__ = [
    "Connections",
    "Outcome",
    "Responder",
    "Shutdown",
    "hello_world",
    "serve_connection",
    "serve_listeners",
    "serve_tcp",
]
