"""Checkpoints: complete or absent whatever happens while they are written, and refused when damaged or foreign."""

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fabricrl.algos.ppo.ppo import main
from fabricrl.utils.checkpoint import load_checkpoint, save_checkpoint
from fabricrl.utils.errors import CheckpointError, OutputError
from tests.process import Finished, call, load, saved_steps

FORK = multiprocessing.get_context("fork")  # torch is there already: a child starts in milliseconds


def state(step: int, size: int = 1000) -> dict[str, Any]:
    return {"algo": "ppo", "global_step": step, "weights": torch.full((size,), float(step))}


def assert_intact(path: Path) -> int:
    """The checkpoint is complete and is the one that its name says; returns its step."""
    stored, found = load_checkpoint(path)
    assert found == path
    step = stored["global_step"]
    assert path.name == f"step_{step:012d}.ckpt"
    assert (stored["weights"] == step).all()
    return step


# --- Keeping


def test_the_newest_and_the_best_are_kept_under_names_that_sort_by_step(tmp_path: Path) -> None:
    for step, best in [(900, False), (1000, True), (20_000, False), (300_000, False), (4_000_000, False)]:
        save_checkpoint(tmp_path, step, state(step), keep=2, best=best)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.ckpt", "step_000000300000.ckpt", "step_000004000000.ckpt"]
    assert load_checkpoint(tmp_path / "best.ckpt")[0]["global_step"] == 1000


def test_a_damaged_checkpoint_of_a_later_step_takes_no_place_of_those_that_are_kept(tmp_path: Path) -> None:
    """A run that cannot read its newest checkpoint goes on from the one before."""
    (tmp_path / "step_000000000009.ckpt").write_bytes(b"damaged")
    for step in (5, 6, 7):
        assert save_checkpoint(tmp_path, step, state(step), keep=1).exists()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000000000007.ckpt", "step_000000000009.ckpt"]
    save_checkpoint(tmp_path, 9, state(9), keep=1)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_000000000009.ckpt"]
    assert load(tmp_path / "step_000000000009.ckpt")["global_step"] == 9


def test_a_checkpoint_is_what_torch_load_reads_with_weights_only(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, state(7), keep=1)
    stored = torch.load(path, weights_only=True)
    assert stored["global_step"] == 7
    assert torch.equal(stored["weights"], torch.full((1000,), 7.0))


def test_leftovers_of_a_killed_run_are_removed_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".abc.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path, 7, state(7), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000000007.ckpt"]


def test_the_temporary_file_is_in_the_same_folder_whatever_tmpdir_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A move from another file system is a copy, which a crash cuts in two; and that system may be full
    monkeypatch.setenv("TMPDIR", str(tmp_path / "does not exist"))
    sources = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (sources.append(Path(a).parent), replace(a, b)))
    save_checkpoint(tmp_path / "run", 7, state(7), keep=1)
    assert set(sources) == {tmp_path / "run"}


# --- Crashes


def in_child(body: Callable[[], None]) -> int:
    """Runs `body` in a forked process; returns its exit code."""
    child = FORK.Process(target=body)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def save_until_killed(folder: Path, first: int) -> None:
    for step in range(first, first + 1_000_000):
        save_checkpoint(folder, step, state(step, 20_000), keep=3, best=step % 2 == 0)


def test_after_kill_9_at_any_moment_every_named_checkpoint_is_complete(tmp_path: Path) -> None:
    rng = random.Random(1)
    newest = 0
    for _ in range(30):
        child = FORK.Process(target=save_until_killed, args=(tmp_path, newest + 1))
        child.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / f"step_{newest + 1:012d}.ckpt").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        steps = [assert_intact(path) for path in sorted(tmp_path.glob("step_*.ckpt"))]
        assert steps[-1] > newest, "nothing was saved between two kills"
        newest = steps[-1]
        if (tmp_path / "best.ckpt").exists():
            load_checkpoint(tmp_path / "best.ckpt")


@pytest.mark.parametrize("moment", ["fsync", "replace", "link", "unlink"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_after_kill_9_around_each_system_call_the_newest_named_checkpoint_is_complete(
    tmp_path: Path, moment: str, after: bool
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step), keep=2, best=True)

    def body() -> None:
        original = getattr(os, moment)

        def fatal(*args: Any, **kwargs: Any) -> None:
            if after:
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, moment, fatal)
        save_checkpoint(tmp_path, 3, state(3), keep=2, best=True)

    assert in_child(body) == -signal.SIGKILL
    steps = [assert_intact(path) for path in sorted(tmp_path.glob("step_*.ckpt"))]
    assert steps[-2:] in ([1, 2], [2, 3])
    assert load_checkpoint(tmp_path / "best.ckpt")[0]["global_step"] in (2, 3)
    save_checkpoint(tmp_path, 4, state(4), keep=2, best=True)  # and the next run can go on
    assert not list(tmp_path.glob(".*"))


# --- Full disks


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call_that_fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call_that_fails: str
) -> None:
    save_checkpoint(tmp_path, 1, state(1), keep=1, best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, call_that_fails, no_space)
        with pytest.raises(OutputError, match="No space left on device") as caught:
            save_checkpoint(tmp_path, 2, state(2), keep=1, best=True)
    assert "step_000000000002.ckpt" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_write_that_stops_half_way_is_an_output_error(tmp_path: Path) -> None:
    """With a limit on the size of files the kernel itself refuses the rest of the file, in the middle of torch.save."""
    save_checkpoint(tmp_path, 1, state(1), keep=1)
    before = sorted(path.name for path in tmp_path.iterdir())

    def body() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            save_checkpoint(tmp_path, 2, state(2, 100_000), keep=1)
        except OutputError as error:
            os._exit(6 if "File too large" in str(error) else 1)
        os._exit(0)

    assert in_child(body) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert assert_intact(tmp_path / before[-1]) == 1


