"""Output of SAC and DroQ, checkpoints that can be played, and options together, end to end."""

import csv
import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from fabricrl import evaluate
from fabricrl.algos import run as run_module
from fabricrl.algos.droq import droq
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.args import SACArgs
from fabricrl.utils.metric import EpisodeStatistics
from tests.process import Finished, call, load, logged, saved_steps
from tests.test_run import RESULT

SCRIPTS: dict[str, Any] = {"sac": sac, "droq": droq}
ARGS = {"sac": SACArgs, "droq": DroQArgs}
TAGS = {
    "charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS",
    "losses/qf_loss", "losses/qf_values", "losses/actor_loss", "losses/alpha_loss", "losses/alpha", "losses/entropy",
    "time/env", "time/act", "time/train", "time/comm",
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "env_id": "Pendulum-v1",
    "num_envs": 2,
    "total_timesteps": 1200,
    "learning_starts": 100,
    "batch_size": 8,
    "buffer_size": 500,
    "replay_ratio": 0.5,
    "hidden_sizes": (16, 16),
    "num_threads": 1,
    "norm_obs": True,
    "log_every": 400,
    "checkpoint_every": 500,
    "seed": 3,
    "exp_name": "named.run-1",
}


def line(settings: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, tuple) else (value,)
        words += [flag] if value is True else [flag, *map(str, values)]
    return words


