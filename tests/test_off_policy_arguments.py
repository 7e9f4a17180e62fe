"""Every argument of SAC and DroQ does something: turning it changes a number, a file, or what a module is told."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from fabricrl.algos import run as run_module
from fabricrl.algos.args import StandardArgs
from fabricrl.algos.command_line import parse
from fabricrl.algos.droq import droq
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.off_policy import replay as off_policy
from fabricrl.algos.off_policy.args import OffPolicyArgs
from fabricrl.algos.run import Run
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.args import SACArgs
from fabricrl.data.replay import ReplayBuffer
from fabricrl.envs.sync import SequentialVectorEnv
from fabricrl.envs.workers import WorkerVectorEnv
from fabricrl.utils import launch as launching
from fabricrl.utils import process
from fabricrl.utils.errors import ConfigError, EnvError
from fabricrl.utils.model import parameter_hash
from tests import test_arguments
from tests.conftest import Trained
from tests.test_arguments import AS_IN_PPO, flags, watched_arguments, watched_compiler

SCRIPTS: dict[str, Any] = {"sac": sac, "droq": droq}
ARGS: dict[str, type[OffPolicyArgs]] = {"sac": SACArgs, "droq": DroQArgs}

# 24 iterations with updates in a fraction of a second, at high rates; the buffer wraps, and time limits end episodes
TINY: dict[str, Any] = {
    "env_id": "tests.envs:Deterministic-v0",
    "env_kwargs": '{"length": 5, "truncate": true, "continuous": true}',
    "num_envs": 2,
    "total_timesteps": 64,
    "buffer_size": 40,
    "learning_starts": 16,
    "batch_size": 8,
    "replay_ratio": 1.5,
    "hidden_sizes": (8, 8),
    "policy_lr": 0.02,
    "q_lr": 0.02,
    "tau": 0.1,
    "num_threads": 1,
    "logger": "csv",
}

DRIFT = {"env_id": "tests.image_envs:Drift-v0", "env_kwargs": "{}"}  # images

# Field -> another value than TINY's, and what else has to be set for it to matter. The parameters after the training
# must be others.
CHANGES_PARAMETERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "env_id": ("Pendulum-v1", {"env_kwargs": "{}"}),
    "env_kwargs": ('{"length": 7, "truncate": true, "continuous": true}', {}),
    "mask_velocities": (True, {"env_id": "Pendulum-v1", "env_kwargs": "{}"}),
    "num_envs": (4, {}),
    "total_timesteps": (48, {}),
    "seed": (2, {}),
    "precision": ("bf16-mixed", {}),
    "buffer_size": (24, {}),
    "learning_starts": (32, {}),
    "obs_keys": (("speed",), {"env_id": "tests.envs:Odd-v0", "env_kwargs": '{"obs": "dict", "action": "box"}'}),
    "action_repeat": (2, {}),
    "batch_size": (4, {}),
    "replay_ratio": (1.0, {}),
    "grayscale": (True, DRIFT),
    "resize": (60, DRIFT),
    "frame_stack": (3, DRIFT),
    "random_shift": (0, DRIFT),
    "cnn_features": (24, DRIFT),
    "n_step": (3, {}),
    "gamma": (0.9, {}),
    "reward_scale": (3.0, {}),
    "norm_obs": (True, {}),
    "hidden_sizes": ((8, 4), {}),
    "activation": ("tanh", {}),
    "num_critics": (3, {}),
    "policy_lr": (0.01, {}),
    "q_lr": (0.01, {}),
    "tau": (0.01, {}),
    "alpha": (0.5, {}),
    "autotune": (False, {}),
    "target_entropy": (-2.0, {}),
}
OWN: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "sac": {"policy_frequency": (1, {}), "target_network_frequency": (2, {})},
    "droq": {"dropout": (0.3, {}), "layer_norm": (False, {})},
}
CHANGES = [(algo, name) for algo in SCRIPTS for name in (CHANGES_PARAMETERS | OWN[algo])]

# Field -> the test below that shows its effect
CHANGES_SOMETHING_ELSE = {
    "preset": "test_tuned_settings_are_those_of_the_environment",
    "vectorization": "test_vectorization_chooses_processes_and_changes_nothing_else",
    "check_spaces": "test_check_spaces_ends_a_run_that_leaves_the_bounds_of_its_space",
    "capture_video": "test_videos_are_recorded_only_if_asked_and_as_often_as_asked",
    "video_every": "test_videos_are_recorded_only_if_asked_and_as_often_as_asked",
    "log_every": "test_log_every_sets_the_distance_of_entries",
    "save_model": "test_checkpoints_are_written_as_often_as_asked_and_as_many_kept",
    "checkpoint_every": "test_checkpoints_are_written_as_often_as_asked_and_as_many_kept",
    "keep_checkpoints": "test_checkpoints_are_written_as_often_as_asked_and_as_many_kept",
    "resume": "test_resume_goes_on_with_the_stored_arguments_and_flags_win_over_them",
    "compile": "test_compile_compiles_the_update",
    "implicit_next_obs": "test_implicit_next_observations_take_less_memory_and_change_nothing_else",
    "buffer_memmap": "test_a_buffer_in_a_file_changes_nothing_else",
    "buffer_device": "test_auto_puts_the_buffer_on_the_gpu_if_it_takes_at_most_half_of_what_is_free",
    "checkpoint_buffer": "test_a_checkpoint_has_the_buffer_unless_told_otherwise",
    "allow_empty_buffer": "test_an_empty_buffer_is_allowed_only_if_asked",
}

Train = Callable[..., Trained]


@pytest.fixture(params=SCRIPTS)
def algo(request: pytest.FixtureRequest) -> str:
    return request.param


def test_tuned_settings_are_those_of_the_environment(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env_id, name, value = {"sac": ("Pendulum-v1", "policy_lr", 1e-3), "droq": ("Humanoid-v5", "dropout", 0.1)}[algo]
    for preset in ("default", "tuned"):
        monkeypatch.setattr(sys, "argv", ["script.py", "--preset", preset, "--env-id", env_id])
        assert (getattr(parse(ARGS[algo], algo), name) == value) == (preset == "tuned")


@pytest.fixture(scope="module")
def trained_before() -> dict[tuple, torch.Tensor]:
    """Weights of trainings that several tests compare with."""
    return {}


@pytest.fixture
def base(train: Train, trained_before: dict[tuple, torch.Tensor]) -> Callable[..., torch.Tensor]:
    def weights(algo: str, **extra: Any) -> torch.Tensor:
        key = (algo, *extra.items())
        if key not in trained_before:
            trained_before[key] = train(SCRIPTS[algo].main, *flags(TINY | extra)).weights
        return trained_before[key]

    return weights


@pytest.fixture
def run(algo: str, train: Train) -> Callable[..., Trained]:
    """Trains with TINY's arguments and others."""

    def call(**settings: Any) -> Trained:
        trained = train(SCRIPTS[algo].main, *flags(TINY | settings))
        assert trained.code == 0
        return trained

    return call


