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
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fabricrl.algos.off_policy.utils import make_buffer, make_schedule, restore_buffer
from fabricrl.algos.run import Run, parse, run_script
from fabricrl.algos.sac.agent import ACTION_SPACES, make_agent
from fabricrl.algos.sac.args import SACDecoupledArgs
from fabricrl.algos.sac.sac import (
    ACTOR_METRICS,
    CRITIC_METRICS,
    Learner,
    rollout,
    setup,
    train,
    update_actor,
    update_critics,
)
from fabricrl.data import ReplayBuffer
from fabricrl.data.buffers import TORCH_TYPES, record_type
from fabricrl.utils.checkpoint import reading, save_shard
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
    Fields,
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
from fabricrl.utils.run import rank_generators
from fabricrl.utils.utils import freeze_gc, require

METRICS = (*CRITIC_METRICS, *ACTOR_METRICS)
OPTIMIZERS = ("q_optimizer", "actor_optimizer")
MOMENTS = ("exp_avg", "exp_avg_sq", "steps")
PATH_MAX = 4096  # bytes of a path in [S]


def make_messages(learner: Learner, run: Run, count: int, args: SACDecoupledArgs) -> Messages:
    """The packets that `count` trainers and their player exchange."""
    agent, envs, num_actions = learner.agent, args.num_envs // count, learner.agent.head.num_actions
    record = record_type(run.obs_space, num_actions, False)["obs"].base.str[1:]
    obs = (envs, *run.obs_space.shape), TORCH_TYPES[record]
    data: dict[str, Any] = HEADER | dict.fromkeys(("save", "note", "first", "updates", "step"), INTEGER)
    data |= {"actions": ((envs, num_actions), torch.float32), "next_obs": obs, "final_obs": obs}
    data |= {"rewards": ((envs,), torch.float32)} | dict.fromkeys(("terminated", "truncated"), ((envs,), torch.bool))
    if agent.obs_normalizer is not None:
        data |= {name: (buffer.shape, buffer.dtype) for name, buffer in agent.obs_normalizer.state_dict().items()}
    weights = {"weights": (learner.actor_optimizer.flat.vector.shape, torch.float32)}
    answer = REPORT | {"noted": INTEGER, "losses": ((2, len(METRICS)), torch.float64)} | weights
    stored: Fields = {name: (value.shape, value.dtype) for name, value in hand_over(learner).items()}
    stored["generators"] = (count, 2, *torch.get_rng_state().shape), torch.uint8
    start = {"path": ((PATH_MAX,), torch.uint8), "obs": obs}
    fields = {"D": data, "W": answer, "O": stored, "S": start, "B": {"code": INTEGER, "refill": INTEGER}}
    return Messages(fields, count, args.max_lag)


class NewestStep(ReplayBuffer):
    """The step that the player is about to send, in place of a replay buffer.

    Attributes:
        newest: actions [N, A] and what `envs.step` answered.
    """

    newest: tuple[np.ndarray, tuple]

    def add(self, actions: np.ndarray, *step: Any) -> None:
        super().add(actions, *step)
        self.newest = actions, step


def shares(actions: np.ndarray, step: tuple, normalizer: Any, count: int) -> list[dict[str, Tensor]]:
    """The parts of a step for each trainer: its environments side by side, and the normaliser."""
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
        learner.actor_optimizer.flat.vector.copy_(answer["weights"])


