"""A concurrent TCP server on Trio: one nursery task for each connection, none lost on stopping.

Run it with ``python -m trio_server``, or build on it:

* `Server` listens on a port and answers with a `Responder` of your own.
* `serve_connection` serves one client on any stream, in memory too; `Outcome` is what came of it.
* `hello_world` is the responder of the command.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from trio_server.connection import Outcome, Responder, serve_connection
    from trio_server.responder import hello_world
    from trio_server.server import Server

__version__ = "1.0.0"

_HOMES = {
    "Outcome": "connection",
    "Responder": "connection",
    "Server": "server",
    "hello_world": "responder",
    "serve_connection": "connection",
}

__all__ = ["Outcome", "Responder", "Server", "hello_world", "serve_connection"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used.

    Python runs this file before `trio_server.__main__`. If it imported Trio, which takes a
    tenth of a second, a Ctrl-C in that time would end the command with a traceback.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(f"trio_server.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
