"""What the package shows, and what its modules import."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import trio_server

PACKAGE = Path(trio_server.__file__).parent
LIBRARY = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))


def run(program: str) -> str:
    return subprocess.check_output([sys.executable, "-c", program], text=True)


def test_every_public_name_is_there_and_no_other() -> None:
    for name in trio_server.__all__:
        assert getattr(trio_server, name) is not None
    names = run("import trio_server; print(*dir(trio_server))").split()
    public = {name for name in names if not name.startswith("_")}
    assert public - set(LIBRARY) == set(trio_server.__all__)


@pytest.mark.parametrize("module", ["trio_server", "trio_server.__main__", "trio_server.command"])
def test_importing_changes_nothing_in_the_process(module: str) -> None:
    program = """
import gc, logging, os, resource, signal, sys, threading
import {0}

def state():
    return (
        [signal.getsignal(number) for number in signal.valid_signals()],
        signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        resource.getrlimit(resource.RLIMIT_NOFILE),
        gc.get_threshold(), gc.get_freeze_count(), gc.isenabled(),
        logging.root.handlers, logging.root.level, logging.raiseExceptions,
        logging.getLogger("trio_server").handlers, dict(os.environ),
        threading.active_count(),
    )

before = state()
import {1}
print(state() == before)
"""
    assert run(program.format("trio, argparse", module)) == "True\n"


def test_help_shows_the_public_names_and_an_example() -> None:
    text = run("import pydoc, trio_server; print(pydoc.plain(pydoc.render_doc(trio_server)))")
    for shown in (
        "class Account(",
        "class Exchange(",
        "class Outcome(",
        "class Shutdown(",
        "serve_connection(",
        "serve_gracefully(",
        "hello_world(",
        "with stop.move_on_after(30):",
        "begin(self, grace_period",
    ):
        assert shown in text, shown


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """Return the modules of this package that a module imports, anywhere in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found & set(MODULES)


@pytest.mark.parametrize("module", ["__init__", *LIBRARY])
def test_the_library_does_not_import_the_command(module: str) -> None:
    names = imports(PACKAGE / f"{module}.py")
    assert not [name for name in names if name.startswith("trio_server.command")]


def test_no_modules_import_each_other() -> None:
    graph = {name: imports(path) for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # It raises a `CycleError`.