def player(args: SACDecoupledArgs, run: Run, trainers: Trainers) -> int:
    """sac.py's main(), whose line `train(...)` is messages."""
    with run:
        # --- Schedule and buffer
        schedule = make_schedule(run)
        rb = NewestStep(args.num_envs, args.num_envs, run.obs_space, int(np.prod(run.action_space.shape)))

        # --- Environments
        envs = run.make_envs()

        # --- Agent, and the optimizers' state for checkpoints
        agent = make_agent(args, envs)
        learner = setup(run, agent)

        run.restore(agent=agent, q_optimizer=learner.q_optimizer, actor_optimizer=learner.actor_optimizer)

        # --- Start
        run.clock = Stopwatch("env", "act", "train", "comm", "wait_player", "log")
        stored = run.state.get("schedule")
        rb.start(obs := run.reset())
        trainers.begin(make_messages(learner, run, trainers.count, args), agent)  # -> [H]
        refill = start(trainers, run.folder, obs)  # -> [S], <- [B]
        if stored is not None:
            schedule.load_state_dict(stored, run.global_step, refill)
        lag = 0  # most that a policy was behind since the last entry

        for step in run.iterations(args.num_envs):
            # 1. Rollout
            lag = max(lag, len(trainers.ahead))
            rollout(run, run.player(agent), envs, rb, schedule.explores(step))
            if agent.obs_normalizer is not None:
                agent.obs_normalizer.update(rb.newest_obs().to(run.fabric.device), run.fabric)

            # 2. Sample
            first, count = schedule.take(run.global_step)

            # 3. Update
            run.exit_code = max(run.exit_code, trainers.signal)
            saves, notes = run.checkpoint_is_due, run.log_is_due or run.checkpoint_is_due
            run.clock.lap("train")
            collect(trainers, max(args.max_lag, 1) - 1, learner, run.losses)  # <- [W]
            run.clock.lap("wait_player")
            command = {"first": first, "updates": count, "step": run.global_step, "save": saves, "note": notes}
            parts = shares(*rb.newest, agent.obs_normalizer, trainers.count)
            trainers.send(parts, answers=count > 0 or notes, **command)  # -> [D]
            run.clock.lap("comm")
            collect(trainers, 0 if run.is_last or saves else args.max_lag, learner, run.losses)  # <- [W]
            run.clock.lap("wait_player")

            # 4. Log
            run.record_step()
            run.evaluate(agent)
            if run.log_is_due:
                run.charts, lag = {"charts/lag": lag, "time/wait_trainer": trainers.share_waited()}, 0
                run.log({"charts/learning_rate": args.policy_lr})

            # 5. Checkpoint
            if saves:
                received = trainers.receive("O")  # <- [O]
                take_over(learner, received)
                run.generators = with_player(received["generators"], run.act_rng, args.seed, run.global_step)
            run.checkpoint(shards=trainers.count if args.checkpoint_buffer else 0, schedule=schedule)

        # --- Close
        trainers.dismiss(STOP, run.exit_code)  # -> [D]
    return run.exit_code


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


def hand_over(learner: Learner) -> dict[str, Tensor]:
    """Collects for [O] what the player lacks for a checkpoint: critics, targets, and the optimizers' moments."""
    stored = {"critics": learner.q_optimizer.flat.vector}
    stored["target_critics"] = parameters_to_vector(learner.agent.target_critics.parameters()).detach()
    for name in OPTIMIZERS:
        flat = getattr(learner, name).flat
        stored |= {f"{name}.{part}": getattr(flat, part) for part in MOMENTS}
    return stored


@torch.no_grad()
def take_over(learner: Learner, stored: Packet) -> None:
    """Loads into the player's what the first trainer has handed over."""
    learner.q_optimizer.flat.vector.copy_(stored["critics"])
    targets = stored["target_critics"].clone().to(learner.agent.log_alpha.device)
    vector_to_parameters(targets, learner.agent.target_critics.parameters())
    for name in OPTIMIZERS:
        getattr(learner, name).flat.load(**{part: stored.tensors[f"{name}.{part}"] for part in MOMENTS})


