"""sac.py, decoupled: rank 0 plays, ranks 1 to W - 1 train (Haarnoja et al. 2018, arXiv:1812.05905v2).

    python fabricrl/algos/sac/sac_decoupled.py --env-id Pendulum-v1 --devices 2
    lightning run model --accelerator=cpu --strategy=ddp --devices=3 fabricrl/algos/sac/sac_decoupled.py --num-envs 2

Each trainer owns the replay buffer of its share of the environments, and draws its share of every batch from that: a
transition travels once, however often it is learned from. Messages of an iteration; with --max-lag 0 the player waits
for [W], with K it is up to K iterations ahead of it:

    [D] data             player → each trainer    the step of its environments, the normaliser, and what to do: which
                                                  updates are due, what is to be saved and noted
    [W] weights          trainer 1 → player       the actor's, and the temperature, if an update was due; losses, faults
                                                  and signals of the trainers
    [O] optimizer        trainer 1 → player       what else a checkpoint holds, if one is due

and once, at the start:

    [H] header           player → each trainer    it is ready
    [S] start            player → each trainer    where the run writes, and the first observations
    [B] buffer           trainer 1 → player       whether a run that is resumed has to fill a new buffer first

Shapes as in sac.py.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from torch import Tensor

from fabricrl.algos.args import parse
from fabricrl.algos.sac.args import SACDecoupledArgs
from fabricrl.algos.sac.learner import ACTOR_TAGS, CRITIC_TAGS, Learner, compile_ahead
from fabricrl.algos.sac.sac import rollout, train
from fabricrl.algos.sac.utils import ACTION_SPACES, UpdateSchedule, check_room, make_agent, make_buffer, restore_buffer
from fabricrl.data.buffers import TORCH_TYPES, ReplayBuffer, record_type
from fabricrl.envs import check_env, make_envs
from fabricrl.envs.spaces import describe
from fabricrl.utils.checkpoint import check_batch, check_spaces, load_checkpoint, reading, restore, save_shard
from fabricrl.utils.decoupled import (
    ABORT,
    FIRST_TRAINER,
    HEADER,
    INTEGER,
    PLAYER,
    REPORT,
    STOP,
    Channel,
    EndedByPeerError,
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
from fabricrl.utils.errors import NonFiniteError
from fabricrl.utils.launch import StopSignal, failing_together, launch, run_script
from fabricrl.utils.metric import EpisodeStatistics, MeanMetrics, Stopwatch
from fabricrl.utils.run import Run, rank_generators, restore_generators
from fabricrl.utils.utils import env_seeds, generators, keep_what_is_here, require

METRICS = (*CRITIC_TAGS, *ACTOR_TAGS)
OPTIMIZERS = ("q_optimizer", "actor_optimizer")
ADAM = ("step", "exp_avg", "exp_avg_sq")
PATH_MAX = 4096  # bytes of a path in [S]


def make_messages(learner: Learner, obs_space: Space, count: int, args: SACDecoupledArgs) -> Messages:
    """The packets that `count` trainers and their player exchange."""
    envs, (obs_size, num_actions) = args.num_envs // count, (learner.agent.actor.inputs, learner.agent.head.num_actions)
    obs = (envs, *obs_space.shape), TORCH_TYPES[record_type(obs_space, num_actions, False)["obs"].base.str[1:]]
    data: dict[str, Any] = HEADER | dict.fromkeys(("save", "note", "first", "updates", "step"), INTEGER)
    data |= {"actions": ((envs, num_actions), torch.float32), "next_obs": obs, "final_obs": obs}
    data |= {"rewards": ((envs,), torch.float32)} | dict.fromkeys(("terminated", "truncated"), ((envs,), torch.bool))
    if args.norm_obs:
        data |= dict.fromkeys(("mean", "var"), ((obs_size,), torch.float64)) | {"count": ((), torch.float64)}
    vectors = {name: (getattr(learner, name).vector.shape, torch.float32) for name in ("critics", "target_critics")}
    optimizer: dict[str, Any] = dict(vectors)
    for name, vector in zip(OPTIMIZERS, (learner.critics.vector, learner.actor.vector), strict=True):
        shapes = ((), vector.shape, vector.shape)
        optimizer |= {f"{name}.{part}": (shape, torch.float32) for part, shape in zip(ADAM, shapes, strict=True)}
    optimizer["generators"] = (count, 2, *torch.get_rng_state().shape), torch.uint8
    answer = REPORT | {"noted": INTEGER, "losses": ((2, len(METRICS)), torch.float64)}
    answer |= {"weights": (learner.actor.vector.shape, torch.float32)}
    fields = {"D": data, "W": answer, "O": optimizer}
    fields |= {"S": {"path": ((PATH_MAX,), torch.uint8), "obs": obs}, "B": {"code": INTEGER, "refill": INTEGER}}
    return Messages(fields, count, args.max_lag)


class NewestStep(ReplayBuffer):
    """What the player keeps: the step that it is about to send.

    Attributes:
        newest: actions [N, A] and what `envs.step` answered.
    """

    newest: tuple[np.ndarray, tuple]

    def add(self, actions: np.ndarray, *step: Any) -> None:
        super().add(actions, *step)
        self.newest = actions, step


def shares(actions: np.ndarray, step: tuple, normalizer: Any, count: int) -> list[dict[str, Tensor]]:
    """What each trainer gets to know of a step: that of its environments, side by side, and the normaliser."""
    obs, rewards, terminated, truncated, infos = step
    final_obs = np.zeros_like(obs)
    for env in np.flatnonzero(terminated | truncated):
        final_obs[env] = infos["final_obs"][env]
    columns = {"actions": actions, "next_obs": obs, "final_obs": final_obs, "rewards": rewards}
    columns |= {"terminated": terminated, "truncated": truncated}
    statistics = {} if normalizer is None else normalizer.state_dict()
    rows = len(obs) // count
    blocks = (slice(i * rows, (i + 1) * rows) for i in range(count))
    return [{name: torch.from_numpy(part[block]) for name, part in columns.items()} | statistics for block in blocks]


def collect(trainers: Trainers, most: int, learner: Learner, losses: MeanMetrics) -> None:
    """Takes losses, and the weights to act with, until the player is `most` iterations ahead."""
    for answer in trainers.collect(most):
        if answer["noted"]:
            for tag, total, count in zip(METRICS, *answer["losses"].clone(), strict=True):
                if count:
                    losses.add(tag, total, int(count))
        learner.actor.vector.data.copy_(answer["weights"])


def player(
    args: SACDecoupledArgs, obs_space: Space, action_space: Space, fabric: Group, trainers: Trainers, stop: StopSignal
) -> int:
    """sac.py's main(), whose line `train(...)` is messages."""
    spaces = describe(obs_space, action_space)
    state, resumed = load_checkpoint(args.resume, "sac") if args.resume else ({}, None)
    global_step, exit_code = state.get("global_step", 0), 0  # environment steps

    # --- Fabric, seed, run folder
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
        rb = NewestStep(args.num_envs, args.num_envs, obs_space, int(np.prod(action_space.shape)))
        envs = make_envs(args, fabric.global_rank, run.videos)

    # --- Agent, and the optimizers' state for checkpoints
    player = make_agent(args, envs)
    learner = Learner(fabric, player, args)

    # --- Metrics
    episodes, losses = EpisodeStatistics(args.num_envs), MeanMetrics()

    # --- Counters
    if state:
        with failing_together(fabric), reading(resumed):
            restore(player, state["agent"])
            learner.load_state_dict(state["learner"])
            episodes.load_state_dict(state["episodes"])
            restore_generators(state["generators"], fabric.global_rank, act_rng, train_rng)
            run.best_return = state["best_return"]

    run.start()
    clock = Stopwatch("env", "act", "train", "comm", "wait_player", "log")
    with failing_together(fabric):
        obs, _ = envs.reset(seed=env_seeds(args.seed, fabric.global_rank, args.num_envs, global_step))  # [N, D]
        rb.start(obs)
        if problem := rb.first_bad():
            raise NonFiniteError(problem)
    trainers.begin(make_messages(learner, obs_space, trainers.count, args), player)  # -> [H]
    refill = start(trainers, run.folder, obs)  # -> [S], <- [B]
    if state:
        schedule.load_state_dict(state["schedule"], global_step, refill)
    lag = 0  # most that a policy was behind since the last entry

    while global_step + batch_size <= args.total_timesteps:
        # 1. Rollout
        lag = max(lag, len(trainers.ahead))
        with failing_together(fabric):
            rollout(player, envs, rb, episodes, act_rng, schedule.explores(global_step), clock)
        clock.lap("comm")
        global_step += batch_size
        if player.obs_normalizer is not None:
            player.obs_normalizer.update(rb.newest_obs().to(fabric.device), fabric)

        # 2. Sample
        first, updates = schedule.take(global_step)

        # 3. Update
        clock.lap("train")
        exit_code = stop.exit_code(fabric)
        exit_code = max(exit_code, trainers.signal)
        last = exit_code > 0 or global_step + batch_size > args.total_timesteps
        saves = run.wants_checkpoint(global_step, last)
        notes = run.wants_log(global_step, last) or saves
        collect(trainers, max(args.max_lag, 1) - 1, learner, losses)  # <- [W]
        clock.lap("wait_player")
        command = {"first": first, "updates": updates, "step": global_step, "save": saves, "note": notes}
        parts = shares(*rb.newest, player.obs_normalizer, trainers.count)
        trainers.send(parts, answers=updates > 0 or notes, **command)  # -> [D]
        clock.lap("comm")
        collect(trainers, 0 if last or saves else args.max_lag, learner, losses)  # <- [W]
        clock.lap("wait_player")

        # 4. Log
        if notes:
            episodes.flush(fabric)
        run.advance(global_step, episodes.mean_return)
        if run.wants_log(global_step, last):
            charts = {"charts/learning_rate": args.policy_lr, "charts/SPS": run.sps(global_step)}
            charts |= {"charts/lag": lag, "time/wait_trainer": trainers.share_waited()}
            run.log(charts | episodes.compute() | losses.compute() | clock.shares(), global_step)
            lag = 0

        # 5. Checkpoint
        if saves:
            stored = trainers.receive("O")  # <- [O]
            take_over(learner, stored)
            state = {
                "spaces": spaces,
                "agent": player.state_dict(),
                "learner": learner.state_dict(),
                "schedule": schedule.state_dict(),
                "episodes": episodes.state_dict(),
                "generators": with_player(stored["generators"], act_rng, args.seed, global_step),
                "shards": trainers.count if args.checkpoint_buffer else 0,
            }
            run.save(global_step, episodes.mean_return, state)
        clock.lap("log")
        if exit_code:
            break

    # --- Close
    trainers.dismiss(STOP, exit_code)  # -> [D]
    envs.close()
    run.finish(global_step, episodes)
    return exit_code


