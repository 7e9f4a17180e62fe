"""Choice of the device on which the policy acts while a GPU trains: `--player-device auto`."""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gymnasium.spaces import Discrete

from fabricrl.algos import acting
from fabricrl.algos import run as run_module
from fabricrl.algos.acting import faster_device
from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.run import Run
from tests.conftest import BareRun, Trained
from tests.envs import vectors
from tests.process import load

HOST, GPU = torch.device("cpu"), torch.device("cpu", 0)  # the second stands for a GPU


def some_run(device: torch.device, rank: int = 0) -> Any:
    autocast, strategy = contextlib.nullcontext, SimpleNamespace(precision=None)
    fabric = SimpleNamespace(world_size=1, global_rank=rank, device=device, autocast=autocast, strategy=strategy)
    fabric.broadcast = lambda value: value
    run: Any = BareRun(PPOArgs(num_envs=2, hidden_sizes=(8,)), fabric)
    run.obs_space, run.mask_size = vectors(3), 0
    return run


@pytest.mark.parametrize(("on_host", "there", "best"), [(2e-4, 1e-4, GPU), (1e-4, 3e-4, HOST)])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_policy_acts_where_it_takes_less_time_and_rank_0_says_so(
    on_host: float,
    there: float,
    best: torch.device,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The first acts of each device, which choose kernels, do not count."""
    run, now, acts = some_run(GPU, rank), [0.0], {HOST: 0, GPU: 0}

    def act(player: PPOAgent, *inputs: Any) -> torch.Tensor:
        device = run.player_device
        acts[device] += 1
        now[0] += 1.0 if device == best and acts[device] < 9 else 0.0
        now[0] += on_host if device == HOST else there
        return player.act(*inputs)

    run.act = act
    monkeypatch.setattr(acting.time, "perf_counter", lambda: now[0])
    assert faster_device(run, PPOAgent(vectors(3), Discrete(2), (8,))) == best
    assert run.player_device == GPU, "it is only measured"
    assert acts[HOST] == acts[GPU] > 100
    times = f"cpu {1e6 * on_host:.0f} µs, cpu:0 {1e6 * there:.0f} µs an action"
    assert capsys.readouterr().err == ("" if rank else f"player device: {best} ({times})\n")


@pytest.mark.parametrize(
    ("measured", "stored", "chosen"),
    [("cpu", None, "cpu"), ("cuda", None, "cuda:1"), ("cuda", "cpu", "cpu"), ("cpu", "cuda", "cuda:1")],
)
def test_a_resumed_run_acts_where_it_has_acted_and_a_new_one_where_rank_0_finds_it_faster(
    measured: str, stored: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = some_run(torch.device("cuda", 1))
    run.state = {"player_device": stored} if stored else {}
    other = "cuda" if measured == "cpu" else "cpu"  # this rank's own finding, which does not count
    monkeypatch.setattr(run_module, "faster_device", lambda *_: torch.device(other))
    run.team = SimpleNamespace(broadcast=lambda kind: measured)
    run._choose_player_device(None)
    assert run.player_device == torch.device(chosen)
    assert run._chosen_device == run.player_device.type


@pytest.mark.parametrize("chosen", [None, "cpu"])
def test_a_checkpoint_holds_what_has_been_chosen(
    chosen: str | None, ppo: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "_chosen_device", chosen)
    ended = ppo("--num-envs", 2, "--num-steps", 8, "--total-timesteps", 16, "--hidden-sizes", 8)
    assert load(ended.checkpoint).get("player_device") == chosen
    assert ppo("--resume", ended.checkpoint, "--total-timesteps", 32).code == 0