def trainer(args: SACDecoupledArgs, run: Run, channel: Channel) -> int:
    """The lines of sac.py's main() that sample and update, for as long as the player wants them."""
    fabric = run.fabric
    count, speaks = fabric.world_size, fabric.global_rank == 0  # the first trainer speaks for all
    envs = args.num_envs // count
    rows = args.buffer_size // args.num_envs  # of each environment, as many as with any other number of trainers
    args = replace(args, num_envs=envs, buffer_size=rows * envs, batch_size=args.batch_size // count)

    # --- Agent and optimizers
    spaces = {"single_observation_space": run.obs_space, "single_action_space": run.action_space}
    agent = make_agent(args, SimpleNamespace(**spaces))
    learner = setup(run, agent)
    step_critics = run.captured(run.compiled(partial(update_critics, run, learner)))
    step_actor = run.captured(run.compiled(partial(update_actor, run, learner)))
    messages = make_messages(learner, run, count, run.args)
    run.args, iteration = args, 0

    # --- Buffer and counters
    with before_the_player(channel):
        run.restore(agent=agent, q_optimizer=learner.q_optimizer, actor_optimizer=learner.actor_optimizer)
        run.restore_generators()
    freeze_gc()
    await_player(channel, agent)
    begun = channel.receive("S", messages["S"], PLAYER, iteration)
    folder = Path(bytes(begun["path"].tolist()).rstrip(b"\0").decode())
    refill = False
    with telling(partial(give_up, channel, messages, "B", speaks, iteration), FIRST_TRAINER):
        rb = make_buffer(run, folder)
        if run.state and run.path:
            with run.together(), reading(run.path):
                refill = not restore_buffer(rb, run.state, run.path, args, fabric)
    rb.start(begun["obs"].numpy())
    if run.records:
        with run.rehearsal():
            every_kind = args.policy_frequency * args.target_network_frequency  # of update: this one, and the next
            train(run, learner, step_critics, step_actor, rb.sample(2, args.batch_size, run.train_rng), every_kind)
    if speaks:
        channel.send("B", messages["B"].fill(code=0, refill=refill), PLAYER, iteration)

    while True:
        packet = receive_data(channel, messages, iteration)
        if packet["command"] == STOP:
            channel.flush()
            return packet["code"]
        add(rb, packet)
        if agent.obs_normalizer is not None:
            statistics = {name: packet.tensors[name] for name in agent.obs_normalizer.state_dict()}
            agent.obs_normalizer.load_state_dict(statistics)

        with telling(partial(give_up, channel, messages, "W", speaks, iteration), FIRST_TRAINER, iteration):
            # 2. Sample
            first, count = packet["first"], packet["updates"]
            if count:
                batches = rb.sample(count, args.batch_size, run.train_rng)

                # 3. Update
                train(run, learner, step_critics, step_actor, batches, first)

            # 4. Log, 5. Checkpoint
            answers = count > 0 or packet["note"]
            metrics: dict[str, Tensor] = {}
            if answers:
                with run.together():
                    metrics = run.look() if packet["note"] or run.has_noted_much else {}
            if packet["save"]:
                rngs = rank_generators(fabric, run.train_rng)
            if packet["save"] and args.checkpoint_buffer:
                with run.together():
                    save_shard(folder / "checkpoints", packet["step"], fabric.global_rank, rb.state_dict())
            if speaks and answers:
                told = report(channel, run.exit_code, metrics)
                answer = messages["W"].fill(weights=learner.actor_optimizer.flat.vector, **told)
                channel.send("W", answer, PLAYER, iteration)
            if speaks and packet["save"]:
                channel.send("O", messages["O"].fill(**hand_over(learner), generators=rngs), PLAYER, iteration)
        iteration += 1


def report(channel: Channel, signal: int, metrics: dict[str, Tensor]) -> dict[str, Any]:
    """The contents of [W] besides weights; losses as sums and counts, if there are any."""
    waited, passed = channel.lap()
    told = {"code": 0, "signal": signal, "waited": waited, "passed": passed, "noted": len(metrics)}
    if not metrics:
        return told
    noted = [metrics.get(tag, torch.zeros(0)) for tag in METRICS]
    return told | {"losses": torch.tensor([[m.sum() for m in noted], [m.numel() for m in noted]])}


def add(rb: ReplayBuffer, packet: Packet) -> None:
    """[D] into the buffer."""
    step = {name: packet[name].numpy() for name in ("actions", "next_obs", "rewards", "terminated", "truncated")}
    rb.add(**step, infos={"final_obs": packet["final_obs"].numpy()})


def main() -> int:
    args = parse(SACDecoupledArgs, "sac")
    run = Run(args, "sac", ACTION_SPACES, bounded=True)
    fabric = run.fabric
    count = max(fabric.world_size - FIRST_TRAINER, 1)
    with run.together():  # none leaves while another is still about to meet the rest
        for name in ("num_envs", "batch_size"):
            require(getattr(args, name) % count == 0, name, getattr(args, name), f"equal parts for {count} trainers")
        rows = args.buffer_size // args.num_envs * args.num_envs
        require(rows >= args.batch_size, "buffer_size", args.buffer_size, f"such that {rows} is at least batch-size")
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
