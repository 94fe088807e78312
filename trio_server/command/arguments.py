"""The command line: its options, and a sentence that says why the server cannot start."""

import argparse
import errno
import math
import os
import socket
from contextlib import suppress
from functools import partial

import trio_server
from trio_server.connection import CLIENT_TIMEOUT
from trio_server.responder import DELAY
from trio_server.shutdown import GRACE_PERIOD

PORT = 1729  # the smallest number that is a sum of two cubes in two ways
LONGEST = 1_000_000  # seconds, 11 days
NUMBERS = (  # option, type, least, most, default, meaning
    ("port", int, 0, 65_535, PORT, "port to listen on; with 0 the kernel chooses one"),
    ("delay", float, 0, LONGEST, DELAY, "simulated work for each request"),
    ("client-timeout", float, 0.001, LONGEST, CLIENT_TIMEOUT, "limit for request and reply, each"),
    ("grace-period", float, 0, LONGEST, GRACE_PERIOD, "limit for requests after a stop signal"),
    ("max-concurrent", int, 1, 1_000_000, math.inf, "at most this many requests at a time"),
)
NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # on this machine: bind(2)


def parse_arguments() -> argparse.Namespace:
    """Return the options; end the process with status 2 on a usage error."""
    parser = argparse.ArgumentParser(
        prog="trio-server",
        description="Answer each TCP connection with an HTTP 200 and `Hello World!`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--host", default="localhost", help="where to listen; '' means all interfaces")
    for name, kind, least, most, default, meaning in NUMBERS:
        unit = "SECONDS" if kind is float else "N"
        parse = partial(number, kind, least, most)
        option(f"--{name}", type=parse, default=default, metavar=unit, help=meaning)
    levels = ("debug", "info", "warning", "error")
    option("--log-level", type=str.lower, choices=levels, default="info", help="lowest level")
    option("--watch", action="store_true", help="show the connections live in the terminal")
    option("--version", action="version", version=f"%(prog)s {trio_server.__version__}")
    options = parser.parse_args()
    if options.watch and (not os.isatty(1) or os.environ.get("TERM") == "dumb"):
        parser.error("--watch needs a terminal: leave it out when stdout is redirected")
    return options


def number(kind: type[float], least: float, most: float, text: str) -> float:
    """Parse a number within limits."""
    with suppress(ValueError):
        value = kind(text)
        if least <= value <= most:
            return value
    name = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {least:,} to {most:,}")


def resolve(host: str, port: int) -> list[str]:
    """Return the numeric addresses of a host, each once. Raise `OSError` if it has none."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except UnicodeError as error:  # It cannot be a name: `a..b`, or a label of 64 letters.
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from error
    # An IPv6 address may have a zone, as in ``fe80::1%2``, which `getaddrinfo` splits off.
    hosts = [f"{ip}%{rest[-1]}" if any(rest) else str(ip) for *_, (ip, _, *rest) in found]
    return list(dict.fromkeys(hosts))  # A hosts file may name an address twice.


def advice(error: BaseException, options: argparse.Namespace) -> str:
    """Return one sentence: why the server cannot serve, and what to do about it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    host, port = f"host {options.host!r}", f"port {options.port}"
    match error:
        case socket.gaierror():
            return f"{host} does not resolve ({error.strerror}): check --host"
        case OSError(errno=errno.EADDRINUSE):
            return (
                f"{port} is already in use: stop the program that listens on it, "
                "or choose another port with --port"
            )
        case OSError(errno=errno.EACCES):
            return f"{port} needs privileges: choose 1024 or higher with --port"
        case OSError() if error.errno in NO_SUCH_ADDRESS:
            return f"{options.host!r} is not an address of this machine: choose another --host"
    return f"cannot serve on {host}, {port}: {error}"
