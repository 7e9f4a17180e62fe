"""Paths that cannot be: one line, and the code of an argument, a checkpoint or a file. Folders of runs list them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fabricrl import compare, evaluate, export, sweep, tune
from fabricrl.algos.droq import droq, droq_decoupled
from fabricrl.algos.droq.args import DroQArgs, DroQDecoupledArgs
from fabricrl.algos.ppo import ppo, ppo_decoupled
from fabricrl.algos.ppo.args import PPOArgs, PPODecoupledArgs
from fabricrl.algos.ppo_recurrent import ppo_recurrent, ppo_recurrent_decoupled
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs, RecurrentPPODecoupledArgs
from fabricrl.algos.sac import sac, sac_decoupled
from fabricrl.algos.sac.args import SACArgs, SACDecoupledArgs
from fabricrl.utils.checkpoint import load_checkpoint, save_checkpoint
from fabricrl.utils.errors import CheckpointError, ConfigError, RunError
from tests.process import call

SCRIPTS = [ppo, ppo_recurrent, sac, droq, ppo_decoupled, ppo_recurrent_decoupled, sac_decoupled, droq_decoupled]
ARGS = [PPOArgs, RecurrentPPOArgs, SACArgs, DroQArgs]
ARGS += [PPODecoupledArgs, RecurrentPPODecoupledArgs, SACDecoupledArgs, DroQDecoupledArgs]
UNDECODABLE = os.fsdecode(b"\xff\xfe")


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, str]:
    """Paths by what is wrong with them."""
    loop = tmp_path / "loop"
    loop.symlink_to(tmp_path / "pool")
    (tmp_path / "pool").symlink_to(loop)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    return {
        "no such user": "~no-such-user-here/x",
        "300 characters": str(tmp_path / ("x" * 300)),
        "300 characters in between": str(tmp_path / ("x" * 300) / "y"),
        "a link loop": str(loop),
        "below a link loop": str(loop / "x"),
        "undecodable bytes": str(tmp_path / UNDECODABLE),
        "a newline": str(tmp_path / "a\nb"),
        "an escape sequence": str(tmp_path / "a\x1b[2Jb"),
        "a zero byte": str(tmp_path / "a\0b"),
        "a line separator": str(tmp_path / "a\u2028b"),
        "empty": "",
        "a link that leads nowhere": str(tmp_path / "nowhere"),
        "below a file": str(tmp_path / "file" / "x"),
    }


def told(what: Callable[[], object], *kinds: type[RunError]) -> str:
    """The message of an error of these kinds, which is one line that can be printed."""
    with pytest.raises(kinds) as caught:
        what()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "\x1b" not in message
    message.encode()
    return message


def test_no_run_starts_in_a_folder_that_cannot_be(odd: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(odd["a link loop"]).parent)
    before = sorted(Path.cwd().iterdir())
    for path in odd.values():
        for kind in ARGS:
            message = told(lambda path=path, kind=kind: kind(log_dir=path).check_machine(), ConfigError)
            assert message.startswith("--log-dir is ")
    for script in SCRIPTS:
        told(lambda script=script: call(script.main, "--log-dir", odd["a link loop"]), ConfigError)
    assert sorted(Path.cwd().iterdir()) == before


def test_a_folder_below_one_that_cannot_be_printed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a\nb", UNDECODABLE):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert "--log-dir" in told(lambda: call(ppo.main), ConfigError)
        assert "one line" in told(lambda: load_checkpoint("."), CheckpointError)


def test_no_script_resumes_from_a_path_that_cannot_be(odd: dict[str, str]) -> None:
    for script in SCRIPTS:
        for kind, path in odd.items():
            expected = ConfigError if kind == "empty" else CheckpointError
            told(lambda path=path, script=script: call(script.main, "--resume", path), expected)


def test_evaluation_refuses_a_path_that_cannot_be(odd: dict[str, str]) -> None:
    for path in odd.values():
        told(lambda path=path: call(evaluate.main, path), CheckpointError)


def test_other_commands_refuse_paths_that_cannot_be(
    odd: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they begin; a folder that cannot be made is found out by those that make it."""
    monkeypatch.chdir(tmp_path)
    checkpoint = call(ppo.main, "--num-envs", 1, "--total-timesteps", 128, "--log-dir", tmp_path).checkpoint
    before = sorted(tmp_path.iterdir())
    for kind, path in odd.items():

        def refused(flag: str, main: Callable[[], int], *words: object, path: str = path) -> bool:
            return flag in told(lambda: call(main, *words, path), ConfigError)

        assert refused("", compare.main)
        assert refused("--out", compare.main, tmp_path, "--out")
        assert refused("--out", sweep.main, "ppo", "--out")
        assert refused("--out", export.main, checkpoint, "--format", "pt2", "--out")
        assert refused("--space", tune.main, "ppo", "--space")
        assert refused("--log-dir", tune.main, "ppo", "--log-dir")
        if kind not in ("a link that leads nowhere", "below a file"):
            assert refused("--log-dir", sweep.main, "ppo", "--log-dir")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("flags", [["--resume", ""], ["--resume="]], ids=str)
