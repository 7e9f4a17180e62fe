"""SAC and DroQ on several ranks: every launcher, one result; equal parameters, own data, averaged gradients."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch.nn.utils import parameters_to_vector

from fabricrl import evaluate
from fabricrl.algos.droq import droq
from fabricrl.algos.droq.agent import DroQAgent
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.agent import SACAgent
from fabricrl.algos.sac.args import SACArgs
from fabricrl.data import Batch, ReplayBuffer
from tests.conftest import Descent
from tests.process import (
    DROQ,
    FORKED,
    FORKSERVER,
    LIMIT,
    SAC,
    Running,
    call,
    command,
    differences,
    files,
    free_port,
    load,
    run,
    run_folder,
    run_team,
)
from tests.test_launchers import DDP, two_nodes

# 16 iterations of 2 ranks × 2 environments; learning starts after the eighth. Episodes take 10 steps
SMALL: list[object] = ["--env-id", "tests.envs:IdentityBox-v0", "--num-envs", 2, "--total-timesteps", 64]
SMALL += ["--learning-starts", 32, "--batch-size", 8, "--buffer-size", 32, "--hidden-sizes", 16, "--num-threads", 1]
SMALL += ["--checkpoint-every", 32, "--policy-lr", 0.01, "--q-lr", 0.01, "--norm-obs"]
PARTS = (
    "agent",
    "q_optimizer",
    "actor_optimizer",
    "schedule",
    "episodes",
    "generators",
    "global_step",
    "best_return",
    "shard",
)


# --- Launchers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def launched(base: Path) -> Callable[..., tuple[Running, Path]]:
    """Runs a script by a launcher once; returns what it printed and its run folder."""

    @cache
    def launch(name: str, script: str) -> tuple[Running, Path]:
        log_dir = base / f"{name} {Path(script).stem}"
        flags = [*SMALL, "--log-dir", log_dir]
        if script == DROQ:
            flags += ["--replay-ratio", 2]
        lightning = ["--accelerator=cpu", "--strategy=ddp", "--devices=2", script, *flags]
        if name == "two nodes":
            ended = two_nodes([*FORKED, script, *map(str, flags), "--num-nodes", "2", "--strategy", "ddp"])
        else:
            arguments: dict[str, list[object]] = {
                "python": [*FORKED, script, *DDP, *flags],
                "lightning run model": [command("lightning"), "run", "model", f"--main-port={free_port()}", *lightning],
            }
            ended = run(*arguments[name])
        assert ended.code == 0, ended.report()
        return ended, run_folder(log_dir)

    return launch


# tests/test_launchers.py holds PPO against all launchers. Here are those that place ranks, and so buffers, differently
LAUNCHES = [("python", SAC), ("two nodes", SAC), ("lightning run model", DROQ)]
NAMES = [f"{name}, {Path(script).stem}" for name, script in LAUNCHES]


@pytest.mark.parametrize(("name", "script"), LAUNCHES, ids=NAMES)
def test_a_launcher_runs_the_script_once_and_each_rank_writes_its_buffer(
    launched: Callable, name: str, script: str
) -> None:
    ended, folder = launched(name, script)
    assert ended.result["steps"] == "64"
    assert ended.result["checkpoint"] == str(folder / "checkpoints" / "step_000000000064.ckpt")
    assert not [line for line in ended.err.splitlines() if line.startswith(("error:", "warning:"))]
    assert ended.err.count("replay buffer: ") == 1
    saved = {f"checkpoints/step_{step:012d}{suffix}" for step in (32, 64) for suffix in (".ckpt", ".shard1")}
    (best,) = folder.glob("checkpoints/best_*.shard1")  # named after its step
    saved |= {"checkpoints/best.ckpt", f"checkpoints/{best.name}"}
    assert files(folder) - {"hparams.yaml"} == saved | {"args.json", "events.out.tfevents"}


def test_two_nodes_end_with_the_parameters_and_buffers_of_one_to_the_last_bit(launched: Callable) -> None:
    first, other = (Path(launched(name, SAC)[0].result["checkpoint"]) for name in ("python", "two nodes"))
    states = [load(path) for path in (first, other)]
    assert states[1]["world_size"] == 2
    for part in PARTS:
        assert differences(states[0][part], states[1][part]) == [], part
    assert differences(*(load(path.with_suffix(".shard1")) for path in (first, other))) == []


def test_a_checkpoint_of_two_ranks_is_evaluated_by_one_process(launched: Callable) -> None:
    _, folder = launched("lightning run model", DROQ)
    played = call(evaluate.main, folder, "--episodes", 2, "--json")
    assert json.loads(played.out)["greedy"]["episodes"] == 2


# --- What ranks share and what they do not


def sha(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def spy(rank: int) -> None:
    """Notes what each rank has after every iteration, and what it has seen and drawn by then."""
    samples: list[tuple[str, int]] = []
    notes = Path(os.environ["SPY"]).with_suffix(f".{rank}")
    add, sample = ReplayBuffer.add, ReplayBuffer.sample

    def noted_add(rb: ReplayBuffer, actions: Any, next_obs: Any, *rest: Any) -> None:
        add(rb, actions, next_obs, *rest)
        note({"obs": next_obs.tolist(), "actions": actions.tolist()})

    def noted_sample(rb: ReplayBuffer, num_batches: int, batch_size: int, rng: torch.Generator) -> Any:
        batches = sample(rb, num_batches, batch_size, rng)
        samples.append((sha(*batches.columns.values()), rng.initial_seed()))
        return batches

    def note(entry: dict[str, Any]) -> None:
        with notes.open("a") as file:
            print(json.dumps(entry), file=file)

    def watched(original: Callable) -> Callable:
        def train(run: Any, learner: sac.Learner, *rest: Any) -> Any:
            result = original(run, learner, *rest)
            agent = learner.agent
            moments = [
                value
                for optimizer in (learner.q_optimizer, learner.actor_optimizer)
                for state in optimizer.state_dict()["state"].values()
                for value in state.values()
            ]
            parts = {
                "actor": agent.actor.state_dict().values(),
                "critics": agent.critics.state_dict().values(),
                "targets": agent.target_critics.state_dict().values(),
                "temperature": [agent.log_alpha],
                "normaliser": agent.obs_normalizer.state_dict().values(),
                "optimizers": moments,
            }
            shared = {name: sha(*tensors) for name, tensors in parts.items()}
            note(shared | dict(zip(("sampled", "generator"), samples[-1], strict=True)))
            return result

        return train

    ReplayBuffer.add, ReplayBuffer.sample = noted_add, noted_sample  # type: ignore[method-assign]
    sac.train, droq.train = watched(sac.train), watched(droq.train)


@pytest.mark.parametrize("algo", ["sac", "droq"])
def test_ranks_have_equal_parameters_after_every_update_and_learn_from_different_data(
    algo: str, tmp_path: Path
) -> None:
    flags = [*SMALL, "--env-kwargs", '{"length": 1000}', "--replay-ratio", 2, "--log-dir", tmp_path / "logs"]
    module = f"fabricrl.algos.{algo}.{algo}"
    run_team(module, *flags, folder=tmp_path, prepare=spy, variables={"SPY": str(tmp_path / "notes")})
    ranks = [[json.loads(line) for line in (tmp_path / f"notes.{rank}").read_text().splitlines()] for rank in (0, 1)]
    steps, updates = ([[entry for entry in rank if name in entry] for rank in ranks] for name in ("obs", "actor"))
    calls = 8 * {"sac": 1, "droq": 4}[algo]  # DroQ's train is of an environment step
    assert [len(rank) for rank in (*steps, *updates)] == [16, 16, calls, calls]
    for first, second in zip(*updates, strict=True):
        assert {name for name in first if first[name] == second[name]} == first.keys() - {"sampled", "generator"}
    for name in ("actor", "critics", "targets", "temperature", "normaliser"):
        changes = 8 if name == "normaliser" else calls
        assert len({entry[name] for entry in updates[0]}) == changes, f"{name} does not change"
    for first, second in zip(*steps, strict=True):
        rows = first["obs"] + second["obs"]
        assert len({tuple(row) for row in rows}) == 4, "two of four environments show the same"
        rows = first["actions"] + second["actions"]
        assert len({tuple(row) for row in rows}) == 4, "two of four environments are acted upon alike"


def test_two_ranks_learn_something_else_than_one(launched: Callable, tmp_path: Path) -> None:
    one = load(call(sac.main, *SMALL, "--num-envs", 4, "--log-dir", tmp_path).checkpoint)
    two = load(launched("python", SAC)[0].result["checkpoint"])
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert one["schedule"] == two["schedule"]
    assert one["q_optimizer"]["state"][0]["step"] == two["q_optimizer"]["state"][0]["step"]
    changed = differences(one["agent"], two["agent"])
    assert {name.removeprefix("/").split(".")[0] for name in changed} == {
        "actor", "critics", "log_alpha", "obs_normalizer", "target_critics",
    }  # fmt: skip


# --- Gradients

ROWS, OBS, ACTIONS = 32, 3, 2
SPACE = Box(-1, 1, (OBS,), np.float32)


def batch() -> Batch:
    """The data of an update, whose second half is another world than the first."""
    rng = torch.Generator().manual_seed(5)
    half = (torch.arange(ROWS) >= ROWS // 2).float()
    return Batch(
        obs=torch.randn(ROWS, OBS, generator=rng) + half[:, None],
        actions=torch.rand(ROWS, ACTIONS, generator=rng) * 2 - 1,
        rewards=torch.randn(ROWS, generator=rng) * (1 + 3 * half) + 2 * half,
        next_obs=torch.randn(ROWS, OBS, generator=rng) - half[:, None],
        terminated=(torch.rand(ROWS, generator=rng) < 0.2).float(),
        discounts=torch.full((ROWS,), 0.99),
        noise=torch.randn(ROWS, ACTIONS, generator=rng),
    )


def update(rank: int, world_size: int, port: int, kind: str, path: str) -> None:
    """Two updates of everything on this rank's share of the rows; writes the parameters before and after."""
    from lightning.fabric import Fabric

    if world_size > 1:  # Fabric takes the place in the group that the environment names, and starts nothing itself
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto")
    fabric.launch()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    agent = {"sac": SACAgent, "droq": DroQAgent}[kind](SPACE, ACTIONS, (16, 16), layer_norm=kind == "droq")
    run: Any = SimpleNamespace(fabric=fabric, setup=fabric.setup, args=SACArgs(tau=0.5, policy_lr=0.1, q_lr=0.1))
    with mock.patch.object(sac, "Adam", Descent):
        learner = sac.setup(run, agent)
    data = batch()[rank * ROWS // world_size : (rank + 1) * ROWS // world_size]

    def vectors() -> dict[str, torch.Tensor]:
        parts = {"critics": agent.critics, "actor": agent.actor, "targets": agent.target_critics}
        found = {name: parameters_to_vector(part.parameters()).detach().clone() for name, part in parts.items()}
        return found | {"temperature": agent.log_alpha.detach().clone()}

    before = {f"{name}, before": vector for name, vector in vectors().items()}
    with fabric.no_backward_sync(learner.actor), fabric.no_backward_sync(learner.critics):
        for _ in range(2):
            if kind == "sac":
                sac.update_critics(run, learner, data, data.noise, True)
                sac.update_actor(run, learner, data.obs, data.noise)
            else:
                droq.update_critics(run, learner, data, data.noise, [], [])
                droq.update_actor(run, learner, data.obs, data.noise, [])
    torch.save(before | vectors(), f"{path}.{world_size}.{rank}")


@pytest.mark.parametrize("kind", ["sac", "droq"])
def test_two_ranks_with_half_the_rows_each_make_the_updates_of_one_rank_with_all_rows(
    kind: str, tmp_path: Path
) -> None:
    """Gradients of critics, actor and temperature are averaged; nothing else could make these equal."""
    path, port = str(tmp_path / "parameters"), free_port()
    ranks = [FORKSERVER.Process(target=update, args=(rank, 2, port, kind, path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    update(0, 1, 0, kind, path)
    for rank in ranks:
        rank.join(LIMIT)
        rank.kill()
        assert rank.exitcode == 0
    one, first, second = (load(f"{path}.{name}") for name in ("1.0", "2.0", "2.1"))
    for name, vector in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], vector, rtol=0, atol=1e-6)
        if "before" in name:
            assert (one[name.removesuffix(", before")] - vector).abs().max() > 1e-2, "nothing has been learned"
