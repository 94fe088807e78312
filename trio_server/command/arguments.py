"""The command line: its options, and a sentence for each that cannot be served."""

import argparse
import errno
import math
import os
import socket
import sys
from contextlib import suppress
from functools import partial
from urllib.parse import urlsplit

import trio_server
from trio_server.connection import CLIENT_TIMEOUT
from trio_server.responder import DELAY
from trio_server.server import HIGHEST_PORT
from trio_server.shutdown import GRACE_PERIOD

PORT = 1729  # the smallest number that is a sum of two cubes in two ways
MOST_DIGITS = 20  # Python refuses to read thousands of them


def parse_arguments() -> argparse.Namespace:
    """Read the command line; end the process with status 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="trio-server",
        description="Answer every TCP connection with an HTTP 200 and `Hello World!`, "
        "each in a task of its own, after a pause that stands in for work.",
        epilog="example: trio-server --host '' --port 8080 --delay 0.5",
        allow_abbrev=False,
    )
    option = parser.add_argument
    option(
        "--host",
        type=host,
        default="localhost",
        help="interface to listen on; a name with several addresses gets a listener on each; "
        "an empty string is all interfaces (default: %(default)s)",
    )
    option(
        "--port",
        type=partial(whole_number, least=0, most=HIGHEST_PORT),
        default=PORT,
        help="port to listen on; 0 lets the kernel pick (default: %(default)s)",
    )
    option(
        "--delay",
        type=seconds,
        default=DELAY,
        metavar="SECONDS",
        help="simulated work for each request (default: %(default)g)",
    )
    option(
        "--client-timeout",
        type=partial(seconds, zero=False),
        default=CLIENT_TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for a client: for its first bytes, while it takes the reply, "
        "while it sends on after that (default: %(default)g)",
    )
    option(
        "--grace-period",
        type=seconds,
        default=GRACE_PERIOD,
        metavar="SECONDS",
        help="how long requests in flight may take once a signal has asked to stop "
        "(default: %(default)g)",
    )
    option(
        "--max-concurrent",
        type=partial(whole_number, least=1),
        metavar="N",
        help="how many requests are worked on at once; the next ones wait (default: no limit)",
    )
    option(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="the least severe of what is logged on stderr (default: %(default)s)",
    )
    option("--watch", action="store_true", help="draw what goes on in the terminal, as it goes on")
    option("--version", action="version", version=f"%(prog)s {trio_server.__version__}")
    options = parser.parse_args()
    is_terminal = sys.stdout and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if options.watch and not is_terminal:
        parser.error("--watch draws in a terminal: leave it out where stdout is none")
    return options


def host(text: str) -> str:
    """Parse a host name or address; say how to write what looks like a part of a URL."""
    if set(text) & set("/[]@") or text.count(":") == 1:
        name, port = "localhost", None
        with suppress(ValueError):  # no host, or a port that is none
            parts = urlsplit(text if "//" in text else f"//{text}")
            name, port = parts.hostname or name, parts.port
        advice = f"--host {name}" if port is None else f"--host {name} --port {port}"
        raise argparse.ArgumentTypeError(f"{text!r} is more than a host: write {advice}")
    return text


def whole_number(text: str, *, least: int, most: float = math.inf) -> int:
    """Parse a whole number within limits."""
    is_number = text.isascii() and text.isdecimal() and len(text) < MOST_DIGITS
    if not (is_number and least <= int(text) <= most):
        limits = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {limits}")
    return int(text)


def seconds(text: str, *, zero: bool = True) -> float:
    """Parse a length of time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf or (value == 0 and not zero):
        least = "0 or more" if zero else "more than 0"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, {least}")
    return value


def advice(error: Exception, options: argparse.Namespace) -> str:
    """Say in one sentence why the server cannot serve, and what to do about it."""
    if not isinstance(error, OSError):
        return "cannot accept any more: a listening socket was closed"
    if isinstance(error, socket.gaierror):
        return f"host {options.host!r} does not resolve ({error.strerror}): check --host"
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"port {options.port} is already in use: stop the program that listens on it, "
                "or choose another port with --port"
            )
        case errno.EACCES:
            return f"port {options.port} needs privileges: choose a port from 1024 on with --port"
        case errno.EADDRNOTAVAIL:
            return f"{error.strerror}: choose one of its own with --host"
    return f"cannot serve on host {options.host!r}, port {options.port}: {error.strerror}"
