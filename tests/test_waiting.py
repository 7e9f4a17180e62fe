"""No rank waits for ever: for one that was stopped, a node that never comes, a store that does not answer."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from torch.distributed import TCPStore

from fabricrl import cli, evaluate
from fabricrl.algos.ppo import ppo
from fabricrl.utils import launch as launching
from fabricrl.utils import peers as peers_module
from fabricrl.utils.checkpoint import load_checkpoint, save_checkpoint
from fabricrl.utils.ending import run_script
from fabricrl.utils.errors import LostPeerError
from fabricrl.utils.network import open_store
from fabricrl.utils.peers import Peers, patience, process_state
from tests.process import FORKSERVER, LAUNCHERS, LIMIT, Team, call, catches, free_port, team

ENDLESS = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 1, "--update-epochs", 1, "--vectorization", "sync"]
ENDLESS += ["--total-timesteps", 1_000_000_000, "--checkpoint-every", 3200, "--keep-checkpoints", 2]
PPO = "fabricrl.algos.ppo.ppo"


def await_checkpoint(ranks: Team, tmp_path: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not list(tmp_path.rglob("step_*.ckpt")):
        assert time.monotonic() < deadline, ranks.report()
        time.sleep(0.02)


@pytest.mark.parametrize(("world_size", "stopped"), [(3, 1), (2, 0)])
def test_a_rank_that_is_stopped_is_named_once_and_all_end_with_code_7(
    world_size: int, stopped: int, tmp_path: Path
) -> None:
    """Rank 0 keeps the store in which the others look for who is missing: there is no answer if it is the one."""
    flags = [*ENDLESS, "--timeout", 0.1, "--log-dir", tmp_path]
    with team(PPO, *flags, folder=tmp_path, world_size=world_size) as ranks:
        await_checkpoint(ranks, tmp_path)
        pid = ranks.ranks[stopped].pid
        os.kill(pid, signal.SIGSTOP)
        ranks.finish()  # it does not stay behind: the others wake it
    assert ranks.code == 7, ranks.report()
    (line,) = ranks.errors
    assert "has lost a peer: no answer for 6 seconds (see --timeout)" in line, line
    assert re.search(rf"; rank {stopped}, process {pid} of \S+, has been stopped$", line), line


def without_limit(rank: int) -> None:
    """Messages that nothing ends: as NCCL's, in a CUDA graph."""
    mock.patch.object(launching, "patience", return_value=timedelta(days=1)).start()
    mock.patch.object(peers_module, "LAST_RESORT", 1.0).start()


def test_a_message_that_waits_for_ever_is_ended_by_the_thread_that_listens_for_signs_of_life(tmp_path: Path) -> None:
    with team(PPO, *ENDLESS, "--timeout", 0.1, "--log-dir", tmp_path, folder=tmp_path, prepare=without_limit) as ranks:
        await_checkpoint(ranks, tmp_path)
        os.kill(ranks.ranks[1].pid, signal.SIGSTOP)
        ranks.finish()
    assert ranks.code == 7, ranks.report()
    (line,) = ranks.errors
    assert "rank 0 has waited for 6 seconds (see --timeout); rank 1," in line, line


