"""ppo.py, decoupled: rank 0 plays, ranks 1 to W - 1 train (Schulman et al. 2017, arXiv:1707.06347).

    python fabricrl/algos/ppo/ppo_decoupled.py --env-id CartPole-v1 --devices 2
    lightning run model --accelerator=cpu --strategy=ddp --devices=3 fabricrl/algos/ppo/ppo_decoupled.py

Messages of an iteration; with --max-lag 0 the player waits for [W], with K it is up to K iterations ahead of it:

    [H] header           player → each trainer    what to do, and the coefficients of the update
    [D] data             player → each trainer    its share of the rollout
    [M] metrics          trainer 1 → player       losses, faults and signals of the trainers
    [W] weights          trainer 1 → player       all parameters
    [O] optimizer        trainer 1 → player       its state and the trainers' generators, if a checkpoint is due

Normalisers stay with the player, who alone sees raw observations and rewards. Shapes as in ppo.py; B rows of a share.
"""

from collections import deque
from functools import partial
from itertools import cycle
from types import SimpleNamespace

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
    PLAYER,
    STOP,
    TRAIN,
    Channel,
    Group,
    Packet,
    dismiss,
    make_groups,
    player_device,
    silent,
    telling,
)
from fabricrl.utils.launch import StopSignal, failing_together, launch, run_script
from fabricrl.utils.metric import EpisodeStatistics, MeanMetrics, Stopwatch
from fabricrl.utils.model import FlatParameters
from fabricrl.utils.run import Run, rank_generators, restore_generators
from fabricrl.utils.utils import anneal, env_seeds, explained_variance, generators, require

METRICS = tuple(
    f"losses/{name}" for name in ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac")
)


HEADER = dict.fromkeys(("command", "code", "save"), ((), torch.int64))
HEADER |= dict.fromkeys(("learning_rate", "clip_coef", "ent_coef"), ((), torch.float64))


class Messages:
    """The packets of each letter, alike on both sides; several in turn, so that none that is on its way is touched.

    Args:
        share: B.
        count: trainers.
    """

    def __init__(self, agent: PPOAgent, flat: FlatParameters, share: int, count: int, args: PPODecoupledArgs) -> None:
        number, real, row = ((), torch.int64), ((), torch.float64), ((share,), torch.float32)
        vector, states = (flat.vector.shape, torch.float32), (count, 2, *torch.get_rng_state().shape)
        data = dict.fromkeys(("advantages", "returns", "values", "logprobs"), row)
        data |= {"obs": ((share, agent.actor.inputs), torch.float32)}
        data |= {"actions": ((share, agent.head.num_actions), agent.head.dtype)}
        report = {"code": number, "signal": number, "waited": real, "passed": real}
        report |= {"losses": ((len(METRICS),), torch.float64)}
        optimizer = {"step": ((), torch.float32), "exp_avg": vector, "exp_avg_sq": vector}
        fields = {"H": HEADER, "D": data, "M": report, "W": {"weights": vector}}
        fields |= {"O": optimizer | {"generators": (states, torch.uint8)}}
        turns = {letter: (args.max_lag + 2) * (count if letter in "HD" else 1) for letter in fields}
        self._packets = {letter: cycle([Packet(fields[letter]) for _ in range(turns[letter])]) for letter in fields}

    def __getitem__(self, letter: str) -> Packet:
        """The next packet to fill, or to receive into."""
        return next(self._packets[letter])


class Trainers:
    """The trainers as the player sees them.

    Attributes:
        ahead: iterations whose data have been sent and whose weights have not come back: what the policy lags behind.
        signal: exit code that a signal to a trainer asks for, or 0.
    """

    def __init__(self, channel: Channel, messages: Messages, flat: FlatParameters) -> None:
        self.channel, self.messages, self.flat = channel, messages, flat
        self.ranks = range(FIRST_TRAINER, channel.world_size)
        self.ahead: deque[int] = deque()
        self.iteration, self.signal = 0, 0
        self._waited = self._passed = 0.0

    def send(self, data: dict[str, Tensor], **command: float) -> None:
        """[H] and [D]: an equal share of the rows to each."""
        for rank in self.ranks:
            share = {name: column[rank - FIRST_TRAINER :: len(self.ranks)] for name, column in data.items()}
            self.channel.send("H", self.messages["H"].fill(command=TRAIN, **command), rank, self.iteration)
            self.channel.send("D", self.messages["D"].fill(**share), rank, self.iteration)
        self.ahead.append(self.iteration)
        self.iteration += 1

    def collect(self, most: int, losses: MeanMetrics) -> None:
        """[M] and [W] of the oldest iterations, until the player is `most` ahead: losses, and weights to act with.

        Raises:
            RunError: without text, if an update failed; the trainer has said why.
        """
        while len(self.ahead) > most:
            iteration = self.ahead.popleft()
            report = self.channel.receive("M", self.messages["M"], FIRST_TRAINER, iteration)
            if report["code"]:
                raise silent(report["code"])
            self.signal = max(self.signal, report["signal"])
            self._waited, self._passed = self._waited + report["waited"], self._passed + report["passed"]
            losses.update(dict(zip(METRICS, report["losses"].clone(), strict=True)))
            weights = self.channel.receive("W", self.messages["W"], FIRST_TRAINER, iteration)
            self.flat.vector.data.copy_(weights["weights"])

    def optimizer_state(self) -> tuple[dict[str, Tensor], Tensor]:
        """[O] of the newest iteration: Adam's state, and the generators of the trainers."""
        packet = self.channel.receive("O", self.messages["O"], FIRST_TRAINER, self.iteration - 1)
        state = {name: packet.tensors[name].clone() for name in ("step", "exp_avg", "exp_avg_sq")}
        return state, packet["generators"].clone()

    def share_waited(self) -> float:
        """Which share of the time the first trainer has waited for data since the last call."""
        share, self._waited, self._passed = self._waited / max(self._passed, 1e-9), 0.0, 0.0
        return share


