"""Arguments of SAC."""

from dataclasses import dataclass

from fabricrl.algos.args import DecoupledArgs, arg, require_counts
from fabricrl.algos.off_policy.args import EntropyArgs


@dataclass(frozen=True)
class SACArgs(EntropyArgs):
    """Arguments of SAC."""

    policy_frequency: int = arg(
        2,
        "critic updates between updates of actor and temperature, which then take as many steps in a row",
        "update",
        advanced=True,
    )
    target_network_frequency: int = arg(1, "critic updates between updates of the target critics", advanced=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, 1000, "policy_frequency")  # so many at once
        require_counts(self, 2**63 - 1, "target_network_frequency")


@dataclass(frozen=True)
class SACDecoupledArgs(DecoupledArgs, SACArgs):
    """SAC's arguments; environments, buffer and batch are the player's and the trainers' together."""

    num_envs: int = arg(1, "environments, all of them the player's; trainers share their steps")
    buffer_size: int = arg(1_000_000, "transitions that all trainers keep together", "replay")
    batch_size: int = arg(256, "transitions per update, of all trainers together")
