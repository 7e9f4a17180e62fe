"""A run that is killed again and again and started by the same command ends as if nothing had happened."""

import contextlib
import importlib
import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fabricrl.utils.checkpoint import load_checkpoint
from fabricrl.utils.errors import CheckpointError
from tests.dying import Moments
from tests.process import (
    FORKED,
    LIMIT,
    PPO,
    ROOT,
    Finished,
    call,
    command,
    differences,
    free_port,
    load,
    run,
    run_team,
    started,
    team,
    wait_for,
)

KILLS = 5
DYING = ROOT / "tests/dying.py"
# A checkpoint is written where the episodes of all environments end, so that a resumed environment is where it would
# have been: after each of 16 iterations on-policy, after each 8 of 120 off-policy, where learning starts at 64 steps
ON_POLICY: list[object] = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--num-steps", 32]
ON_POLICY += ["--total-timesteps", 1024, "--checkpoint-every", 64, "--norm-obs", "--norm-reward", "--log-every", 64]
ON_POLICY += ["--num-minibatches", 2, "--update-epochs", 2]
OFF_POLICY: list[object] = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--total-timesteps", 240]
OFF_POLICY += ["--env-kwargs", '{"continuous": true, "truncate": true}', "--buffer-size", 48, "--learning-starts", 64]
OFF_POLICY += ["--batch-size", 8, "--hidden-sizes", 16, "--norm-obs", "--n-step", 2, "--num-threads", 1]
OFF_POLICY += ["--checkpoint-every", 16, "--log-every", 16, "--replay-ratio", 0.5]
FLAGS = {"ppo": ON_POLICY, "ppo_recurrent": ON_POLICY, "sac": OFF_POLICY, "droq": OFF_POLICY}


def learned(path: Path | str) -> dict[str, Any]:
    """Contents of a checkpoint and its shards, without those that depend on how the run was started."""
    path = Path(path)
    shards = {shard.suffix: load(shard) for shard in path.parent.glob(f"{path.stem}.shard*")}
    return {name: value for name, value in load(path).items() if name not in ("args", "asked")} | shards


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Finished, int]]:
    """Runs of one process that nobody killed, each made once, and the moments that they had."""
    made: dict[str, tuple[Finished, int]] = {}

    def train(algo: str) -> tuple[Finished, int]:
        if algo not in made:
            main = importlib.import_module(f"fabricrl.algos.{algo}.{algo}").main
            with Moments() as moments:
                ended = call(main, *FLAGS[algo], "--log-dir", tmp_path_factory.mktemp(algo))
            made[algo] = ended, moments.passed
        return made[algo]

    return train


def deaths(moments: int, ranks: int) -> list[str]:
    """Five moments at which a rank dies, so early that the run cannot have ended by the last of them."""
    draw = random.Random(1)
    return [f"{draw.randrange(ranks)}:{draw.randrange(1, moments // KILLS)}" for _ in range(KILLS)]


@pytest.mark.parametrize("algo", FLAGS)
def test_a_run_that_was_killed_at_five_random_moments_equals_the_one_that_was_not(
    algo: str, straight: Callable, tmp_path: Path
) -> None:
    whole, moments = straight(algo)
    flags = [f"fabricrl.algos.{algo}.{algo}", *FLAGS[algo], "--resume", "auto", "--log-dir", tmp_path]
    drawn, starts = deaths(moments, 1), set()
    for attempt in range(KILLS + 1):
        ended = run(*FORKED, DYING, *flags, variables={"DYING": ",".join(drawn), "ATTEMPT": str(attempt)})
        assert ended.code == (-9 if attempt < KILLS else 0), ended.report()
        starts |= {line.partition("; from step ")[2].split(" ")[0] for line in ended.err.splitlines()}
    assert ended.result["steps"] == whole.result["steps"]
    assert len(starts - {""}) > 1, "no attempt has gone on from where another had come"
    assert differences(learned(whole.checkpoint), learned(ended.result["checkpoint"])) == []


