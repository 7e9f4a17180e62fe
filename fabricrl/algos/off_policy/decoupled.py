"""Parts of the decoupled twins of off-policy algorithms: the steps that travel, and who keeps which of them.

Each trainer owns the replay buffer of its share of the environments, and draws its share of every batch from that: a
transition travels once, however often it is learned from. Shapes: N environments, n of each trainer, A action size.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fabricrl.algos.decoupled import Trainers
from fabricrl.algos.off_policy.replay import BLOCK, check_buffer
from fabricrl.algos.run import Run
from fabricrl.data import NewestSteps, Replay
from fabricrl.utils.decoupled import Rows
from fabricrl.utils.errors import require


class Steps(NamedTuple):
    """Steps of the environments that a player and a trainer share: one, or a block of S where nothing is learned yet.

    Without steps `next_obs` [0] are the observations that the environments start from.
    """

    due: tuple[int, int]  # SAC: number of the first update, and how many; DroQ: how many, over how many steps
    filled: int  # how many of the S steps are there
    normalizer: dict[str, Tensor]  # running statistics of observations, if there are any
    actions: Tensor  # [S, n, A]
    rewards: Tensor  # [S, n]
    terminated: Tensor  # [S, n]
    truncated: Tensor  # [S, n]
    next_obs: Tensor  # [S, n, ...]
    final_obs: Rows  # [E, ...], of the episodes that have ended, environment by environment

    @property
    def ended(self) -> np.ndarray:
        """Tells which of the steps that are there have ended an episode, [n, filled]."""
        ended: np.ndarray = self.terminated.numpy() | self.truncated.numpy()
        return ended[: self.filled].T

    def joined(self, others: "list[Steps]") -> "Steps":
        """The same steps of several players, their environments side by side."""
        parts, names = (self, *others), ("actions", "rewards", "terminated", "truncated", "next_obs")
        columns: Any = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in names}
        final_obs = torch.cat([part.final_obs.tensor[: part.ended.sum()] for part in parts])
        return self._replace(**columns, final_obs=Rows(final_obs))


def declare_steps(run: Run, agent: Any, count: int) -> Steps:
    """`count` steps of the environments that a player and a trainer share, in names, shapes and types."""
    trainers = run.fabric.world_size if run.trainers is None else run.trainers.count
    num_envs = run.global_args.num_envs // (run.global_args.players * trainers)
    rb = NewestSteps(count, num_envs, run.obs_space, agent.head.num_actions)
    columns = rb.steps | {"final_obs": Rows(rb.steps["final_obs"].flatten(0, 1))}
    return Steps((0, 0), 0, normalizer_state(agent), **columns)  # type: ignore[arg-type]


def divide(rb: Replay, agent: Any, trainers: Trainers, due: tuple[int, int] = (0, 0)) -> Iterator[Steps]:
    """Yields each trainer's share of the waiting steps, and then forgets them."""
    assert isinstance(rb, NewestSteps)
    own, size = trainers.run.own_envs, BLOCK if trainers.bulk else 1
    envs = (own.stop - own.start) // trainers.count
    for first in range(own.start, own.stop, envs):
        columns = {name: column[:size, first : first + envs] for name, column in rb.steps.items()}
        final_obs = columns.pop("final_obs")[: rb.waiting].transpose(0, 1)  # [n, filled, ...]
        steps = Steps(due, rb.waiting, normalizer_state(agent), **columns, final_obs=Rows(final_obs[:0].flatten(0, 1)))
        yield steps._replace(final_obs=Rows(torch.from_numpy(final_obs.numpy()[steps.ended])))
    rb.sent()


def store(rb: Replay, agent: Any, steps: Steps) -> None:
    """Puts steps into a trainer's buffer, and takes the player's statistics of observations."""
    if agent.obs_normalizer is not None:
        agent.obs_normalizer.load_state_dict(steps.normalizer)
    if steps.filled == 0:
        rb.start(steps.next_obs[0].numpy())
    names = ("actions", "next_obs", "rewards", "terminated", "truncated")
    columns = {name: getattr(steps, name).numpy() for name in names}
    ended, final_obs = steps.ended, np.zeros_like(columns["next_obs"][: steps.filled])
    final_obs.swapaxes(0, 1)[ended] = steps.final_obs.tensor.numpy()[: ended.sum()]
    for i in range(steps.filled):
        rb.add(**{name: column[i] for name, column in columns.items()}, infos={"final_obs": final_obs[i]})


def normalizer_state(agent: Any) -> dict[str, Tensor]:
    """Running statistics of observations; empty if there are none."""
    return {} if agent.obs_normalizer is None else agent.obs_normalizer.state_dict()


def check_division(args: Any, count: int) -> None:
    """Raises ConfigError unless environments and batches can be divided among players and `count` trainers."""
    for name in ("num_envs", "batch_size"):
        value, allowed = getattr(args, name), f"a multiple of {count}, so that each trainer has an equal part"
        require(value % count == 0, name, value, allowed)
    pairs = args.players * count
    allowed = f"a multiple of {pairs}, so that {count} trainers have as many of each of {args.players} players"
    require(args.num_envs % pairs == 0, "num_envs", args.num_envs, allowed)
    rows = args.buffer_size // args.num_envs * args.num_envs
    require(rows >= args.batch_size, "buffer_size", args.buffer_size, f"such that {rows} is at least batch-size")


def take_share_of_args(run: Run) -> Any:
    """Replaces `run.args` by this trainer's share of environments, buffer and batch, and returns it.

    Raises:
        ConfigError: the buffers of this machine's trainers do not fit into its memory.
    """
    args, count = run.args, run.fabric.world_size
    envs = args.num_envs // count
    rows = args.buffer_size // args.num_envs  # of each environment, as many as with any other number of trainers
    run.args = replace(args, num_envs=envs, buffer_size=rows * envs, batch_size=args.batch_size // count)
    with run.failing_together():
        check_buffer(run)
    return run.args