@pytest.fixture(params=SCRIPTS)
def algo(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    """1200 steps of Pendulum-v1 in 2 environments, whose episodes take 200 steps; made once for each script."""
    made: dict[str, Finished] = {}

    def train(algo: str) -> Finished:
        if algo not in made:
            made[algo] = call(SCRIPTS[algo].main, *line(SETTINGS), "--log-dir", tmp_path_factory.mktemp(algo))
        return made[algo]

    return train


@pytest.fixture
def finished(algo: str, trained: Callable[[str], Finished]) -> Finished:
    return trained(algo)


def test_run_folder_is_named_as_always_and_holds_events_arguments_and_checkpoints(
    algo: str, finished: Finished
) -> None:
    assert finished.folder.parts[-3:-1] == (algo, "Pendulum-v1")
    assert re.fullmatch(r"named\.run-1_3_\d{8}-\d{6}", finished.folder.name)
    names = {re.sub(r"tfevents.*", "tfevents", path.name) for path in finished.folder.iterdir()}
    assert names - {"hparams.yaml"} == {"args.json", "checkpoints", "events.out.tfevents"}
    assert saved_steps(finished.folder) == [500, 1000, 1200]


def test_args_json_holds_the_arguments_that_ran(algo: str, finished: Finished) -> None:
    stored = json.loads((finished.folder / "args.json").read_text())
    expected = dataclasses.asdict(ARGS[algo](**SETTINGS, log_dir=str(finished.folder.parent.parent.parent)))
    assert stored == expected | {"hidden_sizes": [16, 16], "obs_keys": [], "info_keys": []}


def test_result_is_one_line_on_standard_output_that_tells_what_happened(finished: Finished) -> None:
    match = RESULT.fullmatch(finished.out.rstrip("\n"))
    assert match, finished.out
    steps, sps, return_mean, episodes, checkpoint = match.groups()
    state = load(checkpoint)
    assert int(steps) == 1200 == state["global_step"]
    assert int(sps) > 0
    assert int(episodes) == state["episodes"]["count"] == 6
    assert float(return_mean) == pytest.approx(np.mean(state["episodes"]["returns"]), abs=0.01)
    assert finished.code == 0


def test_nothing_is_printed_besides_but_where_it_runs_and_what_the_buffer_takes(finished: Finished) -> None:
    buffer, chosen, place = finished.err.splitlines()
    assert re.fullmatch(r"vectorization: a?sync", chosen)
    assert re.fullmatch(r"replay buffer: 500 transitions, 0\.000 GiB per rank, in memory", buffer)
    assert str(finished.folder) in place


def test_every_tag_of_the_design_is_logged_and_steps_are_environment_steps(algo: str, finished: Finished) -> None:
    scalars = logged(finished.folder)
    assert scalars.keys() >= TAGS
    for tag in TAGS:
        assert [step for step, _ in scalars[tag]] == [400, 800, 1200], tag
        assert all(math.isfinite(value) for _, value in scalars[tag]), tag
    assert [value for _, value in scalars["charts/episodic_length"]] == [200] * 3
    assert scalars["charts/learning_rate"][-1][1] == pytest.approx(3e-4)
    # The temperature is logged as it was on average, and is learned
    first, *alphas = [ARGS[algo]().alpha, *(value for _, value in scalars["losses/alpha"])]
    last = load(finished.checkpoint)["agent"]["log_alpha"].exp().item()
    assert first > alphas[0] > alphas[1] > alphas[2] > last > first / 2


def test_time_shares_of_each_entry_add_up_to_one(finished: Finished) -> None:
    shares = {tag: values for tag, values in logged(finished.folder).items() if tag.startswith("time/")}
    for entry in zip(*shares.values(), strict=True):
        assert all(0 <= share <= 1 for _, share in entry)
        assert sum(share for _, share in entry) == pytest.approx(1, abs=1e-4)


def test_csv_has_the_same_columns_and_losses_only_once_there_are_some(algo: str, tmp_path: Path) -> None:
    settings = SETTINGS | {"total_timesteps": 160, "log_every": 80}
    folder = call(SCRIPTS[algo].main, *line(settings), "--logger", "csv", "--log-dir", tmp_path).folder
    with (folder / "metrics.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first.keys() >= TAGS - {"charts/episodic_return", "charts/episodic_length"}
    assert (first["step"], second["step"]) == ("80", "160")
    assert first["losses/qf_loss"] == ""  # learning starts at 100
    assert float(second["losses/qf_loss"]) > 0


# --- Evaluation


def played(path: Path, *flags: object) -> dict[str, Any]:
    finished = call(evaluate.main, path, "--json", *flags)
    assert finished.code == 0
    assert len(finished.out.splitlines()) == 1
    return json.loads(finished.out)


def greedy_action(agent: dict[str, torch.Tensor], obs: np.ndarray) -> np.ndarray:
    """The policy written out with NumPy: normalise, two ReLU layers, tanh of the mean, Pendulum's torque of up to 2."""
    weights = {name: tensor.numpy() for name, tensor in agent.items()}
    mean, var = weights["obs_normalizer.mean"], weights["obs_normalizer.var"]
    x = np.clip((obs - mean) / np.sqrt(var + 1e-8), -10, 10)
    for layer in ("actor.hidden.0", "actor.hidden.1"):
        x = np.maximum(weights[f"{layer}.weight"] @ x + weights[f"{layer}.bias"], 0)
    x = weights["actor.out.weight"] @ x + weights["actor.out.bias"]
    return 2 * np.tanh(x[:1])


def test_greedy_results_equal_a_loop_written_by_hand(finished: Finished) -> None:
    agent = load(finished.checkpoint)["agent"]
    returns = []
    for seed in (50, 51):
        env = gym.make("Pendulum-v1")
        obs, _ = env.reset(seed=seed)
        score, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(greedy_action(agent, obs).astype(np.float32))
            score, done = score + float(reward), terminated or truncated
        returns.append(score)
    result = played(finished.checkpoint, "--episodes", 2, "--num-envs", 2, "--seed", 50)["greedy"]
    assert result["episodes"] == 2
    assert result["length_mean"] == 200
    # Single and double precision, over 200 steps of a pendulum that falls
    assert (result["return_min"], result["return_max"]) == pytest.approx((min(returns), max(returns)), rel=1e-3)


def test_both_modes_are_played_and_play_the_same_when_repeated(finished: Finished) -> None:
    before = finished.checkpoint.read_bytes()
    result = played(finished.folder, "--episodes", 3)
    assert result.keys() == {"greedy", "sampled"}
    assert all(mode["episodes"] == 3 and math.isfinite(mode["return_mean"]) for mode in result.values())
    assert result["greedy"] != result["sampled"]
    assert played(finished.checkpoint, "--episodes", 3) == result
    assert finished.checkpoint.read_bytes() == before


def test_the_table_has_a_line_for_each_mode(finished: Finished) -> None:
    lines = call(evaluate.main, finished.checkpoint, "--episodes", 1).out.splitlines()
    assert "Pendulum-v1" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["greedy", "sampled"]


# --- Together


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("flags", [(), ("--implicit-next-obs", "--buffer-memmap")], ids=str)
def test_options_work_together(algo: str, vectorization: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """Three environments whose episodes end at different times, by termination and by time limits, and a ring that is
    shorter than an episode and three-step returns cross."""
    env_kwargs = '{"action": "box_uneven", "obs": "dict", "length": 7}'
    settings = SETTINGS | {"env_id": "tests.envs:Odd-v0", "env_kwargs": env_kwargs, "num_envs": 3, "n_step": 3}
    settings |= {"total_timesteps": 240, "buffer_size": 60, "num_critics": 3, "vectorization": vectorization}
    finished = call(SCRIPTS[algo].main, *line(settings), *flags, "--log-dir", tmp_path)
    assert finished.code == 0
    state = load(finished.checkpoint)
    assert state["schedule"]["done"] == (240 - 100) // 2
    assert state["episodes"]["count"] == 3 * (80 // 7)
    assert all(tensor.isfinite().all() for tensor in state["agent"].values())
    assert played(finished.checkpoint, "--episodes", 2)["sampled"]["length_mean"] == 7


@pytest.mark.parametrize(
    ("obs", "action"),
    [("discrete", "box_uneven"), ("multi_binary", "box_2d"), ("box_2d", "box"), ("multi_discrete", "box")],
)
def test_every_supported_space_is_trained_and_played(algo: str, obs: str, action: str, tmp_path: Path) -> None:
    """The environment refuses actions that are not in its space."""
    env_kwargs = f'{{"action": "{action}", "obs": "{obs}"}}'
    settings = SETTINGS | {"env_id": "tests.envs:Odd-v0", "env_kwargs": env_kwargs, "total_timesteps": 140}
    finished = call(SCRIPTS[algo].main, *line(settings), "--log-dir", tmp_path)
    assert finished.result["steps"] == "140"
    assert played(finished.checkpoint, "--episodes", 2)["greedy"]["episodes"] == 2


def test_steps_do_not_pile_up_until_a_log_entry_is_due(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A decoupled player notes no updates, which would have them counted."""
    monkeypatch.setattr(run_module, "FETCH_EVERY", 10)
    noted: list[int] = []
    add = EpisodeStatistics.add

    def spied(self: EpisodeStatistics, *step: Any) -> None:
        add(self, *step)
        noted.append(self.num_pending)

    monkeypatch.setattr(EpisodeStatistics, "add", spied)
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", 100, "--learning-starts", 90, "--batch-size", 8]
    assert call(sac.main, *flags, "--log-every", 1000, "--log-dir", tmp_path).code == 0
    assert (len(noted), max(noted)) == (100, 10)