def test_an_empty_path_is_not_the_current_folder(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = call(ppo.main, "--num-envs", 1, "--total-timesteps", 128, "--log-dir", tmp_path)
    monkeypatch.chdir(finished.folder)
    assert "empty" in told(lambda: call(ppo.main, *flags), ConfigError)
    assert "empty" in told(lambda: load_checkpoint(""), CheckpointError)
    assert call(ppo.main, "--resume", ".").code == 0


def test_a_name_of_a_run_that_no_file_can_have_is_refused() -> None:
    for name in ("x" * 221, "é" * 111):  # 222 bytes
        assert "--exp-name" in told(lambda name=name: call(ppo.main, "--exp-name", name), ConfigError)


def test_texts_that_cannot_be_printed_or_stored_are_refused() -> None:
    for name in ("env_id", "env_kwargs", "wandb_project_name", "main_address", "obs_keys"):
        for text in ("a\x1bb", UNDECODABLE):
            value = {"env_kwargs": f'{{"a": "{text}"}}', "obs_keys": (text,)}.get(name, text)
            message = told(lambda name=name, value=value: PPOArgs(**{name: value}), ConfigError)
            assert message.startswith(f"--{name.replace('_', '-')} is ")
    assert PPOArgs(env_kwargs='{\n\t"a": 1\n}').env_kwargs


# --- Folders of runs


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Seven runs, as empty as can be, of which the last is the newest; and things that are none."""
    for seed in range(7):
        run = tmp_path / "logs" / "ppo" / "CartPole-v1" / f"ppo_{seed}_20261126-120000"
        save_checkpoint(run / "checkpoints", 1, {"algo": "ppo"}, keep=1)
        os.utime(run, (seed, seed))
    (run.parent / "notes").mkdir()
    (run.parent / "begun" / "checkpoints").mkdir(parents=True)
    return tmp_path / "logs"


@pytest.mark.parametrize("level", ["ppo/CartPole-v1", "ppo", "."])
def test_a_folder_of_runs_lists_them_the_newest_first(level: str, logs: Path) -> None:
    for main in (lambda path: call(ppo.main, "--resume", path), lambda path: call(evaluate.main, path)):
        message = told(lambda main=main: main(logs / level), CheckpointError)
        assert "is a folder without checkpoints/step_*.ckpt; runs in it are " in message
        names = message.split("runs in it are ")[1].removesuffix(" and 2 more").split(", ")
        place = Path("ppo/CartPole-v1").relative_to(level)
        assert names == [str(place / f"ppo_{seed}_20261126-120000") for seed in (6, 5, 4, 3, 2)]


def test_a_folder_without_runs_lists_none(tmp_path: Path) -> None:
    assert told(lambda: load_checkpoint(tmp_path), CheckpointError).endswith("checkpoints/step_*.ckpt")


def test_a_run_may_be_named_by_its_folder_of_checkpoints_or_from_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = call(ppo.main, "--num-envs", 1, "--total-timesteps", 128, "--log-dir", tmp_path)
    monkeypatch.setenv("HOME", str(finished.folder.parent))
    for name in (finished.folder / "checkpoints", f"~/{finished.folder.name}"):
        again = call(ppo.main, "--resume", name, "--total-timesteps", 256)
        assert again.folder == finished.folder
        assert load_checkpoint(finished.folder)[0]["global_step"] == 256
        again.checkpoint.unlink()
