"""Soft actor-critic with automatic temperature (Haarnoja et al. 2018, arXiv:1812.05905v2), for one process or many.

    python fabricrl/algos/sac/sac.py --env-id Pendulum-v1
    python fabricrl/algos/sac/sac.py --env-id Pendulum-v1 --devices 2 --strategy ddp
    lightning run model --accelerator=cpu --strategy=ddp --devices=2 fabricrl/algos/sac/sac.py --env-id Pendulum-v1

Shapes: N environments of a rank, W ranks, D observation size, A action size, C critics, K updates, B rows of a batch.
"""

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from fabricrl.algos.args import parse
from fabricrl.algos.sac.agent import SACAgent
from fabricrl.algos.sac.args import SACArgs
from fabricrl.algos.sac.learner import Learner, compile_ahead
from fabricrl.algos.sac.utils import ACTION_SPACES, UpdateSchedule, check_room, make_agent, make_buffer, restore_buffer
from fabricrl.data.buffers import ReplayBuffer
from fabricrl.envs import check_env, make_envs
from fabricrl.envs.spaces import describe, stretch
from fabricrl.utils.checkpoint import check_batch, check_spaces, load_checkpoint, reading, restore
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.launch import StopSignal, check_ranks, failing_together, launch, run_script
from fabricrl.utils.metric import EpisodeStatistics, MeanMetrics, Stopwatch
from fabricrl.utils.run import Run, rank_generators, restore_generators
from fabricrl.utils.utils import env_seeds, generators, require


@torch.inference_mode()
def rollout(
    player: SACAgent,
    envs: VectorEnv,
    rb: ReplayBuffer,
    episodes: EpisodeStatistics,
    rng: torch.Generator,
    random: bool,
    clock: Stopwatch,
) -> None:
    """One step in every environment, by uniform actions if `random`, into the replay buffer."""
    num_envs, device = rb.num_envs, player.log_alpha.device
    if random:
        actions = (2 * torch.rand(num_envs, player.head.num_actions, generator=rng) - 1).numpy()  # [N, A]
    else:
        noise = player.head.noise((num_envs,), rng).to(device)
        actions = player.act(rb.newest_obs().to(device), noise).cpu().numpy()  # [N, A]
    if not np.isfinite(actions).all():
        raise NonFiniteError("the policy's actions are not finite")
    clock.lap("act")
    step = envs.step(stretch(envs.single_action_space, actions))
    clock.lap("env")
    rb.add(actions, *step)
    if problem := rb.first_bad():
        raise NonFiniteError(problem)
    episodes.add(rewards=step[1], dones=step[2] | step[3])


