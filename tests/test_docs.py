"""README and documentation agree with the code: the excerpt of PPO, commands, arguments, metrics, links."""

import ast
import csv
import importlib.util
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fabricrl.__main__ import scripts
from fabricrl.algos.args import StandardArgs
from fabricrl.algos.command_line import parse
from fabricrl.algos.droq import droq
from fabricrl.algos.droq.args import DroQArgs, DroQDecoupledArgs
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PRESETS, PPOArgs, PPODecoupledArgs
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs, RecurrentPPODecoupledArgs
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.args import SACArgs, SACDecoupledArgs
from tests.conftest import Trained
from tests.process import FORKED, ROOT, run

README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
KINDS: dict[str, type[StandardArgs]] = {
    "ppo": PPOArgs,
    "ppo_decoupled": PPODecoupledArgs,
    "ppo_recurrent": RecurrentPPOArgs,
    "ppo_recurrent_decoupled": RecurrentPPODecoupledArgs,
    "sac": SACArgs,
    "sac_decoupled": SACDecoupledArgs,
    "droq": DroQArgs,
    "droq_decoupled": DroQDecoupledArgs,
}
SMALL_ROLLOUTS = ("--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--total-timesteps", 96)
SMALL_REPLAY = ("--total-timesteps", 230, "--learning-starts", 20, "--batch-size", 4, "--hidden-sizes", 4)
# Page → main and a short run in which an episode ends
RUNS: dict[str, tuple[Any, tuple[object, ...]]] = {
    "ppo": (ppo, SMALL_ROLLOUTS),
    "ppo_recurrent": (ppo_recurrent, SMALL_ROLLOUTS),
    "sac": (sac, SMALL_REPLAY),
    "droq": (droq, (*SMALL_REPLAY, "--replay-ratio", 1)),
}


def commands() -> list[tuple[Path, list[str]]]:
    """Each command in a page that starts a script, with what follows that script."""
    found = []
    for page, text in PAGES.items():
        starters = "python|torchrun|fabricrl|fabric run|lightning run model"
        for line in re.findall(rf"^(?:\$ )?(?:{starters}) .*$(?!\nerror: )", text, re.MULTILINE):
            words = shlex.split(line.split("  #")[0].removeprefix("$ "))
            if "fabricrl" in words:  # as a command, or behind python -m
                at = words.index("fabricrl") + 1
                path = "COMMAND" if words[at] in ("COMMAND", "--help") else scripts()[words[at]].relative_to(ROOT)
                found.append((page, [str(path), *words[at + 1 :]]))
                continue
            starts = [i for i, word in enumerate(words) if word.endswith(".py")]
            found.append((page, words[starts[0] :]))
    return found


# --- README


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_update_in_the_readme_is_that_of_ppo() -> None:
    (excerpt,) = re.findall(r"^```python\n(new_logprobs.*?)^```", README, re.MULTILINE | re.DOTALL)
    source = Path(ppo.__file__).read_text()
    (update,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "update")
    body = "\n".join(source.splitlines()[update.body[1].lineno - 1 : update.body[-2].end_lineno])
    assert textwrap.dedent(body).strip() == excerpt.strip()


@pytest.mark.parametrize(
    ("page", "env_id"),
    [
        ("README.md", "my_envs:Target-v0"),
        ("docs/environments.md", "goal_envs:Goal-v0"),
        ("docs/environments.md", "my_lights:Lights-v0"),
        ("docs/tensors.md", "tensor_targets:TensorTarget-v0"),
    ],
)
def test_the_environment_of_a_page_trains_and_its_policy_is_loaded(
    page: str, env_id: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = env_id.split(":")[0] + ".py"
    (code,) = re.findall(rf"^```python\n(# {file}.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / file).write_text(code)
    (words,) = [words for where, words in commands() if str(where) == page and env_id in words]
    small = ["--total-timesteps", 1024, "--log-dir", tmp_path]
    ended = run(*FORKED, ROOT / words[0], *words[1:], *small, cwd=tmp_path)
    assert ended.code == 0, ended.report()
    if "Lights" in env_id:  # each step switches on one of eight lights, as no other may be chosen
        assert -8 <= float(ended.result["return_mean"]) <= -1
    loads = re.findall(r"^```python\n(import fabricrl\n.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(loads) == (page == "README.md")
    for program in loads:  # in this process, which does not have the environment
        folder = str(tmp_path / Path(ended.result["checkpoint"]).parent.parent)
        exec(re.sub(r'"logs/[^"]*"', repr(folder), program), {})
        (action,) = re.findall(r"\[.*\]", capsys.readouterr().out)
        assert -0.1 <= float(action.strip("[]")) <= 0.1


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
            if not link.startswith("http"):
                assert ((ROOT / page).parent / link).resolve().exists(), f"{page}: {link}"


# --- Docstrings


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    """Those that open with What or Whether tell a reader too late what they are about."""
    indirect = re.compile(r"(What|Whatever|Whether|Where|Which|Whose|Who|How)\b")
    found = []
    for folder in ("fabricrl", "tests", "benchmarks", "docs", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node) or ""
                    found += [f"{path.relative_to(ROOT)}: {text}"] if indirect.match(text) else []
    assert found == []


# --- Commands, arguments, metrics


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: None if isinstance(value, list) else str(value)
)
def test_commands_name_scripts_that_exist_and_arguments_that_they_have(page: Path, words: list[str]) -> None:
    name = Path(words[0]).stem
    if name == "COMMAND":
        return
    if name == "td3":  # run by tests/test_add_an_algorithm.py
        return
    assert (ROOT / words[0]).exists(), page
    asks = {"--help", "--help-all", "--resume", "--seeds"} & set(words)  # --seeds starts the runs
    if name not in KINDS or asks or words[1:] == ["--num-minibatches", "3"]:  # the last shows an error
        return
    with mock.patch.object(sys, "argv", words):
        parse(KINDS[name], name, PRESETS)


def test_tables_of_arguments_are_what_the_code_says() -> None:
    ended = run(*FORKED, ROOT / "docs/generate.py", "--check")
    assert ended.code == 0, ended.report()


def tags(page: str) -> set[str]:
    return set(re.findall(r"^\| `((?:charts|losses|time)/\w+)` \|", (ROOT / "docs" / page).read_text(), re.MULTILINE))


@pytest.mark.parametrize("algo", RUNS)
def test_each_page_lists_the_metrics_that_its_algorithm_logs(algo: str, train: Callable[..., Trained]) -> None:
    script, small = RUNS[algo]
    env_id = "Pendulum-v1" if "--learning-starts" in small else "CartPole-v1"
    every = ("--env-id", env_id, "--logger", "csv", "--log-every", 1, "--num-threads", 1)
    trained = train(script.main, *small, *every)
    assert trained.code == 0, trained.output
    with (trained.folder / "metrics.csv").open() as file:
        logged = set(next(csv.reader(file))) - {"step"}
    assert tags("running.md") | tags(f"algorithms/{algo}.md") == logged


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("needs the group docs")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
