"""The `lightning` command."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fabricrl import cli


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str, raises: BaseException | None = None) -> list[list[str]]:
    """Arguments that `lightning` hands to Fabric's command line."""
    calls = []

    def fabric(arguments: list[str], **_: Any) -> None:
        calls.append(arguments)
        if raises is not None:
            raise raises

    monkeypatch.setattr(cli, "fabric_cli", fabric)
    monkeypatch.setattr(sys, "argv", ["lightning", *arguments])
    cli.main()
    return calls


def test_run_model_is_another_spelling_of_fabric_run(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--accelerator=cpu", "--strategy=ddp", "--devices=2", "script.py", "--env-id", "CartPole-v1"]
    assert called(monkeypatch, "run", "model", *options) == [["run", *options]]
    assert called(monkeypatch, "run", *options) == [["run", *options]]


def test_a_script_may_be_called_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, "run", "model", "model", "run") == [["run", "model", "run"]]


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2), (["train"], 2)])
def test_usage_is_shown_for_anything_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], code: int
) -> None:
    with pytest.raises(SystemExit) as caught:
        called(monkeypatch, *arguments)
    assert caught.value.code == code
    output = capsys.readouterr()
    assert "usage: lightning run model" in (output.err if code else output.out)
    assert (output.out if code else output.err) == ""


def test_every_other_command_goes_to_lightning_sdk_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "lightning_sdk-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[console_scripts]\nlightning = stand_in:main\n")
    (tmp_path / "stand_in.py").write_text("import sys\ndef main(): return len(sys.argv)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as caught:
        called(monkeypatch, "studio", "list")
    assert caught.value.code == 3  # its own exit code
    assert called(monkeypatch, "run", "model", "script.py") == [["run", "script.py"]]


@pytest.mark.parametrize(("exitcode", "code"), [(5, 5), (3, 3), (-signal.SIGKILL, 137)])
def test_the_exit_code_is_that_of_the_rank_that_failed_first(
    monkeypatch: pytest.MonkeyPatch, exitcode: int, code: int
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    first = ProcessFailure(local_rank=1, pid=1, exitcode=exitcode, error_file="none")
    later = ProcessFailure(local_rank=0, pid=2, exitcode=7, error_file="none")
    later.timestamp = first.timestamp + 1
    with pytest.raises(SystemExit) as caught:
        called(monkeypatch, "run", "model", "script.py", raises=ChildFailedError("script.py", {0: later, 1: first}))
    assert caught.value.code == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_is_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    with pytest.raises(SystemExit) as caught:
        called(monkeypatch, "run", "model", "script.py", raises=SignalException("stopped", number))
    assert caught.value.code == code
