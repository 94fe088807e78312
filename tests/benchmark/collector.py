"""Policies of the garbage collector, tried on our server.

Start it with ``python tests/benchmark/collector.py``, where ``python`` is the interpreter to try
them on. It starts the command with other values of its constant ``COLLECTOR_THRESHOLDS``, which
``tune_collector`` passes to `gc.set_threshold`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import Held, Rate, hold, hurry
from report import FULL, SMALL, beyond, cell, environment, median, print_row, say, scale
from servers import HOST, Kind, raise_file_limit, serving

START = "import trio_server.__main__ as command; {}; "

UNTUNED = "command.tune_collector = lambda: None"
POLICIES = {
    "Python's own, nothing frozen": UNTUNED,
    **{
        "frozen, {:,}, {}, {}".format(*thresholds): f"command.COLLECTOR_THRESHOLDS = {thresholds}"
        for thresholds in (
            (700, 10, 10),
            (5_000, 10, 10),
            (50_000, 10, 10),
            (1_000_000, 10, 10),
        )
    },
    "frozen, off": "command.COLLECTOR_THRESHOLDS = (0, 0, 0)",
}


def main() -> None:
    """Measure every policy in rounds; print a table of the medians."""
    parser = argparse.ArgumentParser(prog="python tests/benchmark/collector.py")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--small", action="store_true", help="see that it works")
    options = parser.parse_args()
    plan = SMALL if options.small else FULL
    raise_file_limit()
    held: dict[str, list[Held]] = {name: [] for name in POLICIES}
    rates: dict[str, list[Rate]] = {name: [] for name in POLICIES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, options.rounds + 1):
            for name, policy in POLICIES.items():
                kind = ours_with(name, policy)
                with serving(kind, 0, Path(folder)) as server:
                    rates[name].append(hurry(server, plan.requests))
                with serving(kind, plan.delay, Path(folder)) as server:
                    held[name].append(hold(server, plan.held, plan.delay))
                say(f"round {number}: {name}")

    print_row("collector", "p99 ms", "KB each", "requests/s", "CPU µs", "failed")
    print_row("---", *["---:"] * 5)
    for name in POLICIES:
        loads = [*(one.load for one in held[name]), *(one.load for one in rates[name])]
        print_row(
            name,
            cell(median(beyond(one.load.p99, plan) for one in held[name])),
            cell(median(scale(one.memory, 1 / 1024) for one in held[name])),
            cell(median(one.load.rate for one in rates[name])),
            cell(median(scale(one.cpu, 1e6) for one in rates[name])),
            str(sum(load.failures for load in loads)),
        )
    print(f"\n{environment()}")


def ours_with(name: str, policy: str) -> Kind:
    """Describe our server with a policy."""
    program = START.format(policy) + "raise SystemExit(command.main())"
    options = (f"--host={HOST}", "--port={port}", "--delay={delay}")
    return Kind(name, (sys.executable, "-c", program, *options))


if __name__ == "__main__":
    main()
