"""Every argument does something: turning it changes a number, a file, or what torch, Fabric or a logger is told."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.fabric.strategies import DDPStrategy

from fabricrl import algos
from fabricrl.algos import evaluation
from fabricrl.algos import run as run_module
from fabricrl.algos.args import StandardArgs
from fabricrl.algos.command_line import parse
from fabricrl.algos.ppo import ppo as ppo_script
from fabricrl.algos.ppo.agent import ACTION_SPACES
from fabricrl.algos.ppo.args import PRESETS, PPOArgs
from fabricrl.algos.ppo_recurrent import ppo_recurrent as recurrent_script
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs
from fabricrl.algos.run import Run
from fabricrl.envs import make_envs
from fabricrl.envs.sync import SequentialVectorEnv
from fabricrl.envs.workers import WorkerVectorEnv
from fabricrl.utils import launch as launching
from fabricrl.utils.errors import ConfigError, EnvError
from fabricrl.utils.hub import repository_name
from fabricrl.utils.model import parameter_hash
from fabricrl.utils.seeding import generators
from fabricrl.utils.update import Runner
from tests.conftest import Trained

Train = Callable[..., Trained]
SCRIPTS: dict[str, Any] = {"ppo": ppo_script, "ppo_recurrent": recurrent_script}
ARGS: dict[str, type[PPOArgs]] = {"ppo": PPOArgs, "ppo_recurrent": RecurrentPPOArgs}

# A training of three iterations that takes a fraction of a second. The learning rate is high, so that ratios leave the
# clipping range and gradients the norm; time limits end its episodes.
TINY: dict[str, Any] = {
    "env_id": "tests.envs:Deterministic-v0",
    "env_kwargs": '{"length": 5, "truncate": true}',
    "num_envs": 2,
    "num_steps": 16,
    "total_timesteps": 96,
    "num_minibatches": 2,
    "update_epochs": 2,
    "hidden_sizes": (8, 8),
    "learning_rate": 0.02,
    "logger": "csv",
}
TINIES = {"ppo": TINY, "ppo_recurrent": TINY | {"rnn_hidden_size": 8}}
BOX = {"env_id": "tests.envs:IdentityBox-v0", "env_kwargs": "{}"}
CARTPOLE = {"env_id": "CartPole-v1", "env_kwargs": "{}"}

PICTURE = {"env_id": "tests.envs:Picture-v0", "env_kwargs": "{}", "cnn_features": 16}
PICTURES = PICTURE | {"env_id": "tests.envs:PictureDict-v0"}
BREAKOUT = PICTURE | {"env_id": "ALE/Breakout-v5", "env_kwargs": '{"repeat_action_probability": 0.0}'}
BREAKOUT |= {"action_repeat": 4, "num_steps": 48}  # within which a life is lost

# Field -> another value than TINY's, and what else has to be set for it to matter. The parameters after the training
# must be others.
CHANGES_PARAMETERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "env_id": ("CartPole-v1", {"env_kwargs": "{}"}),
    "env_kwargs": ('{"length": 7, "truncate": true}', {}),
    "mask_velocities": (True, CARTPOLE),
    "obs_keys": (("picture", "gear"), PICTURES),
    "action_repeat": (2, {}),
    "noop_max": (30, BREAKOUT | {"env_id": "ALE/Pong-v5"}),  # where something moves by itself
    "life_loss": (True, BREAKOUT),
    "grayscale": (True, PICTURE),
    "resize": (60, PICTURE),
    "frame_stack": (3, PICTURE),
    "cnn_features": (24, PICTURE),
    "clip_reward": (True, PICTURE),
    "num_envs": (4, {}),
    "total_timesteps": (64, {}),
    "seed": (2, {}),
    "precision": ("bf16-mixed", {}),
    "preset": ("mujoco", {}),
    "num_steps": (8, {}),
    "gamma": (0.9, {}),
    "gae_lambda": (0.5, {}),
    "bootstrap_truncated": (False, {}),
    "norm_obs": (True, {}),
    "norm_reward": (True, {}),
    "hidden_sizes": ((8, 4), {}),
    "activation": ("relu", {}),
    "log_std_init": (-1.0, BOX),
    "learning_rate": (0.01, {}),
    "anneal_lr": (False, {}),
    "num_minibatches": (4, {}),
    "update_epochs": (3, {}),
    "norm_adv": (False, {}),
    "clip_coef": (0.05, {}),
    "anneal_clip": (True, {}),
    "clip_vloss": (False, {}),
    "ent_coef": (0.1, {}),
    "anneal_ent": (True, {}),
    "vf_coef": (1.0, {}),
    "max_grad_norm": (0.05, {}),
    "target_kl": (1e-6, {}),
}
OWN: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "ppo": {},
    "ppo_recurrent": {
        "rnn_type": ("gru", {}),
        "rnn_hidden_size": (12, {}),
        "rnn_layers": (2, {}),
        "shared_core": (True, {}),
        "encoder_sizes": ((8,), {}),
        "prev_action": (True, {}),
        "prev_reward": (True, {}),
        "sequence_length": (4, {}),
    },
}
CHANGES = [(algo, name) for algo in SCRIPTS for name in (CHANGES_PARAMETERS | OWN[algo])]

# Field -> the test below that shows its effect
CHANGES_SOMETHING_ELSE = {
    "vectorization": "test_vectorization_chooses_processes_and_changes_nothing_else",
    "check_spaces": "test_check_spaces_ends_a_run_that_leaves_the_bounds_of_its_space",
    "seeds": "test_seeds_and_jobs_run_the_command_once_a_seed",
    "jobs": "test_seeds_and_jobs_run_the_command_once_a_seed",
    "capture_video": "test_videos_are_recorded_only_if_asked_and_as_often_as_asked",
    "video_every": "test_videos_are_recorded_only_if_asked_and_as_often_as_asked",
    "eval_every": "test_evaluations_come_as_often_as_asked_with_as_many_episodes_and_may_end_the_run",
    "eval_episodes": "test_evaluations_come_as_often_as_asked_with_as_many_episodes_and_may_end_the_run",
    "stop_at_return": "test_evaluations_come_as_often_as_asked_with_as_many_episodes_and_may_end_the_run",
    "info_keys": "test_info_keys_are_logged",
    "exp_name": "test_name_and_folder_of_a_run",
    "log_dir": "test_name_and_folder_of_a_run",
    "logger": "test_logger_chooses_the_kind_of_files",
    "log_every": "test_log_every_sets_the_distance_of_entries",
    "track": "test_wandb_gets_project_and_entity",
    "wandb_project_name": "test_wandb_gets_project_and_entity",
    "wandb_entity": "test_wandb_gets_project_and_entity",
    "upload_model": "test_a_run_is_uploaded_to_the_hub_of_its_owner",
    "hf_entity": "test_a_run_is_uploaded_to_the_hub_of_its_owner",
    "save_model": "test_checkpoints_are_written_as_often_as_asked_and_as_many_kept",
    "checkpoint_every": "test_checkpoints_are_written_as_often_as_asked_and_as_many_kept",
    "keep_checkpoints": "test_checkpoints_are_written_as_often_as_asked_and_as_many_kept",
    "resume": "test_resume_goes_on_with_the_stored_arguments_and_flags_win_over_them",
    "accelerator": "test_fabric_is_given_what_the_user_set_and_nothing_else",
    "cuda": "test_fabric_is_given_what_the_user_set_and_nothing_else",
    "devices": "test_fabric_is_given_what_the_user_set_and_nothing_else",
    "strategy": "test_fabric_is_given_what_the_user_set_and_nothing_else",
    "num_nodes": "test_fabric_is_given_what_the_user_set_and_nothing_else",
    "node_rank": "test_several_nodes_are_told_where_they_stand_and_where_to_meet",
    "main_address": "test_several_nodes_are_told_where_they_stand_and_where_to_meet",
    "main_port": "test_several_nodes_are_told_where_they_stand_and_where_to_meet",
    "num_threads": "test_torch_is_set_as_asked",
    "timeout": "test_messages_between_ranks_have_the_time_that_was_asked_for",
    "matmul_precision": "test_torch_is_set_as_asked",
    "torch_deterministic": "test_torch_is_set_as_asked",
    "compile": "test_compile_compiles_the_update",
    "cuda_graphs": "test_on_a_gpu_updates_are_captured_and_the_policy_acts_there_unless_told_otherwise",
    "player_device": "test_on_a_gpu_updates_are_captured_and_the_policy_acts_there_unless_told_otherwise",
}

# Read by `launch`, `Run` and `RunFolder` alone, which are handed every script's arguments as they are: tests with PPO
# show their effect
AS_IN_PPO = {
    "exp_name", "log_dir", "logger", "track", "wandb_project_name", "wandb_entity", "upload_model", "hf_entity",
    "accelerator", "cuda", "devices", "strategy", "num_nodes", "node_rank", "main_address", "main_port",
    "num_threads", "timeout", "matmul_precision", "torch_deterministic", "cuda_graphs", "player_device",
    "eval_every", "eval_episodes", "stop_at_return", "info_keys", "seeds", "jobs",
}  # fmt: skip


def flags(settings: dict[str, Any]) -> list[str]:
    """The command line that gives these arguments."""
    line: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            line += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return line


def parsed(monkeypatch: pytest.MonkeyPatch, *line: object, kind: type[PPOArgs] = PPOArgs) -> PPOArgs:
    monkeypatch.setattr(sys, "argv", ["ppo.py", *map(str, line)])
    return parse(kind, "ppo", PRESETS)


@pytest.fixture(params=SCRIPTS)
def algo(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_argument_has_a_test_that_shows_what_it_does(algo: str) -> None:
    changes = (CHANGES_PARAMETERS | OWN[algo]).keys()
    assert not changes & CHANGES_SOMETHING_ELSE.keys()
    assert {field.name for field in dataclasses.fields(ARGS[algo])} == changes | CHANGES_SOMETHING_ELSE.keys()
    assert set(CHANGES_SOMETHING_ELSE.values()) <= globals().keys()


def test_a_plain_field_is_an_argument_too(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class OwnArgs(PPOArgs):
        my_coef: float = 0.01

    own: Any = parsed(monkeypatch, "--my-coef", 0.5, kind=OwnArgs)
    assert own.my_coef == 0.5


def test_arguments_tested_with_ppo_alone_are_read_by_the_same_lines(
    run: Train, algo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert AS_IN_PPO.issubset(CHANGES_SOMETHING_ELSE)
    assert AS_IN_PPO.issubset(field.name for field in dataclasses.fields(StandardArgs))
    handed = watched_arguments(SCRIPTS[algo], monkeypatch)
    run()
    assert handed["launch"] is handed["join"] is handed["RunFolder"] is handed["parse"]


def watched_arguments(script: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments as a script has parsed them, and as they are handed to what reads them for every script."""
    handed: dict[str, Any] = {}

    def spy(place: Any, name: str, arguments: Callable[..., Any]) -> None:
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given: (handed.update({name: arguments(*given)}), original(*given))[1])

    monkeypatch.setattr(script, "parse", lambda *given: handed.setdefault("parse", parse(*given)))
    spy(run_module, "launch", lambda args: args)
    spy(Run, "join", lambda run, *_: run.args)
    spy(run_module, "RunFolder", lambda fabric, args, *rest: args)
    return handed