def test_two_signals_end_a_rank_that_waits_for_one_that_was_stopped(tmp_path: Path) -> None:
    with team(PPO, *ENDLESS, "--log-dir", tmp_path, folder=tmp_path) as ranks:
        await_checkpoint(ranks, tmp_path)
        os.kill(ranks.ranks[1].pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(ranks.ranks[0].pid, signal.SIGTERM)
        text, deadline = "\nstopping after this iteration; again to stop now\n", time.monotonic() + LIMIT
        while ranks.printed("err").count(text) != 1:
            assert time.monotonic() < deadline, ranks.report()
            time.sleep(0.02)
        time.sleep(1.2)  # sooner another would count as the same
        os.kill(ranks.ranks[0].pid, signal.SIGTERM)
        ranks.ranks[0].join(LIMIT)
        assert ranks.ranks[0].exitcode == 143, ranks.report()


def play(checkpoint: Path, printed: Path) -> None:
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ["evaluate.py", str(checkpoint)]
    run_script(evaluate.main)


@pytest.mark.parametrize(
    ("hang", "numbers", "code"), [("step", [signal.SIGTERM], 143), ("stubborn", [signal.SIGTERM, signal.SIGINT], 130)]
)
def test_evaluation_ends_by_a_signal_whose_environment_hangs(
    hang: str, numbers: list[int], code: int, tmp_path: Path
) -> None:
    """The second case is a call that swallows whatever interrupts it."""
    flags = ["--env-id", "tests.process_envs:Simulated-v0", "--num-envs", 1, "--num-steps", 8, "--total-timesteps", 8]
    trained = call(ppo.main, *flags, "--vectorization", "sync", "--log-dir", tmp_path / "logs")
    state, _ = load_checkpoint(trained.checkpoint)
    state["args"]["env_kwargs"] = json.dumps({"hang": hang, "start": "command", "folder": str(tmp_path)})
    del state["format"]
    bad, printed = save_checkpoint(tmp_path / "run" / "checkpoints", 8, state, keep=1), tmp_path / "err"
    process = FORKSERVER.Process(target=play, args=(bad, printed))
    process.start()
    try:
        deadline = time.monotonic() + LIMIT
        while not list(tmp_path.glob("*.hanging")) and time.monotonic() < deadline:
            time.sleep(0.01)
        for number in numbers:
            assert process.is_alive(), printed.read_text()
            os.kill(process.pid, number)
            while "again to stop now" not in printed.read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(1.2)  # sooner another would count as the same
        process.join(LIMIT)
        assert process.exitcode == code, printed.read_text()
    finally:
        process.kill()
        process.join()
    assert printed.read_text().splitlines()[-1] == "stopping; again to stop now"


# --- A node that never comes


ARGS = {"accelerator": "cpu", "strategy": None, "devices": "1", "num_nodes": 2, "precision": None, "cuda": False}
ARGS |= {"main_address": "127.0.0.1", "num_threads": 1, "matmul_precision": "highest", "torch_deterministic": True}


def start(node: int, port: int, timeout: float, errors: Path) -> None:
    """A node of two, as a script starts it."""
    from fabricrl.utils.signals import StopSignal

    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    for name in [name for name in os.environ if LAUNCHERS.fullmatch(name)]:
        del os.environ[name]
    StopSignal()
    args = SimpleNamespace(**ARGS, node_rank=node, main_port=port, timeout=timeout, seed=1)
    run_script(lambda: launching.launch(args).world_size)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Callable]:
    started = []

    def begin(number: int, timeout: float) -> tuple:
        started.append(FORKSERVER.Process(target=start, args=(number, free_port(), timeout, tmp_path / "err")))
        started[-1].start()
        return started[-1], tmp_path / "err"

    yield begin
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("number", [0, 1])
def test_a_node_that_never_comes_is_named(number: int, node: Callable) -> None:
    process, errors = node(number, 0.05)
    process.join(LIMIT)
    assert process.exitcode == 7, errors.read_text()
    (line,) = [line for line in errors.read_text().splitlines() if line.startswith("error:")]
    if number == 0:
        assert re.search(r"rank 0 could not reach the others at 127\.0\.0\.1:\d+: no answer for 3 seconds", line), line
        assert line.endswith("; rank 1 never arrived")
    else:
        assert re.search(r"rank 1 has found nobody at 127\.0\.0\.1:\d+ for 3 seconds \(see --timeout\)$", line), line


@pytest.mark.parametrize("number", [0, 1])
def test_one_signal_ends_a_node_that_waits_for_another(number: int, node: Callable) -> None:
    process, errors = node(number, 10)
    deadline = time.monotonic() + LIMIT
    while not catches(process.pid, signal.SIGTERM) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1.5)
    assert process.is_alive(), errors.read_text()
    os.kill(process.pid, signal.SIGTERM)
    process.join(LIMIT)
    assert process.exitcode == 143, errors.read_text()


