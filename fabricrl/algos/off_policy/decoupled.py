"""What the decoupled twins of off-policy algorithms share: the steps that travel, and who keeps which of them.

Each trainer owns the replay buffer of its share of the environments, and draws its share of every batch from that: a
transition travels once, however often it is learned from. Shapes: N environments, n of each trainer, A action size.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fabricrl.algos.run import Run
from fabricrl.data import NewestStep, ReplayBuffer
from fabricrl.utils.utils import require


class Step(NamedTuple):
    """A step of a trainer's environments; without actions: the observations that they start from."""

    due: tuple[int, int]  # updates, as the script counts them
    normalizer: dict[str, Tensor]  # running statistics of observations, if there are any
    next_obs: Tensor  # [n, ...]
    actions: Tensor | None = None  # [n, A]
    rewards: Tensor | None = None  # [n]
    terminated: Tensor | None = None  # [n]
    truncated: Tensor | None = None  # [n]
    final_obs: Tensor | None = None  # where an episode has ended [n, ...]


def declare_step(run: Run, agent: Any, num_envs: int) -> Step:
    """A step of `num_envs` environments in names, shapes and types."""
    rb = NewestStep(num_envs, run.obs_space, agent.head.num_actions)
    obs, flags, statistics = rb.newest_obs(), torch.zeros(num_envs, dtype=torch.bool), normalizer_state(agent)
    actions = torch.zeros(num_envs, agent.head.num_actions)
    return Step((0, 0), statistics, obs, actions, torch.zeros(num_envs), flags, flags, obs)


def divide(rb: ReplayBuffer, agent: Any, count: int, due: tuple[int, int] = (0, 0)) -> Iterator[Step]:
    """The newest step, or what a reset has answered, for each of `count` trainers: its environments side by side."""
    assert isinstance(rb, NewestStep)
    size, statistics = rb.num_envs // count, normalizer_state(agent)
    for first in range(0, rb.num_envs, size):
        yield Step(due, statistics, **{name: column[first : first + size] for name, column in rb.newest.items()})


def store(rb: ReplayBuffer, agent: Any, step: Step) -> None:
    """Puts a step into a trainer's buffer, and takes the player's statistics of observations."""
    if agent.obs_normalizer is not None:
        agent.obs_normalizer.load_state_dict(step.normalizer)
    _, _, next_obs, *rest = step
    if step.actions is None:
        rb.start(next_obs.numpy())
        return
    actions, rewards, terminated, truncated, final_obs = (column.numpy() for column in rest if column is not None)
    rb.add(actions, next_obs.numpy(), rewards, terminated, truncated, {"final_obs": final_obs})


def normalizer_state(agent: Any) -> dict[str, Tensor]:
    """Running statistics of observations; empty if there are none."""
    return {} if agent.obs_normalizer is None else agent.obs_normalizer.state_dict()


def check_division(run: Run) -> None:
    """Raises ConfigError unless environments and batches can be divided among the trainers."""
    args, count = run.args, max(run.fabric.world_size - 1, 1)
    with run.together():  # none leaves while another is still about to meet the rest
        for name in ("num_envs", "batch_size"):
            require(getattr(args, name) % count == 0, name, getattr(args, name), f"equal parts for {count} trainers")
        rows = args.buffer_size // args.num_envs * args.num_envs
        require(rows >= args.batch_size, "buffer_size", args.buffer_size, f"such that {rows} is at least batch-size")


def divided(run: Run) -> Any:
    """The arguments of a trainer, with its share of environments, buffer and batch; its run goes by them from here."""
    args, count = run.args, run.fabric.world_size
    envs = args.num_envs // count
    rows = args.buffer_size // args.num_envs  # of each environment, as many as with any other number of trainers
    run.args = replace(args, num_envs=envs, buffer_size=rows * envs, batch_size=args.batch_size // count)
    return run.args
