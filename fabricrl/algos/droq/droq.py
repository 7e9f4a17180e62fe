"""DroQ: many critic updates per step, by small dropout and layer norm (Hiraoka et al. 2022, arXiv:2110.02034v2).

    python fabricrl/algos/droq/droq.py --env-id HalfCheetah-v4
    python fabricrl/algos/droq/droq.py --env-id HalfCheetah-v4 --devices 2 --strategy ddp
    lightning run model --accelerator=cpu --strategy=ddp --devices=2 fabricrl/algos/droq/droq.py --env-id HalfCheetah-v4

Everything but the update is SAC's. Shapes: N environments of a rank, W ranks, D observation size, A action size,
C critics, S environment steps that updates are due for, K critic updates, B rows of a batch.
"""

import torch
from torch import Tensor

from fabricrl.algos.args import parse
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.droq.utils import ACTION_SPACES, make_agent
from fabricrl.algos.sac.learner import Learner, compile_ahead
from fabricrl.algos.sac.sac import rollout
from fabricrl.algos.sac.utils import UpdateSchedule, check_room, make_buffer, restore_buffer
from fabricrl.envs import check_env, make_envs
from fabricrl.envs.spaces import describe
from fabricrl.utils.checkpoint import check_batch, check_spaces, load_checkpoint, reading, restore
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.launch import StopSignal, check_ranks, failing_together, launch, run_script
from fabricrl.utils.metric import EpisodeStatistics, MeanMetrics, Stopwatch
from fabricrl.utils.run import Run, rank_generators, restore_generators
from fabricrl.utils.utils import env_seeds, generators, require


def train(learner: Learner, batches: dict[str, Tensor], steps: int, rng: torch.Generator, args: DroQArgs) -> None:
    """The update of Algorithm 2: for each environment step its share of critic updates (lines 4–9), then one update of
    actor and temperature (line 10) on a batch of its own. `learner.metrics` tells the losses.

    Args:
        batches: [K + S, B, ...], as sampled; the last S are the actor's.
        steps: S.
    """
    batches = learner.prepare(batches)
    agent, updates = learner.agent, len(batches["rewards"]) - steps  # K
    noise = agent.head.noise(batches["rewards"].shape, rng).to(learner.fabric.device)  # [K + S, B, A]
    dropped = iter(agent.drop(2 * updates + steps, args.batch_size, rng))
    for step in range(steps):
        share = slice(updates * step // steps, updates * (step + 1) // steps)
        # The actor stands still meanwhile, so that one forward gives the next actions of all these batches
        minibatches = learner.next_actions({name: column[share] for name, column in batches.items()}, noise[share])
        for minibatch in zip(*minibatches.values(), strict=True):
            batch = dict(zip(minibatches, minibatch, strict=True))
            learner.update_critics(batch, next(dropped), next(dropped))
            learner.update_targets()
        row = updates + step
        learner.update_actor(batches["obs"][row], noise[row], next(dropped))


def main() -> int:
    args = parse(DroQArgs, "droq")
    video_mode = "rgb_array" if args.capture_video else None
    obs_space, action_space = check_env(args, ACTION_SPACES, video_mode, bounded=True)
    spaces = describe(obs_space, action_space)
    state, resumed = load_checkpoint(args.resume, "droq") if args.resume else ({}, None)
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
    run = Run(fabric, args, "droq", resumed, global_step)
    act_rng, train_rng = generators(args.seed, fabric.global_rank, global_step)

    # --- Environments
    with failing_together(fabric):
        rb = make_buffer(args, obs_space, action_space, fabric, run.folder)
        envs = make_envs(args, fabric.global_rank, run.videos)

    # --- Agent and optimizers
    player = make_agent(args, envs)  # acts and evaluates; the learner trains it
    learner = Learner(fabric, player, args, mean_over_critics=True)

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
        updates = max(int(args.replay_ratio), 1)
        for seed in range(2):  # how much is dropped varies, which the second call shows to the compiler
            dropped = player.drop(3, args.batch_size, torch.Generator().manual_seed(seed))
            compile_ahead(learner, updates, dropped)

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
        steps = min(max(global_step - schedule.starts, 0), batch_size)  # that updates are due for
        _, updates = schedule.take(global_step)
        batches = rb.sample(updates + steps, args.batch_size, train_rng) if steps else {}

        # 3. Update
        if steps:
            train(learner, batches, steps, train_rng, args)
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
