"""Environments in tensor code, which run where the policy does, thousands side by side: `--vectorization torch`.

Each is a page that says how a task moves; what all have in common is in `env.py`. Under the same ids Gymnasium's own
can be made one at a time, where it has them: they draw the videos.
"""

import gymnasium as gym

_CLASSIC = "gymnasium.envs.classic_control"

# id → module and class here, Gymnasium's module and class, steps of an episode
_TASKS: dict[str, tuple[str, str | None, int]] = {
    "torch/CartPole-v1": ("cartpole:CartPole", f"{_CLASSIC}.cartpole:CartPoleEnv", 500),
    "torch/Acrobot-v1": ("acrobot:Acrobot", f"{_CLASSIC}.acrobot:AcrobotEnv", 500),
    "torch/Pendulum-v1": ("pendulum:Pendulum", f"{_CLASSIC}.pendulum:PendulumEnv", 200),
    "torch/MountainCarContinuous-v0": (
        "mountain_car:MountainCarContinuous",
        f"{_CLASSIC}.continuous_mountain_car:Continuous_MountainCarEnv",
        999,
    ),
    "torch/Reach-v0": ("reach:Reach", None, 100),
    "torch/PlanarCheetah-v1": ("cheetah:PlanarCheetah", None, 1000),
}

for _id, (_ours, _theirs, _steps) in _TASKS.items():
    gym.register(_id, entry_point=_theirs, max_episode_steps=_steps, vector_entry_point=f"{__name__}.{_ours}")
