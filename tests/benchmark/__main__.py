"""The benchmark: our server beside its peers. Start it with ``python tests/benchmark``.

Everything runs on this machine, over 127.0.0.1, one server at a time and one after the other
in each round. All inherit the highest limit of open files that this process may set, and the
longest accept queue. The load comes from ab, of the package apache2-utils.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from measure import Crowd, Load, burst, crowd, hold, hurry
from report import FULL, SMALL, Plan, Results, beyond, cell, print_report, say
from servers import (
    OURS,
    UVICORN,
    Kind,
    available,
    raise_file_limit,
    serving,
    serving_together,
)

SPARE_FILES = 500
"""Open files, beside its connections, that a server or ab may need."""

PROCESSES = 4
"""How many share a socket where there are more connections than files."""

STARTING_TIME = 3.0  # seconds that uvicorn's workers take after it listens


def main() -> None:
    """Measure, then print the report."""
    plan, only, pythons = parse_arguments()
    limit = raise_file_limit()
    growth = tuple(size for size in plan.growth if size + SPARE_FILES <= limit)
    plan = replace(plan, growth=growth)
    if not shutil.which("ab"):
        sys.exit("there is no `ab`: install apache2-utils")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds, left_out = available(folder, pythons)
        if unknown := set(only) - {kind.name for kind in kinds}:
            sys.exit(f"not among {', '.join(kind.name for kind in kinds)}: {', '.join(unknown)}")
        if only:
            kinds = [kind for kind in kinds if kind.name in only]
        for sentence in left_out:
            say(sentence)
        results = measure(kinds, plan, folder)
    print_report(kinds, plan, results, left_out)


def parse_arguments() -> tuple[Plan, list[str], list[str]]:
    """Read the command line: the plan, the only servers to measure, if any, more Pythons."""
    parser = argparse.ArgumentParser(prog="python tests/benchmark", description=__doc__)
    option = parser.add_argument
    option("--rounds", type=int, help=f"rounds to take the medians of (default: {FULL.rounds})")
    option("--small", action="store_true", help="see that it works, in half a minute")
    option("--only", action="append", metavar="NAME", default=[], help="a server to measure")
    option("--python", action="append", metavar="PATH", default=[], help="one more for ours")
    options = parser.parse_args()
    plan = SMALL if options.small else FULL
    return replace(plan, rounds=options.rounds or plan.rounds), options.only, options.python


def measure(kinds: list[Kind], plan: Plan, folder: Path) -> Results:
    """Measure everything, in rounds, so that whatever else the machine does hits them all."""
    results = Results()
    for number in range(1, plan.rounds + 1):
        # The rate comes first, as it begins with the check of the reply.
        for kind in kinds:
            with serving(kind, 0, folder) as server:
                rate = hurry(server, plan.requests)
            results.rates[kind.name].append(rate)
            say(f"round {number}: {kind.name}: {cell(rate.load.rate)} requests/s")
        for size in (plan.held, *(plan.growth if number == 1 else ())):
            for kind in kinds:
                if kind.sleeps:
                    with serving(kind, plan.delay, folder) as server:
                        held = hold(server, size, plan.delay)
                    results.held[kind.name, size].append(held)
                    p99 = cell(beyond(held.load.p99, plan))
                    say(f"round {number}: {kind.name}: {size:,} held, p99 {p99} ms beyond")
        for processes in (1, 2) * plan.shared:
            load = share(processes, plan.requests, folder)
            results.shared[processes].append(load)
            say(f"round {number}: {processes} on one socket: {cell(load.rate)} requests/s")
        for kind in kinds:
            if kind.name in {OURS.name, UVICORN}:
                result = many(kind, plan, folder)
                results.crowds[kind.name].append(result)
                p99 = cell(beyond(result.p99, plan))
                say(f"round {number}: {kind.name}: {plan.many:,} at once, p99 {p99} ms beyond")
    return results


def many(kind: Kind, plan: Plan, folder: Path) -> Crowd:
    """Measure several processes of a server that share a socket, each with its own files."""
    if kind.name == UVICORN:
        workers = replace(kind, command=(*kind.command, "--workers", str(PROCESSES)))
        with serving(workers, plan.delay, folder) as server:
            time.sleep(STARTING_TIME)
            return crowd([server], plan.many, plan.delay)
    with serving_together(PROCESSES, plan.delay, folder) as servers:
        return crowd(servers, plan.many, plan.delay)


def share(processes: int, requests: int, folder: Path) -> Load:
    """Measure processes of our server that accept from one socket."""
    with serving_together(processes, 0, folder) as servers:
        return burst(servers[0].port, requests)


if __name__ == "__main__":
    main()