@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_a_twin_whose_player_or_trainer_is_killed_equals_the_coupled_run_that_was_not(
    algo: str, straight: Callable, tmp_path: Path
) -> None:
    whole, moments = straight(algo)
    flags = [f"fabricrl.algos.{algo}.{algo}_decoupled", *FLAGS[algo], "--max-lag", 0, "--resume", "auto"]
    line = ["tests.dying", *flags, "--log-dir", tmp_path / "logs"]
    dying = ",".join(deaths(moments // 4, 2))  # either does less than both
    for attempt in range(KILLS):
        variables = {"DYING": dying, "ATTEMPT": str(attempt)}
        with team(*line, folder=tmp_path / f"{attempt}", variables=variables) as ranks:
            for rank in ranks.ranks:
                rank.join(LIMIT)
            assert sorted([rank.exitcode for rank in ranks.ranks], key=str) == [-9, 7], ranks.report()
    ended = run_team(*line, folder=tmp_path / "last", variables={"DYING": ""})
    own, other = learned(whole.checkpoint), learned(ended.result["checkpoint"])
    assert own["global_step"] == other["global_step"]
    for part in ("agent", "episodes", "generators", "best_return", *(name for name in own if "optimizer" in name)):
        assert differences(own[part], other[part]) == [], part


@pytest.mark.parametrize(("script", "who", "share"), [("ppo", "2 ranks", 1), ("ppo_decoupled", "player", 2)])
def test_torchrun_starts_a_run_again_of_which_any_rank_was_killed(
    script: str, who: str, share: int, straight: Callable, tmp_path: Path
) -> None:
    """In each attempt but the last one of two ranks dies, so early that the attempts before leave it something to do.

    Two ranks take half as long as one alone; of the twin each has a part of that, 1 / `share`.
    """
    flags, (_, moments) = [f"fabricrl.algos.ppo.{script}", *ON_POLICY], straight("ppo")
    moments //= share
    whole = run_team(*flags, "--log-dir", tmp_path / "whole", folder=tmp_path / "out")
    flags += ["--resume", "auto", "--log-dir", tmp_path / "logs"]
    dying = {"DYING": f"1:{moments // 7},0:{moments // 8},1:{moments // 9}"}
    restarts = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 3]
    with started(command("torchrun"), *restarts, DYING, *flags, variables=dying) as running:
        ended = running.finish()
    assert ended.code == 0, ended.report()
    assert ended.err.count(f"{who} on cpu") == 4
    assert "; from step " in ended.err
    assert differences(learned(whole.result["checkpoint"]), learned(ended.result["checkpoint"])) == []


def test_a_node_may_leave_and_return(tmp_path: Path) -> None:
    """Each of 1 to 2 nodes has a rank, to which 2 environments were given: 4 in all, of which one may play all.

    PyTorch 2.13 tells a node that joins a running job of no store, unless that is opened anew (pytorch#135712). A node
    counts as dead after 20 seconds of silence: it shows itself every second, or two where it waits for others, so that
    3 seconds are too few on a busy machine. What is taken for dead is not told so, and goes on beside the next round.
    """
    meeting = ["--nnodes", "1:2", "--nproc-per-node", 1, "--max-restarts", 3, "--local-addr", "127.0.0.1"]
    port = free_port()
    meeting += ["--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    meeting += ["--rdzv-conf", "last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=20"]
    flags = ["--num-envs", 2, "--num-steps", 32, "--total-timesteps", 1_000_000_000, "--checkpoint-every", 256]
    line = [command("torchrun"), *meeting, PPO, *flags, "--resume", "auto", "--log-dir", tmp_path]

    def saved_by(ranks: int, after: int) -> Callable[[], int]:
        """The step of the newest checkpoint, once it is of so many ranks and later than that step."""

        def look() -> int:
            for folder in tmp_path.glob("*/*/*"):
                with contextlib.suppress(CheckpointError, IndexError):
                    state, _ = load_checkpoint(folder)
                    shares = state["world_size"], state["args"]["num_envs"]
                    return state["global_step"] if shares == (ranks, 4 // ranks) and state["global_step"] > after else 0
            return 0

        return look

    def listens() -> bool:
        with socket.socket() as other:
            return other.connect_ex(("127.0.0.1", port)) == 0

    anew = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with started(*line, variables=anew) as first:
        wait_for(listens, first)  # whoever comes first keeps the place where they meet, and has to stay
        with started(*line, variables=anew) as second:
            together = wait_for(saved_by(2, after=0), first, second)
            second.kill()
        alone = wait_for(saved_by(1, after=together), first)
        with started(*line, variables=anew) as third:
            wait_for(saved_by(2, after=alone), first, third)
            for node in (first, third):
                node.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
            for node in (first, third):
                node.finish()
    assert len(list(tmp_path.glob("*/*/*/args.json"))) == 1
