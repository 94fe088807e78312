"""Compare our server with other servers. Start this with ``python tests/benchmark``.

Everything runs on this machine, over 127.0.0.1. All servers inherit the highest limit of open
files that this process may set, and ask for the longest accept queue. The load comes from ab, of
the package apache2-utils. A report in Markdown is printed on stdout, the progress on stderr.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from instructions import count_instructions
from measure import Crowd, Load, connect_at_once, connect_crowd, make_requests, measure_rate
from report import FULL, SMALL, Plan, Results, beyond, cell, print_report, say
from servers import (
    UVICORN,
    Figure,
    Kind,
    available,
    raise_file_limit,
    serving,
    serving_together,
)
from stops import STOP_DELAY, stop_under_load

SPARE_FILES = 500
"""Files that a server or ab may need to open, besides its connections."""

PROCESSES = 4
"""How many share a socket if there are more connections than files that one may open."""

STARTING_TIME = 3.0  # seconds that uvicorn's workers need after the port listens


def main() -> None:
    """Measure, then print the report."""
    options = parse_arguments()
    plan = SMALL if options.small else FULL
    limit = raise_file_limit()
    growth = tuple(size for size in plan.growth if size + SPARE_FILES <= limit)
    plan = replace(plan, rounds=options.rounds or plan.rounds, growth=growth)
    if not shutil.which("ab"):
        sys.exit("ab is not installed: install apache2-utils")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds, left_out = available(folder, options.python)
        if unknown := set(options.only) - {kind.name for kind in kinds}:
            sys.exit(f"not one of {', '.join(kind.name for kind in kinds)}: {', '.join(unknown)}")
        if options.only:
            kinds = [kind for kind in kinds if kind.name in options.only]
        figures = {Figure(name) for name in options.figure} or set(Figure)
        if Figure.INSTRUCTIONS in figures and not shutil.which("valgrind"):
            figures.remove(Figure.INSTRUCTIONS)
            left_out.append("Instructions are not counted: valgrind is not installed")
        kinds = [replace(kind, figures=kind.figures & figures) for kind in kinds]
        for sentence in left_out:
            say(sentence)
        results = Results()
        for number in range(1, plan.stops + 1):
            measure_stops(number, kinds, plan, results, folder)
        measure_instructions(kinds, plan, results, folder)
        for number in range(1, plan.rounds + 1):
            measure_speed(number, kinds, plan, results, folder)
    print_report(kinds, plan, results, left_out)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python tests/benchmark", description=__doc__)
    option = parser.add_argument
    option("--rounds", type=int, help=f"rounds that the medians are of (default: {FULL.rounds})")
    option("--small", action="store_true", help="check in less than a minute that it works")
    option("--only", action="append", metavar="NAME", default=[], help="measure this server only")
    option("--figure", action="append", default=[], choices=list(Figure), help="this figure only")
    option("--python", action="append", metavar="PATH", default=[], help="one more for ours")
    return parser.parse_args()


def measure_stops(
    number: int, kinds: list[Kind], plan: Plan, results: Results, folder: Path
) -> None:
    """Stop each server once under load."""
    for kind in kinds:
        if Figure.STOP in kind.figures:
            with serving(kind, STOP_DELAY, folder) as server:
                stop = stop_under_load(server, plan.stop_clients, plan.load_time)
            results.stops[kind.name].append(stop)
            say(f"stop {number}: {kind.name}: {stop.lost:,} lost, {stop.answered:,} answered")


def measure_instructions(kinds: list[Kind], plan: Plan, results: Results, folder: Path) -> None:
    """Count the instructions of each server."""
    counted = [kind for kind in kinds if Figure.INSTRUCTIONS in kind.figures]
    counted = counted[: plan.counted_servers]
    results.instructions.update(count_instructions(counted, plan.counted_requests, folder))
    for name, number in results.instructions.items():
        say(f"{name}: {cell(number)} instructions per connection")


def measure_speed(
    number: int, kinds: list[Kind], plan: Plan, results: Results, folder: Path
) -> None:
    """Measure a round, one server after the other, so that a slow machine affects them all."""
    # The rate is measured first, as this begins with a check of the reply.
    for kind in kinds:
        if Figure.RATE in kind.figures:
            with serving(kind, 0, folder) as server:
                rate = measure_rate(server, plan.requests)
            results.rates[kind.name].append(rate)
            say(f"round {number}: {kind.name}: {cell(rate.load.rate)} requests/s")
    for size in (plan.at_once, *(plan.growth if number == 1 else ())):
        for kind in kinds:
            if Figure.AT_ONCE in kind.figures:
                with serving(kind, plan.delay, folder) as server:
                    result = connect_at_once(server, size, plan.delay)
                results.at_once[kind.name, size].append(result)
                p99 = cell(beyond(result.load.p99, plan))
                say(f"round {number}: {kind.name}: {size:,} at once, p99 {p99} ms beyond")
    for kind in kinds:
        if Figure.SHARED in kind.figures:
            for processes in (1, 2) * plan.shared:
                load = share(processes, plan.requests, folder)
                results.shared[processes].append(load)
                say(f"round {number}: {processes} on one socket: {cell(load.rate)} requests/s")
        if Figure.MANY in kind.figures:
            crowd = connect_many(kind, plan, folder)
            results.crowds[kind.name].append(crowd)
            p99 = cell(beyond(crowd.p99, plan))
            say(f"round {number}: {kind.name}: {plan.many:,} at once, p99 {p99} ms beyond")


def connect_many(kind: Kind, plan: Plan, folder: Path) -> Crowd:
    """Measure several processes of a server that share a socket, each with its own files."""
    if kind.name == UVICORN:
        workers = replace(kind, command=(*kind.command, "--workers", str(PROCESSES)))
        with serving(workers, plan.delay, folder) as server:
            time.sleep(STARTING_TIME)
            return connect_crowd([server], plan.many, plan.delay)
    with serving_together(PROCESSES, plan.delay, folder) as servers:
        return connect_crowd(servers, plan.many, plan.delay)


def share(processes: int, requests: int, folder: Path) -> Load:
    """Measure processes of our server that accept from one socket."""
    with serving_together(processes, 0, folder) as servers:
        return make_requests(servers[0].port, requests)


if __name__ == "__main__":
    main()