def test_a_run_on_a_full_disk_ends_with_an_output_error_and_its_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync = os.fsync

    def full_after_first_save(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:  # of the file and of the folder
            no_space()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_first_save)
    flags = ["--total-timesteps", 4096, "--checkpoint-every", 1024, "--log-dir", tmp_path]
    with pytest.raises(OutputError, match="No space left") as caught:
        call(main, *flags)
    assert caught.value.exit_code == 6
    assert saved_steps(next(tmp_path.glob("*/*/*"))) == [1024]


# --- Files that are not what they should be


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    flags = ["--total-timesteps", 1536, "--checkpoint-every", 512, "--log-dir", tmp_path_factory.mktemp("trained")]
    return call(main, *flags)


@pytest.fixture
def folder(trained: Finished, tmp_path: Path) -> Path:
    """A copy of a run with checkpoints at 512, 1024 and 1536 steps that a test may damage."""
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))


@pytest.fixture
def path(folder: Path) -> Path:
    return folder / "checkpoints" / "step_000000001536.ckpt"


def refusal(what: Path, *flags: object) -> str:
    """Message with which `--resume` refuses; asserts that it is one line, names the file, and has exit code 3."""
    with pytest.raises(CheckpointError) as caught:
        call(main, "--resume", what, *flags)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.3, 0.9, 0.9999])
def test_a_truncated_checkpoint_is_refused_as_truncated_or_empty(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refusal(path)
    assert str(path) in message
    assert ("empty" if share == 0 else "truncated") in message


@pytest.mark.parametrize("place", [0.001, 0.25, 0.5, 0.75, 0.999])
def test_a_single_flipped_bit_is_noticed(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message
    assert "SHA-256" in message or "checksum" in message


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "with a valid checksum"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, sealed: bool) -> None:
    canary = tmp_path / "canary"
    content = {"format": 1, "algo": "ppo", "args": {}, "agent": Malicious(canary)}
    if sealed:
        path = save_checkpoint(tmp_path, 1, content, keep=1)
    else:
        path = tmp_path / "evil.ckpt"
        torch.save(content, path)
    assert str(path) in refusal(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the file would have done nothing: the test proves nothing"


def resaved(path: Path, **changes: Any) -> Path:
    return save_checkpoint(path.parent, 9999, load(path) | changes, keep=9)


def test_another_format_version_is_refused_with_both_numbers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabricrl.utils.checkpoint.FORMAT", 99)
    newer = save_checkpoint(path.parent, 9999, {name: v for name, v in load(path).items() if name != "format"}, keep=9)
    monkeypatch.undo()
    message = refusal(newer)
    assert "format 99" in message
    assert "format 1" in message


def test_a_checkpoint_of_another_algorithm_is_refused_with_both_names(path: Path) -> None:
    message = refusal(resaved(path, algo="sac"))
    assert "made by sac" in message
    assert "ppo" in message


def test_a_checkpoint_of_other_observations_is_refused_with_both_spaces(path: Path) -> None:
    message = refusal(path, "--env-id", "Acrobot-v1")
    assert "Box([-4.8" in message  # CartPole's
    assert "12.56" in message  # Acrobot's
    assert "obs space" in message


def test_a_checkpoint_of_other_actions_is_refused_with_both_spaces(tmp_path: Path) -> None:
    flags = ["--total-timesteps", 512, "--log-dir", tmp_path, "--env-id", "tests.envs:Odd-v0"]
    made = call(main, *flags, "--env-kwargs", '{"action": "discrete"}')
    message = refusal(made.checkpoint, "--env-kwargs", '{"action": "multi_binary"}')
    assert "actions space" in message
    assert "Discrete(3)" in message
    assert "MultiBinary(4)" in message


def test_a_checkpoint_of_another_net_size_is_refused_with_the_first_parameter_that_differs(path: Path) -> None:
    message = refusal(path, "--hidden-sizes", 64, 32)
    assert str(path) in message
    assert "actor.hidden.1.bias is (64,) in the checkpoint and (32,) now" in message


def test_a_missing_file_a_folder_without_checkpoints_and_a_text_file_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.ckpt"
    assert f"{missing}: No such file" in refusal(missing)
    assert f"{tmp_path} is a folder without checkpoints" in refusal(tmp_path)
    text = tmp_path / "text.ckpt"
    text.write_text("this is not a checkpoint\n" * 100)
    assert str(text) in refusal(text)


def test_a_tensor_file_that_is_not_a_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_000000000001.ckpt"
    torch.save(torch.zeros(3), path)
    assert str(path) in refusal(path)


# --- Run folders


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def test_a_run_folder_with_a_truncated_newest_checkpoint_goes_on_from_the_one_before_with_a_warning(
    folder: Path, path: Path
) -> None:
    truncate(path)
    stored, found = load_checkpoint(folder)
    assert (found.name, stored["global_step"]) == ("step_000000001024.ckpt", 1024)
    finished = call(main, "--resume", folder)
    assert finished.result["steps"] == "1536"
    warnings = [line for line in finished.err.splitlines() if line.startswith("warning:")]
    assert warnings
    assert all(str(path) in line and "truncated" in line for line in warnings)


def test_a_run_folder_without_a_good_checkpoint_is_refused_and_never_started_afresh(folder: Path) -> None:
    for path in folder.glob("checkpoints/*.ckpt"):
        truncate(path)
    before = sorted(folder.parent.rglob("*"))
    message = refusal(folder)
    assert "no checkpoint can be read" in message
    assert "truncated" in message
    assert sorted(folder.parent.rglob("*")) == before
