"""Decoupled scripts as whole runs: equal to the coupled scripts, never further behind than allowed, ended together.

Ranks are forked as torchrun would start them; what launchers do is tested at the end, with launchers.
"""

import copy
import csv
import errno
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch.nn.utils import parameters_to_vector

from fabricrl.algos.droq import droq
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.args import SACArgs
from fabricrl.data import Batch, ReplayBuffer
from fabricrl.data.transitions import record_type
from fabricrl.utils.checkpoint import load_checkpoint
from tests.envs import Deterministic
from tests.process import (
    FORKED,
    LIMIT,
    PPO_DECOUPLED,
    SAC_DECOUPLED,
    Finished,
    Running,
    Team,
    call,
    command,
    differences,
    files,
    free_port,
    load,
    logged,
    run,
    run_folder,
    run_team,
    saved_steps,
    started,
    team,
    wait_for,
)

COUPLED: dict[str, Any] = {"ppo": ppo, "ppo_recurrent": ppo_recurrent, "sac": sac, "droq": droq}
MODULE = {algo: f"fabricrl.algos.{algo}.{algo}_decoupled" for algo in COUPLED}

# Episodes of 8 steps in 2 environments, so that one ends with each rollout or checkpoint, and resumed environments are
# where they would have been. Everything that has a state is on. PPO takes 18 iterations of 32 steps, SAC 120 of 2,
# learning from step 64 on; its ring of 48 transitions has wrapped by then. DroQ is like SAC, recurrent PPO like PPO
FLAGS: dict[str, list[object]] = {
    "ppo": ["--num-steps", 16, "--num-minibatches", 2, "--update-epochs", 3, "--total-timesteps", 576,
            "--learning-rate", 1e-2, "--norm-reward", "--anneal-clip", "--anneal-ent", "--target-kl", 0.001,
            "--env-kwargs", '{"truncate": true}', "--checkpoint-every", 192, "--log-every", 96],
    "sac": ["--total-timesteps", 240, "--learning-starts", 64, "--buffer-size", 48, "--batch-size", 8, "--n-step", 2,
            "--replay-ratio", 0.69, "--target-network-frequency", 3, "--tau", 0.05, "--num-critics", 3,
            "--env-kwargs", '{"continuous": true, "truncate": true}', "--checkpoint-every", 48, "--log-every", 32],
}  # fmt: skip
FLAGS["ppo_recurrent"] = [
    *FLAGS["ppo"],
    "--rnn-hidden-size",
    8,
    "--sequence-length",
    5,
    "--prev-action",
    "--prev-reward",
]
FLAGS["droq"] = [
    "--total-timesteps",
    240,
    "--learning-starts",
    64,
    "--buffer-size",
    48,
    "--batch-size",
    8,
    "--n-step",
    2,
]
FLAGS["droq"] += ["--replay-ratio", 2.69, "--dropout", 0.1, "--tau", 0.05, "--checkpoint-every", 48, "--log-every", 32]
FLAGS["droq"] += ["--env-kwargs", '{"continuous": true, "truncate": true}']
ON_POLICY = ("ppo", "ppo_recurrent")
SHARED: list[object] = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--norm-obs", "--hidden-sizes", 16]
SHARED += ["--num-threads", 1, "--keep-checkpoints", 100, "--logger", "csv"]
# One update of all rows: what two trainers share then is what one would have
ONE_MINIBATCH: list[object] = ["--num-minibatches", 1, "--update-epochs", 1, "--target-kl", None]


