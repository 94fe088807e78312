"""Connections that only have to be closed wait for a lull, and are then closed together.

Their clients have all that they wait for. So the time that closing takes is better spent when
the scheduler has little else to do, and many at a time take less of it than one by one.
"""

import trio

INTERVAL = 0.05
"""Seconds between two looks whether there is a lull."""

LONGEST = 0.5
"""Seconds after which they are closed all the same: half of the time (`CLOSING_TIME`) that their
clients get to close when the server shuts down."""

PUNCTUAL = 0.01
"""There is a lull when a task that is due gets its turn within so many seconds: then no long
line of tasks stands before it."""


class Lull:
    """Where connections wait for the next lull.

    Args:
        nursery: Where to run the task that ends the wait.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._waiting = trio.lowlevel.ParkingLot()

    async def wait(self) -> None:
        """Wait until there is a lull, or for about half a second."""
        if not self._waiting:
            self._nursery.start_soon(self._end_wait)
        await self._waiting.park()

    async def _end_wait(self) -> None:
        now = trio.current_time()
        give_up = now + LONGEST
        punctual = False
        while not punctual and now < give_up:
            due = now + INTERVAL
            await trio.sleep_until(due)
            now = trio.current_time()
            punctual = now - due < PUNCTUAL
        self._waiting.unpark_all()
