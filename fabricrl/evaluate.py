"""Plays a checkpoint of any algorithm, greedily and by sampling, and prints the returns.

python fabricrl/evaluate.py logs/ppo/CartPole-v1/ppo_1_20261122-140732 --episodes 100
python fabricrl/evaluate.py <checkpoint or run folder> --episodes 1 --render
python fabricrl/evaluate.py <checkpoint or run folder> --episodes 3 --capture-video
python fabricrl/evaluate.py <checkpoint or run folder> --json
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Space
from gymnasium.vector import VectorEnv
from tqdm import tqdm

from fabricrl.envs import check_env, make_env
from fabricrl.envs.backends import option
from fabricrl.envs.guard import GRACE, VIDEO_GRACE
from fabricrl.envs.spaces import describe
from fabricrl.envs.vector import step_in_turn
from fabricrl.envs.wrappers import NameFailures
from fabricrl.utils.checkpoint import check_contents, check_spaces, load_checkpoint, reading, restore
from fabricrl.utils.ending import run_script
from fabricrl.utils.errors import CheckpointError, ConfigError, NonFiniteError
from fabricrl.utils.records import Records
from fabricrl.utils.signals import StopSignal
from fabricrl.utils.utils import HALF, require, stream_seed

Policy = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]
# Arguments that older checkpoints do not have, as they were meant
OLDER = {"mask_velocities": False, "frame_stack": 1, "cnn_features": 512}


def play(envs: VectorEnv, policy: Policy, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths of `episodes` episodes, [E] each.

    Every environment plays its share to the end. Were the first to finish taken instead, short episodes would count
    too often.

    Raises:
        NonFiniteError: NaN or infinity came from an environment.
    """
    quota = np.full(envs.num_envs, episodes // envs.num_envs)
    quota[: episodes % envs.num_envs] += 1
    running, steps = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=np.int64)
    returns: list[float] = []
    lengths: list[int] = []
    obs, _ = envs.reset(seed=seed)
    _check_finite(obs, np.zeros(envs.num_envs), envs.single_observation_space)
    rewards, dones = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    bar = tqdm(total=episodes, desc="episodes", disable=None, leave=False)  # none without a terminal
    while quota.any():
        obs, rewards, terminated, truncated, _ = envs.step(policy(obs, rewards, dones))
        _check_finite(obs, rewards, envs.single_observation_space)
        dones = terminated | truncated
        running, steps = running + rewards, steps + 1
        for i in np.flatnonzero(dones & (quota > 0)):
            returns.append(float(running[i]))
            lengths.append(int(steps[i]))
            quota[i] -= 1
            bar.update()
        running, steps = np.where(dones, 0.0, running), np.where(dones, 0, steps)
    bar.close()
    return np.array(returns), np.array(lengths)


def _check_finite(obs: np.ndarray, rewards: np.ndarray, space: Space) -> None:
    """Raises NonFiniteError if there is NaN or infinity: the returns would be worth nothing."""
    floats = obs[:, : 4 * space.num_floats].view(np.float32) if isinstance(space, Records) else obs
    for name, values in (("reward", rewards), ("observation", floats)):
        if not np.isfinite(values).all():
            bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
            raise NonFiniteError(f"{name} of environment {np.flatnonzero(bad)[0]} is not finite")


def summary(returns: np.ndarray, lengths: np.ndarray) -> dict[str, float | int]:
    """Mean, standard deviation over episodes, minimum and maximum of returns and lengths, and their number."""
    result: dict[str, float | int] = {}
    for name, values in (("return", returns), ("length", lengths)):
        result |= {f"{name}_mean": float(values.mean()), f"{name}_std": float(values.std())}
        result |= {f"{name}_min": values.min().item(), f"{name}_max": values.max().item()}
    return result | {"episodes": len(returns)}


