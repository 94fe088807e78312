"""The same body from an ASGI application: one for a Trio loop, one for an asyncio loop."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import trio

DELAY = float(os.environ["DELAY"])  # seconds
BODY = os.environb[b"REPLY"].partition(b"\r\n\r\n")[2]
HEADERS = [
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"content-length", b"%d" % len(BODY)),
]

Send = Callable[[dict[str, Any]], Awaitable[None]]


async def on_trio(scope: dict[str, Any], _receive: object, send: Send) -> None:
    only_http(scope)
    await trio.sleep(DELAY)
    await reply(send)


async def on_asyncio(scope: dict[str, Any], _receive: object, send: Send) -> None:
    only_http(scope)
    await asyncio.sleep(DELAY)
    await reply(send)


def only_http(scope: dict[str, Any]) -> None:
    """Refuse the events of starting and stopping, as the specification wants it."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])


async def reply(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})