def launcher(words: list[str], errors: Path) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    for name in [name for name in os.environ if LAUNCHERS.fullmatch(name)]:
        del os.environ[name]
    sys.argv = ["lightning", "run", "model", "--accelerator=cpu", "--num-nodes=2", *words]
    cli.main()


@pytest.mark.parametrize(("number", "minutes", "code"), [(0, "0.05", 7), (1, "0.05", 7), (0, "1", 130)])
def test_the_lightning_command_waits_no_longer_and_hears_signals(
    number: int, minutes: str, code: int, tmp_path: Path
) -> None:
    """The script's limit is that of its launcher, too."""
    errors = tmp_path / "err"
    words = [f"--node-rank={number}", f"--main-port={free_port()}", __file__, "--timeout", minutes]
    process = FORKSERVER.Process(target=launcher, args=(words, errors))
    process.start()
    try:
        if code == 130:
            deadline = time.monotonic() + LIMIT
            while not catches(process.pid, signal.SIGTERM) and time.monotonic() < deadline:  # as SIGINT by now
                time.sleep(0.01)
            time.sleep(4)
            os.kill(process.pid, signal.SIGINT)
        process.join(LIMIT)
        assert process.exitcode == code, errors.read_text()
    finally:
        process.kill()
        process.join()
    lines = [line for line in errors.read_text().splitlines() if line.startswith("error:")]
    if code == 7:
        (line,) = lines
        assert ("the nodes have not met for 3 seconds (see --timeout)" if number == 0 else "nobody answers at") in line


# --- Signs of life


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    monkeypatch.setattr(peers_module, "ROLL_CALL", 0.3)
    return open_store("127.0.0.1", 0, "MASTER_PORT")


@pytest.fixture
def join(store: TCPStore) -> Iterator[Callable[..., Peers]]:
    joined = []

    def call(rank: int, minutes: float = 1.0, world_size: int = 3) -> Peers:
        joined.append(Peers("127.0.0.1", store.port, rank, world_size, minutes))
        return joined[-1]

    yield call
    for peers in joined:
        peers.close()


def test_of_ranks_that_wait_the_first_to_ask_tells_which_have_not_come(join: Callable[..., Peers]) -> None:
    first, second = join(0), join(2)
    assert first.roll_call()[1] is True
    assert second.roll_call() == ("rank 1 never arrived", False)


def test_a_process_that_has_ended_is_told_from_one_that_is_late(join: Callable[..., Peers], store: TCPStore) -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as other:
        store.set("fabricrl/lives/1", f"0 {other.pid} {peers_module._machine()}")
        own = join(0, world_size=2)
        assert own.roll_call()[0].endswith("is running, but has not reached the point where the others wait")
        os.kill(other.pid, signal.SIGSTOP)
        while process_state(other.pid) != "T":
            time.sleep(0.01)
        assert own.roll_call()[0].endswith("has been stopped")
        while process_state(other.pid) == "T":  # it has been woken
            time.sleep(0.01)
    assert own.roll_call()[0].endswith(f"process {other.pid} of {peers_module._machine().split()[0]}, has ended")


def test_of_a_rank_elsewhere_it_is_known_that_it_does_not_answer(join: Callable, store: TCPStore) -> None:
    store.set("fabricrl/lives/1", "0 12 elsewhere 34")
    assert join(0, world_size=2).roll_call()[0] == "rank 1, process 12 of elsewhere, does not answer"


def test_of_those_that_are_missing_the_ones_that_have_ended_or_gone_quiet_are_named(
    join: Callable, store: TCPStore
) -> None:
    """The others may be on their way to ask."""
    with subprocess.Popen([sys.executable, "-c", ""]) as other:
        pass
    own = join(0)
    store.set("fabricrl/lives/1", "0 12 elsewhere 34")
    store.set("fabricrl/lives/2", f"0 {other.pid} {peers_module._machine()}")
    assert own.roll_call()[0].endswith(f"process {other.pid} of {peers_module._machine().split()[0]}, has ended")
    store.set("fabricrl/lives/2", "0 13 elsewhere 34")
    own.look()
    own._changed[1] -= 1000.0  # seconds
    assert own.roll_call()[0] == "rank 1, process 12 of elsewhere, does not answer"


