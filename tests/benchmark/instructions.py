"""User-space instructions per connection, counted by valgrind.

The count does not depend on what else the machine does, so it shows small differences that
times cannot show.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from measure import make_requests
from servers import Kind, serving

VALGRIND = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
CLIENTS = 32
STOP_TIMEOUT = 60.0  # seconds; valgrind makes everything about 50 times slower


def count_instructions(
    kinds: Sequence[Kind], requests: tuple[int, int], folder: Path
) -> dict[str, float | None]:
    """Count the instructions per connection of several servers.

    Each server runs twice, with a small and a large number of requests. The difference between
    the runs leaves out what starting and stopping cost.

    Args:
        kinds: The servers.
        requests: The small number of requests, and the large one.
        folder: Where the logs go.

    Returns:
        The count for each server, by its name; None if requests failed.
    """
    runs = [(kind, number) for kind in kinds for number in requests]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        totals = list(pool.map(lambda run: count_run(run[0], run[1], folder), runs))
    few, many = requests
    return {
        kind.name: None if small is None or large is None else (large - small) / (many - few)
        for kind, small, large in zip(kinds, totals[::2], totals[1::2], strict=True)
    }


def count_run(kind: Kind, requests: int, folder: Path) -> int | None:
    """Run a server for a number of requests; return its instructions, None if any failed."""
    counted = replace(kind, command=(*VALGRIND, *kind.command))
    with serving(counted, 0, folder) as server:
        load = make_requests(server.port, requests, CLIENTS)
        server.process.terminate()
        server.process.wait(STOP_TIMEOUT)
        total = re.search(r"Collected : (\d+)", server.log.read_text())
    return int(total[1]) if total and not load.failures else None
