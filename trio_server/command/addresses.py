"""Addresses: which ones a host name has, and how to show them."""

from typing import Any

import trio

from trio_server.connection import format_address


async def resolve(host: str, port: int) -> list[str]:
    """Return the numeric addresses of a host, each once.

    Raises:
        socket.gaierror: The host does not resolve.
    """
    try:
        found = await trio.socket.getaddrinfo(
            host or None, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE
        )
    except UnicodeError as error:  # It cannot be a name: `a..b`, or a label of 64 letters.
        raise trio.socket.gaierror(trio.socket.EAI_NONAME, "not a host name") from error
    except RuntimeError as error:  # No thread can start: an old Docker, a full cgroup.
        advice = f"{error}; a numeric address, such as 127.0.0.1, needs none"
        raise trio.socket.gaierror(trio.socket.EAI_SYSTEM, advice) from error
    # A hosts file may name an address twice. The second listener would find it taken.
    return list(dict.fromkeys(_numeric(sockaddr) for *_, sockaddr in found))


def _numeric(sockaddr: tuple[Any, ...]) -> str:
    """Return the address alone, with the zone that `getaddrinfo` splits off: ``fe80::1%2``."""
    host, _port, *ipv6 = sockaddr
    return f"{host}%{ipv6[1]}" if ipv6 and ipv6[1] else str(host)


def format_url(sockaddr: object) -> str:
    """Return where to connect: a URL, or the path of a Unix socket."""
    if isinstance(sockaddr, tuple):
        return f"http://{format_address(sockaddr)}"
    return ascii(sockaddr)[1:-1]