def parsed(monkeypatch: pytest.MonkeyPatch, algo: str, *line: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, line)])
    return parse(ARGS[algo], algo)


def test_every_argument_has_a_test_that_shows_what_it_does(algo: str) -> None:
    tables = [(CHANGES_PARAMETERS | OWN[algo]).keys(), CHANGES_SOMETHING_ELSE.keys(), AS_IN_PPO]
    assert sum(map(len, tables)) == len(set().union(*tables)), "an argument is in two tables"
    assert {field.name for field in dataclasses.fields(ARGS[algo])} == set().union(*tables)
    assert set(CHANGES_SOMETHING_ELSE.values()) <= globals().keys()


def test_arguments_tested_with_ppo_are_read_by_the_same_lines(
    algo: str, run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert AS_IN_PPO.issubset(field.name for field in dataclasses.fields(StandardArgs))
    assert AS_IN_PPO.issubset(test_arguments.CHANGES_SOMETHING_ELSE)
    handed = watched_arguments(SCRIPTS[algo], monkeypatch)
    run()
    assert handed["launch"] is handed["join"] is handed["RunFolder"] is handed["parse"]


def test_every_argument_has_a_help_text(algo: str) -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(ARGS[algo]))


@pytest.mark.parametrize(("algo", "name"), CHANGES)
def test_turning_it_changes_the_parameters(algo: str, name: str, run: Train, base: Callable) -> None:
    value, extra = (CHANGES_PARAMETERS | OWN[algo])[name]
    before = base(algo) if name == "env_id" else base(algo, **extra)
    after = run(**extra, **{name: value})
    assert after.weights.isfinite().all()
    assert after.weights.shape != before.shape or not torch.equal(after.weights, before)
    stored = after.args[name]
    assert (tuple(stored) if isinstance(stored, list) else stored) == value  # the run's args.json says what ran


