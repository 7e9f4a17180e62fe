"""Arguments of recurrent PPO: those of PPO, and the memory's."""

from dataclasses import dataclass
from typing import Literal

from fabricrl.algos.args import DecoupledArgs, arg, num_weights, require_counts, require_widths
from fabricrl.algos.ppo.args import PRESETS, PPOArgs

__all__ = ["PRESETS", "RecurrentPPOArgs", "RecurrentPPODecoupledArgs"]


@dataclass(frozen=True)
class RecurrentPPOArgs(PPOArgs):
    """PPO's names; the presets are PPO's, too."""

    num_envs: int = arg(8, "environments per rank")
    hidden_sizes: tuple[int, ...] = arg(
        (64,), "widths of the layers after the core, of actor and critic; none: linear", "networks"
    )
    rnn_type: Literal["lstm", "gru"] = arg("lstm", "kind of the recurrent core", "memory")
    rnn_hidden_size: int = arg(64, "width of the core")
    rnn_layers: int = arg(1, "layers of the core", advanced=True)
    shared_core: bool = arg(False, "share one core between actor and critic", advanced=True)
    encoder_sizes: tuple[int, ...] = arg(
        (), "widths of the layers before the core; none: the core takes the observation", advanced=True
    )
    prev_action: bool = arg(False, "feed the previous action to the core, discrete ones as one-hot", advanced=True)
    prev_reward: bool = arg(False, "feed the previous reward to the core, as the environment gave it", advanced=True)
    sequence_length: int = arg(128, "longest sequence of steps that gradients flow through")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, 2**63 - 1, "rnn_hidden_size", "sequence_length")
        require_counts(self, 100, "rnn_layers")
        require_widths(self, "encoder_sizes")

    def _num_weights(self) -> int:
        gates, size = {"lstm": 4, "gru": 3}[self.rnn_type], self.rnn_hidden_size
        encoded = self.encoder_sizes[-1] if self.encoder_sizes else 1
        core = gates * size * (encoded + size + 2 * size * (self.rnn_layers - 1))
        cores = (1 if self.shared_core else 2) * (num_weights(1, *self.encoder_sizes) + core)
        return cores + 2 * num_weights(size, *self.hidden_sizes, 1)


@dataclass(frozen=True)
class RecurrentPPODecoupledArgs(DecoupledArgs, RecurrentPPOArgs):
    """Recurrent PPO's arguments; `num_envs` are the player's, and each minibatch is shared by the trainers."""

    num_envs: int = arg(8, "environments, all of them the player's")
    num_minibatches: int = arg(4, "minibatches per epoch, each divided among the trainers")
