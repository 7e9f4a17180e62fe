"""A run's files where disks fill up, vanish, become read-only or lack calls, and who may read them."""

import csv
import errno
import os
import resource
import shutil
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fabricrl.algos.ppo import ppo
from fabricrl.utils import checkpoint
from fabricrl.utils.checkpoint import load_checkpoint, save_checkpoint, save_shard
from fabricrl.utils.ending import run_script
from fabricrl.utils.errors import OutputError
from fabricrl.utils.logger import CsvLogger, EventLogger
from fabricrl.utils.run import RunFolder
from tests.process import Finished, call, logged, run_folder
from tests.test_checkpoint import in_child

fcntl = pytest.importorskip("fcntl")
TINY = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--update-epochs", 1, "--hidden-sizes", 8]
TINY += ["--vectorization", "sync", "--log-every", 1, "--total-timesteps", 96]


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has warned of nothing yet."""
    monkeypatch.setattr(checkpoint, "_told", set())


def train(tmp_path: Path, *flags: object) -> Finished:
    return call(ppo.main, *TINY, "--log-dir", tmp_path / "logs", *flags)


def warnings(finished: Finished) -> list[str]:
    return [line for line in finished.err.splitlines() if line.startswith("warning:")]


# --- Disks that go wrong during a run


@pytest.fixture(params=["csv", "tensorboard"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def before_entry(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[RunFolder], None]], None]:
    """Does something to a run before its n-th entry in the log."""

    def arrange(number: int, what: Callable[[RunFolder], None]) -> None:
        entries: list[int] = []
        log = RunFolder.log

        def interrupted(run: RunFolder, metrics: dict[str, float], step: int) -> None:
            entries.append(step)
            if len(entries) == number:
                what(run)
            log(run, metrics, step)

        monkeypatch.setattr(RunFolder, "log", interrupted)

    return arrange


def test_a_full_disk_costs_the_log_and_one_warning(kind: str, before_entry: Callable, tmp_path: Path) -> None:
    """The kernel refuses what is beyond a limit on the size of files, in a process of its own."""

    def fill(run: RunFolder) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        largest = max(path.stat().st_size for path in run.folder.iterdir() if "args" not in path.name)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    before_entry(2, fill)

    def body() -> None:
        finished = train(tmp_path, "--logger", kind, "--no-save-model")
        told = [line for line in warnings(finished) if "no more metrics are written: File too large" in line]
        # The traceback of a thread, as TensorBoard's, would come on the real standard error
        os._exit(0 if finished.result["steps"] == "96" and told == warnings(finished) and len(told) == 1 else 1)

    quiet = tmp_path / "stderr"
    descriptor = os.dup(2)
    os.dup2(os.open(quiet, os.O_CREAT | os.O_WRONLY), 2)
    try:
        code = in_child(body)
    finally:
        os.dup2(descriptor, 2)
        os.close(descriptor)
    assert (code, quiet.read_text()) == (0, "")


def test_a_run_folder_that_vanishes_costs_the_log_and_not_the_checkpoint(
    kind: str, before_entry: Callable, tmp_path: Path
) -> None:
    before_entry(2, lambda run: shutil.rmtree(run.folder))
    finished = train(tmp_path, "--logger", kind)
    (warning,) = warnings(finished)
    assert "no more metrics are written: No such file" in warning
    assert load_checkpoint(finished.checkpoint, "ppo")[0]["global_step"] == 96


def read_only(*_: object, **__: object) -> Any:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("call_that_fails", ["log_metrics", "finalize"])
def test_a_disk_that_becomes_read_only_is_reported_also_at_the_end(
    kind: str, call_that_fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr({"csv": CsvLogger, "tensorboard": EventLogger}[kind], call_that_fails, read_only)
    finished = train(tmp_path, "--logger", kind, "--no-save-model")
    assert finished.code == 0
    (warning,) = warnings(finished)
    assert "Read-only file system" in warning


@pytest.mark.parametrize("call_that_fails", ["mkdir", "fsync", "replace"])
def test_a_checkpoint_on_a_disk_that_becomes_read_only_is_an_error_of_output(
    call_that_fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, call_that_fails, lacking(errno.EIO)(getattr(os, call_that_fails)))
    monkeypatch.setattr(os, "unlink", read_only)  # not even the temporary file can be removed, which is not the cause
    with pytest.raises(OutputError, match="Input/output error"):
        save_checkpoint(tmp_path / "run", 1, {"algo": "ppo"}, keep=1)


def test_a_run_on_a_read_only_disk_is_an_error_of_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabricrl.utils.run._lock", read_only)
    with pytest.raises(OutputError, match=r"cannot write into .*: Read-only file system"):
        train(tmp_path)


def test_a_result_that_cannot_be_printed_is_reported(tmp_path: Path) -> None:
    """/dev/full is a disk that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")

    def body() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not those of pytest
        sys.argv = ["ppo.py", *map(str, TINY), "--log-dir", str(tmp_path / "logs")]
        run_script(ppo.main)

    assert in_child(body) == 0
    assert "warning: the result is not printed: No space left on device" in (tmp_path / "stderr").read_text()
    assert "Traceback" not in (tmp_path / "stderr").read_text()


