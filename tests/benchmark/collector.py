"""Settings of the garbage collector, measured on our server.

Start this with ``python tests/benchmark/collector.py``, where ``python`` is the interpreter to
measure. It starts the command with other values of its constant ``COLLECTOR_THRESHOLDS``, which
``tune_collector`` passes to `gc.set_threshold`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import AtOnce, Rate, connect_at_once, measure_rate
from report import FULL, SMALL, beyond, cell, environment, median, print_row, say, scale
from servers import HOST, Kind, raise_file_limit, serving

START = "import trio_server.command as command; {}; "

SETTINGS = {
    "Python's own, nothing frozen": "command.tune_collector = lambda: None",
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
    """Measure every setting in each round, then print a table of the medians."""
    parser = argparse.ArgumentParser(prog="python tests/benchmark/collector.py")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--small", action="store_true", help="check that it works")
    options = parser.parse_args()
    plan = SMALL if options.small else FULL
    raise_file_limit()
    at_once: dict[str, list[AtOnce]] = {name: [] for name in SETTINGS}
    rates: dict[str, list[Rate]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, options.rounds + 1):
            for name, setting in SETTINGS.items():
                kind = ours_with(name, setting)
                with serving(kind, 0, Path(folder)) as server:
                    rates[name].append(measure_rate(server, plan.requests))
                with serving(kind, plan.delay, Path(folder)) as server:
                    at_once[name].append(connect_at_once(server, plan.at_once, plan.delay))
                say(f"round {number}: {name}")

    print_row("collector", "p99 ms", "KB", "requests/s", "CPU µs", "failed")
    print_row("---", *["---:"] * 5)
    for name in SETTINGS:
        loads = [*(one.load for one in at_once[name]), *(one.load for one in rates[name])]
        print_row(
            name,
            cell(median(beyond(one.load.p99, plan) for one in at_once[name])),
            cell(median(scale(one.memory, 1 / 1024) for one in at_once[name])),
            cell(median(one.load.rate for one in rates[name])),
            cell(median(scale(one.cpu, 1e6) for one in rates[name])),
            str(sum(load.failures for load in loads)),
        )
    print(f"\n{environment()}")


def ours_with(name: str, setting: str) -> Kind:
    """Describe our server with a setting of the collector."""
    program = START.format(setting) + "raise SystemExit(command.main())"
    options = (f"--host={HOST}", "--port={port}", "--delay={delay}")
    return Kind(name, (sys.executable, "-c", program, *options))


if __name__ == "__main__":
    main()
