"""Plays a checkpoint of any algorithm, greedily and by sampling, and prints the returns.

python fabricrl/evaluate.py logs/ppo/CartPole-v1/ppo_1_20261122-140732 --episodes 100
python fabricrl/evaluate.py <checkpoint or run folder> --episodes 1 --render
python fabricrl/evaluate.py <checkpoint or run folder> --episodes 3 --capture-video
python fabricrl/evaluate.py <checkpoint or run folder> --json
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import torch
from tqdm import tqdm

from fabricrl.envs import check_env, make_env
from fabricrl.envs.episode_infos import info_keys
from fabricrl.envs.guard import GRACE, VIDEO_GRACE
from fabricrl.envs.options import option
from fabricrl.envs.play import play
from fabricrl.envs.structure import check_spaces
from fabricrl.envs.tensors import has_single, trial_device, were_tensors
from fabricrl.envs.vector import make_sync_envs, play_tensors
from fabricrl.envs.wrappers import NameFailures
from fabricrl.policy import Policy, algorithm, run_args
from fabricrl.utils.checkpoint import load_checkpoint, reading
from fabricrl.utils.command import Parser
from fabricrl.utils.contents import check_contents
from fabricrl.utils.ending import run_script
from fabricrl.utils.errors import ConfigError, EnvError, from_here, require, writing
from fabricrl.utils.hub import is_on_hub
from fabricrl.utils.seeding import FIRST_TRAINING_SEED
from fabricrl.utils.signals import StopSignal


def evaluate(policy: Policy, greedy: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Plays one mode, greedy or sampled, on environments of its own."""
    args, mode = policy.args, "greedy" if greedy else "sampled"
    if options.capture_video:
        with writing(folder := video_folder(policy, options.path)):
            folder.mkdir(parents=True, exist_ok=True)
    one = options.render or options.capture_video  # one environment is watched, so it plays all episodes
    num_envs = 1 if one else min(options.episodes, options.num_envs)

    def build(index: int) -> gym.Env:
        folder = video_folder(policy, options.path) if options.capture_video else None
        shown = "human" if options.render else None
        env = make_env(args, shown, folder, mode, video_episodes=options.episodes)
        return NameFailures(env, index, info_keys(args), policy.mask_size > 0)

    makers = [partial(build, index) for index in range(num_envs)]
    grace = VIDEO_GRACE if options.capture_video else GRACE
    settings = {"timeout": option(args, "timeout"), "grace": grace, "told": options.told, "keys": info_keys(args)}
    if args.vectorization == "torch":
        envs = play_tensors(SimpleNamespace(**vars(args) | {"num_envs": num_envs}), trial_device(args), **settings)
    else:
        envs = make_sync_envs(makers, **settings)
    try:
        with tqdm(total=options.episodes, desc="episodes", disable=None, leave=False) as bar:  # none without a terminal
            return play(envs, policy.act, options.episodes, options.seed, bar.update).summary()
    finally:
        envs.close()


def check_screen() -> None:
    """Raises EnvError where no window can be opened: MuJoCo aborts there, and pygame draws for nobody."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    if sys.platform == "linux" and not any(map(os.environ.get, screens)):
        raise EnvError("--render needs a screen, and there is none (DISPLAY is not set): record with --capture-video")


def video_folder(policy: Policy, source: str) -> Path:
    """The folder for videos of a checkpoint, in that of its run; here, for one on the Hub."""
    run = Path() if is_on_hub(source) else policy.path.parent.parent
    return run / "videos" / policy.path.stem


def _options() -> Any:
    """The arguments of the command line, checked."""
    parser = Parser(__doc__)
    parser.add_argument(
        "path", help="checkpoint; or run folder or hf://user/repository, of which the newest one is played"
    )
    parser.add_argument("--episodes", type=int, default=100, help="episodes of each mode (default: 100)")
    parser.add_argument("--num-envs", type=int, default=8, help="environments played side by side (default: 8)")
    parser.add_argument("--seed", type=int, default=10_000, help="of environments and sampling (default: 10000)")
    parser.add_argument("--mode", choices=("both", "greedy", "sampled"), default="both", help="default: both")
    parser.add_argument("--render", action="store_true", help="show the environment in a window")
    parser.add_argument("--capture-video", action="store_true", help="record every episode into the run folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    options = parser.parse_args()
    require(options.episodes >= 1, "episodes", options.episodes, "at least 1")
    require(1 <= options.num_envs <= 2**20, "num_envs", options.num_envs, "at least 1, at most 1048576")
    seeds = FIRST_TRAINING_SEED - options.num_envs + 1  # those above are for training
    require(0 <= options.seed < seeds, "seed", options.seed, f"between 0 and {seeds - 1}")
    if options.render and options.capture_video:
        raise ConfigError("--render and --capture-video cannot be combined: an environment has one render mode")
    if options.render:
        check_screen()
    return options


def main() -> int:
    options = _options()
    StopSignal(raises=True)
    torch.set_num_threads(1)
    options.told = set()  # warnings, so that both modes tell each once

    state, found = load_checkpoint(options.path)
    check_contents(state, found)
    utils, args = algorithm(state, found), run_args(state)
    drawn = "human" if options.render else "rgb_array" if options.capture_video else None
    if were_tensors(state["args"]):
        args.vectorization = "sync" if drawn and has_single(args.env_id) else "torch"
        if drawn and args.vectorization == "torch":
            raise ConfigError(f"{args.env_id} cannot be drawn: it has no entry_point, which makes a single environment")
    try:
        spaces = check_env(args, utils.ACTION_SPACES, drawn, images=True)
    except ConfigError as error:
        if not (drawn and were_tensors(state["args"])):
            raise
        flag = "--render" if options.render else "--capture-video"
        raise ConfigError(
            f"{flag} draws a single environment, which this run's arguments do not make: {error}"
        ) from error
    with reading(found):
        check_spaces(state, spaces)
    results = {}
    for mode in ("greedy", "sampled") if options.mode == "both" else (options.mode,):
        greedy = mode == "greedy"
        policy = Policy(state, found, deterministic=greedy, seed=options.seed, spaces=spaces)
        policy.args.vectorization = args.vectorization
        results[mode] = evaluate(policy, greedy, options)
    if options.json:
        print(json.dumps(results))
        return 0
    name = options.path if is_on_hub(options.path) else from_here(found)
    lines = [f"{args.env_id}, {name}, {state['global_step']} steps, {options.episodes} episodes"]
    for mode, r in results.items():
        spread = f"± {r['return_std']:.2f}  (min {r['return_min']:.2f}, max {r['return_max']:.2f})"
        length = f"{r['length_mean']:.1f} ± {r['length_std']:.1f}"
        told = [f"  {key} {r[f'{key}_mean']:.2f}" for key in info_keys(args) if f"{key}_mean" in r]
        lines.append(f"  {mode:8s} return {r['return_mean']:10.2f} {spread}  length {length}{''.join(told)}")
    if options.capture_video and any((videos := video_folder(policy, options.path)).glob("*.mp4")):
        lines.append(f"  videos in {from_here(videos)}")
    print(_printable("\n".join(lines)))
    return 0


def _printable(text: str) -> str:
    """Makes a text printable on this terminal: ASCII has no ±."""
    encoding = sys.stdout.encoding or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("±", "+-").encode(encoding, "backslashreplace").decode(encoding)
    return text


if __name__ == "__main__":
    run_script(main)