# --- metrics.csv as a crash or another program leaves it

GOOD = b"step,a,b\r\n1,1.0,2.0\r\n2,,3.0\r\n"


def resumed(path: Path, content: bytes, step: int = 9) -> list[dict[str, str]]:
    """The rows after a resume at `step` and another entry."""
    path.write_bytes(content)
    CsvLogger(path, step).log_metrics({"a": 5.0}, step + 1)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_torn_last_line_of_metrics_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for cut in range(len(GOOD) + 1):
        rows = resumed(tmp_path / "metrics.csv", GOOD[:cut])
        whole = GOOD[:cut].count(b"\n")  # lines, of which the first is the head
        assert [row["step"] for row in rows] == [*["1", "2"][: max(whole - 1, 0)], "10"], cut
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_zeros_at_the_end_of_metrics_are_dropped(tmp_path: Path) -> None:
    """As a file system leaves them that had noted the size of a file and not its content when the power failed."""
    assert [row["step"] for row in resumed(tmp_path / "metrics.csv", GOOD + bytes(1000))] == ["1", "2", "10"]


FOREIGN = {
    "another table": b"epoch;loss\n1;2\n",
    "no step": b"a,b\r\n1,2\r\n",
    "a column twice": b"step,a,a\r\n1,2,3\r\n",
    "words": b"step,a,b\r\n1,one,two\r\n",
    "steps that are none": b"step,a\r\n-1,2\r\n1.5,2\r\nx,2\r\n",
    "long rows": b"step,a\r\n1,2,3\r\n",
    "binary": bytes(range(256)) * 20 + b"\n",
    "an endless field": b'step,a\r\n"' + b"x" * 200_000 + b"\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_content_of_metrics_is_set_aside_with_a_warning(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "metrics.csv"
    assert [row["step"] for row in resumed(path, FOREIGN[name])] == ["10"]
    assert (tmp_path / "metrics.damaged.0").read_bytes() == FOREIGN[name]
    (warning,) = capsys.readouterr().err.splitlines()
    assert "metrics.damaged.0" in warning


def test_good_entries_among_foreign_ones_are_kept(tmp_path: Path) -> None:
    content = GOOD.replace(b"2,,3.0", b"2,,3.0\r\n\xff\xfe\r\n3,1.0,1.0")
    assert [row["step"] for row in resumed(tmp_path / "metrics.csv", content)] == ["1", "2", "3", "10"]
    assert (tmp_path / "metrics.damaged.0").read_bytes() == content


def test_metrics_that_are_damaged_during_the_run_are_set_aside_when_columns_are_added(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = CsvLogger(path, 0)
    logger.log_metrics({"a": 1.0}, 1)
    path.write_bytes(path.read_bytes() + b"\0\xff\n")
    logger.log_metrics({"b": 1.0}, 2)
    assert path.read_text().splitlines() == ["step,a,b", "1,1.0,", "2,,1.0"]
    assert (tmp_path / "metrics.damaged.0").exists()


def test_metrics_that_were_removed_are_not_begun_without_a_head(tmp_path: Path) -> None:
    logger = CsvLogger(tmp_path / "metrics.csv", 0)
    logger.log_metrics({"a": 1.0}, 1)
    (tmp_path / "metrics.csv").unlink()
    with pytest.raises(FileNotFoundError):
        logger.log_metrics({"a": 1.0}, 2)
    assert not list(tmp_path.iterdir())


def test_events_are_on_disk_after_each_entry_and_entries_after_a_resumed_step_are_hidden(tmp_path: Path) -> None:
    first = EventLogger(tmp_path, 0)
    for step in (1, 2, 3):
        first.log_metrics({"a": float(step)}, step)
        assert logged(tmp_path)["a"][-1] == (step, step)
    EventLogger(tmp_path, 2).log_metrics({"a": 7.0}, 3)  # in the same second
    assert logged(tmp_path)["a"] == [(1, 1.0), (2, 2.0), (3, 7.0)]


# --- Who may read the files


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_files_and_folders_of_a_run_obey_the_umask(umask: int, kind: str, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        train(tmp_path, "--logger", kind, "--checkpoint-every", 32)
        save_shard(run_folder(tmp_path / "logs") / "checkpoints", 1, 1, {})
    finally:
        os.umask(before)
    paths = list((tmp_path / "logs").rglob("*"))
    assert len(paths) > 8
    for path in paths:
        allowed = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == allowed, path


# --- File systems that lack a call


def lacking(number: int, only: Callable[[Any], bool] = lambda first: True) -> Callable[[Callable], Callable]:
    """A system call that fails with this error, for those arguments; else the real one."""

    def replace(original: Callable) -> Callable:
        def failing(*args: Any, **kwargs: Any) -> Any:
            if only(args[0]):
                raise OSError(number, os.strerror(number))
            return original(*args, **kwargs)

        return failing

    return replace


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


CALLS = [
    ("fcntl.flock", errno.ENOSYS, lambda _: True, "flock"),
    ("fcntl.flock", errno.ENOLCK, lambda _: True, "flock"),
    ("fcntl.flock", errno.EOPNOTSUPP, lambda _: True, "flock"),
    ("os.fsync", errno.EINVAL, is_folder, "fsync of a folder"),
    ("os.fsync", errno.ENOSYS, lambda descriptor: not is_folder(descriptor), "fsync"),
    ("os.chmod", errno.EPERM, lambda _: True, None),
    ("os.fchmod", errno.EPERM, lambda _: True, None),
    ("os.link", errno.EPERM, lambda _: True, None),
    ("os.link", errno.EMLINK, lambda _: True, None),
]


@pytest.mark.parametrize(
    ("name", "number", "only", "told"), CALLS, ids=[f"{c[0]}-{errno.errorcode[c[1]]}" for c in CALLS]
)
def test_a_call_that_the_file_system_lacks_costs_one_warning(
    name: str, number: int, only: Callable, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function = name.split(".")
    target = {"os": os, "fcntl": fcntl}[module]
    monkeypatch.setattr(target, function, lacking(number, only)(getattr(target, function)))
    finished = train(tmp_path, "--checkpoint-every", 32)
    steps = sorted(path.stem for path in finished.folder.glob("checkpoints/*.ckpt"))
    assert steps == ["best", *(f"step_{step:012d}" for step in (32, 64, 96))]
    assert load_checkpoint(finished.folder / "checkpoints" / "best.ckpt", "ppo")
    assert [line.split(" has no ")[1].split(":")[0] for line in warnings(finished)] == ([told] if told else [])


def test_other_errors_of_these_calls_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lacking(errno.EIO)(fcntl.flock))
        with pytest.raises(OutputError, match="Input/output error"):
            train(tmp_path)
    for only in (is_folder, lambda descriptor: not is_folder(descriptor)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lacking(errno.EIO, only)(os.fsync))
            with pytest.raises(OutputError, match="Input/output error"):
                save_checkpoint(tmp_path, 1, {"algo": "ppo"}, keep=1)


def test_a_lock_that_is_not_got_leaves_no_descriptor_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fabricrl.utils.run import _lock

    def open_files() -> Iterator[str]:
        return (os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())

    if not Path("/proc/self/fd").exists():
        pytest.skip("there is no /proc")
    monkeypatch.setattr(fcntl, "flock", lacking(errno.ENOLCK)(fcntl.flock))
    assert _lock(tmp_path) is None
    assert str(tmp_path / "args.json") not in list(open_files())