# Arguments that scripts parse -> the tests that have a guard like the one above
GUARDS = {
    "PPOArgs": "tests.test_arguments",
    "RecurrentPPOArgs": "tests.test_arguments",
    "SACArgs": "tests.test_off_policy_arguments",
    "DroQArgs": "tests.test_off_policy_arguments",
    "PPODecoupledArgs": "tests.test_decoupled_arguments",
    "RecurrentPPODecoupledArgs": "tests.test_decoupled_arguments",
    "SACDecoupledArgs": "tests.test_decoupled_arguments",
    "DroQDecoupledArgs": "tests.test_decoupled_arguments",
}


def test_the_arguments_of_every_algorithm_are_guarded() -> None:
    scripts = Path(algos.__file__).parent.glob("*/*.py")
    parsed = {name for path in scripts for name in re.findall(r"\bparse\((\w+Args),", path.read_text())}
    assert parsed == GUARDS.keys()
    for module in GUARDS.values():
        assert hasattr(importlib.import_module(module), "test_every_argument_has_a_test_that_shows_what_it_does")


def test_every_argument_has_a_help_text(algo: str) -> None:
    assert all(field.metadata["help"] for field in dataclasses.fields(ARGS[algo]))


@pytest.fixture(scope="module")
def trained_before() -> dict[tuple, torch.Tensor]:
    """Weights of trainings that several tests compare with."""
    return {}


