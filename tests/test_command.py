"""The command `fabricrl`: it runs the scripts themselves, under every launcher."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fabricrl import __main__ as command
from fabricrl import evaluate, export
from fabricrl.utils.command import Parser
from fabricrl.utils.errors import ConfigError
from tests.process import PYTHON, ROOT, call, free_port, run
from tests.test_mirror import SCRIPTS

SMALL = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--total-timesteps", 128, "--num-threads", 1]


def test_every_script_is_a_command_and_so_are_those_that_are_named() -> None:
    found = command.scripts()
    algorithms = {name.replace("_", "-"): path for name, path in SCRIPTS.items()}
    assert found == algorithms | {name: ROOT / f"fabricrl/{name}.py" for name in command.COMMANDS}
    assert {"ppo", "ppo-recurrent", "sac-decoupled", "evaluate", "export"} <= found.keys()


def test_help_lists_each_command_with_a_line_and_imports_nothing_slow() -> None:
    program = (
        "import sys; sys.argv[1:] = ['--help']; from fabricrl.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy', 'gymnasium', 'lightning'} & sys.modules.keys()"
    )
    ended = subprocess.run([*PYTHON, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    listed = dict(re.findall(r"^  ([a-z-]+) +(\S.*)$", ended.stdout, re.MULTILINE))
    assert listed.keys() - {"torchrun"} == command.scripts().keys()


def test_a_command_that_is_not_there_ends_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for word, told in (
        ("pqo", "did you mean ppo?"),
        ("ppo_recurent", "ppo-recurrent?"),
        ("xyz", "there are droq, "),
    ):
        monkeypatch.setattr(sys, "argv", ["fabricrl", word])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = output.err.splitlines()
        assert line.startswith(f"error: {word!r} is not a command of fabricrl; ")
        assert told in line


def test_version_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["fabricrl", "--version"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert not ended.value.code
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert capsys.readouterr().out == f"fabricrl {version}\n"


def test_two_ranks_that_a_command_starts_train_and_its_run_is_played(tmp_path: Path) -> None:
    """Fabric starts the second by the words of the first: it has to become the same script."""
    trained = run(
        *PYTHON, "-m", "fabricrl", "ppo", *SMALL, "--devices", 2, "--strategy", "ddp", "--log-dir", tmp_path / "logs"
    )
    assert trained.code == 0, trained.report()
    assert trained.result["steps"] == "128"
    folder = Path(trained.result["checkpoint"]).parent.parent
    played = run(*PYTHON, "-m", "fabricrl", "evaluate", folder, "--episodes", 2, "--json", cwd=tmp_path)
    assert played.code == 0, played.report()
    assert json.loads(played.out)["greedy"]["episodes"] == 2


def test_torchrun_takes_a_command(tmp_path: Path) -> None:
    launcher = [*PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    ended = run(*launcher, "-m", "fabricrl", "ppo", *SMALL, "--log-dir", tmp_path)
    assert ended.code == 0, ended.report()
    assert ended.result["steps"] == "128"


def test_mistakes_of_a_script_are_those_of_the_script(tmp_path: Path) -> None:
    ended = run(*PYTHON, "-m", "fabricrl", "ppo", "--num-envs", 0, cwd=tmp_path)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: --num-envs is 0")


@pytest.mark.parametrize("main", [evaluate.main, export.main])
@pytest.mark.parametrize(("line", "told"), [
    ([], "required: path"), (["run", "--zzz"], "^--zzz is not an argument; see --help$"),
    (["run", "--episodes"], "--episodes"), (["run", "--jsno"], r"^--jsno is not an argument; did you mean --json\?$"),
    (["run", "4"], "^4 is neither an argument nor the value of one; see --help$"),
])  # fmt: skip
def test_mistakes_in_a_command_line_are_one_line(main: object, line: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        call(main, *line)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 1


def test_commands_take_underscores_in_their_flags_and_say_whose_help_all_is() -> None:
    parser = Parser("A command.")
    parser.add_argument("--log-dir")
    options, rest = parser.parse_known_args(["--log_dir", "a", "--num_envs", "2", "--grid", "x_y"])
    assert (options.log_dir, rest) == ("a", ["--num_envs", "2", "--grid", "x_y"])
    assert parser.parse_args(["--log_dir=b_c"]).log_dir == "b_c"
    with pytest.raises(ConfigError, match=r"^--help-all is for the algorithms, as in fabricrl ppo --help-all$"):
        parser.parse_args(["--help-all"])