def start(trainers: Trainers, folder: Path, obs: np.ndarray) -> bool:
    """[S] to each trainer; [B]: whether their buffers have to be filled before the next update.

    Raises:
        RunError: without text, if a buffer cannot be had; the trainer has said why.
    """
    name = str(folder.absolute()).encode()
    require(len(name) <= PATH_MAX, "log_dir", folder, f"a path of at most {PATH_MAX} bytes")
    path = torch.zeros(PATH_MAX, dtype=torch.uint8)
    path[: len(name)] = torch.frombuffer(bytearray(name), dtype=torch.uint8)
    assert trainers.messages is not None
    for rank, part in enumerate(torch.as_tensor(obs).chunk(trainers.count), FIRST_TRAINER):
        trainers.channel.send("S", trainers.messages["S"].fill(path=path, obs=part), rank, 0)
    answer = trainers.receive("B")
    if answer["code"]:
        raise EndedByPeerError(answer["code"])
    return bool(answer["refill"])


def take_over(learner: Learner, stored: Packet) -> None:
    """[O] into the player's copies of critics, targets and optimizers."""
    for name in ("critics", "target_critics"):
        getattr(learner, name).vector.data.copy_(stored[name])
    for name in OPTIMIZERS:
        optimizer = getattr(learner, name)
        adam = {part: stored.tensors[f"{name}.{part}"].clone() for part in ADAM}
        if adam["step"] > 0:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: adam}})