@pytest.fixture
def run(algo: str, train: Train) -> Callable[..., Trained]:
    """Trains with the arguments of TINIES and others."""

    def call(*line: object, **settings: Any) -> Trained:
        trained = train(SCRIPTS[algo].main, *flags(TINIES[algo] | settings), *line)
        assert trained.code == 0
        return trained

    return call


@pytest.fixture
def base(algo: str, run: Train, trained_before: dict[tuple, torch.Tensor]) -> Callable[..., torch.Tensor]:
    def weights(**extra: Any) -> torch.Tensor:
        key = (algo, *extra.items())
        if key not in trained_before:
            trained_before[key] = run(**extra).weights
        return trained_before[key]

    return weights


@pytest.mark.parametrize(("algo", "name"), CHANGES)
def test_turning_it_changes_the_parameters(algo: str, name: str, run: Train, base: Callable) -> None:
    value, extra = (CHANGES_PARAMETERS | OWN[algo])[name]
    if str(extra.get("env_id")).startswith("ALE/"):
        pytest.importorskip("ale_py")
    before = base() if name == "env_id" else base(**extra)
    if name == "preset":  # TINY's own flags win, so what changes is what it leaves open
        assert PRESETS[value].keys() - TINY.keys()
    after = run(**extra | {name: value})
    assert after.weights.isfinite().all()
    assert after.weights.shape != before.shape or not torch.equal(after.weights, before)
    stored = after.args[name]
    assert (tuple(stored) if isinstance(stored, list) else stored) == value  # the run's args.json says what ran


