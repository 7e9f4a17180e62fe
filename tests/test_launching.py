"""Launching under odd conditions: as process 1, under another's care, with variables that mislead, on busy ports."""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fabricrl import cli
from fabricrl.algos.ppo import ppo
from fabricrl.utils import launch as launch_module
from fabricrl.utils import process
from fabricrl.utils.ending import failing_together, report, run_script
from fabricrl.utils.errors import ConfigError, EnvError, LostPeerError, NonFiniteError, RunError
from fabricrl.utils.launch import launch
from fabricrl.utils.network import interfaces, open_store, prepare_network
from fabricrl.utils.precision import HalfPrecision
from fabricrl.utils.process import PLACE, PR_SET_PDEATHSIG, die_with_parent, own_rank
from tests.conftest import on_ranks
from tests.process import (
    FORKED,
    FORKSERVER,
    LAUNCHERS,
    PYTHON,
    command,
    free_port,
    processes,
    run,
    run_team,
    started,
    wait_for,
)

# All that a script does before it trains; the ranks meet, and then do what the test wants
SCRIPT = """
import os, signal, sys, time, types
from fabricrl.utils.ending import run_script
from fabricrl.utils.launch import launch

def main():
    place = {"node_rank": 0, "main_address": "127.0.0.1", "main_port": 29400, "num_nodes": None, "devices": None}
    place |= dict(word.split("=") for word in sys.argv[2:])
    numbers = {name: int(place[name]) for name in ("node_rank", "main_port")}
    numbers["num_nodes"] = place["num_nodes"] and int(place["num_nodes"])
    fabric = launch(types.SimpleNamespace(
        accelerator=None, strategy="ddp", precision=None, cuda=False, num_threads=1, matmul_precision="highest",
        torch_deterministic=True, seed=1, timeout=10.0, **place | numbers,
    ))
    fabric.barrier()
    sys.stdout.write(f"rank {fabric.global_rank} of {fabric.world_size} has met the others\\n")  # as one
    time.sleep(0.6)  # for who watches
    fabric.barrier()
    if sys.argv[1] == "die" and fabric.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] in ("die", "wait"):
        time.sleep(600)
    return 0

run_script(main)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("small") / "small.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.fixture
def environ() -> Iterator[None]:
    """No variables of launchers; those that a test or a script sets are gone afterwards. Fabric starts nothing."""
    with mock.patch.dict(os.environ), mock.patch.object(Fabric, "launch", side_effect=AssertionError("started")):
        for name in [name for name in os.environ if LAUNCHERS.fullmatch(name) or "SOCKET_IFNAME" in name]:
            del os.environ[name]
        with mock.patch.multiple(PLACE, rank=None, store=None, peers=None):
            yield


ARGS = {"accelerator": "cpu", "strategy": None, "devices": "2", "num_nodes": None, "precision": None, "cuda": False}
ARGS |= {"timeout": 10.0, "node_rank": 0, "main_address": "127.0.0.1", "main_port": 29400}


def refused(**args: Any) -> str:
    """Message of a launch that fails before any process is started."""
    with pytest.raises(ConfigError) as caught:
        launch(SimpleNamespace(**ARGS | args))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- Process 1 and other parents

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc"]
CLONE_NEWPID = 0x20000000


def can_unshare() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


in_container = pytest.mark.skipif(not can_unshare(), reason="process namespaces cannot be made here")


@in_container
def test_torchrun_may_be_process_1(small: str) -> None:
    ended = run(*UNSHARE, command("torchrun"), "--standalone", "--nproc-per-node", 2, small, "meet")
    assert ended.code == 0, ended.report()
    assert sorted(ended.out.splitlines()) == [f"rank {rank} of 2 has met the others" for rank in (0, 1)]


@in_container
def test_a_script_with_two_ranks_may_be_process_1_and_ends_when_one_of_them_has_died(small: str) -> None:
    """Fabric ends the first rank by SIGKILL, of which the kernel would spare process 1."""
    with started(*UNSHARE, *PYTHON, small, "die", "devices=2") as running:
        running.finish()
    assert running.code == 128 + signal.SIGKILL, running.report()
    assert sorted(running.out.splitlines()) == [f"rank {rank} of 2 has met the others" for rank in (0, 1)]


def as_process_1(main: Callable[[], int], *arguments: str) -> None:
    """Runs a script as process 1 of a namespace, and ends with its exit code."""
    assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWPID) == 0
    child = os.fork()
    if child == 0:
        assert os.getpid() == 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # if the test gives up
        multiprocessing.set_start_method(None, force=True)  # as in a script: not as this process was started
        sys.argv = ["script.py", *arguments]
        run_script(main)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def code_as_process_1(main: Callable[[], int], *arguments: str) -> int | None:
    process = FORKSERVER.Process(target=as_process_1, args=(main, *arguments))
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    return code


@in_container
def test_process_1_may_have_environments_in_processes_of_their_own(tmp_path: Path) -> None:
    flags = ["--vectorization", "async", "--num-envs", "2", "--num-steps", "16", "--total-timesteps", "64"]
    assert code_as_process_1(ppo.main, *flags, "--log-dir", str(tmp_path)) == 0
    assert list(tmp_path.rglob("step_*.ckpt"))


def orphans_then_waits() -> int:
    """A script's main: checks that somebody takes note of an orphan's end, and then waits for SIGTERM."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    orphan = int(subprocess.check_output(["sh", "-c", "sleep 0 >/dev/null & echo $!"]))
    deadline = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(orphan, 0)  # finds it as long as it is a zombie
            time.sleep(0.01)
        return 1
    os.kill(os.getppid(), signal.SIGTERM)
    while not asked and time.monotonic() < deadline:
        time.sleep(0.01)
    return 128 + asked[0] if asked else 2


