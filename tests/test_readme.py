"""The README's own text: its programs run, its links point at what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from process import Start

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SOURCE_LINKS = re.findall(r"\[`([^`]+)`\]\(([\w./]+)#L(\d+)\)", README)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


PROGRAMS = blocks("python")


@pytest.mark.parametrize("program", [text for text in PROGRAMS if "def test_" not in text])
def test_a_program_prints_what_it_says(program: str) -> None:
    expected = re.search(r"# prints (.+)\n", program)
    assert expected
    output = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=30)
    assert output.strip().replace("\n", " and ") == expected[1]


@pytest.mark.parametrize("program", [text for text in PROGRAMS if "def test_" in text])
def test_a_test_passes(program: str, tmp_path: Path) -> None:
    (tmp_path / "test_from_readme.py").write_text(program)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    assert "1 passed" in subprocess.check_output(command, text=True, timeout=30, cwd=tmp_path)


def test_programs_are_short() -> None:
    assert len(PROGRAMS) == 4
    for program in PROGRAMS:
        assert sum(line.strip() != "" for line in program.splitlines()) <= 20


@pytest.mark.parametrize(("text", "path", "number"), SOURCE_LINKS)
def test_a_link_points_at_what_it_says(text: str, path: str, number: str) -> None:
    assert text in (ROOT / path).read_text().splitlines()[int(number) - 1]


def test_links_to_files_and_sections() -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#(?!L\d)([^)]*))?", README):
        assert (ROOT / path).exists()
        if anchor:
            text = (ROOT / (path or "README.md")).read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            names = (re.sub(r"[^\w -]", "", heading).lower() for heading in headings)
            assert anchor in {name.replace(" ", "-") for name in names}


def test_the_table_of_options_is_complete(start: Start) -> None:
    process = start("--help")
    assert process.wait() == 0
    options = set(re.findall(r"--[a-z-]+", process.stdout))
    assert options == set(
        re.findall(r"`(--[a-z-]+)", README.split("## Options")[1].split("\n## ")[0])
    )