def evaluate(
    state: dict[str, Any], args: Any, greedy: bool, options: argparse.Namespace, video_folder: Path
) -> dict[str, Any]:
    """Plays one mode, greedy or sampled, on environments of its own."""
    utils = importlib.import_module(f"fabricrl.algos.{state['algo']}.utils")
    one = options.render or options.capture_video  # one environment is watched, so it plays all episodes
    mode = "greedy" if greedy else "sampled"
    num_envs = 1 if one else min(options.episodes, options.num_envs)

    def build(index: int) -> gym.Env:
        folder = video_folder if options.capture_video else None
        shown = "human" if options.render else None
        env = make_env(args, shown, folder, mode, video_episodes=options.episodes)
        return NameFailures(env, index)

    makers = [partial(build, index) for index in range(num_envs)]
    grace = VIDEO_GRACE if options.capture_video else GRACE
    envs = step_in_turn(makers, timeout=option(args, "timeout"), grace=grace, told=options.told)
    with reading(options.path):
        agent = utils.make_agent(args, envs)
        restore(agent, state["agent"])
    policy = utils.make_policy(agent.eval(), envs, greedy, stream_seed(options.seed, int(greedy)))
    try:
        return summary(*play(envs, policy, options.episodes, options.seed))
    finally:
        envs.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="checkpoint, or run folder, whose newest checkpoint is played")
    parser.add_argument("--episodes", type=int, default=100, help="episodes of each mode (default: 100)")
    parser.add_argument("--num-envs", type=int, default=8, help="environments played side by side (default: 8)")
    parser.add_argument("--seed", type=int, default=10_000, help="of environments and sampling (default: 10000)")
    parser.add_argument("--mode", choices=("both", "greedy", "sampled"), default="both", help="default: both")
    parser.add_argument("--render", action="store_true", help="show the environment in a window")
    parser.add_argument("--capture-video", action="store_true", help="record every episode into the run folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    options = parser.parse_args()
    require(options.episodes >= 1, "episodes", options.episodes, "at least 1")
    require(options.num_envs >= 1, "num_envs", options.num_envs, "at least 1")
    seeds = HALF - options.num_envs + 1  # those above are for training
    require(0 <= options.seed < seeds, "seed", options.seed, f"between 0 and {seeds - 1}")
    if options.render and options.capture_video:
        raise ConfigError("--render and --capture-video exclude each other: an environment draws in one way")
    StopSignal(raises=True)
    torch.set_num_threads(1)
    options.told = set()  # warnings, so that both modes tell each once

    state, found = load_checkpoint(options.path)
    check_contents(state, found)
    try:
        utils = importlib.import_module(f"fabricrl.algos.{state['algo']}.utils")
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{found} was made by {state['algo']}, which this version does not have") from error
    mode = "human" if options.render else "rgb_array" if options.capture_video else None
    with reading(found):
        args = SimpleNamespace(**OLDER | state["args"] | {"vectorization": "sync"})
        env_id = args.env_id
    check_spaces(state["spaces"], describe(*check_env(args, utils.ACTION_SPACES, mode, images=True)))
    video_folder = found.parent.parent / "videos" / found.stem
    modes = ("greedy", "sampled") if options.mode == "both" else (options.mode,)
    results = {mode: evaluate(state, args, mode == "greedy", options, video_folder) for mode in modes}
    if options.json:
        print(json.dumps(results))
        return 0
    lines = [f"{env_id}, {found}, {state['global_step']} steps, {options.episodes} episodes"]
    for mode, r in results.items():
        spread = f"± {r['return_std']:.2f}  (min {r['return_min']:.2f}, max {r['return_max']:.2f})"
        length = f"{r['length_mean']:.1f} ± {r['length_std']:.1f}"
        lines.append(f"  {mode:8s} return {r['return_mean']:10.2f} {spread}  length {length}")
    if options.capture_video and any(video_folder.glob("*.mp4")):
        lines.append(f"  videos in {video_folder}")
    print(_printable("\n".join(lines)))
    return 0


def _printable(text: str) -> str:
    """As the terminal can show it; those of ASCII have no ±."""
    encoding = sys.stdout.encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("±", "+-").encode(encoding, "backslashreplace").decode(encoding)
    return text


if __name__ == "__main__":
    run_script(main)