@in_container
def test_process_1_hands_signals_on_takes_note_of_orphans_and_ends_as_the_script_does() -> None:
    assert code_as_process_1(orphans_then_waits) == 128 + signal.SIGTERM


# Takes in the orphans below it, as service managers and small inits do; ends when nobody is left
KEEPER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)
subprocess.Popen(sys.argv[1:])
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"""


@pytest.mark.parametrize("launcher", ["torchrun", "rank 0"])
def test_ranks_do_not_outlive_a_launcher_that_dies_while_they_start_and_leaves_them_to_another(
    small: str, launcher: str
) -> None:
    starting = [command("torchrun"), "--standalone", "--nproc-per-node", 2, small, "wait"]
    if launcher == "rank 0":
        starting = [*PYTHON, small, "wait", "devices=2"]
    with started(*PYTHON, "-c", KEEPER, *starting) as running:

        def last_rank() -> list[int]:
            return [pid for pid, names in processes(running.mark).items() if names.get("LOCAL_RANK") == "1"]

        rank = wait_for(last_rank, running)[0]
        parent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
        assert parent != running.process.pid
        os.kill(parent, signal.SIGKILL)
        running.finish()
    assert "has met" not in running.out, "the launcher has ended too late for this test"


def test_a_process_notices_that_its_parent_has_ended_whoever_adopts_it() -> None:
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            while os.getppid() == middle_pid():
                pass
            try:
                die_with_parent()
            except LostPeerError as error:
                os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(middle, 0)
    os.close(write)
    assert os.read(read, 100) == b"the launcher has ended already"
    os.close(read)


def middle_pid() -> int:
    return PLACE.parent


# --- Variables, ports and addresses


TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
TORCHRUN |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE 0"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is 'two'"),
        (TORCHRUN | {"WORLD_SIZE": "3"}, "WORLD_SIZE 3"),
        (TORCHRUN | {"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        (TORCHRUN | {"RANK": "2"}, "RANK is 2"),
        (TORCHRUN | {"LOCAL_RANK": "5"}, "LOCAL_RANK 5"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"LT_CLI_USED": "1"}, "LT_CLI_USED"),
        ({"LOCAL_RANK": "first", "MASTER_PORT": "29400"}, "LOCAL_RANK is 'first'"),
        ({"SLURM_NTASKS": "2"}, "SLURM_PROCID"),
        (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        (SRUN | {"SLURM_NTASKS_PER_NODE": "7"}, "ntasks-per-node=7"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
        ({"STANDALONE_PORT": "any"}, "STANDALONE_PORT is 'any'"),
        ({"GLOO_SOCKET_IFNAME": "nosuch0"}, "nosuch0 must be one of"),
        ({"GLOO_SOCKET_IFNAME": "lo,nosuch0"}, "nosuch0 must be one of"),
    ],
)
def test_variables_that_make_no_sense_are_refused_before_anything_starts(
    environ: None, variables: dict[str, str], words: str
) -> None:
    os.environ |= variables
    given = {"devices": None} if "TORCHELASTIC_RUN_ID" in variables else {}
    with mock.patch.object(Fabric, "launch", side_effect=ValueError("ntasks-per-node=7")):
        assert words in refused(**given)


def test_a_level_of_debugging_that_crashes_pytorch_is_refused(environ: None) -> None:
    level = torch.distributed.get_debug_level()
    torch.distributed.set_debug_level(torch.distributed.DebugLevel.DETAIL)
    try:
        assert "TORCH_DISTRIBUTED_DEBUG" in refused()
    finally:
        torch.distributed.set_debug_level(level)


@pytest.mark.parametrize("name", ["MASTER_PORT", "STANDALONE_PORT", "--main-port"])
def test_a_port_in_use_is_reported_before_another_rank_starts(environ: None, name: str) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        if name == "--main-port":
            told = refused(num_nodes=2, main_port=port)
        else:
            os.environ[name] = str(port)
            told = refused()
    assert told == f"{name} {port} on 127.0.0.1 cannot be used: Address already in use; try another"


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("address", ["no-such-host.invalid", "a" * 300])
def test_a_main_address_that_nobody_knows_is_refused_on_every_node(environ: None, node: int, address: str) -> None:
    assert f"--main-address {address} is not known here" in refused(num_nodes=2, node_rank=node, main_address=address)


def test_a_name_by_which_only_this_machine_knows_itself_is_refused(environ: None) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    with mock.patch.object(socket, "getaddrinfo", return_value=found):
        assert "node0 is 127.0.1.1 here" in refused(num_nodes=2, node_rank=1, main_address="node0")


def test_a_main_address_to_which_there_is_no_way_is_refused(environ: None) -> None:
    with mock.patch.object(socket.socket, "connect", side_effect=OSError(101, "Network is unreachable")):
        told = refused(num_nodes=2, node_rank=1, main_address="192.0.2.1")
    assert told == "the main address 192.0.2.1 cannot be reached from here: Network is unreachable"


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # of the test's standard error
@pytest.mark.parametrize("flags", [["--main-port={port}"], ["--num-nodes=2", "--node-rank=1", "--main-address={name}"]])
def test_the_lightning_command_tells_in_one_line_why_ranks_could_not_meet(
    environ: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: list[str]
) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port, name = busy.getsockname()[1], "no-such-host.invalid"
        words = [flag.format(port=port, name=name) for flag in flags]
        monkeypatch.setattr(sys, "argv", ["lightning", "run", "model", "--accelerator=cpu", *words, __file__])
        waits = mock.patch.object(cli, "find_store", side_effect=AssertionError("looks for an address in vain"))
        with waits, pytest.raises(SystemExit) as caught:
            cli.main()
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    if "--main-port={port}" in flags:
        assert line == f"error: --main-port {port} on 127.0.0.1 cannot be used: Address already in use; try another"
    else:
        assert line.startswith(f"error: --main-address {name} is not known here")


def test_a_rank_that_loses_the_others_before_all_have_met_says_so(environ: None) -> None:
    with (
        mock.patch.object(Fabric, "launch", side_effect=torch.distributed.DistNetworkError("connection reset by peer")),
        pytest.raises(LostPeerError, match=r"rank 0 could not reach the others at 127\.0\.0\.1:"),
    ):
        launch(SimpleNamespace(**ARGS))


def test_a_rank_of_torchrun_whose_launcher_does_not_answer_ends(environ: None) -> None:
    os.environ |= TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(free_port())}
    with mock.patch.object(process, "die_with_parent"), pytest.raises(LostPeerError, match="has ended already"):
        launch(SimpleNamespace(**ARGS | {"devices": None}))


def outer_address() -> str | None:
    """An address of this machine that is not loopback."""
    found = [address for name in interfaces().values() for address in name if ":" not in address]
    return next((address for address in found if not address.startswith("127.")), None)


def test_gloo_and_nccl_are_kept_on_one_machine_unless_the_user_has_chosen(environ: None) -> None:
    prepare_network("127.0.0.1", one_node=True)
    chosen = os.environ["GLOO_SOCKET_IFNAME"]
    assert "127.0.0.1" in interfaces()[chosen]
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={chosen}"
    names = [name for name, addresses in interfaces().items() if addresses and name != chosen]
    for name in names:
        os.environ["GLOO_SOCKET_IFNAME"] = name
        prepare_network("127.0.0.1", one_node=True)
        assert os.environ["GLOO_SOCKET_IFNAME"] == name


@pytest.mark.skipif(outer_address() is None, reason="this machine has no address but loopback")
def test_the_ranks_of_two_nodes_listen_at_the_given_address_only(small: str) -> None:
    address = outer_address()
    words = [*FORKED, small, "meet", "devices=1", "num_nodes=2", f"main_address={address}", f"main_port={free_port()}"]
    with (
        started(*words, "node_rank=0") as first,
        started(*words, "node_rank=1") as second,
        first.watched(),
        second.watched(),
    ):
        for node in (first, second):
            assert node.finish().code == 0, node.report()
    for node in (first, second):
        assert node.listened[node.process.pid] == {address}


# --- Who tells


def ranks_of(launcher: str) -> list[dict[str, str]]:
    """The variables of four ranks on two nodes."""
    places = [(rank, rank // 2, rank % 2) for rank in range(4)]  # rank, node, rank on it
    if launcher == "torchrun":
        shared = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
        return [shared | {"RANK": f"{rank}", "LOCAL_RANK": f"{local}"} for rank, _, local in places]
    if launcher == "srun":
        shared = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}
        return [
            shared | {"SLURM_PROCID": f"{rank}", "SLURM_LOCALID": f"{local}", "SLURM_NODEID": f"{node}"}
            for rank, node, local in places
        ]
    return [{"NODE_RANK": f"{node}"} | ({"LOCAL_RANK": f"{local}"} if local else {}) for _, node, local in places]


@pytest.mark.parametrize("launcher", ["torchrun", "--num-nodes"])
@pytest.mark.parametrize("code", [2, 3])
def test_a_mistake_in_arguments_is_reported_once_on_each_terminal_before_the_ranks_have_met(
    environ: None, capsys: pytest.CaptureFixture, launcher: str, code: int
) -> None:
    told = []
    for rank, variables in enumerate(ranks_of(launcher)):
        with mock.patch.dict(os.environ, variables):
            report("--gamma is 7", code)
        if capsys.readouterr().err:
            told.append(rank)
    assert told == [0, 2]


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "--num-nodes"])
def test_once_ranks_have_met_each_knows_its_number_among_all(
    environ: None, launcher: str, capsys: pytest.CaptureFixture
) -> None:
    for rank, variables in enumerate(ranks_of(launcher)):
        with mock.patch.dict(os.environ, variables), mock.patch.object(PLACE, "rank", rank):
            assert own_rank() == rank
            report("too little memory", 2, told_by=2)
        assert bool(capsys.readouterr().err) == (rank == 2)


@pytest.mark.parametrize("failing", [{0: 5}, {2: 2}, {1: 4, 2: 5}, {0: 2, 1: 2, 2: 2}])
def test_of_ranks_that_fail_together_the_first_alone_says_why_and_all_end_with_its_code(
    failing: dict[int, int],
) -> None:
    kinds = {2: ConfigError, 4: EnvError, 5: NonFiniteError}

    def work(fabric: Any) -> RunError | None:
        try:
            with failing_together(fabric):
                if fabric.global_rank in failing:
                    raise kinds[failing[fabric.global_rank]](f"rank {fabric.global_rank} has failed")
        except RunError as error:
            return error
        return None

    errors, first = on_ranks(3, work), min(failing)
    assert [str(error) for error in errors] == [f"rank {first} has failed" * (rank == first) for rank in range(3)]
    assert {(error.exit_code, error.told_by) for error in errors} == {(failing[first], first)}


def as_srun(rank: int) -> None:
    """Makes a rank of the team one of srun's: alone on its node, and without the variables of torchrun."""
    port = os.environ["MASTER_PORT"]
    for name in [name for name in os.environ if LAUNCHERS.fullmatch(name)]:
        del os.environ[name]
    os.environ |= SRUN | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_NNODES": "2"}
    os.environ |= {"SLURM_NTASKS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def as_nodes(rank: int) -> None:
    """Makes each rank of the team a node of its own, started by hand."""
    for name in [name for name in os.environ if LAUNCHERS.fullmatch(name)]:
        del os.environ[name]


PPO_DECOUPLED, SAC = "fabricrl.algos.ppo.ppo_decoupled", "fabricrl.algos.sac.sac"


@pytest.mark.parametrize("prepare", [as_srun, as_nodes])
def test_a_trainer_of_another_node_whose_parameters_overflow_says_so(prepare: Any, tmp_path: Path) -> None:
    flags = ["--num-nodes", 2, "--num-envs", 2, "--num-steps", 16, "--learning-rate", 1e30, "--log-dir", tmp_path]
    if prepare is as_nodes:
        flags += ["--node-rank", "{rank}", "--main-port", free_port()]
    ended = run_team(PPO_DECOUPLED, *flags, folder=tmp_path, code=5, prepare=prepare)
    assert len(ended.errors) == 1, ended.report()
    assert "not finite" in (tmp_path / "err.1").read_text()


def without_memory(rank: int) -> None:
    as_srun(rank)
    if rank == 1:
        from fabricrl.algos.off_policy import replay

        mock.patch.object(replay, "check_memory", side_effect=ConfigError("node 1 has too little memory")).start()


def test_too_little_memory_on_another_node_is_reported_by_it(tmp_path: Path) -> None:
    flags = ["--num-nodes", 2, "--env-id", "Pendulum-v1", "--log-dir", tmp_path]
    ended = run_team(SAC, *flags, folder=tmp_path, code=2, prepare=without_memory)
    assert ended.errors == ["error: node 1 has too little memory"], ended.report()
    assert ended.errors[0] in (tmp_path / "err.1").read_text()


def fails(rank: int, failing: list[int], port: int, folder: Path) -> None:
    """A rank of srun's that fails before the ranks have met; or does not, and waits where they would."""
    os.environ["MASTER_PORT"] = str(port)
    as_srun(rank)
    os.environ["SLURM_NTASKS"] = "3"
    os.dup2(os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT), 2)
    if rank in failing:
        report("no such file", 3)
    elif rank == 0:
        store = open_store("127.0.0.1", port, "MASTER_PORT")
        deadline = time.monotonic() + 10
        while store.add("fabricrl/asked", 0) < len(failing) and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.mark.parametrize("failing", [[1], [1, 2], [0, 1, 2]])
