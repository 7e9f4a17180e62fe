"""Arguments of DroQ."""

from dataclasses import dataclass

from fabricrl.algos.args import DecoupledArgs, arg, require_between
from fabricrl.algos.off_policy.args import EntropyArgs


@dataclass(frozen=True)
class DroQArgs(EntropyArgs):
    """SAC's arguments with many critic updates per step, and what regularises the critics."""

    # These two as Smith et al. 2022 (arXiv:2208.07860). Hiraoka's code starts to learn after 5 000 steps, and from a
    # temperature of 1, which one update a step takes thousands of steps to bring down. HalfCheetah-v4 at step 8 000:
    # -32 as there, 1 167 from 0.1, 3 190 from 0.1 and after 1 000 steps (training episodes, a single seed)
    learning_starts: int = arg(
        1_000, "random environment steps over all ranks before the first update; at least a batch"
    )
    alpha: float = arg(0.1, "entropy temperature α: initial with --autotune, else constant")
    replay_ratio: float = arg(20.0, "critic updates per environment step, over all environments and ranks")
    dropout: float = arg(0.01, "dropout: share of the critics' hidden units set to zero", "networks")
    layer_norm: bool = arg(True, "normalise the critics' hidden layers", advanced=True)
    q_lr: float = arg(3e-4, "Adam's learning rate for the critics")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_between(self, 0, 0.99, "dropout")


@dataclass(frozen=True)
class DroQDecoupledArgs(DecoupledArgs, DroQArgs):
    """DroQ's arguments; environments, buffer and batch are the player's and the trainers' together."""

    num_envs: int = arg(1, "environments, all of them the player's; trainers share their steps")
    buffer_size: int = arg(1_000_000, "transitions that all trainers keep together", "replay")
    batch_size: int = arg(256, "transitions per update, of all trainers together")
