"""ppo.py, decoupled: rank 0 plays, ranks 1 to W - 1 train (Schulman et al. 2017, arXiv:1707.06347).

    python fabricrl/algos/ppo/ppo_decoupled.py --env-id CartPole-v1 --devices 2
    lightning run model --accelerator=cpu --strategy=ddp --devices=3 fabricrl/algos/ppo/ppo_decoupled.py

Messages of an iteration; with --max-lag 0 the player waits for [W], with K it is up to K iterations ahead of it:

    [D] data             player → each trainer    its share of the rollout, and what to do with it
    [W] weights          trainer 1 → player       all parameters; losses, faults and signals of the trainers
    [O] optimizer        trainer 1 → player       its state and the trainers' generators, if a checkpoint is due

and once, at the start, [H] from the player to each trainer, when it is ready.

Normalisers stay with the player, who alone sees raw observations and rewards. Shapes as in ppo.py; B rows of a share.
"""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from fabricrl.algos.args import parse
from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.algos.ppo.args import PRESETS, PPODecoupledArgs
from fabricrl.algos.ppo.ppo import Objective, compile_ahead, returns_and_advantages, rollout, train
from fabricrl.algos.ppo.utils import ACTION_SPACES, make_agent
from fabricrl.data.buffers import RolloutBuffer
from fabricrl.envs import check_env, make_envs
from fabricrl.envs.spaces import describe
from fabricrl.utils.checkpoint import check_batch, check_spaces, load_checkpoint, reading, restore, restore_optimizer
from fabricrl.utils.decoupled import (
    ABORT,
    FIRST_TRAINER,
    HEADER,
    INTEGER,
    PLAYER,
    REAL,
    REPORT,
    STOP,
    Channel,
    Group,
    Messages,
    Trainers,
    await_player,
    before_the_player,
    give_up,
    make_groups,
    player_device,
    receive_data,
    telling,
    with_player,
)
from fabricrl.utils.launch import StopSignal, failing_together, launch, run_script
from fabricrl.utils.metric import EpisodeStatistics, MeanMetrics, Stopwatch
from fabricrl.utils.model import FlatParameters
from fabricrl.utils.run import Run, rank_generators, restore_generators
from fabricrl.utils.utils import anneal, env_seeds, explained_variance, generators, keep_what_is_here, require

DATA = ("obs", "actions", "logprobs", "values", "advantages", "returns")  # of a share, [B, ...]
METRICS = tuple(
    f"losses/{name}" for name in ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
)


def make_messages(agent: PPOAgent, flat: FlatParameters, count: int, args: PPODecoupledArgs) -> Messages:
    """The packets that `count` trainers and their player exchange."""
    share = args.num_steps * args.num_envs // count  # B
    vector, states = (flat.vector.shape, torch.float32), (count, 2, *torch.get_rng_state().shape)
    data: dict[str, Any] = HEADER | {"save": INTEGER, "rows": INTEGER}
    data |= dict.fromkeys(("learning_rate", "clip_coef", "ent_coef"), REAL)
    data |= dict.fromkeys(("advantages", "returns", "values", "logprobs"), ((share,), torch.float32))
    data["obs"] = (share, *agent.obs_shape), agent.obs_dtype
    data["actions"] = (share, agent.head.num_actions), agent.head.dtype
    answer = REPORT | {"losses": ((2, len(METRICS)), torch.float64), "weights": vector}
    optimizer = {"step": ((), torch.float32), "exp_avg": vector, "exp_avg_sq": vector}
    optimizer["generators"] = states, torch.uint8
    return Messages({"D": data, "W": answer, "O": optimizer}, count, args.max_lag)


def divide(data: dict[str, Any], count: int, room: int) -> Iterator[dict[str, Tensor]]:
    """Every `count`-th row of the rollout for each trainer; as many for all, filled up to `room` if steps were skipped.

    What frames an observation is made of is put together here: it travels as it is seen.
    """
    rows = len(data["returns"]) // count
    for rank in range(count):
        share = {name: column[rank::count][:rows] for name, column in data.items()}
        if rows < room:
            for name, column in share.items():
                share[name] = torch.cat((column, column.new_zeros(room - rows, *column.shape[1:])))
        yield share


def collect(trainers: Trainers, most: int, flat: FlatParameters, losses: MeanMetrics) -> None:
    """Takes losses, and the weights to act with, until the player is `most` iterations ahead."""
    for answer in trainers.collect(most):
        for tag, total, count in zip(METRICS, *answer["losses"].clone(), strict=True):
            losses.add(tag, total, int(count))
        flat.vector.data.copy_(answer["weights"])