def test_a_job_that_was_suspended_as_a_whole_has_not_waited(
    join: Callable, store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = join(0, world_size=2)
    own.close()
    store.set("fabricrl/lives/1", "0 12 elsewhere 34")
    own.look()
    pauses = iter([False, True])
    own._over = SimpleNamespace(wait=lambda seconds: next(pauses), set=lambda: None)
    own._clock, own._looked = 0.0, time.monotonic() - 1000.0
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("it has ended the process"))
    own._watch()
    assert own._clock == 2 * own._often


def test_nodes_of_which_one_has_been_started_again_see_each_other(
    join: Callable[..., Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun counts the restarts of each node by itself: of one that has just joined there were none."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    other = join(1, world_size=2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    own = join(0, world_size=2)
    assert "has not reached the point where the others wait" in own.roll_call()[0]
    assert other.roll_call() == ("", False)


def test_signs_of_life_are_heard_and_missed(join: Callable[..., Peers], store: TCPStore) -> None:
    minutes = 0.8 / 60  # a sign of life every 0.1 s
    first, second = join(0, minutes, 2), join(1, minutes, 2)
    deadline = time.monotonic() + 20
    while first._quiet(1) == 0 or second._signs.get(0, "").startswith("0"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second.close()
    while first._quiet(1) < 0.5:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_store_that_is_gone_is_that_of_rank_0_or_of_the_launcher() -> None:
    kept = open_store("127.0.0.1", 0, "MASTER_PORT")
    own = Peers("127.0.0.1", kept.port, 1, 2, 1.0)
    by_agent = Peers("127.0.0.1", kept.port, 1, 2, 1.0, keeps_store=False)
    with (
        mock.patch.object(Peers, "_ask", side_effect=lambda answer: time.sleep(60)),
        mock.patch.object(peers_module, "ROLL_CALL", 0),
    ):
        assert own.roll_call() == ("rank 0 never arrived", True)
        assert by_agent.roll_call()[0] == "the launcher does not answer"
        own._looked -= 1000.0  # it has been stopped for so long that the others have left, and told
        assert own.roll_call() == ("rank 0 never arrived", False)
    own.close()
    by_agent.close()
    del kept


def test_nobody_at_the_address_is_told_once_the_time_is_out() -> None:
    with pytest.raises(LostPeerError, match=r"rank 1 has found nobody at 127\.0\.0\.1:\d+ for 0\.6 seconds"):
        Peers("127.0.0.1", free_port(), 1, 2, 0.01)


ENDING = """
import sys
import time
from fabricrl.utils import peers
from fabricrl.utils.network import open_store

peers.OFTEN = 1e-5  # a thread is nearly always between a question to the store and its answer
store = open_store("127.0.0.1", 0, "MASTER_PORT")
ranks = peers.Peers("127.0.0.1", store.port, 0, 2, 1.0)
time.sleep(0.1)
"""


@pytest.mark.parametrize(("end", "code"), [("sys.exit(7)", 7), ("ranks.close()", 0), ("raise KeyError(1)", 1)])
def test_a_process_may_end_whatever_its_threads_are_asking_the_store(end: str, code: int) -> None:
    ended = subprocess.run([sys.executable, "-c", ENDING + end], capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr


def test_zero_minutes_are_for_ever() -> None:
    assert patience(0.5) == timedelta(seconds=30)
    assert patience(0) > timedelta(days=1000)


def test_every_script_has_the_time_limit_and_refuses_what_is_none(script: Callable[..., int]) -> None:
    from fabricrl.utils.errors import ConfigError

    for value in ("-1", "nan", "100001"):
        with pytest.raises(ConfigError, match="--timeout is"):
            script(ppo.main, "--timeout", value)
