"""The command line: its options, and a sentence for each reason why it cannot be served."""

import argparse
import errno
import math
import os
import socket
import sys
from functools import partial

import trio_server
from trio_server.connection import CLIENT_TIMEOUT
from trio_server.responder import DELAY
from trio_server.shutdown import GRACE_PERIOD

PORT = 1729  # the smallest number that is a sum of two cubes in two ways
HIGHEST_PORT = 65535  # 16 bits (RFC 9293, section 3.1)


def parse_arguments() -> argparse.Namespace:
    """Return the options; end the process with status 2 after wrong usage."""
    parser = argparse.ArgumentParser(
        prog="trio-server",
        description="Answer every TCP connection with an HTTP 200 and `Hello World!`, "
        "after a pause that stands in for work.",
        epilog="example: trio-server --host '' --port 8080 --delay 0.5",
        allow_abbrev=False,
    )
    option = parser.add_argument
    option(
        "--host",
        default="localhost",
        help="name or address to listen on; a name with several addresses gets a listener on "
        "each; an empty string means all interfaces (default: %(default)s)",
    )
    option(
        "--port",
        type=partial(whole_number, least=0, most=HIGHEST_PORT),
        default=PORT,
        help="port to listen on; with 0 the kernel chooses one (default: %(default)s)",
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
        help="time limit for the client to send its request, and again to receive the reply and "
        "close (default: %(default)g)",
    )
    option(
        "--grace-period",
        type=seconds,
        default=GRACE_PERIOD,
        metavar="SECONDS",
        help="time limit for requests in flight after a stop signal (default: %(default)g)",
    )
    option(
        "--max-concurrent",
        type=partial(whole_number, least=1),
        metavar="N",
        help="work on at most N requests at a time; the others wait (default: no limit)",
    )
    option(
        "--log-level",
        type=str.lower,
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="minimum level to log on stderr; debug also shows clients that send nothing "
        "(default: %(default)s)",
    )
    option("--watch", action="store_true", help="show the connections live in the terminal")
    option("--version", action="version", version=f"%(prog)s {trio_server.__version__}")
    options = parser.parse_args()
    is_terminal = sys.stdout and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if options.watch and not is_terminal:
        parser.error("--watch needs a terminal: leave it out when stdout is redirected")
    return options


def whole_number(text: str, *, least: int, most: int = sys.maxsize) -> int:
    """Parse a whole number within limits."""
    if not (text.isdecimal() and least <= float(text) <= most):
        limits = f"{least} or more" if most == sys.maxsize else f"{least} to {most}"
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
    """Return one sentence: why the server cannot serve, and what to do about it."""
    where = f"host {options.host!r}, port {options.port}"
    match error:
        case socket.gaierror():
            return f"host {options.host!r} does not resolve ({error.strerror}): check --host"
        case OSError(errno=errno.EADDRINUSE):
            return (
                f"port {options.port} is already in use: stop the program that listens on it, "
                "or choose another port with --port"
            )
        case OSError(errno=errno.EACCES):
            return f"port {options.port} needs privileges: choose 1024 or higher with --port"
        case OSError(errno=errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT):
            return f"this machine has no address of {options.host!r}: choose another with --host"
        case OSError():
            return f"cannot serve on {where} ({error.strerror}): check --host and --port"
    return f"cannot accept on {where} any more ({error!r}): restart the server"