@pytest.fixture(params=COUPLED)
def algo(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def coupled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Runs of the coupled script, each made once."""

    @cache
    def train(algo: str, *flags: object) -> Finished:
        log_dir = tmp_path_factory.mktemp("coupled")
        return call(COUPLED[algo].main, *SHARED, *FLAGS[algo], *flags, "--log-dir", log_dir)

    return train


@pytest.fixture(scope="module")
def decoupled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Team, Path]]:
    """Runs of the decoupled script and their folders, each made once."""

    @cache
    def train(algo: str, *flags: object, world_size: int = 2) -> tuple[Team, Path]:
        folder = tmp_path_factory.mktemp("decoupled")
        line = [*SHARED, *FLAGS[algo], *flags, "--log-dir", folder / "logs"]
        return run_team(MODULE[algo], *line, folder=folder, world_size=world_size), run_folder(folder / "logs")

    return train


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:012d}.ckpt"


def content(path: Path | str) -> dict[str, Any]:
    """Contents of a checkpoint and its shards, without those that depend on how the run was started.

    A coupled script keeps the buffer of its first rank within the checkpoint, a decoupled one beside it.
    """
    path = Path(path)
    state = {name: value for name, value in load(path).items() if name not in ("args", "shards")}
    shards = {file.suffix: load(file)["shard"] for file in path.parent.glob(f"{path.stem}.shard*")}
    if (first := state.pop("shard")) is not None:
        shards[".shard0"] = first
    return state | shards


def resume(algo: str, path: Path, folder: Path, *flags: object, world_size: int = 2, **options: Any) -> Path:
    """Goes on from a checkpoint with ranks of the decoupled script; returns the new run's folder."""
    line = ["--resume", path, "--log-dir", folder / "logs", *flags]
    run_team(MODULE[algo], *line, folder=folder, world_size=world_size, **options)
    return run_folder(folder / "logs")


def table(folder: Path) -> list[dict[str, float]]:
    """The entries of metrics.csv, without what an entry lacks."""
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


# --- One trainer that is waited for does what the coupled script does

EQUAL: dict[str, tuple[str, list[object]]] = {
    "ppo": ("ppo", []),
    "ppo, continuous, bare, bf16-mixed": (
        "ppo",
        ["--env-id", "Pendulum-v1", "--env-kwargs", "{}", "--target-kl", None, "--no-norm-obs", "--no-norm-reward",
         "--no-anneal-lr", "--precision", "bf16-mixed"],
    ),
    "ppo_recurrent": ("ppo_recurrent", []),
    "ppo_recurrent, one gru, continuous, bf16-mixed": (
        "ppo_recurrent",
        ["--env-id", "Pendulum-v1", "--env-kwargs", "{}", "--target-kl", None, "--no-norm-obs", "--no-norm-reward",
         "--rnn-type", "gru", "--shared-core", "--encoder-sizes", 8, "--no-prev-action", "--no-prev-reward",
         "--precision", "bf16-mixed"],
    ),
    "droq": ("droq", []),
    "sac": ("sac", []),
    "sac, bare, bf16-mixed": (
        "sac",
        ["--env-id", "tests.envs:IdentityBox-v0", "--env-kwargs", "{}", "--no-norm-obs", "--policy-frequency", 1,
         "--implicit-next-obs", "--no-autotune", "--replay-ratio", 1.5, "--precision", "bf16-mixed"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_one_trainer_without_lag_leaves_the_checkpoints_of_the_coupled_script_to_the_last_bit(
    name: str, coupled: Callable, decoupled: Callable
) -> None:
    algo, flags = EQUAL[name]
    one = coupled(algo, *flags)
    ranks, folder = decoupled(algo, *flags, "--max-lag", 0)
    steps = saved_steps(one.folder)
    assert len(steps) >= 3
    assert saved_steps(folder) == steps
    parts = {"agent", "episodes", "generators", "global_step", "best_return", "world_size", "spaces"}
    parts |= {"optimizer"} if algo in ON_POLICY else {"q_optimizer", "actor_optimizer", "schedule", ".shard0"}
    for step in steps:
        expected, found = content(checkpoint(one.folder, step)), content(checkpoint(folder, step))
        assert parts <= expected.keys()
        assert differences(expected, found) == [], step
    first, last = (content(checkpoint(one.folder, step)) for step in (steps[0], steps[-1]))
    changed = {part.split("/")[1] for part in differences(first, last)}
    assert parts - {"best_return", "world_size", "spaces", "episodes"} <= changed, "what stays shows nothing"
    assert ranks.result.keys() == one.result.keys()
    for field in ("steps", "return_mean", "episodes"):
        assert ranks.result[field] == one.result[field]


@pytest.mark.parametrize("name", EQUAL)
def test_its_log_is_that_of_the_coupled_script_and_tells_how_long_each_side_has_waited(
    name: str, coupled: Callable, decoupled: Callable
) -> None:
    algo, flags = EQUAL[name]
    expected, found = table(coupled(algo, *flags).folder), table(decoupled(algo, *flags, "--max-lag", 0)[1])
    assert len(expected) == len(found) >= 5
    added = {"charts/lag", "time/wait_player", "time/wait_trainer"}
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs.keys() - ours.keys() == added
        assert ours.keys() <= theirs.keys()
        for tag, value in ours.items():
            if not tag.startswith("time/") and tag != "charts/SPS":
                assert theirs[tag] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), (tag, ours["step"])
        assert theirs["charts/lag"] == 0
        for tag in theirs:
            assert not tag.startswith("time/") or 0 <= theirs[tag] <= 1, (tag, theirs[tag])
        assert sum(value for tag, value in theirs.items() if tag.startswith("time/") and "trainer" not in tag) <= 1.001
    assert any(entry["time/wait_player"] > 0 for entry in found)
    assert any(entry["time/wait_trainer"] > 0 for entry in found)


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_evaluations_change_nothing_and_those_that_are_not_the_best_leave_no_checkpoint(
    algo: str, decoupled: Callable
) -> None:
    without = decoupled(algo, "--max-lag", 0)[1]
    every = {"ppo": 96, "sac": 16}[algo]
    beside = decoupled(algo, "--max-lag", 0, "--eval-every", every, "--eval-episodes", 1)[1]
    steps, seldom = saved_steps(beside), saved_steps(without)
    assert set(seldom) <= set(steps)
    for step in seldom:
        expected, found = content(checkpoint(without, step)), content(checkpoint(beside, step))
        assert {part.split("/")[1] for part in differences(expected, found)} <= {"best_return"}, step
    evaluations = [entry["step"] for entry in table(beside) if "eval/return_mean" in entry]
    returns = [entry["eval/return_mean"] for entry in table(beside) if "eval/return_mean" in entry]
    best = [step for i, step in enumerate(evaluations) if returns[i] > max(returns[:i], default=-np.inf)]
    assert steps == sorted({*seldom, *map(int, best)})
    assert len(evaluations) > len(set(map(int, evaluations)) & set(steps)), "every one was the best"
    shards = [int(path.stem.removeprefix("step_")) for path in (beside / "checkpoints").glob("step_*.shard0")]
    assert sorted(shards) == (steps if algo == "sac" else [])


def test_tensorboard_has_the_same_tags(tmp_path: Path) -> None:
    flags = [*SHARED, *FLAGS["ppo"], "--total-timesteps", 192, "--logger", "tensorboard"]
    one = logged(call(ppo.main, *flags, "--log-dir", tmp_path / "coupled").folder)
    run_team(MODULE["ppo"], *flags, "--no-save-model", "--log-dir", tmp_path / "logs", folder=tmp_path)
    assert not list((tmp_path / "logs").rglob("*.ckpt"))
    other = logged(run_folder(tmp_path / "logs"))
    assert other.keys() - one.keys() == {"charts/lag", "time/wait_player", "time/wait_trainer"}
    assert one.keys() <= other.keys()
    assert all([step for step, _ in one[tag]] == [step for step, _ in other[tag]] for tag in one)


# --- Several trainers


def after_one_update(algo: str, *flags: object) -> list[object]:
    more = ["--total-timesteps", 32, *ONE_MINIBATCH] if algo in ON_POLICY else []
    return [*more, *flags]


@pytest.mark.parametrize("algo", ON_POLICY)
def test_two_trainers_with_half_the_rows_each_make_the_update_of_the_coupled_script(
    algo: str, coupled: Callable, decoupled: Callable
) -> None:
    """Recurrent trainers have an environment each."""
    flags = after_one_update(algo, "--env-id", "Pendulum-v1", "--env-kwargs", "{}", "--max-grad-norm", 0.05)
    one = content(coupled(algo, *flags).checkpoint)
    two = content(decoupled(algo, *flags, world_size=3)[0].result["checkpoint"])
    assert one["optimizer"]["state"][0]["step"] == two["optimizer"]["state"][0]["step"] == 1
    for name, value in one["agent"].items():
        torch.testing.assert_close(two["agent"][name], value, rtol=0, atol=1e-5)
    for name, value in one["optimizer"]["state"][0].items():  # the first moment is a tenth of the gradient
        torch.testing.assert_close(two["optimizer"]["state"][0][name], value, rtol=1e-3, atol=1e-6)
    assert one["optimizer"]["state"][0]["exp_avg"].abs().max() > 1e-4
    assert len(two["generators"]) == 2
    assert differences(two["generators"][0, ::2], one["generators"][0, ::2]) == [], "the player is not the coupled one"
    assert differences(two["generators"][0, 1], two["generators"][1, 1]), "both trainers draw the same numbers"


def _watch_weights(rank: int) -> None:
    """Has the player end in an error if a rollout is looked at with other weights than those that acted in it."""
    from fabricrl.algos.ppo import ppo_decoupled

    rollout, returns_and_advantages = ppo_decoupled.rollout, ppo_decoupled.returns_and_advantages
    acted: list[float] = []

    def watched_rollout(run: Any, player: Any, *rest: Any) -> None:
        acted.append(parameters_to_vector(player.parameters()).double().sum().item())
        rollout(run, player, *rest)

    def watched_returns(run: Any, model: Any, agent: Any, *rest: Any) -> Any:
        assert parameters_to_vector(agent.parameters()).double().sum().item() == acted[-1]
        assert len(acted) < 6 or len(set(acted)) > 3  # they have moved meanwhile
        return returns_and_advantages(run, model, agent, *rest)

    if rank == 0:
        ppo_decoupled.rollout, ppo_decoupled.returns_and_advantages = watched_rollout, watched_returns


@pytest.mark.parametrize("lag", [1, 2])
def test_old_logprobs_are_those_of_the_weights_that_acted(lag: int, tmp_path: Path) -> None:
    """Newer weights, which may have come meanwhile, would make all ratios those of another policy."""
    flags = [*SHARED, *FLAGS["ppo"], "--total-timesteps", 320, "--max-lag", lag, "--log-dir", tmp_path / "logs"]
    run_team(MODULE["ppo"], *flags, folder=tmp_path, prepare=_watch_weights)


def test_each_trainer_of_sac_keeps_the_transitions_of_its_own_environment(
    coupled: Callable, decoupled: Callable
) -> None:
    """Before learning starts, both scripts play the same."""
    flags = [*LAGGED["sac"], "--max-lag", 1]
    whole = records(content(checkpoint(coupled("sac").folder, 48))[".shard0"], 2)
    parts = content(checkpoint(decoupled("sac", *flags, world_size=3)[1], 48))
    assert (whole[:, 0] == whole[:, 1]).sum() <= 1  # the row that comes next is empty
    for env in (0, 1):
        assert (records(parts[f".shard{env}"], 1)[:, 0] == whole[:, env]).all()


def draw_update(algo: str, agent: Any, rb: ReplayBuffer, rng: torch.Generator) -> tuple[dict, torch.Tensor, list]:
    """Batches [K, B, ...], noise [K, B, A], and what critics drop, as a trainer with half a batch of 4 draws them.

    SAC's critics and actor share one batch, each with noise of its own; of DroQ's two batches the last is the actor's.
    """
    batches = rb.sample(1 if algo == "sac" else 2, 4, rng).columns
    noise = agent.head.noise((2, 4), rng)
    kept = [] if algo == "sac" else [copy.deepcopy(agent.dropout_masks(passes, 4, rng)) for passes in (2, 1)]
    return batches, noise, kept  # a copy, since masks hold until the next draw


def side_by_side(*parts: Any) -> Any:
    """Tensors of several trainers with the rows of all, [K, B, ...], in lists as deep as theirs."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts, 1)
    return [side_by_side(*those) for those in zip(*parts, strict=True)]


@pytest.mark.parametrize(("algo", "count"), [("sac", 1), ("droq", 2)])
def test_two_trainers_make_the_updates_of_one_learner_with_both_their_batches(
    algo: str, count: int, tmp_path: Path
) -> None:
    """Each draws half a batch from its own buffer, with its own generator; their gradients are averaged.

    SAC makes one update; DroQ two of the critics, each with one of the actor.
    """
    module, more = COUPLED[algo], ["--policy-frequency", 1, "--target-network-frequency", 1]
    flags = [*SHARED, *FLAGS[algo], "--env-kwargs", '{"continuous": true, "length": 11}', "--replay-ratio", count / 2]
    flags += ["--learning-starts", 62, *(more if algo == "sac" else [])]
    flags += ["--total-timesteps", 64, "--checkpoint-every", 2, "--log-dir", tmp_path / "logs"]
    run_team(MODULE[algo], *flags, folder=tmp_path, world_size=3)
    folder = run_folder(tmp_path / "logs")
    before, after = load(checkpoint(folder, 62)), load(checkpoint(folder, 64))
    assert (before["schedule"]["done"], after["schedule"]["done"]) == (0, count)

    names = {"num_envs", "buffer_size", "batch_size", "n_step", "tau", "num_critics", "norm_obs", "policy_lr", "q_lr"}
    stored = {name: value for name, value in after["args"].items() if name in names | {"dropout"}}
    kinds = {"sac": partial(SACArgs, policy_frequency=1, target_network_frequency=1), "droq": DroQArgs}
    args = kinds[algo](**stored, hidden_sizes=(16,))  # type: ignore[operator]
    env = Deterministic(continuous=True)
    spaces = SimpleNamespace(single_observation_space=env.observation_space, single_action_space=env.action_space)
    agent: Any = module.make_agent(args, spaces)
    agent.load_state_dict(before["agent"])
    normalizer = {name: value for name, value in after["agent"].items() if name.startswith("obs_normalizer")}
    agent.load_state_dict(normalizer, strict=False)  # that of the step which was learned from at once
    drawn = []
    for rank in (0, 1):
        rb = ReplayBuffer(args.buffer_size // 2, 1, env.observation_space, 1, args.gamma, args.n_step)
        rb.load_state_dict(load(checkpoint(folder, 64).with_suffix(f".shard{rank}"))["shard"])
        rng = torch.Generator()
        rng.set_state(before["generators"][rank, 1].clone())
        drawn.append([draw_update(algo, agent, rb, rng) for _ in range(count)])
        assert torch.equal(rng.get_state(), after["generators"][rank, 1]), "the trainer has drawn something else"

    fabric = Fabric(accelerator="cpu", devices=1)
    alone: Any = SimpleNamespace(args=args, fabric=fabric, setup=fabric.setup, device_rng=None)
    learner = module.setup(alone, agent)
    steps = partial(module.update_critics, alone, learner), partial(module.update_actor, alone, learner)
    for (first, *halves), (second, *others) in zip(*drawn, strict=True):
        assert differences(first, second), "both trainers have drawn the same"
        both = Batch(**{name: torch.cat((first[name], second[name]), 1) for name in first})
        noise, dropped = side_by_side(halves, others)
        agent.head.noise, agent.dropout_masks = (
            lambda *_, noise=noise: noise,
            lambda *_, dropped=dropped: dropped.pop(0),
        )
        module.train(alone, learner, *steps, both, *([sac.make_plan(args, 1, 1)] if algo == "sac" else []))
    for name, value in after["agent"].items():
        torch.testing.assert_close(agent.state_dict()[name], value, rtol=0, atol=1e-5)
    for name in ("critics.layers", "actor"):
        keys = [key for key in after["agent"] if key.startswith(name.split(".")[0])]
        assert max((after["agent"][key] - before["agent"][key]).abs().max() for key in keys) > 2e-4, "nothing learned"


# --- Lag


def sha(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def acting(module: torch.nn.Module) -> str:
    """Parameters that the player acts with: all of PPO's, all of SAC's but the critics'."""
    return sha(*(value for name, value in module.named_parameters() if "critics" not in name))


def spy(rank: int) -> None:
    """Notes with what parameters each rollout begins and each update ends, and what each trainer learns from.

    The trainers' first update waits until the player has begun as many more rollouts as it may be ahead.
    """
    from fabricrl.algos.droq import droq_decoupled
    from fabricrl.algos.ppo import ppo_decoupled
    from fabricrl.algos.ppo_recurrent import ppo_recurrent_decoupled
    from fabricrl.algos.sac import sac_decoupled

    lag, path = int(os.environ["SPY_LAG"]), Path(os.environ["SPY"])
    calls: list[int] = []

    def note(**entry: Any) -> None:
        with path.with_suffix(f".{rank}").open("a") as file:
            print(json.dumps(entry), file=file)

    def wait(rollouts: int) -> None:
        deadline = time.monotonic() + LIMIT
        while len(path.with_suffix(".0").read_text().splitlines()) < rollouts:
            assert time.monotonic() < deadline, "the player does not play while the trainers learn"
            time.sleep(0.01)

    def rollout(original: Callable) -> Callable:
        def watched(run: Any, player: Any, *rest: Any) -> Any:
            note(rollout=acting(player))
            return original(run, player, *rest)

        return watched

    def train_on_policy(original: Callable) -> Callable:
        def watched(run: Any, step: Any, data: Any, *rest: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                wait(1 + lag)
            result = original(run, step, data, *rest)
            rows = [sha(*row) for row in zip(*(c for c in data.columns.values() if c is not None), strict=True)]
            (optimizer,) = run._optimizers
            note(update=sha(optimizer.flat.vector), everything=sha(*optimizer.tensors()), data=rows)
            return result

        return watched

    def train_off_policy(original: Callable) -> Callable:
        def watched(run: Any, learner: Any, *rest: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                wait(33 + lag)  # the 33rd rollout brings the first updates
            result = original(run, learner, *rest)
            batches = next(part for part in rest if isinstance(part, Batch))
            tensors = learner.q_optimizer.tensors() + learner.actor_optimizer.tensors()
            note(
                update=acting(learner.agent), data=[sha(*batches.columns.values())],
                everything=sha(*learner.agent.state_dict().values(), *tensors), first=len(calls),
            )  # fmt: skip
            return result

        return watched

    for module in (ppo_decoupled, ppo_recurrent_decoupled):
        module.train = train_on_policy(module.train)
    for module in (sac, droq):  # whose `make_sample_and_train` the twins have
        module.train = train_off_policy(module.train)
    for module in (ppo_decoupled, ppo_recurrent_decoupled, sac_decoupled, droq_decoupled):
        module.rollout = rollout(module.rollout)


# Off-policy algorithms learn in whole iterations here, from the 33rd on; the others from the first on
LAGGED: dict[str, list[object]] = {"ppo": [], "ppo_recurrent": [], "sac": ["--replay-ratio", 1], "droq": []}
BEFORE = {"ppo": 0, "ppo_recurrent": 0, "sac": 32, "droq": 32}
PER_ITERATION = {"ppo": 32, "ppo_recurrent": 32, "sac": 2, "droq": 2}


# Without lag, runs equal the coupled script's
@pytest.mark.parametrize(
    ("algo", "lag", "world_size"),
    [("ppo", 1, 3), ("ppo", 3, 2), ("ppo_recurrent", 2, 3), ("sac", 1, 3), ("sac", 3, 2), ("droq", 2, 3)],
)
def test_the_player_is_as_far_ahead_as_allowed_and_never_further_whichever_side_is_slow(
    algo: str, lag: int, world_size: int, decoupled: Callable, tmp_path: Path
) -> None:
    """The rollout of iteration i is played with the parameters after update i - lag, or those of the last checkpoint.

    The same run with trainers that are not held up leaves the same checkpoints.
    """
    flags = [*LAGGED[algo], "--max-lag", lag]
    line = [*SHARED, *FLAGS[algo], *flags, "--log-dir", tmp_path / "logs"]
    variables = {"SPY": str(tmp_path / "notes"), "SPY_LAG": str(lag)}
    run_team(MODULE[algo], *line, folder=tmp_path, world_size=world_size, prepare=spy, variables=variables)
    ranks = [
        [json.loads(text) for text in (tmp_path / f"notes.{rank}").read_text().splitlines()]
        for rank in range(world_size)
    ]
    played = [entry["rollout"] for entry in ranks[0]]
    often = 2 if algo == "droq" else 1  # it trains once for each of two environments' steps
    learned = [played[0], *(entry["update"] for entry in ranks[1][often - 1 :: often])]
    iterations, before = len(played), BEFORE[algo]
    assert len(learned) - 1 == iterations - before
    assert len(set(learned)) == len(learned), "an update has changed nothing"
    folder = run_folder(tmp_path / "logs")
    saved = [step // PER_ITERATION[algo] for step in saved_steps(folder)]
    for iteration, parameters in enumerate(played):
        fresh = max((step for step in saved if step <= iteration), default=0)
        updates = max(iteration - lag, fresh) - before
        assert parameters == learned[max(updates, 0)], iteration
    lags = [entry["charts/lag"] for entry in table(folder)]
    assert max(lags) == lag

    for trainer in ranks[2:]:
        for first, other in zip(ranks[1], trainer, strict=True):
            assert first["everything"] == other["everything"], "trainers have different parameters or moments"
            assert first["data"] != other["data"], "trainers learn from the same data"

    _, other_folder = decoupled(algo, *flags, world_size=world_size)
    assert saved_steps(folder) == saved_steps(other_folder)
    for step in saved_steps(folder):
        assert differences(content(checkpoint(folder, step)), content(checkpoint(other_folder, step))) == [], step


# --- Resuming


@pytest.mark.parametrize(("algo", "lag"), [("ppo", 1), ("ppo_recurrent", 2), ("sac", 1), ("droq", 2)])
def test_a_resumed_run_equals_the_straight_run_to_the_last_bit(
    algo: str, lag: int, decoupled: Callable, tmp_path: Path
) -> None:
    world_size = 3
    _, folder = decoupled(algo, *LAGGED[algo], "--max-lag", lag, world_size=world_size)
    step = 192 if algo in ON_POLICY else 96
    expected, before = content(folder / f"checkpoints/step_{saved_steps(folder)[-1]:012d}.ckpt"), None
    before = content(checkpoint(folder, step))
    found = resume(algo, checkpoint(folder, step), tmp_path, world_size=world_size)
    assert differences(expected, content(checkpoint(found, saved_steps(folder)[-1]))) == []
    changed = {name.split("/")[1] for name in differences(before, expected)}
    assert {"agent", "generators", "episodes", "global_step"} <= changed, "what does not change shows nothing"


MIDDLE = dict.fromkeys(ON_POLICY, 384) | {"sac": 144, "droq": 144}  # SAC's ratio leaves a fraction of an update there


def test_a_decoupled_run_goes_on_from_a_coupled_one_and_the_other_way_round(
    algo: str, coupled: Callable, decoupled: Callable, tmp_path: Path
) -> None:
    one = coupled(algo)
    _, folder = decoupled(algo, "--max-lag", 0)
    last = saved_steps(one.folder)[-1]
    expected = content(checkpoint(one.folder, last))
    on = resume(algo, checkpoint(one.folder, MIDDLE[algo]), tmp_path, "--max-lag", 0)
    assert on.name.startswith(f"{algo}_decoupled_")
    assert differences(expected, content(checkpoint(on, last))) == []
    finished = call(COUPLED[algo].main, "--resume", checkpoint(folder, MIDDLE[algo]), "--log-dir", tmp_path / "coupled")
    assert finished.code == 0
    assert not finished.folder.name.startswith(f"{algo}_decoupled_")
    assert differences(expected, content(finished.checkpoint)) == []


def test_another_number_of_trainers_goes_on_with_the_same_updates(coupled: Callable, tmp_path: Path) -> None:
    """Iterations more with two trainers, then with one, or with the coupled script: equal but for rounding."""
    flags = [*ONE_MINIBATCH, "--checkpoint-every", 32, "--total-timesteps", 96]
    one = coupled("ppo", *flags)
    third = content(checkpoint(one.folder, 96))

    def close(path: Path) -> dict[str, Any]:
        found = content(path)
        for name, value in third["agent"].items():
            torch.testing.assert_close(found["agent"][name], value, rtol=0, atol=2e-5)
        for name, value in third["optimizer"]["state"][0].items():
            torch.testing.assert_close(found["optimizer"]["state"][0][name], value, rtol=1e-3, atol=1e-6)
        assert found["episodes"] == third["episodes"]
        return found

    earlier = resume("ppo", checkpoint(one.folder, 32), tmp_path / "first", "--max-lag", 0, world_size=3)
    assert len(close(checkpoint(earlier, 96))["generators"]) == 2
    again = resume("ppo", checkpoint(earlier, 64), tmp_path / "again", world_size=2)
    assert len(close(checkpoint(again, 96))["generators"]) == 1
    finished = call(ppo.main, "--resume", checkpoint(earlier, 64), "--log-dir", tmp_path / "coupled")
    close(finished.checkpoint)


def test_a_replay_buffer_is_divided_among_other_trainers_and_put_together_again(
    coupled: Callable, tmp_path: Path
) -> None:
    """Of two environments, one each: what the coupled script has stored of each is what its trainer goes on with."""
    one = coupled("sac")
    two = resume("sac", checkpoint(one.folder, 144), tmp_path / "two", "--total-timesteps", 160, world_size=3)
    whole = records(content(checkpoint(one.folder, 144))[".shard0"], 2)
    parts = content(checkpoint(two, 160))
    assert {name for name in parts if name.startswith(".shard")} == {".shard0", ".shard1"}
    assert parts["schedule"]["done"] == int(0.69 * (160 - 64))
    finished = call(
        sac.main, "--resume", checkpoint(two, 160), "--total-timesteps", 176, "--log-dir", tmp_path / "back"
    )
    state = content(finished.checkpoint)
    assert state["schedule"]["done"] == int(0.69 * (176 - 64))
    together = records(state[".shard0"], 2)
    for env in (0, 1):
        own = records(parts[f".shard{env}"], 1)[:, 0]
        for other in (whole[:, env], together[:, env]):  # 8 of 24 steps were taken between
            assert 24 - 8 - 1 <= (own == other).sum() <= len(own) - 8, env


def records(buffer: dict[str, Any], num_envs: int) -> np.ndarray:
    """The records of a stored buffer, [rows, N]."""
    space = Deterministic(continuous=True).observation_space
    return buffer["records"].numpy().view(record_type(space, 1, False)).reshape(-1, num_envs)


# --- What goes wrong with one rank ends all of them

# Runs that nobody would wait for. A checkpoint is there after 40 iterations
ENDLESS: dict[str, list[object]] = {
    "ppo": ["--num-steps", 8, "--num-minibatches", 1, "--update-epochs", 1, "--checkpoint-every", 640],
    "sac": ["--learning-starts", 32, "--buffer-size", 48, "--batch-size", 8, "--checkpoint-every", 80],
}
ENDLESS |= {"ppo_recurrent": [*ENDLESS["ppo"], "--rnn-hidden-size", 8], "droq": [*ENDLESS["sac"], "--replay-ratio", 2]}
for _flags in ENDLESS.values():
    _flags += ["--env-id", "tests.envs:Fault-v0", "--num-envs", 2, "--hidden-sizes", 16, "--num-threads", 1]
    _flags += ["--keep-checkpoints", 3, "--total-timesteps", 1_000_000_000]


def endless(algo: str, tmp_path: Path, *flags: object, kind: str = "none", at_step: int = 0) -> list[object]:
    continuous = "" if algo in ON_POLICY else ', "continuous": true'
    kwargs = f'{{"kind": "{kind}", "at_step": {at_step}{continuous}}}'
    return [*ENDLESS[algo], "--env-kwargs", kwargs, "--log-dir", tmp_path / "logs", *flags]


def checkpoints(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "logs").glob("*/*/*/checkpoints/step_*.ckpt"))


def wait_for_checkpoint(running: Team, tmp_path: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not checkpoints(tmp_path):
        assert time.monotonic() < deadline, running.report()
        assert all(rank.exitcode is None for rank in running.ranks), running.report()
        time.sleep(0.05)


def assert_ended(running: Team, codes: list[int | None], within: float) -> None:
    """Each rank ends with its code, all of them in time; None: it cannot."""
    deadline = time.monotonic() + within
    for rank, code in zip(running.ranks, codes, strict=True):
        if code is not None:
            rank.join(max(deadline - time.monotonic(), 0))
    assert [rank.exitcode for rank in running.ranks] == codes, running.report()


def assert_newest_loads(algo: str, tmp_path: Path) -> Path:
    state, path = load_checkpoint(run_folder(tmp_path / "logs"), algo)
    assert path == checkpoints(tmp_path)[-1]
    assert all(tensor.isfinite().all() for tensor in state["agent"].values())
    return path


# Trainers that average something among themselves may not know which of them is gone
LOST = re.compile(r"error: rank (\d) lost (?:rank (\d): message \w+ (?:to|from) it|.+) in iteration (\d+): \S.*")


def loss_told(running: Team) -> str:
    """The end of the only line, which says who is missing; the line names an iteration."""
    assert len(running.errors) == 1, running.report()
    match = LOST.fullmatch(running.errors[0])
    assert match, running.report()
    assert int(match[3]) >= 40, "the run had a checkpoint by then"
    return running.errors[0].rpartition("; ")[2]


@pytest.mark.parametrize(
    ("algo", "victim", "world_size"),
    [("ppo", 0, 3), ("ppo_recurrent", 1, 3), ("ppo", 2, 3), ("droq", 2, 3)],  # an only trainer is killed below
)
def test_a_killed_rank_ends_the_others_with_code_7_and_a_line(
    algo: str, victim: int, world_size: int, tmp_path: Path
) -> None:
    flags = endless(algo, tmp_path)
    with team(MODULE[algo], *flags, folder=tmp_path, world_size=world_size) as running:
        wait_for_checkpoint(running, tmp_path)
        os.kill(running.ranks[victim].pid or 0, signal.SIGKILL)
        assert_ended(running, [-9 if rank == victim else 7 for rank in range(world_size)], within=LIMIT)
    assert re.fullmatch(rf"rank {victim}, process {running.ranks[victim].pid} of \S+, has ended", loss_told(running))
    assert_newest_loads(algo, tmp_path)


def test_a_stopped_trainer_ends_the_others_with_code_7_once_the_time_is_out(tmp_path: Path) -> None:
    """The player waits for the first trainer, which waits for the second."""
    flags = endless("sac", tmp_path, "--timeout", 0.1)  # 6 s
    with team(MODULE["sac"], *flags, folder=tmp_path, world_size=3) as running:
        wait_for_checkpoint(running, tmp_path)
        os.kill(running.ranks[2].pid or 0, signal.SIGSTOP)
        assert_ended(running, [7, 7, 7], within=LIMIT)  # the others wake it, and what it finds ends it, too
    assert re.fullmatch(rf"rank 2, process {running.ranks[2].pid} of \S+, has been stopped", loss_told(running))
    assert_newest_loads("sac", tmp_path)


@pytest.mark.parametrize(
    ("algo", "kind", "code", "words"),
    [
        ("ppo", "raise_reset", 4, "this environment cannot be reset"),
        ("ppo", "reward_nan", 5, "reward of environment 0 is not finite"),
        ("sac", "raise_step", 4, "RuntimeError: this environment cannot step"),
    ],
)
def test_a_fault_of_the_player_ends_all_ranks_with_its_code_and_one_line(
    algo: str, kind: str, code: int, words: str, tmp_path: Path
) -> None:
    flags = endless(algo, tmp_path, kind=kind, at_step=0 if kind == "raise_reset" else 400)
    ended = run_team(MODULE[algo], *flags, folder=tmp_path, code=code, world_size=3)
    (line,) = ended.errors
    assert words in line
    if kind != "raise_reset":
        assert_newest_loads(algo, tmp_path)


def nan_gradient(rank: int) -> None:
    """The last trainer's gradient is NaN at some time, as after a bug in what somebody has changed."""
    from fabricrl.utils.optimizer import FlatState

    gather, calls = FlatState.gather, []

    def spoil(flat: FlatState) -> torch.Tensor:
        gradient = gather(flat)
        calls.append(1)
        if len(calls) == 200 and rank == 2:
            gradient[0] = torch.nan
        return gradient

    FlatState.gather = spoil  # type: ignore[method-assign]


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_gradient_that_is_not_finite_on_one_trainer_ends_all_ranks_without_a_checkpoint_of_it(
    algo: str, tmp_path: Path
) -> None:
    flags = endless(algo, tmp_path, "--log-every", 1)
    ended = run_team(MODULE[algo], *flags, folder=tmp_path, code=5, world_size=3, prepare=nan_gradient)
    (line,) = ended.errors
    assert "not finite after the update" in line
    assert_newest_loads(algo, tmp_path)


def test_parameters_that_overflow_end_all_ranks_and_are_reported_once(tmp_path: Path) -> None:
    """All trainers notice, since they have the same parameters."""
    flags = endless("ppo", tmp_path, "--learning-rate", 1e30)
    ended = run_team(MODULE["ppo"], *flags, folder=tmp_path, code=5, world_size=3)
    assert len(ended.errors) == 1, ended.report()
    assert "not finite" in ended.errors[0]
    assert not checkpoints(tmp_path)


def disk_full(rank: int) -> None:
    """PPO's player, or SAC's last trainer, cannot write its second file."""
    from fabricrl.utils import checkpoint

    write, calls = checkpoint._write, []

    def spoil(path: Path, state: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, state)

    if rank == int(os.environ["RANK_WITH_FULL_DISK"]):
        checkpoint._write = spoil


@pytest.mark.parametrize(("algo", "rank"), [("ppo", 0), ("sac", 2)])
def test_a_full_disk_of_any_rank_ends_all_with_code_6_and_earlier_checkpoints_stay(
    algo: str, rank: int, tmp_path: Path
) -> None:
    flags = endless(algo, tmp_path)
    variables = {"RANK_WITH_FULL_DISK": str(rank)}
    ended = run_team(
        MODULE[algo], *flags, folder=tmp_path, code=6, world_size=3, prepare=disk_full, variables=variables
    )
    (line,) = ended.errors
    assert "No space left on device" in line
    assert len(checkpoints(tmp_path)) == 1
    assert_newest_loads(algo, tmp_path)


def defect(rank: int) -> None:
    """A bug in the trainers' code, such as nobody has thought of."""
    from fabricrl.algos.ppo import ppo_decoupled

    train, calls = ppo_decoupled.train, []

    def spoil(*given: Any) -> Any:
        calls.append(1)
        return train(*given) if len(calls) < 45 else 1 // 0

    ppo_decoupled.train = spoil


def test_an_exception_that_nobody_expects_shows_its_traceback_and_ends_the_others_with_code_7(tmp_path: Path) -> None:
    with team(MODULE["ppo"], *endless("ppo", tmp_path), folder=tmp_path, prepare=defect) as running:
        assert_ended(running, [7, 1], within=LIMIT)
    assert loss_told(running).startswith("rank 1, process "), running.report()
    assert "ZeroDivisionError" in running.printed("err")


# --- Signals


@pytest.mark.parametrize(
    ("algo", "ranks", "number", "code"),
    [
        ("ppo", [0], signal.SIGTERM, 143),
        ("ppo", [0, 1, 2], signal.SIGINT, 130),
        ("ppo_recurrent", [0], signal.SIGUSR1, 75),
        ("sac", [2], signal.SIGUSR1, 75),
        ("droq", [1], signal.SIGTERM, 143),
    ],
)
def test_a_signal_to_any_rank_ends_all_with_a_checkpoint_that_resumes(
    algo: str, ranks: list[int], number: int, code: int, tmp_path: Path
) -> None:
    with team(MODULE[algo], *endless(algo, tmp_path), folder=tmp_path, world_size=3) as running:
        wait_for_checkpoint(running, tmp_path)
        for rank in ranks:
            os.kill(running.ranks[rank].pid or 0, number)
        assert_ended(running, [code] * 3, within=LIMIT)
    assert running.errors == []
    path = assert_newest_loads(algo, tmp_path)
    step = load(path)["global_step"]
    assert (running.result["steps"], running.result["checkpoint"]) == (str(step), str(path))
    finished = call(COUPLED[algo].main, "--resume", path.parent.parent, "--total-timesteps", step + 64)
    assert (finished.code, finished.result["steps"]) == (0, str(step + 64))
    assert finished.folder == path.parent.parent


# --- Bad input, found out by the ranks together where a launcher has started them


@pytest.mark.parametrize(
    ("algo", "flags", "words"),
    [
        ("ppo", ["--num-envs", 1, "--num-steps", 9, "--num-minibatches", 3],
         "error: --num-envs is 1: it must be such that each of 2 trainers has an equal share of every minibatch of 3"),
        ("sac", ["--num-envs", 3],
         "error: --num-envs is 3: it must be a multiple of 2, so that each trainer has an equal part"),
        ("sac", ["--batch-size", 7],
         "error: --batch-size is 7: it must be a multiple of 2, so that each trainer has an equal part"),
        ("ppo", ["--player-device", "cuda"], "error: --player-device is cuda: it must be cpu: there is no GPU here"),
        ("ppo", ["--resume", "/nowhere"], "error: cannot read checkpoint /nowhere: No such file or directory"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_the_ranks_end_all_of_them_with_one_line(
    algo: str, flags: list[object], words: str, tmp_path: Path
) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = 3 if "--resume" in flags else 2
    line = [*endless(algo, tmp_path), *flags]
    ended = run_team(MODULE[algo], *line, folder=tmp_path, code=code, world_size=3)
    assert ended.errors == [words], ended.report()
    assert not (tmp_path / "logs").exists()


# --- Launchers


LAUNCHES: dict[str, tuple[str, list[object]]] = {
    "python": ("ppo", [*FORKED, PPO_DECOUPLED, "--devices", 2]),
    "lightning run model": ("sac", [command("lightning"), "run", "model", f"--main-port={free_port()}",
                                    "--accelerator=cpu", "--strategy=ddp", "--devices=2", SAC_DECOUPLED]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launcher_leaves_the_checkpoint_that_forked_ranks_leave(
    name: str, decoupled: Callable, tmp_path: Path
) -> None:
    algo, words = LAUNCHES[name]
    ended = run(*words, *SHARED, *FLAGS[algo], "--max-lag", 0, "--log-dir", tmp_path / "logs")
    assert ended.code == 0, ended.report()
    folder = run_folder(tmp_path / "logs")
    other = decoupled(algo, "--max-lag", 0)[1]
    assert files(folder) == files(other)
    last = saved_steps(other)[-1]
    assert ended.result["checkpoint"] == str(checkpoint(folder, last))
    assert differences(content(checkpoint(folder, last)), content(checkpoint(other, last))) == []
    told = [line for line in ended.err.splitlines() if line.startswith(("error:", "warning:"))]
    assert not [line for line in told if "start from equal observations" not in line]


def killed(algo: str, rank: int, tmp_path: Path) -> Running:
    """A run that Fabric has launched, of which one rank is killed once it has a checkpoint."""
    script = {"ppo": PPO_DECOUPLED, "sac": SAC_DECOUPLED}[algo]
    with started(*FORKED, script, *endless(algo, tmp_path), "--devices", 2) as running:
        wait_for(lambda: checkpoints(tmp_path), running)
        os.kill(running.rank_pid(rank), signal.SIGKILL)
        return running.finish()


def test_a_killed_trainer_of_fabrics_launcher_ends_the_player_with_code_7(tmp_path: Path) -> None:
    running = killed("ppo", 1, tmp_path)
    assert running.code == 7, running.report()
    (line,) = running.errors
    assert LOST.fullmatch(line), running.report()
    assert "rank 0 lost rank 1" in line
    assert_newest_loads("ppo", tmp_path)


def test_a_killed_player_of_fabrics_launcher_leaves_no_trainer_behind(tmp_path: Path) -> None:
    assert killed("sac", 0, tmp_path).code == -9
    assert_newest_loads("sac", tmp_path)
