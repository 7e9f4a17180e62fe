"""Arguments of PPO, and the presets."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fabricrl.algos.args import (
    LARGEST,
    STEP_BYTES,
    WEIGHT_BYTES,
    DecoupledArgs,
    StandardArgs,
    arg,
    num_weights,
    require_above_zero,
    require_between,
    require_counts,
    require_images,
    require_memory,
    require_widths,
)
from fabricrl.utils.errors import ConfigError, require

# Coherent defaults for a family of tasks; `classic` are those below. Flags given beside --preset win.
PRESETS: dict[str, dict[str, Any]] = {
    "classic": {},
    "mujoco": {
        "total_timesteps": 1_000_000,
        "learning_rate": 3e-4,
        "num_envs": 1,
        "num_steps": 2048,
        "num_minibatches": 32,
        "update_epochs": 10,
        "ent_coef": 0.0,
        "norm_obs": True,
        "norm_reward": True,
    },
    "atari": {
        "env_id": "ALE/Pong-v5",
        "env_kwargs": '{"repeat_action_probability": 0.0}',
        "action_repeat": 4,
        "noop_max": 30,
        "life_loss": True,
        "grayscale": True,
        "resize": 84,
        "frame_stack": 4,
        "total_timesteps": 10_000_000,
        "num_envs": 8,
        "clip_reward": True,
        "hidden_sizes": (),
        "clip_coef": 0.1,
        "num_threads": None,
    },
}


@dataclass(frozen=True)
class PPOArgs(StandardArgs):
    """CleanRL's names and defaults, and some that it lacks."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    num_envs: int = arg(4, "environments per rank")
    total_timesteps: int = arg(500_000, "environment steps over all environments and ranks, in whole iterations")
    noop_max: int = arg(
        0, "Atari: start each episode with up to this many no-op steps", "images and Atari", advanced=True
    )
    life_loss: bool = arg(
        False, "Atari: treat the loss of a life as the end of an episode; logs count whole games", advanced=True
    )
    grayscale: bool = arg(False, "turn images grey", advanced=True)
    resize: int | None = arg(
        None, "resize images to this height and width; None: leave them as they are", advanced=True
    )
    frame_stack: int = arg(1, "number of stacked frames, for observations with images")
    preset: Literal["classic", "mujoco", "atari", "tuned"] = arg(
        "classic",
        "defaults for a family of tasks, or tuned: those for this environment; --help --preset mujoco shows them",
        "rollout and returns",
    )
    num_steps: int = arg(128, "steps of each environment per iteration")
    gamma: float = arg(0.99, "discount γ")
    gae_lambda: float = arg(0.95, "λ of generalised advantage estimation")
    bootstrap_truncated: bool = arg(True, "bootstrap truncated episodes with γ V(final observation)", advanced=True)
    norm_obs: bool = arg(False, "normalise observations by their running mean and deviation")
    clip_reward: bool = arg(False, "learn from the sign of each reward; logs show the unclipped rewards", advanced=True)
    norm_reward: bool = arg(False, "divide rewards by the running deviation of the discounted return")
    hidden_sizes: tuple[int, ...] = arg(
        (64, 64), "widths of the hidden layers of actor and critic, such as 64 64; none: linear", "networks"
    )
    activation: Literal["tanh", "relu", "elu", "silu"] = arg("tanh", "activation of the hidden layers", advanced=True)
    cnn_features: int = arg(512, "width of the last layer of each image encoder", advanced=True)
    log_std_init: float = arg(0.0, "initial logarithm of the standard deviation of Box actions", advanced=True)
    learning_rate: float = arg(2.5e-4, "Adam's learning rate", "update")
    anneal_lr: bool = arg(True, "let the learning rate fall linearly to zero over the run")
    num_minibatches: int = arg(4, "minibatches per epoch, on each rank")
    update_epochs: int = arg(4, "passes over each rollout")
    norm_adv: bool = arg(True, "normalise advantages in each minibatch, over all ranks", advanced=True)
    clip_coef: float = arg(0.2, "ε: clip ratios to 1 ± ε")
    anneal_clip: bool = arg(False, "let ε fall linearly to zero over the run", advanced=True)
    clip_vloss: bool = arg(True, "clip the change of the value to ±ε as well", advanced=True)
    ent_coef: float = arg(0.01, "weight of the entropy bonus")
    anneal_ent: bool = arg(
        False, "let the weight of the entropy bonus fall linearly to zero over the run", advanced=True
    )
    vf_coef: float = arg(0.5, "weight of the value loss", advanced=True)
    max_grad_norm: float = arg(0.5, "maximum gradient norm; 0: no clipping", advanced=True)
    target_kl: float | None = arg(
        None, "stop the epochs of an iteration once the approximate KL divergence passes this"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, 2**63 - 1, "num_steps", "num_minibatches")
        require_counts(self, 1000, "update_epochs")  # a run can be stopped between two iterations, not within
        require_images(self)
        require(0 <= self.noop_max <= 1000, "noop_max", self.noop_max, "0 or more, at most 1000")
        require_between(self, 0, 1, "gamma", "gae_lambda")
        require_between(self, 0, LARGEST, "ent_coef", "vf_coef", "max_grad_norm")
        require_between(self, -20, 20, "log_std_init")
        require_above_zero(self, "learning_rate", "clip_coef", "target_kl")
        require_widths(self, "hidden_sizes")
        atari = self.env_id.startswith("ALE/") or "NoFrameskip" in self.env_id
        require(
            self.preset != "atari" or atari, "env_id", self.env_id, "an Atari game, such as ALE/Pong-v5, for its preset"
        )
        steps = self.num_envs * self.num_steps
        allowed = f"at least num-envs × num-steps = {steps}, an iteration"
        require(self.total_timesteps >= steps, "total_timesteps", self.total_timesteps, allowed)
        self._check_minibatches()

    def _check_minibatches(self) -> None:
        """Every minibatch has the same size, so that none has one row, whose advantage cannot be normalised."""
        batch, least = self.num_envs * self.num_steps, 2 if self.norm_adv else 1

        def is_legal(number: int) -> bool:
            return number >= 1 and batch % number == 0 and batch // number >= least

        if not is_legal(self.num_minibatches):
            start = min(self.num_minibatches, batch // least)
            around = (number for gap in range(10_000) for number in dict.fromkeys((start - gap, start + gap)))
            near = sorted(itertools.islice(filter(is_legal, around), 2)) or [1] * is_legal(1)
            raise ConfigError(
                f"--num-minibatches is {self.num_minibatches}: it must divide num-envs × num-steps = {batch} into "
                f"equal parts of at least {least}; nearest are {' and '.join(map(str, near)) or 'none'}"
            )

    def check_machine(self) -> None:
        super().check_machine()
        steps = self.num_envs * self.num_steps
        require_memory("--num-envs × --num-steps", f"rollouts of {steps} steps", steps * STEP_BYTES)
        weights = self._num_weights()
        require_memory("--hidden-sizes", f"networks of {weights} weights", weights * WEIGHT_BYTES)

    def _num_weights(self) -> int:
        """Weights of actor and critic at the least: of observations and actions that are a single number."""
        return 2 * num_weights(1, *self.hidden_sizes, 1)


@dataclass(frozen=True)
class PPODecoupledArgs(DecoupledArgs, PPOArgs):
    """PPO's arguments; `num_envs` are the player's, and each minibatch is shared by the trainers."""

    num_envs: int = arg(4, "environments, all of them the player's")
    num_minibatches: int = arg(4, "minibatches per epoch, each divided among the trainers")
