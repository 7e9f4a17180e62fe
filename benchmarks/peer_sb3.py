"""One timed run of Stable-Baselines3's PPO or SAC, or of sb3-contrib's RecurrentPPO, for speed.py.

The only argument is JSON with the run's settings. Prints PPO's result as fabricrl's scripts do, with steps per second
from the first reset to the end of the last update; of SAC the updates per second, after a warm-up.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize


def make_envs(settings: dict[str, Any]) -> VecEnv:
    make_env = partial(gym.make, settings["env_id"], **settings.get("env_kwargs", {}))
    masked = settings.get("masked")
    return DummyVecEnv([partial(mask, make_env, masked) if masked else make_env] * settings["num_envs"])


def mask(make_env: Callable[[], gym.Env], places: list[int]) -> gym.Env:
    env = make_env()
    seen = np.ones(env.observation_space.shape, np.float32)
    seen[places] = 0
    return gym.wrappers.TransformObservation(env, lambda obs: obs * seen, env.observation_space)


def run_ppo(settings: dict[str, Any]) -> None:
    envs = make_envs(settings)
    if settings["normalize"]:
        envs = VecNormalize(envs, gamma=settings["ppo"].get("gamma", 0.99))
    rate = settings["learning_rate"]
    learning_rate = (lambda remaining: remaining * rate) if settings["anneal_lr"] else rate
    common = {"learning_rate": learning_rate, "device": "cpu", "seed": settings["seed"], **settings["ppo"]}
    if settings["algo"] == "ppo_recurrent":
        from sb3_contrib import RecurrentPPO

        ppo: PPO = RecurrentPPO("MlpLstmPolicy", envs, policy_kwargs=settings["policy"], **common)
    else:
        ppo = PPO("MlpPolicy", envs, **common)
    started = time.perf_counter()
    ppo.learn(settings["total_timesteps"])
    seconds = time.perf_counter() - started
    print(f"result steps={ppo.num_timesteps} sps={ppo.num_timesteps / seconds:.1f}")


def run_off_policy(algorithm: type[OffPolicyAlgorithm], settings: dict[str, Any]) -> None:
    """Learns for a stretch that is not timed, then for one that is; SBX's algorithms are made and called alike."""
    model = algorithm("MlpPolicy", make_envs(settings), device="cpu", seed=settings["seed"], **settings["model"])
    model.learn(settings["warm_up"])
    steps, updates = model.num_timesteps, model._n_updates
    started = time.perf_counter()
    model.learn(settings["total_timesteps"] - steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - started
    updates = model._n_updates - updates
    print(f"result steps={model.num_timesteps - steps} updates={updates} updates_per_second={updates / seconds:.2f}")


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["num_threads"])  # one for PPO: networks that small are slower with more
    if settings["algo"].startswith("ppo"):
        run_ppo(settings)
    else:
        run_off_policy(SAC, settings)


if __name__ == "__main__":
    main()
