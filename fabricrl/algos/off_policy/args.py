"""Arguments that off-policy algorithms share: replay, networks, learning rates, and those of an entropy bonus."""

from dataclasses import dataclass
from typing import Literal

from fabricrl.algos.args import (
    LARGEST,
    STEP_BYTES,
    WEIGHT_BYTES,
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
from fabricrl.utils.errors import require


@dataclass(frozen=True)
class OffPolicyArgs(StandardArgs):
    """Replay, networks and update of an off-policy actor-critic algorithm; CleanRL's names and defaults."""

    env_id: str = arg("Pendulum-v1", "Gymnasium id, or module:Id-v0 for an environment of your own", "environment")
    vectorization: Literal["auto", "sync", "async", "envpool", "torch"] = arg(
        "auto",
        "sync: one process steps all; async: a process each; envpool: C++ threads, needs the extra of that name; "
        "torch: tensors on the device that trains; auto: torch for environments that are tensors, else the faster of "
        "sync and async",
    )
    total_timesteps: int = arg(1_000_000, "environment steps over all environments and ranks")
    grayscale: bool = arg(False, "turn images grey", "images", advanced=True)
    resize: int | None = arg(
        None, "resize images to this height and width; None: leave them as they are", advanced=True
    )
    frame_stack: int = arg(1, "number of stacked frames, for observations with images")
    random_shift: int = arg(
        4,
        "shift images of a batch at random by up to this many pixels, so that critics generalise; 0: off",
        advanced=True,
    )
    num_threads: int | None = arg(
        None, "PyTorch threads per rank; None: 2 if each rank can have two cores, else 1. Use 1 beside other work"
    )
    preset: Literal["default", "tuned"] = arg("default", "tuned: settings for this environment", "replay")
    buffer_size: int = arg(1_000_000, "transitions that each rank keeps")
    learning_starts: int = arg(
        5_000, "random environment steps over all ranks before the first update; at least a batch"
    )
    batch_size: int = arg(256, "transitions per update, on each rank")
    replay_ratio: float = arg(1.0, "critic updates per environment step, over all environments and ranks")
    n_step: int = arg(1, "rewards summed into a transition's return, without off-policy correction")
    implicit_next_obs: bool = arg(
        False,
        "read next observations from the step after instead of storing them: up to half the memory",
        advanced=True,
    )
    buffer_memmap: bool = arg(
        False,
        "keep the buffer in a temporary memory-mapped file in the run folder, for one larger than memory",
        advanced=True,
    )
    buffer_device: Literal["auto", "cpu", "cuda"] = arg(
        "auto",
        "device of the replay buffer; auto: the GPU that trains, if it takes at most half of the free memory there",
        advanced=True,
    )
    checkpoint_buffer: bool = arg(
        True,
        "save the buffer in checkpoints; without it, a resumed run first plays --learning-starts steps to fill one",
        advanced=True,
    )
    allow_empty_buffer: bool = arg(
        False,
        "if the checkpoint's buffer is missing or does not fit, resume with an empty one and fill it first",
        advanced=True,
    )
    gamma: float = arg(0.99, "discount γ")
    norm_obs: bool = arg(False, "normalise observations by their running mean and deviation")
    hidden_sizes: tuple[int, ...] = arg(
        (256, 256), "widths of the hidden layers of actor and critics, such as 256 256; none: linear", "networks"
    )
    activation: Literal["tanh", "relu", "elu", "silu"] = arg("relu", "activation of the hidden layers", advanced=True)
    cnn_features: int = arg(50, "width of the last layer of each image encoder", advanced=True)
    num_critics: int = arg(2, "critics of the ensemble", advanced=True)
    policy_lr: float = arg(3e-4, "Adam's learning rate for actor and temperature", "update")
    q_lr: float = arg(1e-3, "Adam's learning rate for the critics")
    tau: float = arg(0.005, "τ: step size of the target critics towards the critics (Polyak averaging)")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, 2**63 - 1, "buffer_size", "batch_size")
        require_counts(self, 1000, "n_step", "num_critics")
        require_images(self)
        require(0 <= self.random_shift < 36, "random_shift", self.random_shift, "0 or more, below 36")
        require(self.learning_starts >= 0, "learning_starts", self.learning_starts, "0 or more")
        require_between(self, 0, 1, "gamma", "tau")
        require(self.tau > 0, "tau", self.tau, "above 0, or the targets never move")
        require_above_zero(self, "policy_lr", "q_lr")
        # An iteration draws the batches of all its updates at once, and cannot be stopped before they are done
        require(0 < self.replay_ratio <= 1000, "replay_ratio", self.replay_ratio, "above 0 and at most 1000")
        require_widths(self, "hidden_sizes")
        for flag in ("buffer_memmap", "implicit_next_obs"):
            clash = self.buffer_device == "cuda" and getattr(self, flag)
            require(not clash, "buffer_device", "cuda", f"auto or cpu beside --{flag.replace('_', '-')}")
        self._check_amounts()

    def _check_amounts(self) -> None:
        allowed = f"at most buffer-size = {self.buffer_size}"
        require(self.batch_size <= self.buffer_size, "batch_size", self.batch_size, allowed)
        allowed = f"at least num-envs = {self.num_envs}"
        require(self.buffer_size >= self.num_envs, "buffer_size", self.buffer_size, allowed)
        allowed = f"at least num-envs = {self.num_envs}, an iteration"
        require(self.total_timesteps >= self.num_envs, "total_timesteps", self.total_timesteps, allowed)
        allowed = f"below total-timesteps = {self.total_timesteps}"
        require(self.learning_starts < self.total_timesteps, "learning_starts", self.learning_starts, allowed)

    def check_machine(self) -> None:
        super().check_machine()
        weights = num_weights(1, *self.hidden_sizes, 1)
        # Beside those of the critics are the targets, which are not trained
        need = weights * (WEIGHT_BYTES + self.num_critics * (WEIGHT_BYTES + 4))
        require_memory(
            "--hidden-sizes, --num-critics", f"{1 + 2 * self.num_critics} networks of {weights} weights", need
        )
        self.check_batches()

    def check_batches(self, ranks: int = 1) -> None:
        """Raises ConfigError unless the batches that one of so many ranks draws in an iteration fit into memory."""
        rows = int(max(self.replay_ratio * self.num_envs * ranks, 1)) * self.batch_size
        flags = "--batch-size × --replay-ratio × --num-envs" + " × ranks" * (ranks > 1)
        require_memory(flags, f"the batches of an iteration, {rows} transitions", rows * STEP_BYTES)


@dataclass(frozen=True)
class EntropyArgs(OffPolicyArgs):
    """The temperature of an algorithm that rewards entropy, and the scale of rewards, which are weighed against it."""

    reward_scale: float = arg(
        1.0,
        "multiply rewards by this for the critics; logs show them as the environment gave them",
        "replay",
        advanced=True,
    )
    alpha: float = arg(1.0, "entropy temperature α: initial with --autotune, else constant", "update")
    autotune: bool = arg(True, "learn the temperature so that the policy's entropy approaches the target")
    target_entropy: float | None = arg(
        None, "entropy that the temperature aims at, of actions in [-1, 1]; None: minus the number of actions"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above_zero(self, "alpha", "reward_scale")
        entropy, allowed = self.target_entropy, f"a number between {-LARGEST:g} and {LARGEST:g}, or None"
        require(entropy is None or abs(entropy) <= LARGEST, "target_entropy", entropy, allowed)
