"""A trained policy in one's own program: observations in, as the environment gives them; actions out, as it takes them.

    import fabricrl

    policy = fabricrl.load("logs/ppo/CartPole-v1/ppo_1_20261122-140732")
    obs, info = env.reset()
    action = policy(obs)

Neither the environment nor its package is needed: a checkpoint holds the spaces.
"""

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from fabricrl.envs import check_env
from fabricrl.envs.rows import Rows, floats_in
from fabricrl.envs.spaces import Spaces, mask_choices, text_of
from fabricrl.envs.structure import check_spaces, stored_spaces
from fabricrl.utils.checkpoint import load_checkpoint, reading, restore
from fabricrl.utils.contents import check_contents
from fabricrl.utils.errors import CheckpointError, ConfigError, EnvError
from fabricrl.utils.seeding import stream_seed

# Arguments that older checkpoints do not have, as they were meant
OLDER = {"mask_velocities": False, "frame_stack": 1, "cnn_features": 512, "random_shift": 4}


class Policy:
    """Acts as the agent in a checkpoint does, with its normaliser, its frame stack and its memory.

    Actions are equal to those of `evaluate.py`, to the last bit where as many observations come at once.

    Args:
        state, path: a checkpoint, and where it is from.
        deterministic: take the most likely actions; False: draw them.
        seed: of what is drawn; `evaluate.py --seed` draws alike.
        spaces: of the environment; None: as the checkpoint has them.

    Attributes:
        observation_space, action_space: of one environment; mask_size: of its action masks, 0 if there are none.
        agent: the network; args: those of the run; algo, env_id, global_step: of the run, too.
        deterministic: as given.

    Raises:
        CheckpointError: it does not fit together, or was made by an algorithm that is not here.
        ConfigError, EnvError: it is of an earlier version, without spaces, and its environment cannot be built.
    """

    def __init__(
        self,
        state: dict[str, Any],
        path: Path,
        deterministic: bool = True,
        seed: int = 10_000,
        spaces: Spaces | None = None,
    ) -> None:
        check_contents(state, path)
        utils, self.deterministic = algorithm(state, path), deterministic
        self.path, self.algo, self.global_step = path, state["algo"], state["global_step"]
        self.args = run_args(state)
        self.env_id = self.args.env_id
        with reading(path):
            spaces = spaces or stored_spaces(state)
        spaces = spaces or _spaces_of_environment(state, path, self.args, utils)
        self.observation_space, self.action_space = spaces.given, spaces.actions
        self.mask_size = spaces.mask_size
        known = SimpleNamespace(single_observation_space=spaces.obs, single_action_space=spaces.actions)
        with reading(path), torch.random.fork_rng([]):  # initial parameters are drawn, and replaced at once
            self.rows = Rows(spaces.given, self.args)
            self.agent = utils.make_agent(self.args, known).eval()
            restore(self.agent, state["agent"])
        self.act = utils.make_policy(self.agent, known, deterministic, stream_seed(seed, int(deterministic)))
        self._begins: np.ndarray | None = None  # [N], which observations are the first of an episode; None: all

    def __repr__(self) -> str:
        """One line: algorithm, environment, steps of training, spaces, and how it acts."""
        mode = "deterministic" if self.deterministic else "sampled"
        spaces = text_of(f"{self.observation_space} → {self.action_space}")
        return f"Policy({self.algo}, {self.env_id}, {self.global_step} steps: {spaces}, {mode})"

    def __call__(self, obs: Any, reward: Any = None, mask: Any = None) -> Any:
        """The action for an observation, or the actions [N, ...] for a batch, as a vector environment gives it.

        Args:
            reward: what the action before earned, a number or [N]; for policies that were trained with --prev-reward.
            mask: discrete actions that are allowed now, [L] or [N, L], as the environment's `action_masks()` or
                `info["action_mask"]` has them; None: all.

        Raises:
            ValueError: the observation does not fit its space or is not finite; the reward is missing or not finite;
                the mask is of another size or allows nothing; or another number of observations came before, without
                a `reset`.
        """
        try:
            rows, is_batch = self.rows(obs)  # [N, ...]
        except EnvError as error:
            raise ValueError(str(error)) from None
        count = len(rows)
        if not np.isfinite(floats_in(rows, self.rows.space)).all():
            raise ValueError("an observation is not finite")
        begins = np.ones(count, dtype=bool) if self._begins is None else self._begins
        if len(begins) != count:
            raise ValueError(f"{count} observations after {len(begins)}: call reset() between them")
        if reward is None and getattr(self.agent, "prev_reward", False) and not begins.all():
            raise ValueError("this policy was trained with --prev-reward: call policy(obs, reward)")
        masks = [] if mask is None else [self._mask(mask, count)]
        rewards = np.full(count, 0.0 if reward is None else reward, dtype=np.float64)
        if not np.isfinite(rewards).all():
            raise ValueError("a reward is not finite")
        actions = self.act(rows, rewards, begins, *masks)
        self._begins = np.zeros(count, dtype=bool)
        return actions if is_batch else actions[0]

    def _mask(self, mask: Any, count: int) -> np.ndarray:
        """Masks as bool [N, L]. Raises ValueError if they are of another size, or allow no action."""
        choices = mask_choices(self.action_space)
        masks, size = np.asarray(mask, dtype=bool), sum(choices)
        if masks.size != count * size or not size:
            raise ValueError(f"a mask of shape {masks.shape} for {count} observations: actions have {size} choices")
        masks = masks.reshape(count, size)
        if not np.logical_or.reduceat(masks, np.cumsum([0, *choices[:-1]]), axis=1).all():
            raise ValueError("a mask that allows no action")
        return masks

    def reset(self, dones: Any = None) -> None:
        """Begins new episodes: call it after `env.reset()`, and in a loop over a batch with what has ended.

        Args:
            dones: [N], true where the next observation is the first of an episode; None: everywhere.

        Raises:
            ValueError: they are not as many as the observations before.
        """
        if dones is None:
            self._begins = None
            return
        dones = np.asarray(dones, dtype=bool).reshape(-1)
        if self._begins is not None:
            if len(dones) != len(self._begins):
                raise ValueError(f"{len(dones)} dones after {len(self._begins)} observations")
            self._begins = self._begins | dones


def load(source: str | Path, deterministic: bool, seed: int) -> Policy:
    """Does what `fabricrl.load` says."""
    return Policy(*load_checkpoint(source), deterministic, seed)


def algorithm(state: dict[str, Any], path: Path) -> ModuleType:
    """The module `utils` of the algorithm that made a checkpoint: it has ACTION_SPACES, make_agent and make_policy.

    Raises:
        CheckpointError: it is not here.
    """
    name = f"fabricrl.algos.{state['algo']}.utils"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):  # what the algorithm needs is missing
            raise
        raise CheckpointError(f"{path} was made by {state['algo']}, which this version does not have") from error


def run_args(state: dict[str, Any]) -> SimpleNamespace:
    """The arguments of the run that made a checkpoint, with those that it did not know yet."""
    return SimpleNamespace(**OLDER | state["args"] | {"vectorization": "sync"})


def _spaces_of_environment(state: dict[str, Any], path: Path, args: Any, utils: ModuleType) -> Spaces:
    """Asks the environment for what a checkpoint of an earlier version does not hold."""
    try:
        spaces = check_env(args, utils.ACTION_SPACES, None, images=True)
    except ConfigError as error:
        raise ConfigError(f"{path} is of an earlier version and does not hold its spaces: {error}") from error
    with reading(path):
        check_spaces(state, spaces)
    return spaces
