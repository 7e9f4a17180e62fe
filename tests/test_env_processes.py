"""Environments that start processes and threads, hang, stop, or draw from global generators: no run suffers from it."""

import contextlib
import io
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import VectorEnv

from fabricrl import evaluate
from fabricrl.algos.ppo import ppo, ppo_decoupled
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.envs import check_env, failures, guard, make_envs, vector, workers
from fabricrl.utils.errors import EnvError
from fabricrl.utils.seeding import env_seeds
from fabricrl.utils.signals import StopSignal
from tests.process import FORKED, PPO, PYTHON, call, run, run_team, signal_again, started, wait_for
from tests.process_envs import multiply

KINDS = ["sync", "async"]
SMALL: list[object] = ["--num-envs", 2, "--num-steps", 8, "--num-minibatches", 2, "--update-epochs", 1]
SMALL += ["--hidden-sizes", 8, "--num-threads", 1]
ACTIONS = np.zeros(2, np.int64)


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., VectorEnv]]:
    """Makes two environments of tests.process_envs; what is left of them is closed."""
    made: list[VectorEnv] = []

    def make(kind: str, name: str = "Simulated", rank: int = 0, module: str = "process_envs", **settings: Any) -> Any:
        own = {key: settings.pop(key) for key in ("timeout", "resume") if key in settings}
        args = PPOArgs(env_id=f"tests.{module}:{name}-v0", env_kwargs=json.dumps(settings), num_envs=2)
        given = SimpleNamespace(**vars(args) | {"vectorization": kind} | own)
        made.append(make_envs(given, rank, tmp_path))
        return made[-1]

    yield make
    for envs in made:
        envs.close()


def alive(pid: int) -> bool:
    return pid in guard._processes()


def noted(folder: Path, what: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"*.{what}"))


# --- Torch and threads inside


def test_processes_of_environments_start_without_torch() -> None:
    """It takes seconds to import and starts threads, which do not survive the fork of a worker."""
    ended = run(*PYTHON, "-c", "import sys, fabricrl.envs.workers; print({'torch', 'lightning'} & sys.modules.keys())")
    assert ended.out == "set()\n", ended.report()


def test_environments_that_compute_with_torch_step_in_processes(build: Callable) -> None:
    """Although the script has computed on two threads before, which a forked process does not have."""
    multiply()
    envs = build("async", "Computing", timeout=0.5)
    envs.reset(seed=[1, 2])
    for _ in range(3):
        envs.step(ACTIONS)


def test_a_module_that_starts_threads_is_imported_by_each_worker_itself(build: Callable) -> None:
    envs = build("async", "Pooled", module="threaded_envs", timeout=0.2)
    envs.reset(seed=[1, 2])
    envs.step(ACTIONS)


# --- What environments start


