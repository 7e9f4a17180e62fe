"""The page "Add an algorithm" as a reader follows it: its code is copied out, its commands run, and TD3 learns."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.process import PYTHON, ROOT, Running, command, load, started

PAGE = (ROOT / "docs/add-an-algorithm.md").read_text()
LIMIT = 600  # seconds for the training, which takes 40 of one core
LINES = 240


def code() -> dict[str, str]:
    """Path → its text: blocks with one title belong to one file, in order."""
    files: dict[str, str] = {}
    for path, text in re.findall(r'^```python title="(.*?)"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL):
        files[path] = f"{files[path]}\n\n{text}" if path in files else text
    return files


def commands() -> list[list[str]]:
    """The words of each command that starts a script, in the page's order."""
    return [shlex.split(line) for line in re.findall(r"^(?:python|torchrun) .*$", PAGE, re.MULTILINE)]


def call(root: Path, words: list[str], folder: str = "") -> Running:
    """Runs a command of the page in a copy of the repository, as it is printed."""
    program = PYTHON if words[0] == "python" else [command(words[0])]
    rest = [folder if word == "<run>" else word for word in words[1:]]
    with started(*program, *rest, cwd=root, variables={"PYTHONPATH": str(root)}) as running:
        ended = running.finish(LIMIT)
    assert ended.code == 0, ended.report()
    return ended


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the files of the page."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "fabricrl", root / "fabricrl", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "fabricrl/algos/td3").mkdir()
    (root / "fabricrl/algos/td3/__init__.py").touch()
    for path, text in code().items():
        (root / path).write_text(text)
    return root


@pytest.fixture(scope="module")
def trained(root: Path) -> Running:
    """The page's training, which several tests look at and which runs once."""
    return call(root, commands()[0])


def folder(trained: Running) -> str:
    return str(Path(trained.result["checkpoint"]).parent.parent)


def test_the_page_adds_five_files_and_about_two_hundred_lines() -> None:
    files = code()
    names = {Path(path).name for path in files}
    assert names == {"args.py", "agent.py", "td3.py", "utils.py"}  # and an empty __init__.py
    assert sum(len(text.splitlines()) for text in files.values()) <= LINES


@pytest.mark.slow
def test_td3_of_the_page_learns_pendulum(root: Path, trained: Running) -> None:
    assert trained.result["steps"] == "15000"
    ended = call(root, [*commands()[1], "--json"], folder(trained))
    results = json.loads(ended.out)
    assert results["greedy"]["return_mean"] >= -250, results
    assert results["sampled"]["return_mean"] >= -250, results


@pytest.mark.slow
def test_td3_of_the_page_resumes(root: Path, trained: Running) -> None:
    resumed = call(root, commands()[2], folder(trained))
    assert resumed.result["steps"] == "15400"
    state = load(root / resumed.result["checkpoint"])
    assert state["schedule"]["done"] == 15_400 - 1000


def test_td3_of_the_page_runs_on_two_ranks_by_each_launcher_that_is_printed(root: Path) -> None:
    launched = [call(root, words).result["steps"] for words in commands()[3:]]
    assert launched == ["1400", "1400"]
