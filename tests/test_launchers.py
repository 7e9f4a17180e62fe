"""One script, every launcher, the same result: ranks agree to the last bit, learn from all data, and write once."""

import os
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo.ppo import train, train_epoch
from fabricrl.algos.ppo.ppo import update as update_step
from fabricrl.data import Batch
from fabricrl.utils.errors import RunError
from fabricrl.utils.optimizer import Adam
from tests.conftest import Descent
from tests.envs import vectors
from tests.process import (
    EVALUATE,
    FORKED,
    FORKSERVER,
    LIMIT,
    PPO,
    PYTHON,
    Running,
    command,
    differences,
    files,
    free_port,
    load,
    run,
    run_folder,
    started,
)

# Two iterations of 2 ranks × 4 environments × 128 steps
SMALL = ["--total-timesteps", "2048", "--checkpoint-every", "1024"]
DDP = ["--devices", "2", "--strategy", "ddp"]
LIGHTNING = [
    "--accelerator=cpu",
    "--strategy=ddp",
    "--devices=2",
    "fabricrl/algos/ppo/ppo.py",
    "--env-id",
    "CartPole-v1",
]

# PPO as it is, with a protocol of what each rank has learned and seen
SPY = '''
"""Spies on ranks."""
import hashlib, os, pathlib
from fabricrl.algos import run as run_module
from fabricrl.algos.ppo import ppo
from fabricrl.utils.ending import run_script

def note(fabric, *words):
    with open(f"{os.environ['SPY']}.{fabric.global_rank}", "a") as file:
        print(*words, file=file)

def sha(tensor):
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()

def train(run, epoch, data, *rest):
    result = original_train(run, epoch, data, *rest)
    (optimizer,) = run._optimizers
    learned = optimizer.flat.vector, optimizer.flat.exp_avg, optimizer.flat.exp_avg_sq
    seen = data.obs[:4], data.obs, data.actions
    note(run.fabric, "train", *map(sha, learned), *map(sha, seen))
    return result

class EpisodeStatistics(run_module.EpisodeStatistics):
    def update(self, fabric, rewards, dones, *rest):
        super().update(fabric, rewards, dones, *rest)
        note(fabric, "episodes", int(dones.sum()), self.count)

original_train, ppo.train, run_module.EpisodeStatistics = ppo.train, train, EpisodeStatistics
run_script(ppo.main)
'''


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "spy.py").write_text(SPY)
    return folder


@pytest.fixture(scope="module")
def launched(base: Path) -> Any:
    """Runs a launcher once; returns what it printed and its run folder."""

    def log_dir(name: str) -> list[str]:
        return [*SMALL, "--log-dir", str(base / name)]

    def arguments(name: str) -> list[str]:
        return {
            "python, one rank": [*FORKED, PPO, *log_dir(name)],
            "python": [*PYTHON, str(base / "spy.py"), *DDP, *log_dir(name)],
            "fabric run": [command("fabric"), "run", f"--main-port={free_port()}", *LIGHTNING, *log_dir(name)],
            "lightning run model": [
                command("lightning"),
                "run",
                "model",
                f"--main-port={free_port()}",
                *LIGHTNING,
                *log_dir(name),
            ],
            "torchrun": [command("torchrun"), "--standalone", "--nproc-per-node", "2", PPO, *log_dir(name)],
        }[name]

    @cache
    def launch(name: str) -> tuple[Running, Path]:
        if name == "two nodes":
            ended = two_nodes([*FORKED, PPO, *log_dir(name), "--num-nodes", "2", "--strategy", "ddp"])
        else:
            variables = {"SPY": str(base / "notes")}
            with started(*arguments(name), variables=variables) as running, running.watched():
                ended = running.finish()
        assert ended.code == 0, ended.report()
        return ended, run_folder(base / name)

    return launch


def two_nodes(words: list[str]) -> Running:
    """Two launchers with one rank each, that know of each other only address and port."""
    port = ["--main-port", str(free_port())]
    with (
        started(*words, *port, "--node-rank", 0) as first,
        started(*words, *port, "--node-rank", 1) as second,
        first.watched(),
        second.watched(),
    ):
        first.finish()
        second.finish()
    first.listened |= second.listened
    assert second.code == 0, second.report()
    assert second.out == "", "the second node has printed a result, too"
    return first


TWO_RANKS = ["python", "fabric run", "lightning run model", "torchrun", "two nodes"]