@pytest.mark.parametrize("close", ["end", "leave", "raise", "hang"])
@pytest.mark.parametrize("start", ["process", "stubborn", "command"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_simulator_outlives_its_environment(
    kind: str,
    start: str,
    close: str,
    build: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor does the end take long, whether `close()` ends it, leaves it, raises or hangs."""
    if start == "stubborn" and close != "leave":
        pytest.skip("one that ignores SIGTERM is left once")
    monkeypatch.setattr(vector, "GRACE", 0.5 if close == "hang" else 300.0)
    monkeypatch.setattr(vector, "VIDEO_GRACE", 1000.0)
    monkeypatch.setattr(guard, "LAST_WORDS", 0.5)
    StopSignal()  # as in a script: what is forked inherits its handlers
    envs = build(kind, start=start, close=close, folder=str(tmp_path))
    envs.reset(seed=[1, 2])
    envs.step(ACTIONS)
    simulators = [int(pid) for pid in noted(tmp_path, "started")]
    assert len(simulators) == 2
    assert all(alive(pid) for pid in simulators)
    begin = time.monotonic()
    envs.close()
    assert noted(tmp_path, "closed") == noted(tmp_path, "started")
    assert not any(alive(pid) for pid in simulators)
    assert time.monotonic() - begin < 300  # not the grace of those that are given time
    problem = {"raise": "failed in close: RuntimeError: not connected", "hang": "has not returned from close for 0.5"}
    assert problem.get(close, "") in (told := capsys.readouterr().err)
    assert told.count("\n") == (close in problem)


@pytest.mark.parametrize("kind", KINDS)
def test_close_is_called_on_every_environment_where_one_has_failed(
    kind: str, build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = build(kind, start="command", folder=str(tmp_path), fails=True)
    envs.reset(seed=[1, 2])
    envs.step(ACTIONS)
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(EnvError, match=r"environment 0 failed in step"):
        envs.step(ACTIONS)
    envs.close()
    assert noted(tmp_path, "closed") == noted(tmp_path, "started")


def test_nothing_is_left_of_environments_that_were_built_before_one_that_cannot_be(tmp_path: Path) -> None:
    def fail() -> Any:
        raise RuntimeError("one is enough")

    def make() -> Any:
        from tests.process_envs import Simulated

        return Simulated(str(tmp_path), "command", "leave")

    with pytest.raises(EnvError, match="one is enough"):
        vector.make_sync_envs([make, fail])
    (pid,) = noted(tmp_path, "started")
    assert noted(tmp_path, "closed") == [pid]
    assert not alive(int(pid))


@pytest.mark.parametrize("kind", [*KINDS, "auto"])
def test_a_close_that_raises_costs_one_warning(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the run, nor what `evaluate.py` has found."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    settings = '{"close": "raise", "sleep": 0.001}'
    flags = ["--env-id", "tests.process_envs:Simulated-v0", "--env-kwargs", settings, "--vectorization", kind]
    finished = call(ppo.main, *SMALL, *flags, "--total-timesteps", 32, "--log-dir", tmp_path)
    warning = "warning: environment 0 failed in close: RuntimeError: not connected (1 more likewise)"
    told = [line for line in finished.err.splitlines() if line.startswith("warning:")]
    assert (finished.code, told) == (0, [warning])
    assert finished.result["steps"] == "32"
    if kind == "auto":
        assert "vectorization: async" in finished.err
        played = call(evaluate.main, finished.checkpoint, "--episodes", 2, "--json")
        assert played.err.splitlines() == [warning]
        assert json.loads(played.out)["greedy"]["episodes"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_simulators_do_not_outlive_a_script_that_is_killed(kind: str, tmp_path: Path) -> None:
    """In processes of their own, environments are even closed."""
    notes = tmp_path / "notes"
    notes.mkdir()
    settings = json.dumps({"start": "command", "close": "leave", "folder": str(notes), "sleep": 0.01})
    flags = ["--env-id", "tests.process_envs:Simulated-v0", "--env-kwargs", settings, "--vectorization", kind]
    with started(*FORKED, PPO, *SMALL, *flags, "--log-dir", tmp_path / "logs", "--checkpoint-every", 16) as running:
        wait_for(lambda: list(tmp_path.rglob("step_*.ckpt")), running)
        running.process.kill()
        running.finish()  # asserts that no process is left
    assert len(noted(notes, "started")) == 3, "one was tried, two have run"
    assert len(noted(notes, "closed")) == (3 if kind == "async" else 1)


def test_a_run_writes_where_it_began_though_its_environment_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some environments make the folder of their files the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    settings = json.dumps({"start": "elsewhere", "folder": str(tmp_path / "files")})
    flags = ["--env-id", "tests.process_envs:Simulated-v0", "--env-kwargs", settings, "--vectorization", "sync"]
    flags += ["--total-timesteps", 32, "--eval-every", 16, "--eval-episodes", 1, "--logger", "csv"]
    finished = call(ppo.main, *SMALL, *flags, "--log-dir", "logs")
    assert finished.code == 0
    (run_folder,) = (tmp_path / "logs").glob("*/*/*")
    assert {path.name for path in run_folder.iterdir()} >= {"args.json", "checkpoints", "metrics.csv"}
    assert tmp_path / finished.folder == run_folder, "the result line begins where the run did"
    monkeypatch.chdir(tmp_path)
    assert call(ppo.main, "--resume", run_folder.relative_to(tmp_path), "--total-timesteps", 64).code == 0
    assert not [path for path in (tmp_path / "files").iterdir() if path.is_dir()]


def test_a_thread_that_nobody_ends_does_not_keep_a_run_from_its_end(tmp_path: Path) -> None:
    flags = ["--env-id", "tests.process_envs:Simulated-v0", "--env-kwargs", '{"start": "thread"}']
    flags += ["--vectorization", "sync", "--total-timesteps", 32, "--log-dir", tmp_path]
    with started(*FORKED, PPO, *SMALL, *flags) as running:
        running.finish()
    assert (running.code, running.result["steps"]) == (0, "32")


def test_workers_leave_signals_that_stop_a_whole_job_to_the_script(build: Callable) -> None:
    """So that it can end its iteration."""
    envs = build("async")
    envs.reset(seed=[1, 2])
    server = envs.env._server
    pids = server._process.pid, server.pid(0), server.pid(1)
    for pid, number in itertools.product(pids, (signal.SIGINT, signal.SIGTERM)):
        os.kill(pid, number)
    time.sleep(0.1)
    envs.step(ACTIONS)


# --- Calls that never return


def limit(envs: Any, call: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits the next call once environment 0 has answered, for which a busy machine may take its time."""

    def limiting(answer: Callable) -> Callable:
        def answered(*args: Any, **options: Any) -> Any:
            result = answer(*args, **options)
            envs._watch.seconds = seconds
            return result

        return answered

    if hasattr(envs.env, "envs"):
        first = envs.env.envs[0]
        monkeypatch.setattr(first, call, limiting(getattr(first, call)))
    else:
        monkeypatch.setattr(workers, "receive", limiting(workers.receive))


@pytest.mark.parametrize("hang", ["init", "reset", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_never_returns_ends_in_an_error_that_names_the_environment(
    kind: str, hang: str, build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:

    def play() -> None:
        envs = build(kind, hang=hang, only=None if hang == "init" else 8, timeout=0.02 if hang == "init" else 10)
        for call, given in (("reset", {"seed": [7, 8]}), ("step", {"actions": ACTIONS})):
            if call == hang:
                limit(envs, call, 1.2, monkeypatch)
            getattr(envs, call)(**given)

    begin = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(EnvError) as caught:
        play()
    all_of_them = "environment 0" if kind == "sync" else "environments 0, 1"
    name, call = (all_of_them, "the constructor") if hang == "init" else ("environment 1", hang)
    assert str(caught.value).startswith(f"{name} failed in {call}: ")
    assert "has not returned for 1.2 seconds" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - begin >= 1.2


def test_a_constructor_that_never_returns_is_reported_before_anything_starts() -> None:
    args = PPOArgs(env_id="tests.process_envs:Simulated-v0", env_kwargs='{"hang": "init"}')
    with pytest.raises(EnvError, match=r"tests.process_envs:Simulated-v0 .* has not returned for 1.2 seconds"):
        check_env(SimpleNamespace(**vars(args) | {"timeout": 0.02}), (object,), None)  # type: ignore[arg-type]


def test_native_environments_that_never_return_end_in_an_error(build: Callable) -> None:
    envs = build("native", "Endless", timeout=0.02)
    envs.reset(seed=[1, 2])
    with pytest.raises(EnvError, match=r"environments failed in step: .*has not returned for 1.2 seconds"):
        envs.step(ACTIONS)


def test_a_worker_that_was_stopped_is_named_and_does_not_stay(
    build: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = build("async", start="command", folder=str(tmp_path))
    envs.reset(seed=[1, 2])
    pid = envs.env._server.pid(1)
    os.kill(pid, signal.SIGSTOP)
    limit(envs, "step", 1.0, monkeypatch)
    with pytest.raises(EnvError, match=r"environment 1 failed in step: .* \(its process has been stopped\)"):
        envs.step(ACTIONS)
    envs.close()
    assert not any(alive(int(one)) for one in [pid, *noted(tmp_path, "started")])
    assert len(noted(tmp_path, "closed")) == 1, "the other one was closed"


def test_a_server_that_was_stopped_delays_the_end_by_seconds(build: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector, "GRACE", 0.5)
    envs = build("async")
    server = envs.env._server._process.pid
    workers = [envs.env._server.pid(index) for index in (0, 1)]
    os.kill(server, signal.SIGSTOP)
    envs.close()
    assert not any(alive(pid) for pid in [server, *workers])


def test_waiting_for_ever_is_possible(build: Callable) -> None:
    envs = build("async", timeout=0, sleep=0.5)
    envs.reset(seed=[1, 2])
    envs.step(ACTIONS)
    assert envs._watch not in guard.Watch.open


def test_a_step_that_nothing_can_interrupt_ends_the_process_with_code_4(tmp_path: Path) -> None:
    script = """
import json, pathlib, sys, types
import numpy as np
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.envs import guard, make_envs
guard.GRACE = 0.5
kwargs = json.dumps({"hang": "stubborn", "only": 8, "start": "command", "close": "leave"})
args = vars(PPOArgs(env_id="tests.process_envs:Simulated-v0", env_kwargs=kwargs, num_envs=2, vectorization="sync"))
envs = make_envs(types.SimpleNamespace(**args | {"timeout": 0.01}), 0, pathlib.Path("."))
envs.reset(seed=[7, 8])
envs.step(np.zeros(2, np.int64))
"""
    (tmp_path / "script.py").write_text(script)
    ended = run(*FORKED, tmp_path / "script.py")
    assert ended.code == 4, ended.report()
    assert ended.errors == ["error: environment 1 failed in step: it has not returned for 0.6 seconds (see --timeout)"]


def test_a_hanging_environment_ends_all_ranks_with_code_4_and_one_line(tmp_path: Path) -> None:
    settings = json.dumps({"hang": "step", "only": env_seeds(1, 0, 2)[1], "start": "command"})
    flags = [*SMALL, "--env-id", "tests.process_envs:Simulated-v0", "--env-kwargs", settings]
    flags += ["--vectorization", "async", "--timeout", 0.2, "--log-dir", tmp_path / "logs"]
    ended = run_team(ppo_decoupled.__name__, *flags, folder=tmp_path, code=4)
    text = "error: environment 1 failed in step: it has not returned for 6 seconds (see --timeout)"
    assert ended.errors == [text], "half of the time: no rank gives up on another before"


def test_a_second_signal_ends_a_run_whose_environment_hangs(tmp_path: Path) -> None:
    settings = json.dumps({"hang": "step", "only": env_seeds(1, 0, 2)[1], "start": "command", "folder": str(tmp_path)})
    flags = ["--env-id", "tests.process_envs:Simulated-v0", "--env-kwargs", settings, "--vectorization", "sync"]
    with started(*FORKED, PPO, *SMALL, *flags, "--log-dir", tmp_path / "logs") as running:
        wait_for(lambda: noted(tmp_path, "hanging"), running)
        running.process.send_signal(signal.SIGINT)
        signal_again(running.process, signal.SIGTERM)
        running.finish()  # asserts that no process is left
    assert running.code == 143, running.report()


# --- Global generators


def rollout(envs: VectorEnv, seeds: list[int]) -> np.ndarray:
    """Observations of a reset and three steps, and the reward, which is drawn when the environments are built."""
    obs = [envs.reset(seed=seeds)[0].copy()]
    for _ in range(3):
        step = envs.step(ACTIONS)
        obs.append(step[0].copy())
    rewards = np.broadcast_to(step[1][:, None], (2, 3))
    return np.stack([*obs, rewards], 1)  # [N, 5, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_from_global_generators_differ_by_environment_rank_and_seed_and_can_be_repeated(
    kind: str, build: Callable
) -> None:
    torch.manual_seed(1)  # as in a script: the same on every rank
    first, other = build(kind, "Drawing", rank=0), build(kind, "Drawing", rank=1)
    one = rollout(first, env_seeds(1, 0, 2))
    more = [rollout(first, env_seeds(2, 0, 2)), rollout(first, env_seeds(1, 0, 2, global_step=99))]
    envs = np.concatenate([one, rollout(other, env_seeds(1, 1, 2)), *more])  # [8, 5, 3]
    for draws in range(4):
        for generator in range(3):
            values = envs[:, draws, generator]
            assert len(np.unique(values)) == 8, (draws, generator)
    assert len(np.unique(envs[:4, 4, 0])) == 4, "drawn while they are built"
    assert np.array_equal(rollout(first, env_seeds(1, 0, 2)), one)


def test_torchs_generator_goes_on_where_a_resumed_run_has_left_it(build: Callable) -> None:
    """In the script's own process, where checkpoints keep it."""
    envs = build("sync", "Drawing", resume="somewhere")
    torch.manual_seed(5)
    expected = torch.rand(1).item()
    torch.manual_seed(5)
    assert envs.reset(seed=[1, 2])[0][0, 2] == np.float32(expected)


def test_building_and_trying_environments_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    args = PPOArgs(env_id="tests.process_envs:Drawing-v0", num_envs=2, vectorization="auto")

    def draws() -> list[float]:
        return [random.random(), np.random.random(), torch.rand(1).item()]

    found = []
    for task in (lambda: None, lambda: make_envs(args, 0, tmp_path).close()):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        task()
        found.append(draws())
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [*KINDS, "native"])
def test_environments_that_start_from_equal_observations_are_reported(
    kind: str, build: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "warning: environments 0 and 1 start from equal observations: right if every episode begins alike; "
        "if not, does reset use its seed?\n"
    )
    name, module = ("Endless", "process_envs") if kind == "native" else ("Deterministic", "envs")
    for rank in (0, 1):
        envs = build(kind, name, rank=rank, module=module)
        for _ in range(2):
            envs.reset(seed=[1, 2])
    assert capsys.readouterr().err == text, "once, by one rank"
    build(kind if kind != "native" else "sync").reset(seed=[1, 2])
    assert capsys.readouterr().err == ""


def test_games_may_start_from_equal_frames(build: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    obs, _ = build("sync", "CountingImages", module="image_envs").reset(seed=[1, 1])
    assert (obs[0] == obs[1]).all()
    assert capsys.readouterr().err == ""


def test_images_tell_environments_apart_whose_numbers_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    envs = make_envs(PPOArgs(env_id="tests.image_envs:Lit-v0", num_envs=2), 0, Path())
    envs.reset(seed=[1, 2])
    assert "equal observations" not in capsys.readouterr().err
    envs.close()


def test_environments_that_hang_as_they_close_cost_their_time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs(gym.Env):
        observation_space = action_space = Discrete(2)

        def close(self) -> None:
            time.sleep(60)

    monkeypatch.setattr(failures, "HASTE", 0.05)
    envs = vector.make_sync_envs([Hangs] * 20, grace=1.0)
    begin = time.monotonic()
    envs.close()
    assert time.monotonic() - begin < 10
