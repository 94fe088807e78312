import subprocess
import sys

import trio_server

SUBMODULES = {"backlog", "connection", "lull", "responder", "server"}


def run(program: str) -> str:
    return subprocess.check_output([sys.executable, "-c", program], text=True)


def test_every_public_name_can_be_imported_and_no_other() -> None:
    for name in trio_server.__all__:
        assert getattr(trio_server, name) is not None
    names = {name for name in dir(trio_server) if not name.startswith("_")}
    assert names - SUBMODULES == set(trio_server.__all__)
    assert not hasattr(trio_server, "trio")


def test_importing_the_package_does_not_import_trio() -> None:
    # The command has to be able to take signals before that slow import.
    assert run("import sys, trio_server; print('trio' in sys.modules)") == "False\n"


def test_help_knows_the_public_names() -> None:
    text = run("import pydoc, trio_server; print(pydoc.plain(pydoc.render_doc(trio_server)))")
    for shown in (
        "class Outcome(",
        "class Server(",
        "hello_world(",
        "serve_connection(",
        "Responder = ",
    ):
        assert shown in text