def player(args: PPODecoupledArgs, spaces: dict[str, str], fabric: Group, trainers: Trainers, stop: StopSignal) -> int:
    """ppo.py's main(), whose line `train(...)` is messages."""
    state, resumed = load_checkpoint(args.resume, "ppo") if args.resume else ({}, None)
    global_step, exit_code = state.get("global_step", 0), 0  # environment steps

    # --- Fabric, seed, run folder
    batch_size = args.num_steps * args.num_envs * fabric.world_size  # steps an iteration takes
    require(batch_size <= args.total_timesteps, "total_timesteps", args.total_timesteps, f"at least {batch_size}")
    if state:
        check_batch(state, args, fabric.world_size)
        check_spaces(state["spaces"], spaces)
    run = Run(fabric, args, "ppo", resumed, global_step)
    act_rng, train_rng = generators(args.seed, fabric.global_rank, global_step)

    # --- Environments
    with failing_together(fabric):
        envs = make_envs(args, fabric.global_rank, run.videos)

    # --- Agent, and the optimizer's state for checkpoints
    player = make_agent(args, envs)
    player.to(fabric.device)
    flat = FlatParameters(player)
    adam = torch.optim.Adam([flat.vector], lr=args.learning_rate, eps=1e-5, fused=fabric.device.type in ("cpu", "cuda"))
    optimizer = fabric.setup_optimizers(adam)

    # --- Metrics and buffer
    episodes, losses = EpisodeStatistics(args.num_envs), MeanMetrics()
    obs_space, head = envs.single_observation_space, player.head
    rb = RolloutBuffer(args.num_steps, args.num_envs, obs_space, head.num_actions, head.dtype, args.frame_stack)
    carry = torch.zeros(args.num_envs)  # discounted reward so far, [N]

    # --- Counters
    if state:
        with reading(resumed):
            restore(player, state["agent"])
            restore_optimizer(optimizer, state["optimizer"])
            episodes.load_state_dict(state["episodes"])
            restore_generators(state["generators"], fabric.global_rank, act_rng, train_rng)
            run.best_return = state["best_return"]

    run.start()
    clock = Stopwatch("env", "act", "train", "comm", "wait_player", "log")
    with failing_together(fabric):
        obs, _ = envs.reset(seed=env_seeds(args.seed, fabric.global_rank, args.num_envs, global_step))  # [N, D]
    rb.start(obs)
    trainers.begin(make_messages(player, flat, trainers.count, args), player)  # -> [H]
    lag = 0  # most that a rollout's policy was behind since the last entry

    while global_step + batch_size <= args.total_timesteps:
        # 1. Rollout
        lag = max(lag, len(trainers.ahead))
        with failing_together(fabric):
            rollout(player, envs, rb, act_rng, clock)
        clock.lap("comm")
        global_step += batch_size

        # 2. Returns and advantages
        data, carry = returns_and_advantages(player, rb, carry, args, fabric)

        # 3. Update
        progress = (global_step - batch_size) / args.total_timesteps
        learning_rate = anneal(args.learning_rate, progress, args.anneal_lr)
        clip_coef = anneal(args.clip_coef, progress, args.anneal_clip)
        ent_coef = anneal(args.ent_coef, progress, args.anneal_ent)
        optimizer.param_groups[0]["lr"] = learning_rate
        exit_code = stop.exit_code(fabric)
        exit_code = max(exit_code, trainers.signal)
        last = exit_code > 0 or global_step + batch_size > args.total_timesteps
        saves = run.wants_checkpoint(global_step, last)
        clock.lap("train")
        collect(trainers, max(args.max_lag, 1) - 1, flat, losses)  # <- [W]
        clock.lap("wait_player")
        coefs = {"learning_rate": learning_rate, "clip_coef": clip_coef, "ent_coef": ent_coef}
        shares = divide(data, trainers.count, batch_size // trainers.count)
        trainers.send(shares, save=saves, rows=len(data["returns"]) // trainers.count, **coefs)  # -> [D]
        clock.lap("comm")
        collect(trainers, 0 if last or saves else args.max_lag, flat, losses)  # <- [W]
        clock.lap("wait_player")
        if player.obs_normalizer is not None:  # after the update: actions and losses of a rollout see one normaliser
            player.obs_normalizer.update(rb.vectors(rb.obs[:-1][~rb.skipped]).to(fabric.device), fabric)
        clock.lap("train")

        # 4. Log
        episodes.update(fabric, rb.rewards, rb.ends, rb.skipped)
        run.advance(global_step, episodes.mean_return)
        if run.wants_log(global_step, last):
            charts = {"charts/learning_rate": learning_rate, "charts/SPS": run.sps(global_step)}
            charts["losses/explained_variance"] = explained_variance(data["values"], data["returns"]).item()
            charts |= {"charts/lag": lag, "time/wait_trainer": trainers.share_waited()}
            run.log(charts | episodes.compute() | losses.compute() | clock.shares(), global_step)
            lag = 0

        # 5. Checkpoint
        if saves:
            stored = trainers.receive("O")  # <- [O]
            moments = {name: stored.tensors[name].clone() for name in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: moments}})
            state = {
                "spaces": spaces,
                "agent": player.state_dict(),
                "optimizer": optimizer.state_dict(),
                "episodes": episodes.state_dict(),
                "generators": with_player(stored["generators"], act_rng, args.seed, global_step),
            }
            run.save(global_step, episodes.mean_return, state)
        clock.lap("log")
        if exit_code:
            break
        rb.start()

    # --- Close
    trainers.dismiss(STOP, exit_code)  # -> [D]
    envs.close()
    run.finish(global_step, episodes)
    return exit_code