def train(learner: Learner, batches: dict[str, Tensor], first: int, rng: torch.Generator, args: SACArgs) -> None:
    """The update: K critic steps on a batch each, the actor's among them. `learner.metrics` tells the losses.

    Args:
        batches: [K, B, ...], as sampled.
        first: number of the first of these updates in the run, from 1.
    """
    batches, delay = learner.prepare(batches), args.policy_frequency
    updates, batch_size = batches["rewards"].shape  # K, B
    actor_updates = delay * ((first - 1 + updates) // delay - (first - 1) // delay)
    noise = learner.agent.head.noise((updates + actor_updates, batch_size), rng)  # [K + ..., B, A]
    noise = iter(noise.to(learner.fabric.device))
    for update, minibatch in enumerate(zip(*batches.values(), strict=True), first):
        batch = dict(zip(batches, minibatch, strict=True))
        learner.update_critics(learner.next_actions(batch, next(noise)))
        if update % delay == 0:  # delayed, and then as often as it was put off
            for _ in range(delay):
                learner.update_actor(batch["obs"], next(noise))
        if update % args.target_network_frequency == 0:
            learner.update_targets()


def main() -> int:
    args = parse(SACArgs, "sac")
    video_mode = "rgb_array" if args.capture_video else None
    obs_space, action_space = check_env(args, ACTION_SPACES, video_mode, bounded=True)
    spaces = describe(obs_space, action_space)
    state, resumed = load_checkpoint(args.resume, "sac") if args.resume else ({}, None)
    global_step, exit_code = state.get("global_step", 0), 0  # environment steps over all ranks

    # --- Fabric, seed, run folder
    stop = StopSignal()
    fabric = launch(args)
    batch_size = args.num_envs * fabric.world_size  # steps an iteration takes
    require(batch_size <= args.total_timesteps, "total_timesteps", args.total_timesteps, f"at least {batch_size}")
    if state:
        check_batch(state, args, fabric.world_size)
        check_spaces(state["spaces"], spaces)
    with failing_together(fabric):
        schedule = UpdateSchedule(args, fabric)
        check_room(args, obs_space, action_space, fabric)
    run = Run(fabric, args, "sac", resumed, global_step)
    act_rng, train_rng = generators(args.seed, fabric.global_rank, global_step)

    # --- Environments
    with failing_together(fabric):
        rb = make_buffer(args, obs_space, action_space, fabric, run.folder)
        envs = make_envs(args, fabric.global_rank, run.videos)

    # --- Agent and optimizers
    player = make_agent(args, envs)  # acts and evaluates; the learner trains it
    learner = Learner(fabric, player, args)

    # --- Metrics
    episodes, losses = EpisodeStatistics(args.num_envs), MeanMetrics()

    # --- Counters
    if state:
        with failing_together(fabric), reading(resumed):
            restore(player, state["agent"])
            learner.load_state_dict(state["learner"])
            episodes.load_state_dict(state["episodes"])
            refill = not restore_buffer(rb, state, resumed, args, fabric)
            schedule.load_state_dict(state["schedule"], global_step, refill)
            restore_generators(state["generators"], fabric.global_rank, act_rng, train_rng)
            run.best_return = state["best_return"]
    if args.compile:
        compile_ahead(learner)

    run.start()
    clock = Stopwatch("env", "act", "train", "comm", "log")
    with failing_together(fabric):
        obs, _ = envs.reset(seed=env_seeds(args.seed, fabric.global_rank, args.num_envs, global_step))  # [N, D]
        rb.start(obs)
        if problem := rb.first_bad():
            raise NonFiniteError(problem)
    check_ranks(fabric, player, rb.newest_obs())

    while global_step + batch_size <= args.total_timesteps:
        # 1. Rollout
        with failing_together(fabric):
            rollout(player, envs, rb, episodes, act_rng, schedule.explores(global_step), clock)
        clock.lap("comm")
        global_step += batch_size
        if player.obs_normalizer is not None:
            player.obs_normalizer.update(rb.newest_obs().to(fabric.device), fabric)

        # 2. Sample
        first, updates = schedule.take(global_step)
        batches = rb.sample(updates, args.batch_size, train_rng) if updates else {}

        # 3. Update
        if updates:
            train(learner, batches, first, train_rng, args)
        clock.lap("train")

        # 4. Log
        exit_code = stop.exit_code(fabric)
        last = exit_code > 0 or global_step + batch_size > args.total_timesteps
        saves = run.wants_checkpoint(global_step, last)
        clock.lap("comm")
        if run.wants_log(global_step, last) or saves or learner.wants_check:
            episodes.flush(fabric)
            with failing_together(fabric):
                losses.update(learner.metrics())
        run.advance(global_step, episodes.mean_return)
        if run.wants_log(global_step, last):
            charts = {"charts/learning_rate": args.policy_lr, "charts/SPS": run.sps(global_step)}
            run.log(charts | episodes.compute() | losses.compute() | clock.shares(), global_step)

        # 5. Checkpoint
        if saves:
            state = {
                "spaces": spaces,
                "agent": player.state_dict(),
                "learner": learner.state_dict(),
                "schedule": schedule.state_dict(),
                "episodes": episodes.state_dict(),
                "generators": rank_generators(fabric, act_rng, train_rng),
            }
            run.save(global_step, episodes.mean_return, state, rb.state_dict() if args.checkpoint_buffer else None)
        clock.lap("log")
        if exit_code:
            break

    # --- Close
    envs.close()
    run.finish(global_step, episodes)
    return exit_code


if __name__ == "__main__":
    run_script(main)