def player(args: PPODecoupledArgs, spaces: dict[str, str], fabric: Group, channel: Channel, stop: StopSignal) -> int:
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
    envs = make_envs(args, fabric.global_rank, run.videos)

    # --- Agent, and the optimizer's state for checkpoints
    player = make_agent(args, envs).to(fabric.device)
    flat = FlatParameters(player)
    optimizer = torch.optim.Adam(
        [flat.vector], lr=args.learning_rate, eps=1e-5, fused=fabric.device.type in ("cpu", "cuda")
    )
    count = channel.world_size - FIRST_TRAINER
    trainers = Trainers(channel, Messages(player, flat, batch_size // count, count, args), flat)

    # --- Metrics and buffer
    episodes, losses = EpisodeStatistics(args.num_envs), MeanMetrics()
    obs_shape, head = envs.single_observation_space.shape, player.head
    rb = RolloutBuffer(args.num_steps, args.num_envs, obs_shape, head.num_actions, head.dtype)
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
    obs, _ = envs.reset(seed=env_seeds(args.seed, fabric.global_rank, args.num_envs, global_step))  # [N, D]
    rb.start(obs)
    lag = 0  # most that a rollout's policy was behind since the last entry

    while global_step + batch_size <= args.total_timesteps:
        # 1. Rollout
        lag = max(lag, len(trainers.ahead))
        rollout(player, envs, rb, act_rng, clock)
        global_step += batch_size

        # 2. Returns and advantages
        data, carry = returns_and_advantages(player, rb, carry, args, fabric)

        # 3. Update
        progress = (global_step - batch_size) / args.total_timesteps
        learning_rate = anneal(args.learning_rate, progress, args.anneal_lr)
        clip_coef = anneal(args.clip_coef, progress, args.anneal_clip)
        ent_coef = anneal(args.ent_coef, progress, args.anneal_ent)
        optimizer.param_groups[0]["lr"] = learning_rate
        exit_code = max(stop.exit_code(fabric), trainers.signal)
        last = exit_code > 0 or global_step + batch_size > args.total_timesteps
        saves = run.wants_checkpoint(global_step, last)
        clock.lap("train")
        trainers.collect(max(args.max_lag, 1) - 1, losses)  # <- [M] [W]
        clock.lap("wait_player")
        coefs = {"learning_rate": learning_rate, "clip_coef": clip_coef, "ent_coef": ent_coef}
        trainers.send(data, save=saves, **coefs)  # -> [H] [D]
        clock.lap("comm")
        trainers.collect(0 if last or saves else args.max_lag, losses)  # <- [M] [W]
        clock.lap("wait_player")
        if player.obs_normalizer is not None:  # after the update: actions and losses of a rollout see one normaliser
            player.obs_normalizer.update(rb.obs[:-1].to(fabric.device), fabric)
        clock.lap("train")

        # 4. Log
        episodes.update(fabric, rb.rewards, rb.dones)
        run.advance(global_step, episodes.mean_return)
        if run.wants_log(global_step, last):
            charts = {"charts/learning_rate": learning_rate, "charts/SPS": run.sps(global_step), "charts/lag": lag}
            charts["losses/explained_variance"] = explained_variance(data["values"], data["returns"]).item()
            charts |= {"time/wait_trainer": trainers.share_waited()}
            run.log(charts | episodes.compute() | losses.compute() | clock.shares(), global_step)
            lag = 0

        # 5. Checkpoint
        if saves:
            adam, rngs = trainers.optimizer_state()  # <- [O]
            optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: adam}})
            state = {
                "spaces": spaces,
                "agent": player.state_dict(),
                "optimizer": optimizer.state_dict(),
                "episodes": episodes.state_dict(),
                "generators": with_player(rngs, act_rng, args.seed, global_step),
            }
            run.save(global_step, episodes.mean_return, state)
        clock.lap("log")
        if exit_code:
            break
        rb.start()

    # --- Close
    dismiss(channel, Packet(HEADER), STOP, exit_code)  # -> [H]
    envs.close()
    run.finish(global_step, episodes)
    return exit_code