def trainer(
    args: PPODecoupledArgs, spaces: tuple[Space, Space], fabric: Group, channel: Channel, stop: StopSignal
) -> int:
    """The line `train(...)` of ppo.py's main(), for as long as the player wants it."""
    with before_the_player(channel):
        state, resumed = load_checkpoint(args.resume, "ppo") if args.resume else ({}, None)
        act_rng, train_rng = generators(args.seed, fabric.global_rank, state.get("global_step", 0))

        # --- Agent and optimizer
        agent = make_agent(args, SimpleNamespace(single_observation_space=spaces[0], single_action_space=spaces[1]))
        objective: nn.Module = Objective(agent, args)
        objective = fabric.setup_module(torch.compile(objective) if args.compile else objective)
        flat = FlatParameters(agent)
        adam = torch.optim.Adam(
            [flat.vector], lr=args.learning_rate, eps=1e-5, fused=fabric.device.type in ("cpu", "cuda")
        )
        optimizer = fabric.setup_optimizers(adam)
        messages = make_messages(agent, flat, fabric.world_size, args)

        # --- Counters
        if state:
            with reading(resumed):
                restore(agent, state["agent"])
                restore_optimizer(optimizer, state["optimizer"])
                restore_generators(state["generators"], fabric.global_rank, act_rng, train_rng)
        if args.compile:
            minibatch_size = args.num_steps * args.num_envs // fabric.world_size // args.num_minibatches
            compile_ahead(fabric, objective, flat, agent, minibatch_size, args)

    iteration, speaks = 0, fabric.global_rank == 0  # the first trainer speaks for all
    keep_what_is_here()
    await_player(channel, agent)
    while True:
        packet = receive_data(channel, messages, iteration)
        if packet["command"] == STOP:
            channel.flush()
            return packet["code"]
        data = {name: packet[name][: packet["rows"]].to(fabric.device) for name in DATA}

        with telling(partial(give_up, channel, messages, "W", speaks, iteration), FIRST_TRAINER, iteration):
            # 3. Update
            optimizer.param_groups[0]["lr"] = packet["learning_rate"]
            with failing_together(fabric):
                coefs = packet["clip_coef"], packet["ent_coef"]
                metrics = train(fabric, objective, flat, optimizer, data, train_rng, args, *coefs)
            signal = stop.exit_code(fabric)
            if packet["save"]:
                rngs = rank_generators(fabric, train_rng)
            if speaks:
                waited, passed = channel.lap()
                sums = torch.tensor(
                    [[metrics[tag].sum() for tag in METRICS], [metrics[tag].numel() for tag in METRICS]]
                )
                report = {"code": 0, "signal": signal, "waited": waited, "passed": passed, "losses": sums}
                channel.send("W", messages["W"].fill(weights=flat.vector.data, **report), PLAYER, iteration)
                if packet["save"]:
                    stored = optimizer.state[flat.vector]
                    channel.send("O", messages["O"].fill(**stored, generators=rngs), PLAYER, iteration)
        iteration += 1


def main() -> int:
    args = parse(PPODecoupledArgs, "ppo", PRESETS)
    video_mode = "rgb_array" if args.capture_video else None
    spaces = check_env(args, ACTION_SPACES, video_mode, images=True)
    stop = StopSignal()
    fabric = launch(args)
    count = max(fabric.world_size - FIRST_TRAINER, 1)
    minibatch = args.num_steps * args.num_envs // args.num_minibatches
    allowed = f"such that each of {count} trainers has an equal share of every minibatch of {minibatch}"
    with failing_together(fabric):  # none leaves while another is still about to meet the rest
        require(minibatch % count == 0, "num_envs", args.num_envs, allowed)
    world, team = make_groups(fabric, args.timeout)
    channel = Channel(world, (count if fabric.global_rank == PLAYER else 1) * (args.max_lag + 1))
    if fabric.global_rank > PLAYER:
        return trainer(args, spaces, Group(fabric, team), channel, stop)
    trainers = Trainers(channel)
    with telling(partial(trainers.dismiss, ABORT)):
        return player(args, describe(*spaces), Group(fabric, device=player_device(args, fabric)), trainers, stop)


if __name__ == "__main__":
    run_script(main)