def trainer(
    args: SACDecoupledArgs, obs_space: Space, action_space: Space, fabric: Group, channel: Channel, stop: StopSignal
) -> int:
    """The lines of sac.py's main() that sample and update, for as long as the player wants them."""
    state, resumed = load_checkpoint(args.resume, "sac") if args.resume else ({}, None)
    act_rng, train_rng = generators(args.seed, fabric.global_rank, state.get("global_step", 0))
    count, speaks = fabric.world_size, fabric.global_rank == 0  # the first trainer speaks for all
    envs = args.num_envs // count
    rows = args.buffer_size // args.num_envs  # of each environment, as many as with any other number of trainers
    share = replace(args, num_envs=envs, buffer_size=rows * envs, batch_size=args.batch_size // count)

    # --- Agent and optimizers
    agent = make_agent(share, SimpleNamespace(single_observation_space=obs_space, single_action_space=action_space))
    learner = Learner(fabric, agent, share)
    messages = make_messages(learner, obs_space, count, args)
    iteration = 0

    # --- Buffer and counters
    if state:
        with before_the_player(channel), reading(resumed):
            restore(agent, state["agent"])
            learner.load_state_dict(state["learner"])
            restore_generators(state["generators"], fabric.global_rank, act_rng, train_rng)
    keep_what_is_here()
    await_player(channel, agent)
    begun = channel.receive("S", messages["S"], PLAYER, iteration)
    folder = Path(bytes(begun["path"].tolist()).rstrip(b"\0").decode())
    refill = False
    with telling(partial(give_up, channel, messages, "B", speaks, iteration), FIRST_TRAINER):
        with failing_together(fabric):
            rb = make_buffer(share, obs_space, action_space, fabric, folder)
        if state:
            with failing_together(fabric), reading(resumed):
                refill = not restore_buffer(rb, state, resumed, share, fabric)
    rb.start(begun["obs"].numpy())
    if speaks:
        channel.send("B", messages["B"].fill(code=0, refill=refill), PLAYER, iteration)
    if args.compile:
        compile_ahead(learner)

    while True:
        packet = receive_data(channel, messages, iteration)
        if packet["command"] == STOP:
            channel.flush()
            return packet["code"]
        add(rb, packet)
        if agent.obs_normalizer is not None:
            statistics = {name: packet.tensors[name] for name in ("mean", "var", "count")}
            agent.obs_normalizer.load_state_dict(statistics)

        with telling(partial(give_up, channel, messages, "W", speaks, iteration), FIRST_TRAINER, iteration):
            # 2. Sample
            updates = packet["updates"]
            batches = rb.sample(updates, share.batch_size, train_rng) if updates else {}

            # 3. Update
            if updates:
                train(learner, batches, packet["first"], train_rng, share)

            # 4. Log, 5. Checkpoint
            metrics: dict[str, Tensor] = {}
            if packet["note"] or learner.wants_check:
                with failing_together(fabric):
                    metrics = learner.metrics()
            if packet["save"]:
                rngs = rank_generators(fabric, train_rng)
            if packet["save"] and args.checkpoint_buffer:
                with failing_together(fabric):
                    save_shard(folder / "checkpoints", packet["step"], fabric.global_rank, rb.state_dict())
            if updates or packet["note"]:
                signal = stop.exit_code(fabric)
                if speaks:
                    answer = messages["W"].fill(weights=learner.actor.vector.data, **report(channel, signal, metrics))
                    channel.send("W", answer, PLAYER, iteration)
            if speaks and packet["save"]:
                channel.send("O", messages["O"].fill(**hand_over(learner), generators=rngs), PLAYER, iteration)
        iteration += 1


def report(channel: Channel, signal: int, metrics: dict[str, Tensor]) -> dict[str, Any]:
    """What [W] tells besides weights; losses as sums and counts, if there are any."""
    waited, passed = channel.lap()
    told = {"code": 0, "signal": signal, "waited": waited, "passed": passed, "noted": len(metrics)}
    if not metrics:
        return told
    noted = [metrics.get(tag, torch.zeros(0)) for tag in METRICS]
    return told | {"losses": torch.tensor([[m.sum() for m in noted], [m.numel() for m in noted]])}


def add(rb: ReplayBuffer, packet: Packet) -> None:
    """[D] into the buffer."""
    names = ("actions", "next_obs", "rewards", "terminated", "truncated", "final_obs")
    *step, final_obs = (packet[name].numpy() for name in names)
    rb.add(*step, {"final_obs": final_obs})


def hand_over(learner: Learner) -> dict[str, Tensor]:
    """Critics, targets and optimizers for [O]; Adam's step is 0 before its first."""
    stored = {name: getattr(learner, name).vector.data for name in ("critics", "target_critics")}
    for name, vector in zip(OPTIMIZERS, (learner.critics.vector, learner.actor.vector), strict=True):
        adam = getattr(learner, name).state.get(vector) or {part: torch.zeros(()) for part in ADAM}
        stored |= {f"{name}.{part}": adam[part] for part in ADAM}
    return stored


def main() -> int:
    args = parse(SACDecoupledArgs, "sac")
    video_mode = "rgb_array" if args.capture_video else None
    obs_space, action_space = check_env(args, ACTION_SPACES, video_mode, bounded=True)
    stop = StopSignal()
    fabric = launch(args)
    count = max(fabric.world_size - FIRST_TRAINER, 1)
    with failing_together(fabric):  # none leaves while another is still about to meet the rest
        for name in ("num_envs", "batch_size"):
            require(getattr(args, name) % count == 0, name, getattr(args, name), f"equal parts for {count} trainers")
        rows = args.buffer_size // args.num_envs * args.num_envs
        require(rows >= args.batch_size, "buffer_size", args.buffer_size, f"such that {rows} is at least batch-size")
    world, team = make_groups(fabric, args.timeout)
    channel = Channel(world, (count if fabric.global_rank == PLAYER else 1) * (args.max_lag + 1))
    if fabric.global_rank > PLAYER:
        return trainer(args, obs_space, action_space, Group(fabric, team), channel, stop)
    trainers = Trainers(channel)
    with telling(partial(trainers.dismiss, ABORT)):
        home = Group(fabric, device=player_device(args, fabric))
        return player(args, obs_space, action_space, home, trainers, stop)


if __name__ == "__main__":
    run_script(main)