def with_player(states: Tensor, act_rng: torch.Generator, seed: int, global_step: int) -> Tensor:
    """Generators as ppo.py stores them: those that act, train, and torch's own, of each of its ranks.

    `states` [W - 1, 2, bytes] are the trainers'; the player is the first one's other half.
    """
    acting = [generators(seed, rank, global_step)[0].get_state() for rank in range(len(states))]
    acting[0] = act_rng.get_state()
    states = torch.cat((torch.stack(acting)[:, None], states), 1)  # [W - 1, 3, bytes]
    states[0, -1] = torch.get_rng_state()
    return states


def trainer(
    args: PPODecoupledArgs, spaces: tuple[Space, Space], fabric: Group, channel: Channel, stop: StopSignal
) -> int:
    """The line `train(...)` of ppo.py's main(), for as long as the player wants it."""
    state, resumed = load_checkpoint(args.resume, "ppo") if args.resume else ({}, None)
    act_rng, train_rng = generators(args.seed, fabric.global_rank, state.get("global_step", 0))

    # --- Agent and optimizer
    agent = make_agent(args, SimpleNamespace(single_observation_space=spaces[0], single_action_space=spaces[1]))
    objective: nn.Module = Objective(agent, args)
    objective = fabric.setup_module(torch.compile(objective) if args.compile else objective)
    flat = FlatParameters(agent)
    adam = torch.optim.Adam([flat.vector], lr=args.learning_rate, eps=1e-5, fused=fabric.device.type in ("cpu", "cuda"))
    optimizer = fabric.setup_optimizers(adam)
    share = args.num_steps * args.num_envs // fabric.world_size
    messages = Messages(agent, flat, share, fabric.world_size, args)

    # --- Counters
    if state:
        with reading(resumed):
            restore(agent, state["agent"])
            restore_optimizer(optimizer, state["optimizer"])
            restore_generators(state["generators"], fabric.global_rank, act_rng, train_rng)
    if args.compile:
        compile_ahead(fabric, objective, flat, agent, share // args.num_minibatches, args)

    iteration, first = 0, fabric.global_rank == 0  # the first trainer speaks for all

    def fail(code: int) -> None:
        if first:
            channel.send("M", messages["M"].fill(code=code), PLAYER, iteration)
            channel.flush()

    while True:
        header = channel.receive("H", messages["H"], PLAYER, iteration)
        if header["command"] == ABORT:
            raise silent(header["code"])
        if header["command"] == STOP:
            channel.flush()
            return header["code"]
        data = channel.receive("D", messages["D"], PLAYER, iteration).tensors
        data = {name: column.to(fabric.device) for name, column in data.items()}

        # 3. Update
        optimizer.param_groups[0]["lr"] = header["learning_rate"]
        with telling(fail), failing_together(fabric):
            coefs = header["clip_coef"], header["ent_coef"]
            metrics = train(fabric, objective, flat, optimizer, data, train_rng, args, *coefs)
        signal = stop.exit_code(fabric)
        if header["save"]:
            rngs = rank_generators(fabric, train_rng)
        if first:
            waited, passed = channel.lap()
            means = torch.stack([metrics[tag].mean() for tag in METRICS])
            report = messages["M"].fill(code=0, signal=signal, waited=waited, passed=passed, losses=means)
            channel.send("M", report, PLAYER, iteration)
            channel.send("W", messages["W"].fill(weights=flat.vector.data), PLAYER, iteration)
            if header["save"]:
                stored = optimizer.state[flat.vector]
                channel.send("O", messages["O"].fill(**stored, generators=rngs), PLAYER, iteration)
        iteration += 1


def main() -> int:
    args = parse(PPODecoupledArgs, "ppo", PRESETS)
    video_mode = "rgb_array" if args.capture_video else None
    spaces = check_env(args, ACTION_SPACES, video_mode)
    stop = StopSignal()
    fabric = launch(args)
    world, team = make_groups(fabric, args.timeout)
    count = fabric.world_size - FIRST_TRAINER
    minibatch = args.num_steps * args.num_envs // args.num_minibatches
    allowed = f"such that each of {count} trainers has an equal share of every minibatch of {minibatch}"
    require(minibatch % count == 0, "num_envs", args.num_envs, allowed)
    messages_an_iteration = 2 * (count if fabric.global_rank == PLAYER else 1)
    channel = Channel(world, messages_an_iteration * (args.max_lag + 1))
    if fabric.global_rank > PLAYER:
        return trainer(args, spaces, Group(fabric, team), channel, stop)
    with telling(partial(dismiss, channel, Packet(HEADER), ABORT)):
        return player(args, describe(*spaces), Group(fabric, device=player_device(args, fabric)), channel, stop)


if __name__ == "__main__":
    run_script(main)
