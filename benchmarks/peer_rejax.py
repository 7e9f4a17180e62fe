"""One timed run of rejax's PPO, PureJaxRL as a package: environments of gymnax and training are one program of JAX.

The only argument is JSON with the run's settings. Prints its result as fabricrl's scripts do, without compilation.
"""

import json
import sys
import time
from typing import Any

import jax
from rejax import PPO


def run(settings: dict[str, Any]) -> None:
    total = settings["total_timesteps"]
    network = {"hidden_layer_sizes": (64, 64), "activation": "tanh"}
    ppo = PPO.create(**settings["ppo"], total_timesteps=total, eval_freq=total, agent_kwargs=network)
    ppo = ppo.replace(eval_callback=lambda ppo, state, rng: 0, skip_initial_evaluation=True)
    train = jax.jit(ppo.train).lower(jax.random.PRNGKey(0)).compile()
    started = time.perf_counter()
    state, _ = jax.block_until_ready(train(jax.random.PRNGKey(settings["seed"])))
    steps = int(state.global_step)
    print(f"result steps={steps} sps={steps / (time.perf_counter() - started):.1f}")


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