@pytest.mark.parametrize("name", ["python, one rank", *TWO_RANKS])
def test_a_launcher_runs_the_script_once_and_it_writes_one_set_of_files(launched: Any, name: str) -> None:
    ended, folder = launched(name)
    assert ended.result["steps"] == "2048"
    assert ended.result["checkpoint"] == str(folder / "checkpoints" / "step_000000002048.ckpt")
    assert not [line for line in ended.err.splitlines() if line.startswith(("error:", "warning:"))]
    expected = {"args.json", "events.out.tfevents", "checkpoints/best.ckpt"}
    expected |= {f"checkpoints/step_{step:012d}.ckpt" for step in (1024, 2048)}
    assert files(folder) - {"hparams.yaml"} == expected
    assert len(list(folder.glob("events*"))) == 1


@pytest.mark.parametrize("name", TWO_RANKS[1:])
def test_all_launchers_of_two_ranks_end_with_the_same_parameters_to_the_last_bit(launched: Any, name: str) -> None:
    first, other = (load(launched(launcher)[0].result["checkpoint"]) for launcher in ("python", name))
    assert other["world_size"] == 2
    for part in ("agent", "optimizer", "episodes", "generators", "global_step", "best_return"):
        assert differences(first[part], other[part]) == [], part


@pytest.mark.parametrize("name", TWO_RANKS)
def test_the_ranks_of_one_machine_listen_to_nobody_outside_it(launched: Any, name: str) -> None:
    """The launchers of others, torchrun and `fabric run`, have a socket of their own, which is theirs to bind."""
    ended, _ = launched(name)
    foreign = {ended.process.pid} if name in ("torchrun", "fabric run") else set()
    listened = [addresses for pid, addresses in ended.listened.items() if addresses and pid not in foreign]
    assert len(listened) >= 2, ended.report()
    assert set().union(*listened) == {"127.0.0.1"}


def notes(base: Path, rank: int, kind: str) -> list[list[str]]:
    lines = Path(f"{base / 'notes'}.{rank}").read_text().splitlines()
    return [line.split()[1:] for line in lines if line.split()[0] == kind]


def test_ranks_have_equal_parameters_after_every_update_and_learn_from_different_data(
    launched: Any, base: Path
) -> None:
    launched("python")
    first, second = notes(base, 0, "train"), notes(base, 1, "train")
    assert len(first) == len(second) == 2
    for ours, theirs in zip(first, second, strict=True):
        assert ours[:3] == theirs[:3]  # parameters, and both moments of Adam
        for own, other in zip(ours[3:], theirs[3:], strict=True):  # first observations, all of them, actions
            assert own != other


def test_episode_statistics_are_those_of_all_ranks(launched: Any, base: Path) -> None:
    ended, _ = launched("python")
    ranks = [notes(base, rank, "episodes") for rank in (0, 1)]
    own = [sum(int(count) for count, _ in rank) for rank in ranks]
    assert all(count > 0 for count in own)
    assert int(ended.result["episodes"]) == sum(own)
    assert ranks[0][-1][1] == ranks[1][-1][1] == str(sum(own))
    assert load(ended.result["checkpoint"])["episodes"]["count"] == sum(own)


def test_two_ranks_learn_something_else_than_one(launched: Any) -> None:
    one, two = (load(launched(name)[0].result["checkpoint"]) for name in ("python, one rank", "python"))
    assert differences(one["agent"], two["agent"])
    assert (one["world_size"], two["world_size"]) == (1, 2)


def test_a_checkpoint_of_two_ranks_is_evaluated_by_one_process(launched: Any) -> None:
    _, folder = launched("lightning run model")
    ended = run(*FORKED, EVALUATE, folder, "--episodes", 2, "--json", cwd=folder)
    assert ended.code == 0, ended.report()
    assert '"episodes": 2' in ended.out


# --- Gradients