def test_a_temperature_that_is_not_learned_stays_where_it_is_and_matters(run: Train) -> None:
    first, second = (run(alpha=alpha, autotune=False) for alpha in (0.5, 0.25))
    for trained, alpha in ((first, 0.5), (second, 0.25)):
        assert trained.state["agent"]["log_alpha"].exp().item() == pytest.approx(alpha, rel=1e-6)
    networks = [name for name in first.state["agent"] if name != "log_alpha"]
    assert any(not torch.equal(first.state["agent"][name], second.state["agent"][name]) for name in networks)


def test_a_reward_scale_is_rewards_that_are_so_much_larger(
    run: Train, base: Callable, algo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = run(reward_scale=4.0)  # by which rewards are multiplied without rounding
    sample = ReplayBuffer.sample

    def larger(self: ReplayBuffer, *given: Any) -> Any:
        batch = sample(self, *given)
        return batch.with_columns(rewards=4.0 * batch.rewards)

    monkeypatch.setattr(ReplayBuffer, "sample", larger)
    plain = run()
    assert torch.equal(scaled.weights, plain.weights)
    assert scaled.result["return_mean"] != "nan"  # and no return of the log is larger
    assert float(scaled.result["return_mean"]) < 2 * abs(float(plain.result["return_mean"])) + 1


def test_the_same_arguments_give_the_same_bits(algo: str, run: Train, base: Callable) -> None:
    assert torch.equal(run().weights, base(algo))


def test_the_seed_reaches_parameters_environments_action_noise_and_sampling(
    algo: str, run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, seen = SCRIPTS[algo], []
    real_rollout, real_sample = script.rollout, ReplayBuffer.sample

    def check_ranks(fabric: Any, player: torch.nn.Module, obs: torch.Tensor) -> None:
        seen[:] = [parameter_hash(player).item(), obs.tolist()]

    def rollout(run: Run, *rest: Any) -> None:
        if len(seen) == 2:
            seen.append(run.act_rng.initial_seed())
        real_rollout(run, *rest)

    def sample(*given: Any) -> Any:
        if len(seen) == 3:
            seen.append(given[3].initial_seed())
        return real_sample(*given)

    monkeypatch.setattr(run_module, "check_ranks", check_ranks)
    monkeypatch.setattr(script, "rollout", rollout)
    monkeypatch.setattr(ReplayBuffer, "sample", sample)
    runs = {}
    for seed in (1, 2):
        run(env_id="Pendulum-v1", env_kwargs="{}", total_timesteps=20, seed=seed)
        runs[seed] = list(seen)
    for what, first, second in zip(("parameters", "environments", "noise", "sampling"), *runs.values(), strict=True):
        assert first != second, what
    assert not {tuple(obs) for obs in runs[1][1]} & {tuple(obs) for obs in runs[2][1]}, "seeds share an environment"
    assert runs[1][2] != runs[1][3]  # streams of their own


def test_check_spaces_ends_a_run_that_leaves_the_bounds_of_its_space(run: Train) -> None:
    settings = {"env_id": "tests.value_envs:Answering-v0", "env_kwargs": '{"late": "beyond", "at": 3}'}
    assert run(**settings).code == 0
    with pytest.raises(EnvError, match=r"returned from step an observation with 9\.5, which is out of range"):
        run(**settings, check_spaces=True)


def test_vectorization_chooses_processes_and_changes_nothing_else(
    algo: str, run: Train, base: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []
    real = run_module.make_envs
    monkeypatch.setattr(
        run_module, "make_envs", lambda *given: (envs := real(*given), kinds.append(type(envs.unwrapped)))[0]
    )
    for kind in ("sync", "async"):
        assert torch.equal(run(vectorization=kind).weights, base(algo))
    assert kinds == [SequentialVectorEnv, WorkerVectorEnv]


def test_videos_are_recorded_only_if_asked_and_as_often_as_asked(run: Train) -> None:
    def videos(**settings: Any) -> list[str]:  # an episode of Pendulum takes 200 steps
        folder = run(env_id="Pendulum-v1", env_kwargs="{}", num_envs=1, **settings).folder / "videos"
        return sorted(file.name for file in folder.glob("*.mp4"))

    three = {"total_timesteps": 600, "learning_starts": 590, "buffer_size": 600}
    assert videos(**three) == []
    assert videos(**three, capture_video=True, video_every=2) == ["train-episode-0.mp4", "train-episode-2.mp4"]


def test_log_every_sets_the_distance_of_entries(run: Train) -> None:
    def steps(log_every: int) -> list[int]:
        lines = (run(log_every=log_every).folder / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("step")
        return [int(line.split(",")[column]) for line in lines[1:]]

    assert steps(16) == [16, 32, 48, 64]
    assert steps(25) == [26, 52, 64]  # whole iterations of two steps; the last is always logged


def test_checkpoints_are_written_as_often_as_asked_and_as_many_kept(run: Train, tmp_path: Path) -> None:
    def steps(**settings: Any) -> list[int]:
        folder = tmp_path / "_".join(map(str, settings.values()))
        run(**settings, log_dir=folder)
        return sorted(int(file.stem.split("_")[1]) for file in folder.rglob("step_*.ckpt"))

    assert steps(checkpoint_every=0) == [64]
    assert steps(checkpoint_every=20) == [20, 40, 60, 64][1:]  # three are kept
    assert steps(checkpoint_every=20, keep_checkpoints=2) == [60, 64]
    assert steps(save_model=False) == []


def test_resume_goes_on_with_the_stored_arguments_and_flags_win_over_them(algo: str, run: Train, train: Train) -> None:
    first = run(gamma=0.9)
    second = train(SCRIPTS[algo].main, "--resume", first.folder, "--total-timesteps", 80, "--tau", 0.2)
    assert second.folder == first.folder
    assert second.state["global_step"] == 80
    expected = first.state["args"] | {"total_timesteps": 80, "tau": 0.2, "resume": str(first.folder)}
    assert second.state["args"] == expected
    assert not torch.equal(second.weights, first.weights)


def test_compile_compiles_the_update(algo: str, run: Train, base: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling for real takes half a minute; that it is asked for, and that its result is used, is what counts here
    compiled = watched_compiler(monkeypatch)
    run()
    assert compiled == []
    after = run(compile=True)
    assert len(compiled) == 2, "not one program for the critics, and one for the actor"
    assert all(calls >= 24 for calls in compiled), compiled
    assert torch.equal(after.weights, base(algo))


@pytest.mark.parametrize(("delay", "every"), [(1, 3), (2, 3), (3, 2)])
def test_all_programs_are_compiled_before_the_first_step(
    delay: int, every: int, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAC's critics have two, with and without an update of their targets."""
    compiled, before = watched_compiler(monkeypatch), []
    reset = Run.reset
    monkeypatch.setattr(Run, "reset", lambda run: (before.append(len(compiled)), reset(run))[1])
    train(sac.main, *flags(TINY | {"policy_frequency": delay, "target_network_frequency": every, "compile": True}))
    assert (before, len(compiled)) == ([3], 3)
    assert min(compiled) >= 5


def gibibytes(trained: Trained) -> float:
    (line,) = [line for line in trained.output.splitlines() if line.startswith("replay buffer: ")]
    return float(line.split(" transitions, ")[1].split(" GiB")[0])


def test_implicit_next_observations_take_less_memory_and_change_nothing_else(
    algo: str, run: Train, base: Callable
) -> None:
    assert torch.equal(run(implicit_next_obs=True).weights, base(algo))
    large = {"buffer_size": 10_000_000, "checkpoint_buffer": False}  # 480 MB, of which nothing is touched
    explicit, implicit = (gibibytes(run(**large, implicit_next_obs=value)) for value in (False, True))
    # 3 numbers of observation, action, reward, two flags and, on one side, 3 of the next observation, or its place
    assert (explicit, implicit) == (
        pytest.approx(36 * 1e7 / 2**30, abs=1e-3),
        pytest.approx(28 * 1e7 / 2**30, abs=1e-3),
    )


def test_a_buffer_in_a_file_changes_nothing_else(
    algo: str, run: Train, base: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []
    start = ReplayBuffer.start
    monkeypatch.setattr(ReplayBuffer, "start", lambda rb, obs: (kinds.append(type(rb._records)), start(rb, obs))[1])
    trained = run(buffer_memmap=True)
    assert torch.equal(trained.weights, base(algo))
    assert kinds[-1] is np.memmap
    run()
    assert kinds[-1] is np.ndarray
    assert f"in {trained.folder}" in trained.output.split("replay buffer: ")[1]


def test_a_checkpoint_has_the_buffer_unless_told_otherwise(run: Train) -> None:
    shard = run().state["shard"]
    assert (shard["size"], shard["position"]) == (20, 32 % 21)  # of rows; the ring has one more
    assert len(shard["records"]) == 21 * 2 * 36
    assert run(checkpoint_buffer=False).state["shard"] is None


def test_an_empty_buffer_is_allowed_only_if_asked(algo: str, run: Train, train: Train, tmp_path: Path) -> None:
    from fabricrl.utils.errors import CheckpointError

    folder = run().folder
    line = ("--resume", folder, "--total-timesteps", 128, "--buffer-size", 60)
    with pytest.raises(CheckpointError, match="--allow-empty-buffer"):
        train(SCRIPTS[algo].main, *line)
    assert train(SCRIPTS[algo].main, *line, "--allow-empty-buffer").state["global_step"] == 128


@pytest.mark.parametrize(
    ("cores", "quota", "world_size", "threads"),
    [(1, "max", 1, 1), (2, "max", 1, 2), (2, "max", 2, 1), (3, "max", 2, 1), (64, "max", 4, 2), (64, "190000", 1, 1)],
)
def test_a_rank_has_two_threads_where_there_are_two_cores_for_each(
    cores: int, quota: str, world_size: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quota of a container is in microseconds of each period, here of 100 000."""

    class Fabric:
        def __init__(self, **options: Any) -> None:
            self.world_size, self.global_rank, self.strategy = world_size, 0, None

        def launch(self) -> None:
            pass

    monkeypatch.setattr(launching, "Fabric", Fabric)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    monkeypatch.setattr(process, "Path", lambda _: tmp_path / "cpu.max")
    launching.launch(SACArgs())
    assert torch.get_num_threads() == threads
    launching.launch(SACArgs(num_threads=3))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("cores", "busy", "warns"), [(2, 0.3, False), (2, 0.9, True), (4, 1.5, False), (4, 3.5, True)])
def test_two_threads_on_a_busy_machine_are_warned_of(
    cores: int, busy: float, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Within the moment that is looked at, others take this many hundredths of a second for each that passes."""
    table, passed = tmp_path / "stat", [0.0]

    def write() -> None:
        ticks, free = round(100 * passed[0] * busy), 10**9
        rows = [
            f"cpu {free} 0 0 0 0 0 0 0",
            f"cpu0 {ticks} 0 0 {free} 0 0 0 0",
            f"cpu99 {free * passed[0]:.0f} 0 0 0 0 0 0 0",
        ]
        table.write_text("\n".join(rows))

    def sleep(seconds: float) -> None:
        passed[0] += seconds
        write()

    write()
    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: passed[0], process_time=lambda: 0.0)
    monkeypatch.setattr(process, "time", clock)
    monkeypatch.setattr(process, "Path", lambda path: table if path == "/proc/stat" else tmp_path / "none")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    rank = SimpleNamespace(world_size=1, global_rank=0)
    assert launching._threads(SACArgs(), rank) == 2
    said = capsys.readouterr().err
    assert ("--num-threads 1" in said) == warns
    assert not warns or f"keep {busy:.1f} of {cores} cores busy" in said
    assert launching._threads(SACArgs(num_threads=2), rank) == 2
    assert not capsys.readouterr().err  # who has chosen knows


# CleanRL's, but for what fabricrl/algos/droq/args.py gives a reason for
DEFAULTS: dict[str, Any] = {
    "policy_lr": 3e-4,
    "num_envs": 1,
    "batch_size": 256,
    "gamma": 0.99,
    "tau": 0.005,
    "buffer_size": 1_000_000,
    "hidden_sizes": (256, 256),
    "activation": "relu",
    "num_critics": 2,
    "autotune": True,
    "target_entropy": None,
    "n_step": 1,
    "norm_obs": False,
    "total_timesteps": 1_000_000,
    "seed": 1,
    "checkpoint_buffer": True,
}
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "sac": {
        "learning_starts": 5000,
        "alpha": 1.0,
        "q_lr": 1e-3,
        "replay_ratio": 1.0,
        "policy_frequency": 2,
        "target_network_frequency": 1,
    },
    "droq": {
        "learning_starts": 1000,
        "alpha": 0.1,
        "q_lr": 3e-4,
        "replay_ratio": 20.0,
        "dropout": 0.01,
        "layer_norm": True,
    },
}


def test_defaults_are_the_design(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = dataclasses.asdict(parsed(monkeypatch, algo))
    expected = DEFAULTS | OWN_DEFAULTS[algo]
    assert {name: args[name] for name in expected} == expected


def test_cleanrls_command_lines_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """All arguments of CleanRL's sac_continuous_action.py, each as it is given there."""
    line = """--exp-name sac --seed 3 --no-torch-deterministic --no-cuda --no-track --wandb-project-name p
        --wandb-entity e --no-capture-video --env-id Hopper-v4 --total-timesteps 10000 --num-envs 2 --buffer-size 5000
        --gamma 0.9 --tau 0.01 --batch-size 64 --learning-starts 100 --policy-lr 0.001 --q-lr 0.002
        --policy-frequency 3 --target-network-frequency 2 --alpha 0.2 --no-autotune"""
    args = parsed(monkeypatch, "sac", *line.split())
    assert (args.exp_name, args.seed) == ("sac", 3)
    assert [args.torch_deterministic, args.cuda, args.track] == [False] * 3
    assert (args.wandb_project_name, args.wandb_entity, args.capture_video) == ("p", "e", False)
    assert (args.env_id, args.total_timesteps, args.num_envs, args.buffer_size) == ("Hopper-v4", 10_000, 2, 5000)
    assert (args.gamma, args.tau, args.batch_size, args.learning_starts) == (0.9, 0.01, 64, 100)
    assert (args.policy_lr, args.q_lr, args.policy_frequency, args.target_network_frequency) == (0.001, 0.002, 3, 2)
    assert (args.alpha, args.autotune) == (0.2, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("buffer_size", 0),
        ("batch_size", 0),
        ("n_step", 0),
        ("frame_stack", 0),
        ("random_shift", -1),
        ("random_shift", 36),
        ("cnn_features", 0),
        ("resize", 35),
        ("num_critics", 0),
        ("learning_starts", -1),
        ("gamma", 2.0),
        ("reward_scale", 0.0),
        ("reward_scale", float("nan")),
        ("gamma", float("nan")),
        ("tau", 0.0),
        ("tau", 1.5),
        ("alpha", 0.0),
        ("alpha", float("inf")),
        ("policy_lr", 0.0),
        ("q_lr", float("nan")),
        ("replay_ratio", 0.0),
        ("replay_ratio", float("inf")),
        ("target_entropy", float("nan")),
        ("hidden_sizes", (8, 0)),
        ("activation", "sine"),
        ("policy_frequency", 0),
        ("target_network_frequency", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    kind = DroQArgs if name == "dropout" else SACArgs
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} is ") as caught:
        kind(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "free", "chosen"),
    [("auto", 8_100, "cuda:0"), ("auto", 7_900, None), ("cuda", 7_900, "cuda:0"), ("cpu", 8_100, None)],
)
def test_auto_puts_the_buffer_on_the_gpu_if_it_takes_at_most_half_of_what_is_free(
    asked: str, free: int, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80_000))
    fabric = SimpleNamespace(device=torch.device("cuda:0"))
    args = SACArgs(buffer_device=asked, buffer_size=99, batch_size=9)  # 100 records of 40 bytes
    spaces = {"obs_space": Box(-1, 1, (3,), np.float32), "action_space": SimpleNamespace(shape=(2,))}
    run: Any = SimpleNamespace(args=args, fabric=fabric, uses_tensor_envs=False, **spaces)
    device, why_not = off_policy.buffer_device(run)
    assert str(device) == str(chosen)
    assert ("--buffer-device cuda puts it there all the same" in why_not) == (asked == "auto" and chosen is None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 80_000))
    if asked == "cuda":
        with pytest.raises(ConfigError, match=r"--buffer-device is cuda: the buffer would take .* cpu keeps it"):
            off_policy.buffer_device(run)
