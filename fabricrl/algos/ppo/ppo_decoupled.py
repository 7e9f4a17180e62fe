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
from torch import Tensor

from fabricrl.algos.ppo.agent import ACTION_SPACES, PPOAgent, make_agent
from fabricrl.algos.ppo.args import PRESETS, PPODecoupledArgs
from fabricrl.algos.ppo.ppo import METRICS, returns_and_advantages, rollout, train, train_epoch, update
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.data import Batch, RolloutBuffer
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
    Packet,
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
from fabricrl.utils.metric import MeanMetrics, Stopwatch
from fabricrl.utils.optimizer import Adam
from fabricrl.utils.run import rank_generators
from fabricrl.utils.utils import anneal, explained_variance, freeze_gc, require

ROWS = ("advantages", "returns", "values", "logprobs", "counts")  # of a share, [B]


def make_messages(agent: PPOAgent, optimizer: Adam, count: int, args: PPODecoupledArgs, mask_size: int) -> Messages:
    """The packets that `count` trainers and their player exchange."""
    share, flat = args.num_steps * args.num_envs // count, optimizer.flat  # B
    vector, states = (flat.vector.shape, torch.float32), (count, 2, *torch.get_rng_state().shape)
    data: dict[str, Any] = HEADER | {"save": INTEGER, "skips": INTEGER}
    data |= dict.fromkeys(("learning_rate", "clip_coef", "ent_coef"), REAL)
    data |= dict.fromkeys(ROWS, ((share,), torch.float32))
    data["obs"] = (share, *agent.obs_shape), agent.obs_dtype
    data["masks"] = (share, mask_size), torch.bool
    data["actions"] = (share, agent.head.num_actions), agent.head.dtype
    answer = REPORT | {"losses": ((2, len(METRICS)), torch.float64), "weights": vector}
    moments = {"exp_avg": vector, "exp_avg_sq": vector, "steps": (flat.steps.shape, torch.float32)}
    return Messages({"D": data, "W": answer, "O": moments | {"generators": (states, torch.uint8)}}, count, args.max_lag)


def divide(data: Batch, count: int) -> Iterator[dict[str, Tensor]]:
    """Every `count`-th row of the rollout for each trainer.

    What frames an observation is made of is put together here: it travels as it is seen.
    """
    counts = torch.ones_like(data.advantages) if data.counts is None else data.counts
    data = data.with_columns(counts=counts)
    for rank in range(count):
        share = data[rank::count].columns
        yield {name: column for name, column in share.items() if column is not None}


def collect(trainers: Trainers, most: int, optimizer: Adam, losses: MeanMetrics) -> None:
    """Takes losses, and the weights to act with, until the player is `most` iterations ahead."""
    for answer in trainers.collect(most):
        for tag, total, count in zip(METRICS, *answer["losses"].clone(), strict=True):
            losses.add(tag, total, int(count))
        optimizer.flat.vector.copy_(answer["weights"])


def player(args: PPODecoupledArgs, run: Run, trainers: Trainers) -> int:
    """ppo.py's main(), whose line `train(...)` is messages."""
    with run:
        # --- Environments
        envs = run.make_envs()

        # --- Agent, and the optimizer's state for checkpoints
        agent = make_agent(args, envs)
        model, optimizer = run.setup(agent, Adam(agent.parameters(), args.learning_rate, eps=1e-5))

        run.restore(agent=agent, optimizer=optimizer)

        # --- Buffer
        shape = args.num_steps, args.num_envs, run.obs_space, agent.head.num_actions, agent.head.dtype
        rb = RolloutBuffer(*shape, args.frame_stack, run.skips, run.mask_size)

        # --- Start
        run.clock = Stopwatch("env", "act", "train", "comm", "wait_player", "log")
        rb.start(run.reset(), run.masks)
        trainers.begin(make_messages(agent, optimizer, trainers.count, args, run.mask_size), agent)  # -> [H]
        lag = 0  # most that a rollout's policy was behind since the last entry

        for step in run.iterations(args.num_steps * args.num_envs):
            # 1. Rollout
            lag = max(lag, len(trainers.ahead))
            rollout(run, run.player(agent), envs, rb)
            if step == 0:  # nothing is learned from observations that are not normalised yet
                run.observe(agent, rb)

            # 2. Returns and advantages
            data = returns_and_advantages(run, model, agent, rb)

            # 3. Update
            progress = step / args.total_timesteps
            learning_rate = anneal(args.learning_rate, progress, args.anneal_lr)
            clip_coef = anneal(args.clip_coef, progress, args.anneal_clip)
            ent_coef = anneal(args.ent_coef, progress, args.anneal_ent)
            optimizer.param_groups[0]["lr"].fill_(learning_rate)
            run.exit_code = max(run.exit_code, trainers.signal)
            saves = run.checkpoint_is_due
            run.clock.lap("train")
            collect(trainers, max(args.max_lag, 1) - 1, optimizer, run.losses)  # <- [W]
            run.clock.lap("wait_player")
            coefs: dict[str, Any] = {"learning_rate": learning_rate, "clip_coef": clip_coef, "ent_coef": ent_coef}
            trainers.send(divide(data, trainers.count), save=saves, skips=rb.skips, **coefs)  # -> [D]
            run.clock.lap("comm")
            collect(trainers, 0 if run.is_last or saves else args.max_lag, optimizer, run.losses)  # <- [W]
            run.clock.lap("wait_player")
            if step > 0:  # after the update: a rollout's actions and losses see the same statistics
                run.observe(agent, rb)
            run.clock.lap("train")

            # 4. Log
            run.record_rollout(rb)
            run.evaluate(agent)
            if run.log_is_due:
                run.charts, lag = {"charts/lag": lag, "time/wait_trainer": trainers.share_waited()}, 0
                explained = explained_variance(run.fabric, data.values, data.returns, data.counts).item()
                run.log({"charts/learning_rate": learning_rate, "losses/explained_variance": explained})

            # 5. Checkpoint
            if saves:
                stored = trainers.receive("O")  # <- [O]
                optimizer.flat.load(**{name: stored.tensors[name] for name in ("exp_avg", "exp_avg_sq", "steps")})
                run.generators = with_player(stored["generators"], run.act_rng, args.seed, run.global_step)
            run.checkpoint()
            rb.start()

        # --- Close
        trainers.dismiss(STOP, run.exit_code)  # -> [D]
    return run.exit_code