def test_the_same_arguments_give_the_same_bits(run: Train, base: Callable) -> None:
    assert torch.equal(run().weights, base())


def test_the_seed_reaches_parameters_environments_action_noise_and_minibatches(
    algo: str, run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real_rollout, real_train = SCRIPTS[algo].rollout, SCRIPTS[algo].train

    def check_ranks(fabric: Any, player: torch.nn.Module, obs: torch.Tensor) -> None:
        seen[:] = [parameter_hash(player).item(), obs.tolist()]

    def rollout(run: Run, *rest: Any) -> None:
        seen.append(run.act_rng.initial_seed())
        real_rollout(run, *rest)

    def train(run: Run, *rest: Any) -> Any:
        seen.append(run.train_rng.initial_seed())
        return real_train(run, *rest)

    monkeypatch.setattr(run_module, "check_ranks", check_ranks)
    for function in (rollout, train):
        monkeypatch.setattr(SCRIPTS[algo], function.__name__, function)
    runs = {}
    for seed in (1, 2):
        run(**CARTPOLE, total_timesteps=32, seed=seed)
        runs[seed] = list(seen)
    for what, first, second in zip(("parameters", "environments", "noise", "minibatches"), *runs.values(), strict=True):
        assert first != second, what
    assert not {tuple(obs) for obs in runs[1][1]} & {tuple(obs) for obs in runs[2][1]}, "seeds share an environment"
    assert runs[1][2] != runs[1][3]  # streams of their own


def test_streams_differ_by_seed_rank_purpose_and_the_step_of_resumption() -> None:
    states = {
        (seed, rank, step, purpose): generator.initial_seed()
        for seed in (1, 2)
        for rank in (0, 1)
        for step in (0, 1000)
        for purpose, generator in enumerate(generators(seed, rank, step))
    }
    assert len(set(states.values())) == len(states) == 16


def test_check_spaces_ends_a_run_that_leaves_the_bounds_of_its_space(run: Train) -> None:
    settings = {"env_id": "tests.value_envs:Answering-v0", "env_kwargs": '{"late": "beyond", "at": 3}'}
    assert run(**settings).code == 0
    with pytest.raises(EnvError, match=r"returned from step an observation with 9\.5, which is out of range"):
        run(**settings, check_spaces=True)


def test_vectorization_chooses_processes_and_changes_nothing_else(
    algo: str, run: Train, base: Callable, tmp_path: Path
) -> None:
    for kind, expected in (("sync", SequentialVectorEnv), ("async", WorkerVectorEnv)):
        envs = make_envs(ARGS[algo](**(TINIES[algo] | {"vectorization": kind})), 0, tmp_path)
        assert type(envs.unwrapped) is expected
        envs.close()
    assert torch.equal(run(vectorization="async").weights, base())


def test_videos_are_recorded_only_if_asked_and_as_often_as_asked(run: Train) -> None:
    # CartPole's episodes take at most a few dozen steps at first: environment 0 ends several in 192 steps
    def videos(**settings: Any) -> list[str]:
        folder = run(**CARTPOLE, num_steps=96, total_timesteps=384, **settings).folder / "videos"
        return sorted(file.name for file in folder.glob("*.mp4"))

    assert videos() == []
    every_second = videos(capture_video=True, video_every=2)
    assert every_second[:2] == ["train-episode-0.mp4", "train-episode-2.mp4"]
    assert videos(capture_video=True, video_every=100) == ["train-episode-0.mp4"]


def test_name_and_folder_of_a_run(ppo: Train, tmp_path: Path) -> None:
    run = ppo(*flags(TINY), "--exp-name", "mine", "--log-dir", tmp_path / "elsewhere")
    assert run.folder.parent == tmp_path / "elsewhere" / "ppo" / "tests.envs_Deterministic-v0"
    assert run.folder.name.startswith("mine_1_")
    assert ppo(*flags(TINY)).folder.name.startswith("ppo_")


def test_seeds_and_jobs_run_the_command_once_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_sweep.py runs them; `parse` is what every script calls."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("fabricrl.sweep.run_seeds", lambda *given: asked.append(given) or 7)
    with pytest.raises(SystemExit) as ended:
        parsed(monkeypatch, "--seeds", 3, "--jobs", 2, "--seed", 5, "--log-dir", "there")
    assert ended.value.code == 7
    assert asked == [(5, 3, 2, "there")]


def test_logger_chooses_the_kind_of_files(ppo: Train) -> None:
    def kinds(logger: str) -> tuple[bool, bool]:
        folder = ppo(*flags(TINY | {"logger": logger})).folder
        return any(folder.rglob("metrics.csv")), any(folder.rglob("events.out.tfevents.*"))

    assert kinds("csv") == (True, False)
    assert kinds("tensorboard") == (False, True)


def test_log_every_sets_the_distance_of_entries(run: Train) -> None:
    def steps(log_every: int) -> list[int]:
        lines = (run(log_every=log_every).folder / "metrics.csv").read_text().splitlines()
        column = lines[0].split(",").index("step")
        return [int(line.split(",")[column]) for line in lines[1:]]

    assert steps(1) == [32, 64, 96]
    assert steps(64) == [64, 96]  # the last iteration is always logged
    assert steps(1000) == [96]


def test_a_run_is_uploaded_to_the_hub_of_its_owner(ppo: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is stood in for, so that it need not be there; test_hub.py looks at what is sent."""
    calls: list[tuple[str, Any]] = []

    class Recorder:
        endpoint = "https://huggingface.co"

        def create_repo(self, name: str, exist_ok: bool) -> Any:
            calls.append(("create", name))
            return types.SimpleNamespace(repo_id=f"me/{name}" if "/" not in name else name)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **others: Any) -> None:
            assert list(folder_path.glob("checkpoints/step_*.ckpt"))
            calls.append(("upload", repo_id))

    module = types.ModuleType("huggingface_hub")
    module.HfApi = Recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("fabricrl.utils.hub._quiet", contextlib.nullcontext)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace(name=name))  # it is installed
    ppo(*flags(TINY))
    assert calls == []
    name = repository_name(*ppo(*flags(TINY), "--upload-model").folder.parts[-2:])
    assert calls == [("create", name), ("upload", f"me/{name}")]
    calls.clear()
    name = repository_name(*ppo(*flags(TINY), "--upload-model", "--hf-entity", "lab").folder.parts[-2:])
    assert calls == [("create", f"lab/{name}"), ("upload", f"lab/{name}")]
    with pytest.raises(ConfigError, match="--no-save-model"):
        ppo(*flags(TINY), "--upload-model", "--no-save-model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*\[hub\]"):
        ppo(*flags(TINY), "--upload-model")


def test_wandb_gets_project_and_entity(ppo: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Recorder:
        def __init__(self, **options: Any) -> None:
            made.append(options)
            self.entries: list[int] = []

        def log_hyperparams(self, values: dict[str, Any]) -> None:
            made[-1]["hyperparameters"] = values

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            made[-1].setdefault("steps", []).append(step)

        def finalize(self, status: str) -> None:
            made[-1]["status"] = status

    module = types.ModuleType("lightning.pytorch.loggers")
    module.WandbLogger = Recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace(name=name))  # it is installed
    ppo(*flags(TINY))
    assert made == []
    for choice in (["--track"], ["--logger", "wandb"]):
        ppo(*flags(TINY), *choice, "--wandb-project-name", "ours", "--wandb-entity", "us")
        assert (made[-1]["project"], made[-1]["entity"]) == ("ours", "us")
        assert made[-1]["hyperparameters"]["gamma"] == 0.99
        assert made[-1]["steps"] == [96]
        assert made[-1]["status"] == "success"
    assert len(made) == 2
    ppo(*flags(TINY), "--track")
    assert (made[-1]["project"], made[-1]["entity"]) == ("fabricrl", None)


def test_checkpoints_are_written_as_often_as_asked_and_as_many_kept(run: Train, tmp_path: Path) -> None:
    def steps(*line: object) -> list[int]:
        folder = tmp_path / "_".join(map(str, line))
        run(*line, "--log-dir", folder)
        return sorted(int(file.stem.split("_")[1]) for file in folder.rglob("step_*.ckpt"))

    assert steps("--checkpoint-every", 0) == [96]
    assert steps("--checkpoint-every", 32) == [32, 64, 96]
    assert steps("--checkpoint-every", 64) == [64, 96]
    assert steps("--checkpoint-every", 32, "--keep-checkpoints", 2) == [64, 96]
    assert steps("--no-save-model") == []


def test_evaluations_come_as_often_as_asked_with_as_many_episodes_and_may_end_the_run(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations of 32 steps; episodes are all alike."""
    shares: list[int] = []
    play = evaluation.play

    def counted(envs: Any, policy: Any, episodes: int, *rest: Any) -> Any:
        shares.append(episodes)
        return play(envs, policy, episodes, *rest)

    monkeypatch.setattr(evaluation, "play", counted)
    run()
    assert shares == []
    run(eval_every=32)
    assert shares == [10] * 3
    trained = run(eval_every=64, eval_episodes=3)
    assert shares[3:] == [3] * 2  # the run ends with step 96
    assert trained.result["steps"] == "96"
    reached = float(trained.result["eval_return_mean"]) - 0.01  # of the last one
    assert run(eval_every=32, stop_at_return=reached - 100).result["steps"] == "32"
    assert run(eval_every=32, stop_at_return=reached + 100).result["steps"] == "96"


def test_info_keys_are_logged(run: Train) -> None:
    def columns(*line: object) -> list[str]:
        (file,) = run(*line, env_id="tests.envs:Dicey-v0", env_kwargs="{}").folder.glob("metrics.csv")
        return file.read_text().splitlines()[0].split(",")

    assert "charts/bias" not in columns()
    assert "charts/bias" in columns("--info-keys", "bias")


def test_resume_goes_on_with_the_stored_arguments_and_flags_win_over_them(algo: str, run: Train, train: Train) -> None:
    first = run(gamma=0.9)
    second = train(SCRIPTS[algo].main, "--resume", first.folder, "--total-timesteps", 160, "--ent-coef", 0.2)
    assert second.folder == first.folder
    assert second.state["global_step"] == 160
    expected = first.state["args"] | {"total_timesteps": 160, "ent_coef": 0.2, "resume": str(first.folder)}
    assert second.state["args"] == expected
    assert not torch.equal(second.weights, first.weights)


class FabricStub:
    """Records what Fabric is told; launching ends the script, which would otherwise wait for other ranks."""

    told: dict[str, Any] | None = None
    global_rank = 0
    strategy = None  # of a single process

    def __init__(self, **options: Any) -> None:
        type(self).told = options

    def launch(self) -> None:
        pass


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Arguments of Fabric's constructor for a command line."""
    monkeypatch.setattr(launching, "Fabric", FabricStub)
    for name in ("LT_CLI_USED", "LT_ACCELERATOR", "TORCHELASTIC_RUN_ID", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def ask(*line: object) -> dict[str, Any]:
        launching.launch(parsed(monkeypatch, *line))
        assert FabricStub.told is not None
        return FabricStub.told

    return ask


def test_fabric_is_given_what_the_user_set_and_nothing_else(told: Callable[..., dict[str, Any]]) -> None:
    default = {"accelerator": "cpu", "devices": "1"}
    assert told() == default
    assert told("--accelerator", "auto") == default | {"accelerator": "auto"}
    assert told("--cuda") == default | {"accelerator": "cuda"}
    assert told("--devices", 2) == default | {"devices": "2"}
    assert told("--devices", "0,2") == default | {"devices": "0,2"}
    assert told("--strategy", "ddp") == default | {"strategy": "ddp"}
    assert told("--num-nodes", 1) == default | {"num_nodes": 1}
    assert told("--precision", "bf16-mixed") == default | {"precision": "bf16-mixed"}


def test_several_nodes_are_told_where_they_stand_and_where_to_meet(
    told: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what launch() writes is taken away after the test
    line = ("--num-nodes", 3, "--node-rank", 2, "--main-address", "10.0.0.7", "--main-port", 4567)
    assert told(*line) == {"accelerator": "cpu", "devices": "1", "num_nodes": 3}
    assert [os.environ[name] for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")] == ["2", "10.0.0.7", "4567"]


def test_messages_between_ranks_have_the_time_that_was_asked_for(
    told: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their effect is in test_waiting.py; environments' time is in test_env_processes.py."""
    limits: list[timedelta] = []

    class Strategy(DDPStrategy):
        def __init__(self, timeout: timedelta, **_: Any) -> None:
            limits.append(timeout)

    monkeypatch.setattr(launching, "DDPStrategy", Strategy)
    for line in ((), ("--timeout", 0.5)):
        told(*line)
    assert limits == [timedelta(minutes=10), timedelta(seconds=30)]


def test_torch_is_set_as_asked(told: Callable[..., dict[str, Any]]) -> None:
    for threads in (1, 2):
        told("--num-threads", threads)
        assert torch.get_num_threads() == threads
    for precision in ("medium", "high", "highest"):
        told("--matmul-precision", precision)
        assert torch.get_float32_matmul_precision() == precision
    for flag, expected in (("--no-torch-deterministic", False), ("--torch-deterministic", True)):
        told(flag)
        assert torch.backends.cudnn.deterministic is expected


def test_compile_compiles_the_update(algo: str, run: Train, base: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling for real takes half a minute; that it is asked for, and that its result is used, is what counts here
    compiled = watched_compiler(monkeypatch)
    run()
    assert compiled == []
    after = run(compile=True, anneal_clip=True, anneal_ent=True)
    if algo == "ppo":  # in every iteration the same program, although coefficients change; sequences differ in shape
        assert len(compiled) == 1
    assert sum(compiled) >= 3 * 2 * 2  # iterations, epochs, minibatches; and perhaps once before the clock starts
    assert not torch.equal(after.weights, base())
    torch.testing.assert_close(after.weights, run(anneal_clip=True, anneal_ent=True).weights, rtol=0, atol=1e-4)


def watched_compiler(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the runs of each program that a compiler was asked for; the compiler itself is not called."""
    calls: list[int] = []

    def compile_variant(runner: Runner, function: Callable[..., Any], inputs: list[torch.Tensor]) -> Any:
        place = len(calls)
        calls.append(0)
        with runner.restoring_state():
            function(inputs)

        def program(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            calls[place] += 1
            return function(tensors)

        return program

    monkeypatch.setattr(Runner, "_compile_variant", compile_variant)
    return calls


def test_on_a_gpu_updates_are_captured_and_the_policy_acts_there_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[bool, bool]] = []
    monkeypatch.setattr(run_module, "Runner", lambda compile, capture, *rest: asked.append((compile, capture)))

    def chosen(device: str, *line: object) -> tuple[tuple[bool, bool], str]:
        run = Run(parsed(monkeypatch, *line), "ppo", ACTION_SPACES)
        run.join(types.SimpleNamespace(device=torch.device(device), global_rank=0))
        return asked.pop(), run.player_device.type

    assert chosen("cpu") == ((False, False), "cpu")
    assert chosen("cpu", "--compile") == ((True, False), "cpu")
    assert chosen("cuda") == ((False, True), "cuda")
    assert chosen("cuda", "--no-cuda-graphs", "--player-device", "cuda") == ((False, False), "cuda")
    assert chosen("cuda", "--compile", "--player-device", "cpu") == ((True, True), "cpu")


@pytest.mark.parametrize("precision", get_args(get_args(typing.get_type_hints(PPOArgs)["precision"])[0]))
def test_every_precision_that_the_help_names_trains(precision: str, run: Train) -> None:
    assert run(precision=precision).weights.isfinite().all()


def test_the_environments_own_arguments_reach_it(run: Train) -> None:
    assert run(env_kwargs='{"length": 4}', log_every=1).result["episodes"] == str(96 // 4)


# CleanRL's, which the pages of the algorithms repeat
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2.5e-4,
    "anneal_lr": True,
    "num_envs": 4,
    "num_steps": 128,
    "num_minibatches": 4,
    "update_epochs": 4,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_coef": 0.2,
    "clip_vloss": True,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
    "norm_adv": True,
    "target_kl": None,
    "activation": "tanh",
    "hidden_sizes": (64, 64),
    "norm_obs": False,
    "norm_reward": False,
    "log_std_init": 0.0,
    "total_timesteps": 500_000,
    "env_id": "CartPole-v1",
    "seed": 1,
    "anneal_clip": False,
    "anneal_ent": False,
    "bootstrap_truncated": True,
}
RECURRENT: dict[str, Any] = DEFAULTS | {
    "num_envs": 8,
    "hidden_sizes": (64,),
    "rnn_type": "lstm",
    "rnn_hidden_size": 64,
    "rnn_layers": 1,
    "shared_core": False,
    "encoder_sizes": (),
    "prev_action": False,
    "prev_reward": False,
    "sequence_length": 128,
    "mask_velocities": False,
}
MUJOCO: dict[str, Any] = DEFAULTS | {
    "learning_rate": 3e-4,
    "num_envs": 1,
    "num_steps": 2048,
    "num_minibatches": 32,
    "update_epochs": 10,
    "ent_coef": 0.0,
    "norm_obs": True,
    "norm_reward": True,
    "total_timesteps": 1_000_000,
}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], DEFAULTS),
        (["--preset", "classic"], DEFAULTS),
        (["--preset", "mujoco"], MUJOCO),
        (["--preset=mujoco"], MUJOCO),
    ],
)
def test_presets_are_the_design(line: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    args = dataclasses.asdict(parsed(monkeypatch, *line))
    assert {name: args[name] for name in expected} == expected


def test_recurrent_defaults_are_those_of_ppo_but_for_what_memory_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    args = dataclasses.asdict(parsed(monkeypatch, kind=RecurrentPPOArgs))
    assert {name: args[name] for name in RECURRENT} == RECURRENT


@pytest.mark.parametrize("order", [1, -1])
def test_flags_win_over_the_preset_wherever_they_stand(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [["--preset", "mujoco"], ["--num-steps", "64", "--no-norm-obs", "--ent-coef", "0.01"]]
    args = dataclasses.asdict(parsed(monkeypatch, *[flag for part in parts[::order] for flag in part]))
    changed = {"num_steps": 64, "norm_obs": False, "ent_coef": 0.01, "preset": "mujoco"}
    assert {name: args[name] for name in MUJOCO | changed} == MUJOCO | changed


def test_every_argument_that_is_not_in_a_preset_keeps_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    default, mujoco = (dataclasses.asdict(parsed(monkeypatch, "--preset", name)) for name in ("classic", "mujoco"))
    assert {name for name in default if default[name] != mujoco[name]} == {*PRESETS["mujoco"], "preset"}


def test_cleanrls_command_lines_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """All arguments of CleanRL's ppo.py, and --save-model of ppo_continuous_action.py, each as it is given there."""
    line = """--exp-name ppo --seed 3 --no-torch-deterministic --no-cuda --no-track --wandb-project-name p
        --wandb-entity e --no-capture-video --no-save-model --env-id CartPole-v1 --total-timesteps 1000
        --learning-rate 0.001 --num-envs 2 --num-steps 16 --no-anneal-lr --gamma 0.9 --gae-lambda 0.8
        --num-minibatches 2 --update-epochs 3 --no-norm-adv --clip-coef 0.1 --no-clip-vloss --ent-coef 0.02
        --vf-coef 0.4 --max-grad-norm 0.3 --target-kl 0.02"""
    args = parsed(monkeypatch, *line.split())
    assert (args.exp_name, args.seed, args.torch_deterministic, args.cuda, args.track) == (
        "ppo",
        3,
        False,
        False,
        False,
    )
    assert (args.wandb_project_name, args.wandb_entity, args.capture_video, args.save_model) == ("p", "e", False, False)
    assert (args.env_id, args.total_timesteps, args.learning_rate) == ("CartPole-v1", 1000, 0.001)
    assert (args.num_envs, args.num_steps, args.anneal_lr, args.gamma, args.gae_lambda) == (2, 16, False, 0.9, 0.8)
    assert (args.num_minibatches, args.update_epochs, args.norm_adv, args.clip_coef) == (2, 3, False, 0.1)
    assert (args.clip_vloss, args.ent_coef, args.vf_coef, args.max_grad_norm) == (False, 0.02, 0.4, 0.3)
    assert args.target_kl == 0.02


def test_other_shapes_of_values_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(monkeypatch, "--hidden-sizes", 32, 16, 8, "--target-kl", "None", "--env-kwargs", '{"a": [1, "b"]}')
    assert args.hidden_sizes == (32, 16, 8)
    assert args.target_kl is None
    assert json.loads(args.env_kwargs) == {"a": [1, "b"]}


def test_learning_rate_clipping_and_entropy_fall_linearly_to_zero(
    algo: str, run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float, float]] = []
    train = SCRIPTS[algo].train

    def record(run: Run, *given: Any) -> Any:
        (optimizer,) = run._optimizers
        seen.append((optimizer.param_groups[0]["lr"].item(), *given[-2:]))
        return train(run, *given)

    monkeypatch.setattr(SCRIPTS[algo], "train", record)
    run(anneal_clip=True, anneal_ent=True)
    # Three iterations: from the full value in the first, a third less in each
    for i, numbers in enumerate(seen):
        assert numbers == pytest.approx([0.02 * (1 - i / 3), 0.2 * (1 - i / 3), 0.01 * (1 - i / 3)])
    assert len(seen) == 3
    seen.clear()
    run(anneal_lr=False)
    assert seen == [pytest.approx((0.02, 0.2, 0.01))] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_envs", 0),
        ("num_steps", 0),
        ("total_timesteps", 0),
        ("num_threads", 0),
        ("update_epochs", 0),
        ("num_minibatches", 0),
        ("num_minibatches", 3),
        ("log_every", 0),
        ("checkpoint_every", -1),
        ("keep_checkpoints", 0),
        ("video_every", 0),
        ("seed", -1),
        ("gamma", 1.1),
        ("gamma", float("nan")),
        ("gae_lambda", -0.1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("clip_coef", 0.0),
        ("ent_coef", -0.1),
        ("vf_coef", -0.1),
        ("max_grad_norm", -0.1),
        ("target_kl", 0.0),
        ("log_std_init", 50.0),
        ("hidden_sizes", (8, 0)),
        ("activation", "sine"),
        ("env_kwargs", "[1]"),
        ("env_kwargs", "{"),
        ("exp_name", "a/b"),
        ("num_nodes", 0),
        ("node_rank", 1),
        ("main_port", 0),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} is ") as caught:
        PPOArgs(**{name: value})
    assert "\n" not in str(caught.value)
