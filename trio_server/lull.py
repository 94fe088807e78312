"""Connections that only have to be closed wait for a lull, and are then closed in groups.

Their clients have all that they wait for. So the time that closing takes is better spent when
the scheduler has little else to do, and many at a time take less of it than one by one.
"""

import math
import resource

import trio

INTERVAL = 0.05
"""Seconds between two looks whether there is a lull."""

LONGEST = 0.5
"""Seconds after which they are closed all the same: half of the time (`CLOSING_TIME`) that their
clients get to close when the server shuts down."""

PUNCTUAL = 0.01
"""There is a lull when a task that is due gets its turn within so many seconds: then no long
line of tasks stands before it."""

GROUP = 64
"""Connections to close together. Thousands at once would keep all other tasks from their turn."""

TURNS = 4
"""Turns of the scheduler that a connection needs to close; then the next group follows."""

PART_OF_FILES = 0.5
"""Of the files that the process may open, how many may belong to connections that wait. Who comes
when it is reached is closed at once: the other half is for clients that have no reply yet."""


class Lull:
    """Where connections wait for the next lull.

    Args:
        nursery: Where to run the task that ends the waits.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        # A line of tasks that stand still: `park` joins it, `unpark` lets the first ones go on.
        self._waiting = trio.lowlevel.ParkingLot()
        self._ending_waits = False
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        no_limit = files == resource.RLIM_INFINITY
        self._most_waiting = math.inf if no_limit else PART_OF_FILES * files

    async def wait(self) -> None:
        """Wait until there is a lull, or for about half a second; not if too many wait already."""
        if len(self._waiting) >= self._most_waiting:
            await trio.lowlevel.checkpoint()
            return
        if not self._ending_waits:
            self._ending_waits = True
            self._nursery.start_soon(self._end_waits)
        await self._waiting.park()

    async def _end_waits(self) -> None:
        """Let those who wait go on, after each lull or `LONGEST`, until nobody waits any more."""
        while self._waiting:
            await _lull()
            for _ in range(0, len(self._waiting), GROUP):
                self._waiting.unpark(count=GROUP)
                for _ in range(TURNS):
                    await trio.lowlevel.checkpoint()
        self._ending_waits = False  # no `await` since the last look, so nobody came after it


async def _lull() -> None:
    """Sleep for `INTERVAL` again and again, until one sleep ends on time or `LONGEST` is over."""
    now = trio.current_time()
    give_up = now + LONGEST
    punctual = False
    while not punctual and now < give_up:
        due = now + INTERVAL
        await trio.sleep_until(due)
        now = trio.current_time()
        punctual = now - due < PUNCTUAL