def trainer(args: PPODecoupledArgs, run: Run, channel: Channel) -> int:
    """The line `train(...)` of ppo.py's main(), for as long as the player wants it."""
    with before_the_player(channel):
        # --- Agent and optimizer
        spaces = {"single_observation_space": run.obs_space, "single_action_space": run.action_space}
        agent = make_agent(args, SimpleNamespace(**spaces))
        model, optimizer = run.setup(agent, Adam(agent.parameters(), args.learning_rate, eps=1e-5))
        epoch = run.captured(partial(train_epoch, run.compiled(partial(update, run, model, optimizer)), args.norm_adv))
        messages = make_messages(agent, optimizer, run.fabric.world_size, args, run.mask_size)

        # --- Counters
        run.restore(agent=agent, optimizer=optimizer)
        run.restore_generators()
        if run.records:
            with run.rehearsal():
                train(run, epoch, share_of(messages["D"], run), *run.numbers(0.0, 0.0))

    iteration, speaks = 0, run.fabric.global_rank == 0  # the first trainer speaks for all
    freeze_gc()
    await_player(channel, agent)
    while True:
        packet = receive_data(channel, messages, iteration)
        if packet["command"] == STOP:
            channel.flush()
            return packet["code"]

        with telling(partial(give_up, channel, messages, "W", speaks, iteration), FIRST_TRAINER, iteration):
            # 3. Update
            optimizer.param_groups[0]["lr"].fill_(packet["learning_rate"])
            coefs = run.numbers(packet["clip_coef"], packet["ent_coef"])
            with run.together():
                run.note(METRICS, train(run, epoch, share_of(packet, run), *coefs))
                metrics = run.look()
            sums = torch.tensor([[metrics[tag].sum() for tag in METRICS], [metrics[tag].numel() for tag in METRICS]])
            if packet["save"]:
                rngs = rank_generators(run.fabric, run.train_rng)
            if speaks:
                waited, passed = channel.lap()
                report = {"code": 0, "signal": run.exit_code, "waited": waited, "passed": passed, "losses": sums}
                channel.send("W", messages["W"].fill(weights=optimizer.flat.vector, **report), PLAYER, iteration)
                if packet["save"]:
                    flat = optimizer.flat
                    moments = {"exp_avg": flat.exp_avg, "exp_avg_sq": flat.exp_avg_sq, "steps": flat.steps}
                    channel.send("O", messages["O"].fill(**moments, generators=rngs), PLAYER, iteration)
        iteration += 1


def share_of(packet: Packet, run: Run) -> Batch:
    """A trainer's share of the rollout, on its device."""
    names = ("obs", "actions", "logprobs", "values", "advantages", "returns")
    columns = {name: packet[name].to(run.fabric.device) for name in names}
    columns["masks"] = packet["masks"].to(run.fabric.device) if run.mask_size > 0 else None
    return Batch(**columns, counts=packet["counts"].to(run.fabric.device) if packet["skips"] else None)


def main() -> int:
    args = parse(PPODecoupledArgs, "ppo", PRESETS)
    run = Run(args, "ppo", ACTION_SPACES, images=True)
    fabric = run.fabric
    count = max(fabric.world_size - FIRST_TRAINER, 1)
    minibatch = args.num_steps * args.num_envs // args.num_minibatches
    allowed = f"such that each of {count} trainers has an equal share of every minibatch of {minibatch}"
    with run.together():  # none leaves while another is still about to meet the rest
        require(minibatch % count == 0, "num_envs", args.num_envs, allowed)
    world, team = make_groups(fabric, args.timeout)
    channel = Channel(world, (count if fabric.global_rank == PLAYER else 1) * (args.max_lag + 1))
    if fabric.global_rank > PLAYER:
        run.join(Group(fabric, team))
        return trainer(args, run, channel)
    trainers = Trainers(channel)
    with telling(partial(trainers.dismiss, ABORT)):
        run.join(Group(fabric, device=player_device(args, fabric)))
        return player(args, run, trainers)


if __name__ == "__main__":
    run_script(main)
