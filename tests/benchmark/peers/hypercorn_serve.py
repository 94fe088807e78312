"""hypercorn's own Trio worker in one process, stopped as its documentation shows."""

import os
import signal
from typing import Any

import trio
from asgi_app import on_trio
from hypercorn.config import Config
from hypercorn.trio import serve


async def wait_for_sigterm(*_: Any) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        await anext(signals)


async def main() -> None:
    config = Config()
    config.bind = [f"127.0.0.1:{os.environ['PORT']}"]
    config.backlog = 65_535  # as Trio has it
    await serve(on_trio, config, shutdown_trigger=wait_for_sigterm)


trio.run(main)
