"""Atari games in C++ threads: ale-py's own vector environment, with the preprocessing of the Gymnasium path."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fabricrl.utils.errors import ConfigError
from fabricrl.utils.records import Records

# Arguments of a game that both of ale-py's forms take. The frames of a step are `frameskip`, or --action-repeat
KWARGS = {"game", "repeat_action_probability", "full_action_space", "max_num_frames_per_episode", "frameskip"}
NO_LIMIT = 2**31 - 2  # frames; ale-py counts one more, in 32 bits


def is_game(env_id: str) -> bool:
    """Returns True for ids of ale-py's own games, and False where somebody has put wrappers around one."""
    spec = gym.registry.get(env_id.rpartition(":")[2])
    if spec is None or spec.entry_point != "ale_py.env:AtariEnv":
        return False
    return spec.max_episode_steps is None and not spec.additional_wrappers


class AtariVectorEnv(VectorEnv):
    """Games as Gymnasium's `AtariEnv`, `AtariPreprocessing` and `PackImages` show them, all in C++.

    Frames, rewards and ends are equal to theirs to the last bit but for chance: generators have other seeds, and the
    steps without action at the beginning are drawn from 0 … noop_max here, from 1 … noop_max there. Frames are not
    stacked: the rollout does that, and stores each once. Rows are views of the array that the threads have written.

    Games reset in the step that ends an episode (SAME_STEP), so that no row only resets. Where neither --action-repeat
    nor --noop-max is given, the final observation is the last but one, as nothing looks at a screen after the end.

    Args:
        env: one environment of Gymnasium's with the same id and arguments, which says how spaces look.
        num_threads: that play.

    Raises:
        ConfigError: the arguments do not fit.
    """

    def __init__(self, args: Any, env: gym.Env, num_threads: int) -> None:
        self.num_envs = args.num_envs
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self._life_loss = args.life_loss
        self._lives = np.zeros(self.num_envs, np.int32)
        self._games = _make(args, env, num_threads)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple:
        """Starts new games; each has a seed of its own, or goes on with its generator if there are none."""
        if seed is not None:
            seeds = seed if isinstance(seed, list) else range(seed, seed + self.num_envs)
            seed = np.array([one % 2**31 for one in seeds])
        obs, info = self._games.reset(seed=seed)
        self._lives = info["lives"]
        return self._rows(obs), {}

    def step(self, actions: Any) -> tuple:
        obs, rewards, terminated, truncated, info = self._games.step(np.asarray(actions, np.int64))
        infos = {}
        if self._life_loss:
            infos["life_lost"] = info["lives"] < self._lives
        self._lives = info["lives"]
        if "final_obs" in info:
            infos["final_obs"] = self._rows(info["final_obs"])
        return self._rows(obs), rewards, terminated, truncated, infos

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the threads."""
        self._games = None

    def _rows(self, obs: np.ndarray) -> np.ndarray:
        """Frames [N, 1, H, W] or [N, 1, H, W, 3] as records [N, R]: a view, unless records are padded."""
        rows = obs.reshape(self.num_envs, -1)
        padding = self.single_observation_space.shape[0] - rows.shape[1]  # type: ignore[index]
        return np.pad(rows, ((0, 0), (0, padding))) if padding else rows


def _make(args: Any, env: gym.Env, num_threads: int) -> Any:
    """ale-py's vector environment, set to what the arguments say and the id implies."""
    from ale_py.vector_env import AtariVectorEnv as Games  # here, as it takes a moment and few runs need it

    space, spec = env.observation_space, dict(env.spec.kwargs if env.spec else {})
    if unknown := sorted(spec.keys() - KWARGS):
        known = ", ".join(sorted(KWARGS - {"game"}))
        raise ConfigError(f"--env-kwargs has {unknown[0]!r}: games of --vectorization native take {known}")
    # With either of the two flags Gymnasium's AtariPreprocessing repeats the actions, else the game does
    repeats = args.action_repeat if args.action_repeat > 1 or args.noop_max > 0 else spec["frameskip"]
    if not isinstance(repeats, int):
        raise ConfigError(
            f"--vectorization native: {args.env_id} draws how often an action is repeated; --action-repeat says it"
        )
    assert isinstance(space, Records)
    (image,) = space.images.values()
    channels, height, width = image.sizes
    try:
        return Games(
            spec["game"],
            args.num_envs,
            num_threads=num_threads,
            max_num_frames_per_episode=spec.get("max_num_frames_per_episode") or NO_LIMIT,
            repeat_action_probability=spec["repeat_action_probability"],
            full_action_space=spec["full_action_space"],
            autoreset_mode=AutoresetMode.SAME_STEP,
            img_height=height,
            img_width=width,
            grayscale=channels == 1,
            stack_num=1,
            frameskip=repeats,
            maxpool=args.action_repeat > 1,
            noop_max=args.noop_max + 1,  # draws from what is below
            life_loss_info=False,  # `life_lost` tells it, and the game goes on
            reward_clipping=False,  # --clip-reward does it, and logs the unclipped ones
            use_fire_reset=False,
        )
    except TypeError as error:
        raise ConfigError(f"--vectorization native: Atari games take ale-py 0.11.1 or newer ({error})") from error
