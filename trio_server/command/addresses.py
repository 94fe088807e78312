"""Addresses: which ones a host name stands for, how to listen on them, how to write them."""

import errno
import logging
from typing import Any

import trio

UNAVAILABLE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of bind(2) for an address that this machine does not have. A host name may resolve to
one: in many containers `localhost` is also `::1` while IPv6 is switched off."""

logger: logging.Logger = logging.getLogger("trio_server")


async def resolve(host: str | None, port: int) -> list[str]:
    """Resolve a host to the numeric addresses to listen on, each once."""
    try:
        found = await trio.socket.getaddrinfo(
            host or None, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE
        )
    except UnicodeError as error:  # Not a name at all: `a..b`, or a label of 64 letters.
        raise trio.socket.gaierror(trio.socket.EAI_NONAME, "not a host name") from error
    # A hosts file may name an address twice, and the second listener would find it taken.
    return list(dict.fromkeys(_numeric(sockaddr) for *_, sockaddr in found))


def _numeric(sockaddr: tuple[Any, ...]) -> str:
    """Write the address alone, with the zone that `getaddrinfo` splits off: ``fe80::1%2``."""
    host, _port, *ipv6 = sockaddr
    return f"{host}%{ipv6[1]}" if ipv6 and ipv6[1] else str(host)


async def listen(
    addresses: list[str], port: int, *, host: str | None, backlog: int | None
) -> list[trio.SocketListener]:
    """Listen on all of a host's addresses that this machine has, or on none if one fails."""
    listeners: list[trio.SocketListener] = []
    unavailable = []
    try:
        # One call for each, as a single call for all gives up on the first that is unavailable.
        for address in addresses:
            try:
                listeners += await trio.open_tcp_listeners(port, host=address, backlog=backlog)
            except OSError as error:
                if error.errno not in UNAVAILABLE:
                    raise
                unavailable.append((address, error.strerror))
    except BaseException:  # also when cancelled
        for listener in listeners:
            listener.socket.close()
        raise
    if not listeners:
        raise OSError(errno.EADDRNOTAVAIL, f"this machine has no address of {host!r}")
    for address, reason in unavailable:
        logger.warning("not listening on %s: %s", address, reason)
    return listeners


def format_address(sockaddr: object) -> str:
    """Write a socket address as people do: ``127.0.0.1:1729``, ``[::1]:1729``."""
    match sockaddr:
        case (str(host), int(port), *_):
            host = host.removeprefix("::ffff:") if "." in host else host  # IPv4 on an IPv6 socket
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    # The path of a Unix socket, which may hold any character. Its client often has none.
    return str(sockaddr or "client").encode("unicode_escape").decode()


def format_url(sockaddr: object) -> str:
    """Write where to connect: a URL, or the path of a Unix socket."""
    scheme = "http://" if isinstance(sockaddr, tuple) else ""
    return scheme + format_address(sockaddr)


def peer_name(stream: trio.abc.Stream) -> str:
    """Say who is at the other end of a stream."""
    if isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    if not isinstance(stream, trio.SocketStream):
        return "client"
    try:
        return format_address(stream.socket.getpeername())
    except OSError:  # It went away while it was in the accept queue.
        return "unknown client"
