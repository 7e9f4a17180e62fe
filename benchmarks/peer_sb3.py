"""One timed run of Stable-Baselines3's PPO, for speed.py. The only argument is JSON with the run's settings.

Prints its result as fabricrl's scripts do, with steps per second from the first reset to the end of the last update.
"""

import json
import sys
import time

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)  # networks this small are slower with more
    envs: VecEnv = DummyVecEnv([lambda: gym.make(settings["env_id"])] * settings["num_envs"])
    if settings["normalize"]:
        envs = VecNormalize(envs, gamma=settings["ppo"].get("gamma", 0.99))
    rate = settings["learning_rate"]
    learning_rate = (lambda remaining: remaining * rate) if settings["anneal_lr"] else rate
    ppo = PPO("MlpPolicy", envs, learning_rate, device="cpu", seed=settings["seed"], **settings["ppo"])
    started = time.perf_counter()
    ppo.learn(settings["total_timesteps"])
    seconds = time.perf_counter() - started
    print(f"result steps={ppo.num_timesteps} sps={ppo.num_timesteps / seconds:.1f}")


if __name__ == "__main__":
    main()