def test_before_srun_s_ranks_have_met_one_of_those_that_fail_says_so(failing: list[int], tmp_path: Path) -> None:
    port = free_port()
    ranks = [FORKSERVER.Process(target=fails, args=(rank, failing, port, tmp_path)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == 0
    lines = [line for rank in range(3) for line in (tmp_path / str(rank)).read_text().splitlines()]
    assert [line for line in lines if line.startswith("error:")] == ["error: no such file"]


def test_a_mistake_in_arguments_under_srun_is_reported_once(tmp_path: Path) -> None:
    ended = run_team(SAC, "--gamma", 7, folder=tmp_path, code=2, prepare=as_srun)
    assert len(ended.errors) == 1, ended.report()


# --- Players on the CPU beside trainers that own GPUs


@pytest.fixture
def two_gpus(environ: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric finds two GPUs, of which nothing is used."""
    monkeypatch.setattr("lightning.fabric.accelerators.cuda._get_all_visible_cuda_devices", lambda: [0, 1])
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)


def placed(**args: Any) -> tuple[int | None, str, str | None]:
    """GPU of this rank, processes of this node, and the kind of device that it computes on."""
    beside = {"accelerator": "cuda", "player_device": "cpu", "players": 1}
    given = SimpleNamespace(**ARGS | beside | args)
    with mock.patch.object(PLACE, "gpu", None):
        options, kind = launch_module._placed(given, launch_module._options(given))
        return PLACE.gpu, options["devices"], kind


@pytest.mark.parametrize("devices", ["2", "auto", "-1", "0,1"])
def test_every_gpu_gets_a_trainer_and_players_come_on_top(two_gpus: None, devices: str) -> None:
    assert placed(devices=devices, players=2) == (None, "4", "cpu")
    expected = [(None, "4", "cpu"), (None, "4", "cpu"), (0, "4", "cuda"), (1, "4", "cuda")]
    os.environ["MASTER_PORT"] = "29400"
    for rank, place in enumerate(expected):
        os.environ["LOCAL_RANK"] = str(rank)
        assert placed(devices=devices, players=2) == place


def test_one_gpu_is_enough_and_may_be_any(two_gpus: None) -> None:
    os.environ |= {"LOCAL_RANK": "1", "MASTER_PORT": "29400"}
    assert placed(devices=None) == (0, "2", "cuda")
    assert placed(devices="1,") == (1, "2", "cuda")


def test_under_torchrun_processes_are_counted_and_players_are_on_the_first_node(two_gpus: None) -> None:
    """Three processes on each of two nodes, of which the second would need three GPUs."""
    os.environ |= TORCHRUN | {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "0"}
    for local_rank, gpu in enumerate((None, 0, 1)):
        os.environ |= {"RANK": str(local_rank), "LOCAL_RANK": str(local_rank)}
        assert placed(devices=None) == (gpu, "3", "cpu" if gpu is None else "cuda")
    assert placed(devices=None, players=3) == (None, "3", "cpu")
    os.environ |= {"RANK": "3", "LOCAL_RANK": "0", "GROUP_RANK": "1"}
    with pytest.raises(MisconfigurationException, match="requested gpu"):
        placed(devices=None)
    assert placed(devices=None, players=4) == (None, "3", "cpu")


def test_with_several_nodes_processes_are_counted_too(two_gpus: None) -> None:
    assert placed(num_nodes=2) == (None, "2", "cpu")
    assert placed(num_nodes=2, node_rank=1) == (0, "2", "cuda")
    os.environ |= {"LOCAL_RANK": "1", "MASTER_PORT": "29400"}
    assert placed(num_nodes=2) == (0, "2", "cuda")
    assert placed(num_nodes=2, node_rank=1) == (1, "2", "cuda")


def test_all_others_are_left_where_fabric_puts_them(two_gpus: None) -> None:
    assert placed(player_device="auto") == (None, "2", None)
    assert placed(accelerator="cpu") == (None, "2", None)
    given = SimpleNamespace(**ARGS | {"accelerator": "cuda", "player_device": "cpu"})  # a coupled script
    assert launch_module._placed(given, launch_module._options(given))[1] is None


def test_gpus_that_are_not_there_are_refused_in_one_line_before_anything_starts(two_gpus: None) -> None:
    told = refused(accelerator="cuda", player_device="cpu", players=2, devices="3")
    assert told.startswith("--accelerator cuda, --devices 3 is not available here: ")


@pytest.mark.parametrize(("precision", "plugin"), [("bf16-mixed", MixedPrecision), ("16-mixed", HalfPrecision)])
def test_each_side_rounds_on_its_own_kind_of_device(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, precision: str, plugin: type
) -> None:
    class BuiltError(Exception):
        """Fabric would be, with these options."""

    def build(**options: Any) -> Any:
        raise BuiltError(options)

    monkeypatch.setattr(launch_module, "Fabric", build)
    monkeypatch.setattr("fabricrl.utils.precision.LossScale", mock.Mock)
    beside = {"accelerator": "cuda", "player_device": "cpu", "players": 1, "devices": "1", "precision": precision}
    kinds = []
    for local_rank in ("0", "1"):
        os.environ |= {"LOCAL_RANK": local_rank, "MASTER_PORT": "29400"}
        with mock.patch.object(PLACE, "gpu", None), pytest.raises(BuiltError) as caught:
            launch(SimpleNamespace(**ARGS | beside))
        (options,) = caught.value.args
        (given,) = options["plugins"]
        assert type(given) is plugin
        assert "precision" not in options
        kinds.append(given.device)
    assert kinds == ["cpu", "cuda"]