def batch(rows: int) -> Batch:
    """The data of an update, with advantages and values whose moments differ from half to half."""
    rng = torch.Generator().manual_seed(5)
    half = (torch.arange(rows) >= rows // 2).float()
    return Batch(
        obs=torch.randn(rows, 3, generator=rng),
        actions=torch.randint(4, (rows, 1), generator=rng),
        logprobs=-1.4 + 0.2 * torch.randn(rows, generator=rng),
        advantages=torch.randn(rows, generator=rng) * (1 + 3 * half) + 2 * half,
        returns=torch.randn(rows, generator=rng) + half,
        values=torch.randn(rows, generator=rng),
    )


def update(rank: int, world_size: int, port: int, sgd: bool, norm_adv: bool, path: str) -> None:
    """One update on this rank's share of 2 × 32 rows; writes the parameters that come out of it."""
    from gymnasium.spaces import Discrete
    from lightning.fabric import Fabric

    if world_size > 1:  # Fabric takes the place in the group that the environment names, and starts nothing itself
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy="ddp" if world_size > 1 else "auto")
    fabric.launch()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = {"num_envs": 8, "num_steps": 8, "num_minibatches": 1, "update_epochs": 1}
    # A sum over ranks in place of the mean shows where the norm is not clipped
    args = PPOArgs(**small, norm_adv=norm_adv, max_grad_norm=0.05 if norm_adv else 0.0)
    agent = PPOAgent(vectors(3), Discrete(4))
    adam = Descent(agent.parameters(), 1.0) if sgd else Adam(agent.parameters(), 1e-3, eps=1e-5)
    model, optimizer = fabric.setup(agent, adam)
    share = 64 // world_size
    data = batch(64)[rank * share : (rank + 1) * share].with_columns(valid=None)
    run: Any = SimpleNamespace(fabric=fabric, args=args, device_rng=torch.Generator().manual_seed(rank))
    start = adam.flat.vector.clone()
    with fabric.no_backward_sync(model):
        step = partial(update_step, run, model, optimizer)
        train(run, partial(train_epoch, step, norm_adv), data, 0.2, 0.01)  # type: ignore[arg-type]
    torch.save({"start": start, "end": adam.flat.vector}, f"{path}.{world_size}.{rank}")


def both(rank: int, port: int, path: str) -> None:
    """Both optimizers, with and without normalised advantages, in one process group."""
    for sgd in (True, False):
        for norm_adv in (True, False):
            update(rank, 2, port, sgd, norm_adv, f"{path}.{sgd}.{norm_adv}")


def test_two_ranks_with_half_the_rows_each_make_the_update_of_one_rank_with_all_rows(tmp_path: Path) -> None:
    """Gradients are averaged and advantages normalised over all ranks, before the norm is clipped."""
    path = str(tmp_path / "parameters")
    port = free_port()
    ranks = [FORKSERVER.Process(target=both, args=(rank, port, path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT)
        assert process.exitcode == 0
    for sgd in (True, False):
        for norm_adv in (True, False):
            name = f"{path}.{sgd}.{norm_adv}"
            update(0, 1, 0, sgd, norm_adv, name)
            one, first, second = (load(f"{name}.{rank}") for rank in ("1.0", "2.0", "2.1"))
            assert torch.equal(one["start"], first["start"])
            assert torch.equal(first["end"], second["end"])
            torch.testing.assert_close(first["end"], one["end"], rtol=1e-5, atol=1e-5 if not sgd else 1e-6)
            assert (one["end"] - one["start"]).abs().max() > 5e-4, "nothing has been learned"


# --- The ranks' check of themselves


class Ranks:
    """Stands for Fabric on rank 0 of 2; the other rank contributes one of `others` to each gathering."""

    world_size, global_rank, device = 2, 0, torch.device("cpu")

    def __init__(self, *others: torch.Tensor) -> None:
        self.others = list(others)

    def process_group(self, rows: torch.Tensor, own: torch.Tensor) -> None:
        rows.copy_(torch.cat((own, self.others.pop(0).reshape(-1))))


@pytest.fixture
def _gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabricrl.utils.ranks.finish", lambda gather, rows, own, group: group(rows, own))


@pytest.mark.usefixtures("_gathering")
def test_ranks_that_start_from_different_parameters_are_refused_and_from_equal_observations_warned(
    capsys: pytest.CaptureFixture,
) -> None:
    from fabricrl.utils.launch import check_ranks
    from fabricrl.utils.model import parameter_hash

    module, obs = torch.nn.Linear(2, 2), torch.ones(3)
    same = parameter_hash(module)
    check_ranks(Ranks(same, 2 * obs), module, obs)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    check_ranks(Ranks(same, obs), module, obs)  # type: ignore[arg-type]
    assert "equal observations" in capsys.readouterr().err
    check_ranks(Ranks(same, obs.byte()), module, obs.byte())  # type: ignore[arg-type]  # frames of a game
    assert capsys.readouterr().err == ""
    with pytest.raises(RunError, match="different parameters"):
        check_ranks(Ranks(same + 1, 2 * obs), module, obs)  # type: ignore[arg-type]


def test_the_parameters_of_an_agent_change_its_hash_and_nothing_else_does() -> None:
    from fabricrl.utils.model import parameter_hash

    torch.manual_seed(0)
    module = torch.nn.Linear(2, 2)
    before = parameter_hash(module)
    assert torch.equal(before, parameter_hash(module))
    with torch.no_grad():
        module.bias[1] += 1e-6
    assert not torch.equal(before, parameter_hash(module))
