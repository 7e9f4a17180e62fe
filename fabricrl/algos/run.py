"""Everything that a run needs around its algorithm: `Run`, which every script drives.

with Run(args, "ppo", ACTION_SPACES) as run:
    envs = run.make_envs()
    model, optimizer = run.setup(agent, Adam(agent.parameters(), args.learning_rate))
    run.restore(agent=agent, optimizer=optimizer)
    obs = run.reset()
    for step in run.iterations(args.num_steps * args.num_envs):
        ...  # the algorithm
        run.evaluate(agent)
        if run.log_is_due:
            run.log({"charts/learning_rate": learning_rate})
        run.checkpoint()
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, nn

from fabricrl.algos.acting import Acting, example_inputs, faster_device
from fabricrl.algos.args import AUTO, check_sizes
from fabricrl.algos.command_line import parse
from fabricrl.algos.evaluation import Evaluation
from fabricrl.algos.names import command, run_name
from fabricrl.algos.remarks import Remarks
from fabricrl.algos.resume import newest_run, resume_together
from fabricrl.algos.tensor_episodes import TensorEpisodes
from fabricrl.data import (
    DeviceRecurrentRolloutBuffer,
    DeviceRolloutBuffer,
    RecurrentRolloutBuffer,
    Replay,
    RolloutBuffer,
)
from fabricrl.envs import check_env, make_envs
from fabricrl.envs.episode_infos import info_keys
from fabricrl.envs.rows import floats_in
from fabricrl.envs.shared import SharedEnvs
from fabricrl.envs.structure import check_spaces, structure_of
from fabricrl.envs.tensors import takes_tensors
from fabricrl.models.recurrent import common_length
from fabricrl.utils.checkpoint import check_batch, load_checkpoint, reading, restore
from fabricrl.utils.device import to_device
from fabricrl.utils.ending import end_if_out_of_memory, run_script
from fabricrl.utils.errors import NonFiniteError, RunError, require
from fabricrl.utils.launch import check_ranks, launch
from fabricrl.utils.metric import EpisodeStatistics, MeanMetrics, Stopwatch, UpdateMetrics
from fabricrl.utils.optimizer import Adam
from fabricrl.utils.ranks import all_gather
from fabricrl.utils.run import RunFolder, rank_generators, restore_generators
from fabricrl.utils.seeding import env_seeds, generators
from fabricrl.utils.signals import StopSignal
from fabricrl.utils.update import Runner, check_compiler

FETCH_EVERY = 1000  # updates, or steps
WORTH_A_WORD = 0.01  # of `total_timesteps`: fewer are not missed

__all__ = ["Run", "parse", "run_script"]  # what a script begins and ends with


class Run(Acting):
    """One run of a script: ranks, environments, seeds, the run's folder, faults, signals, logs and checkpoints.

    How it acts is in `Acting`. All ranks have to call whatever involves other ranks.

    Args:
        algo: the algorithm, which checkpoints have to be of.
        action_spaces: those that it can act in.
        bounded: actions must be a Box with finite bounds; images: observations may have images.

    Attributes:
        args: the arguments, of which another number of ranks may have changed some; asked: those as they were given.
        given: the arguments of all players, where each has its share.
        fabric: Lightning's, or the `Group` of a decoupled script.
        team: the ranks that agree on faults and signals; those of `fabric`, except for players that each see what all
            do, and compute as if they were alone.
        all_envs: number of environments, also those of other players, whose noise comes from the same generator.
        spaces: of a single environment; obs_space, action_space: those that the agent knows; mask_size: of its action
            masks, 0 if there are none.
        masks: actions that are allowed after a reset, [N, mask_size], or None.
        uses_tensor_envs: environments take and return tensors where the run trains, which leave it for logs alone.
        storage: of what such environments return: the buffer of a rollout, or a replay buffer.
        state, path: the checkpoint that the run goes on from, or {} and None.
        global_step: environment steps of all ranks, at the end of the current iteration.
        act_rng, train_rng: generators of action noise and of training, different on every rank.
        device_rng: what updates draw from that sample for themselves: `train_rng`, or one on a GPU, see `draw_on`.
        runner: compiles and captures updates.
        metrics: of updates, until they are looked at.
        episodes, losses, clock: statistics for the log; charts: further ones for the next entry alone.
        generators: states for the next checkpoint, of all ranks; None: of those generators that this run has.
        trainers: those of a decoupled script, if this is its player; else None.
        while_evaluating: called every second or so in an evaluation; a decoupled script's player has others waiting.
        exit_code: 0, or that of the signal that ends the run.

    Raises:
        RunError: here and later, on all ranks at once.
    """

    trainers: Any = None
    uses_tensor_envs = False
    storage: Any = None
    _chosen_device: str | None = None  # of `player_device`, where it is chosen by measuring

    def __init__(
        self, args: Any, algo: str, action_spaces: tuple[type[Space], ...], bounded: bool = False, images: bool = False
    ) -> None:
        auto = args.resume == AUTO
        if auto:
            args = replace(args, resume=str(folder) if (folder := newest_run(args, algo)) else None)
        self.args, self.algo = args, algo
        if args.compile:
            check_compiler()
        video_mode = "rgb_array" if args.capture_video else None
        self.spaces = check_env(args, action_spaces, video_mode, bounded, images)
        self.action_space: Any  # one of `action_spaces`
        self.obs_space, self.action_space, self.mask_size, _ = self.spaces
        self.path: Path | None
        check_sizes(args, algo, self.obs_space, self.action_space)
        self.uses_tensor_envs = takes_tensors(args)
        self.state, self.path = load_checkpoint(args.resume, algo) if args.resume else ({}, None)
        self.exit_code, self._iteration_steps = 0, 0
        self._is_last: bool | None = None  # undecided
        self.charts: dict[str, float] = {}
        self.generators: Tensor | None = None
        self._signals = StopSignal()
        self.fabric: Any = launch(args)
        self.team = self.fabric
        self._signals.can_save = True
        self.asked: dict[str, Any]
        parsed, found = self.args, (self.state, self.path)
        self.args, self.asked, self.state, self.path = resume_together(self.fabric, parsed, *found, algo, auto)
        if self.args != parsed:
            check_sizes(self.args, algo, self.obs_space, self.action_space)
        self.global_step = self.first_step = self.state.get("global_step", 0)
        self.global_args, self.losses = self.args, MeanMetrics()
        self.clock = Stopwatch("env", "act", "train", "comm", "log")
        self._parts: dict[str, Any] = {}
        self._modules: list[nn.Module] = []
        self._optimizers: list[Adam] = []
        self._contexts = ExitStack()
        self._envs: Any = None  # a VectorEnv
        self._tensor_episodes: TensorEpisodes | None = None
        self._remarks = Remarks()
        self.masks: np.ndarray | None = None
        self._folder: RunFolder | None = None
        self._evaluation: Evaluation | None = None
        self._evaluated_step = self.first_step
        self._eval_charts: dict[str, float] = {}  # for the next entry
        self._eval_return: float | None = None  # mean of the last evaluation
        self._score = math.nan  # mean return that decides if a checkpoint is the best; NaN: this iteration has none
        self.while_evaluating: Callable[[], None] = lambda: None

    def __enter__(self) -> "Run":
        """Checks the arguments against the number of ranks, and seeds this rank's generators."""
        args, fabric = self.args, self.fabric
        steps = args.num_envs * getattr(args, "num_steps", 1) * fabric.world_size
        require(steps <= args.total_timesteps, "total_timesteps", args.total_timesteps, f"at least {steps}")
        left = (args.total_timesteps - self.first_step) % steps
        if left > WORTH_A_WORD * args.total_timesteps and self.team.global_rank == 0:
            text = f"is rounded down to {args.total_timesteps - left}, whole iterations of {steps} steps"
            print(f"--total-timesteps {args.total_timesteps} {text}", file=sys.stderr, flush=True)
        acts = args.player_device != "cuda" or fabric.device.type == "cuda"
        require(acts, "player_device", args.player_device, "cpu or auto where the run trains on the CPU")
        acts = not self.uses_tensor_envs or args.player_device != "cpu" or fabric.device.type == "cpu"
        require(acts, "player_device", args.player_device, "cuda or auto where environments are tensors on a GPU")
        if self.state:
            check_batch(self.state, args, fabric.world_size)
            with reading(self.path):
                check_spaces(self.state, self.spaces)
        self.join(fabric, self.team)
        return self

    def join(self, fabric: Any, team: Any = None) -> None:
        """Makes these ranks the run's world: Fabric's, or the `Group` of a decoupled script's players or trainers.

        Seeds this rank's generators; those of all players alike, so that noise is an environment's, whoever plays it.
        """
        self.fabric, self.team, args = fabric, team or fabric, self.args
        players = self.team.world_size if self.trainers is not None else 1
        self.all_envs = self.global_args.num_envs
        self._envs_here = self.all_envs // players
        self._first_env = self._envs_here * self.team.global_rank if self.trainers is not None else 0
        self.episodes = EpisodeStatistics(args.num_envs, info_keys(args))
        rank = fabric.global_rank if self.trainers is None else 0
        self.act_rng, self.train_rng = generators(args.seed, rank, self.first_step)
        self.device_rng = self.train_rng
        graphs = fabric.device.type == "cuda" and args.cuda_graphs
        self.runner = Runner(args.compile, graphs, self._modules, self._optimizers, [self.train_rng])
        if self.uses_tensor_envs:
            self.draw_on(fabric.device)
            self.runner.generators.append(self.act_rng)
        self.metrics = UpdateMetrics(self._optimizers)
        self.act_on(torch.device("cpu") if args.player_device == "cpu" else fabric.device)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Closes the environments and prints the result, unless something has gone wrong.

        Raises:
            ConfigError: what has gone wrong is that there is too little memory.
        """
        if error is not None:
            if self._folder is not None:
                self._folder.discard()
            end_if_out_of_memory(error, self.global_args)
        self._contexts.close()
        self.runner.release()
        if kind is None and self._envs is not None:
            self._envs.close()
        if kind is None and self._evaluation is not None:
            self._evaluation.close()
        if kind is None and self._folder is not None:
            self._folder.finish(self.global_step, self.episodes, self._eval_return, self.exit_code > 0)
            if self.args.upload_model and self.team.global_rank == 0:
                from fabricrl.hub import upload  # here, as it brings what draws

                upload(self.folder, self.args.hf_entity, command(self.args, self.algo))

    # --- before the loop

    def make_envs(self) -> VectorEnv:
        """This rank's environments, which may record videos in the run's folder; beside them those of evaluations.

        Players that have to see what all do share theirs.
        """
        videos = self._made_folder().videos
        with self.failing_together():
            own, masked = SimpleNamespace(**vars(self.args) | {"num_envs": self._envs_here}), self.mask_size > 0
            place = self.team.global_rank, videos, masked, self._first_env, self.fabric.device
            envs = self._envs = make_envs(own, *place)
            if self.uses_tensor_envs:
                keys = info_keys(self.args)
                self._tensor_episodes = TensorEpisodes(self.fabric, envs.env, self.args.num_envs, len(keys))  # type: ignore[attr-defined]
                self.runner.tensors += self._tensor_episodes.tensors()
            if self.team.world_size > self.fabric.world_size:
                resumed, keys = self.args.resume is not None, info_keys(self.args)
                self._envs = SharedEnvs(envs, self.team, resumed, self.mask_size, keys)
            if self.args.eval_every > 0:
                self._evaluation = Evaluation(self.global_args, self.algo, self.team, envs, masked)
        return self._envs

    @property
    def envs(self) -> Any:
        """This rank's environments, once they are made; None on a rank that has none."""
        return self._envs

    @property
    def env_spaces(self) -> SimpleNamespace:
        """Spaces under the names that `make_agent` asks environments for, on a rank that has none."""
        return SimpleNamespace(single_observation_space=self.obs_space, single_action_space=self.action_space)

    @property
    def skips(self) -> bool:
        """True if some steps only reset an environment, and belong to no episode."""
        assert self._envs is not None
        return self._envs.metadata.get("autoreset_mode") == AutoresetMode.NEXT_STEP

    def rollout_buffer(self, agent: Any) -> Any:
        """Storage for this rank's rollouts, of a policy that may remember: in memory, or where environments are."""
        args, device, memory = self.args, self.fabric.device, getattr(agent, "memory_size", None)
        shape = args.num_steps, args.num_envs, self.obs_space, agent.head.num_actions, agent.head.dtype
        if self.uses_tensor_envs:
            told = {"skips": self.skips, "num_keys": len(info_keys(args)), "device": device}
            kind: Any = DeviceRolloutBuffer
            if memory is not None:
                kind = partial(DeviceRecurrentRolloutBuffer, memory_size=memory)
                self._tell_sequence_length()
            self.storage = kind(*shape, **told)
            return self.storage
        settings = {"frame_stack": args.frame_stack, "skips": self.skips, "mask_size": self.mask_size, "device": device}
        if memory is None:
            return RolloutBuffer(*shape, **settings)
        return RecurrentRolloutBuffer(*shape, memory, player_device=self.player_device, **settings)

    def _tell_sequence_length(self) -> None:
        """Says so if sequences on a device are shorter than asked for: gradients flow through time less far, then."""
        args = self.args
        length = common_length(args.num_steps, args.num_envs, args.num_minibatches, args.sequence_length)
        if length < min(args.sequence_length, args.num_steps) and self.team.global_rank == 0:
            text = f"sequences have {length} step{'s' * (length > 1)}, not --sequence-length {args.sequence_length}"
            why = "of the lengths up to that, it is the longest that divides --num-steps and the rows of a minibatch"
            print(f"warning: {text}: {why}", file=sys.stderr, flush=True)

    @property
    def folder(self) -> Path:
        """The run's folder; the same on every rank."""
        return self._made_folder().folder

    def _made_folder(self) -> RunFolder:
        if self._folder is None:
            name = run_name(self.global_args, self.algo)
            start = self.path, self.first_step, self.asked
            self._folder = RunFolder(self.team, self.global_args, self.algo, name, *start)
        return self._folder

    def setup(self, module: nn.Module, *optimizers: Adam) -> Any:
        """Calls `fabric.setup`, which returns the module and its optimizers, ready to train on this rank's device.

        In a decoupled script that is `Group.setup`, which gives modules Fabric's precision and nothing else. Over ranks
        gradients are left alone: `average_gradients` averages them.
        """
        wrapped = self.fabric.setup(module, *optimizers)
        self._contexts.enter_context(self.fabric.no_backward_sync(wrapped[0] if optimizers else wrapped))
        self._modules.append(module)
        self._optimizers += optimizers
        for optimizer in optimizers:
            optimizer.scaler = self._scaler
        return wrapped

    @property
    def _scaler(self) -> Any:
        """The scale of the loss in 16-bit floats, else None."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    def restore(self, **parts: Any) -> None:
        """Names the modules and optimizers that checkpoints hold, and loads their state if the run resumes one."""
        self._parts |= parts
        self._modules += [part for part in parts.values() if isinstance(part, nn.Module)]
        acts_in_rollouts = self._envs is not None and hasattr(self.args, "num_steps") and not self.uses_tensor_envs
        if self.args.player_device == "auto" and self.fabric.device.type != "cpu" and acts_in_rollouts:
            self._choose_player_device(parts["agent"])  # weights move once a rollout
        if not self.state:
            return
        with self.failing_together(), reading(self.path):
            if self._scaler is not None and "scaler" in self.state:
                self._scaler.load_state_dict(self.state["scaler"])
            for name, part in parts.items():
                if isinstance(part, nn.Module):
                    restore(part, self.state[name])
                else:
                    part.load_state_dict(self.state[name])

    def _choose_player_device(self, agent: nn.Module) -> None:
        """Acts where the run that is resumed did, else where rank 0 finds it faster: devices round differently."""
        kind = self.state.get("player_device") or self.team.broadcast(faster_device(self, agent).type)
        self._chosen_device = kind
        self.act_on(torch.device("cpu") if kind == "cpu" else self.fabric.device)

    def restore_generators(self) -> None:
        """Continues the generators from the checkpoint, if the run resumes one."""
        if self.state:
            with reading(self.path):
                rank = self.fabric.global_rank if self.trainers is None else 0
                restore_generators(self.state["generators"], rank, self.act_rng, self.train_rng)

    def reset(self) -> Any:
        """Starts logs and clocks, and the environments: their first observations [N, ...], an array or a tensor.

        None where tensor environments go on in their episodes, from where `storage` has been left.
        """
        assert self._folder is not None
        args, rank = self.args, self.fabric.global_rank
        if self.state:
            with self.failing_together(), reading(self.path):
                self.episodes.load_state_dict(self.state["episodes"])
                self.restore_generators()
                if (self.state["args"].get("eval_every", 0) > 0) == (self.args.eval_every > 0):  # of the same measure
                    self._folder.best_return = self.state["best_return"]
                    self._is_last = True if self._folder.has_stopped else None
        self._folder.start()
        with self.failing_together():
            seeds: Any = env_seeds(args.seed, rank, args.num_envs, self.first_step)  # Gymnasium's types know no list
            obs, infos = self._envs.reset(seed=seeds)
            if not _are_finite(obs):
                raise NonFiniteError("first observation is not finite")
            goes_on = False
            if self._tensor_episodes is not None and "envs" in self.state:
                with reading(self.path):
                    goes_on = self._tensor_episodes.load_state_dict(self.state["envs"], self.storage, *self._along())
        first = self.storage.running()["obs"] if goes_on else torch.as_tensor(floats_in(obs, self.obs_space))
        check_ranks(self.fabric, self._parts["agent"], first)
        self.masks = infos.get("action_mask")
        self.state = {}  # a replay buffer in it may be large
        self.clock.restart()
        return None if goes_on else obs

    def _along(self) -> tuple[Any, torch.Generator | None]:
        """The reward normaliser and the generator on a GPU, if any: what goes along with tensor environments."""
        rng = None if self.device_rng is self.train_rng else self.device_rng
        return getattr(self._parts["agent"], "reward_normalizer", None), rng

    # --- running updates

    @property
    def needs_warmup(self) -> bool:
        """True if updates are compiled or captured, which happens before the clock starts."""
        return self.runner.needs_warmup

    @property
    def captures(self) -> bool:
        """True if updates are captured as CUDA graphs, of which one is made for every kind of arguments."""
        return self.runner.captures

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """An update as one program with `--compile`, else as it is."""
        return self.runner.compiled(function)

    def captured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Training as one CUDA graph on a GPU, else as it is."""
        return self.runner.captured(function)

    @contextmanager
    def warmup(self, *rollouts: Callable[[], None]) -> Iterator[None]:
        """Compiles and captures the updates inside, and acting, before the clock starts; then undoes what they changed.

        `rollouts`: of all kinds, which are captured as a whole where environments are tensor code.
        """
        with self.runner.restoring_state():
            if self.uses_tensor_envs and self._envs.env.is_code:
                for rollout in rollouts:
                    with self.runner.restoring_state():
                        rollout()
            elif self._envs is not None:
                agent = self._parts["agent"]
                player = self.player(agent)
                with torch.inference_mode():
                    self.act(player, *example_inputs(self, agent))
            yield
        if (agent := self._parts.get("agent")) is not None and getattr(agent, "reward_normalizer", None) is not None:
            agent.reward_normalizer.discounted = None
        self.metrics.forget()

    def coefs(self, *values: float) -> tuple[Any, ...]:
        """Annealed coefficients: as they are, or as scalar tensors for updates that are compiled or captured.

        A recording would freeze floats.
        """
        if not self.needs_warmup:
            return values
        return tuple(torch.full((), value, device=self.fabric.device) for value in values)

    def to_device(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        """The tensor on a device, that which trains if none is named, without waiting for it."""
        return to_device(tensor, device or self.fabric.device)

    def draw_on(self, device: torch.device) -> None:
        """Makes `device_rng` a generator of this device, with a seed of its own on every rank; before any recording."""
        if device.type != "cpu" and self.device_rng is self.train_rng:
            self.device_rng = torch.Generator(device).manual_seed(self.train_rng.initial_seed())
            self.runner.generators.append(self.device_rng)

    # --- in the loop

    def iterations(self, steps: int) -> Iterator[int]:
        """Yields the steps taken before each iteration of `steps` a rank, up to `total_timesteps` or a signal."""
        self._iteration_steps = steps * self.fabric.world_size
        while not self.is_last:
            self.global_step, self._is_last, self._score = self.global_step + self._iteration_steps, None, math.nan
            yield self.global_step - self._iteration_steps

    @property
    def is_last(self) -> bool:
        """True if no iteration follows: decided when an iteration asks first, whatever signals come later."""
        if self._is_last is None:
            self._is_last = self.exit_code > 0 or self.global_step + self._iteration_steps > self.args.total_timesteps
        return self._is_last

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Ends all ranks with one exit code if a RunError is raised inside on any; agrees on signals as well."""
        fault: RunError | None = None
        try:
            yield
        except RunError as error:
            fault = error
        own = fault.exit_code if fault is not None and str(fault) else 0  # one without text is another rank's
        codes, signals = [own], [self._signals.code]
        if self.team.world_size > 1:
            codes, signals = all_gather(self.team, torch.tensor([own, self._signals.code])).T.tolist()  # [W] each
        self.exit_code = max(self.exit_code, *signals)
        if any(codes):
            fault = fault or RunError()  # the first rank that failed says why
            fault.told_by, fault.exit_code = next((rank, code) for rank, code in enumerate(codes) if code)
        if fault is not None:
            raise fault

    def add_metrics(self, tags: tuple[str, ...], metrics: Tensor) -> None:
        """Keeps the metrics of one update [tags], or of several [K, tags], until they are fetched."""
        self.metrics.add(tags, metrics)

    def count(self, rewards: Any, ends: Any, infos: dict[str, Any]) -> None:
        """Keeps one step for the statistics of episodes: its rewards, and which episodes end with it, [N]."""
        if self._tensor_episodes is None:
            self.episodes.add(rewards, ends)
        else:
            self._tensor_episodes.episodes.add(rewards, ends, infos)

    def update_normalizer(self, agent: Any, rb: RolloutBuffer) -> None:
        """Adds what all ranks have seen in a rollout to the agent's running statistics, if it has any.

        The first rollout's belong before its losses. Its actions have been taken without statistics; they hardly depend
        on what they see, as the last layer of a new policy is near zero.
        """
        if agent.obs_normalizer is not None:
            device = self.fabric.device
            agent.obs_normalizer.update(self.to_device(rb.vectors(rb.obs[:-1]), device), self.fabric, rb.valid(device))

    def record_rollout(self, rb: RolloutBuffer) -> None:
        """Ends an iteration of many steps: fetches the metrics, counts episodes, and heeds signals once more.

        Raises:
            NonFiniteError: a metric or a parameter is not finite.
        """
        summary = None
        with self.failing_together():
            if self._tensor_episodes is not None:
                summary = self._tensor_episodes.summary(self.storage)
            self.losses.update(self.metrics.fetch())
        if summary is None:
            self.episodes.update(self.fabric, rb.rewards, rb.ends, rb.skipped, self._take_infos())
        else:
            self.episodes.add_summary(self.fabric, summary)
        self.clock.lap("comm")
        self._advance()

    def record_step(self) -> None:
        """Ends an iteration of one step: fetches and counts only now and then, since that costs as much as an update.

        Over ranks, signals are agreed on with the next step, unless this one fetches.

        Raises:
            NonFiniteError: a metric or a parameter is not finite.
        """
        if self.team.world_size == 1:
            self.exit_code = max(self.exit_code, self._signals.code)
        is_full = self._tensor_episodes is not None and self._tensor_episodes.count_step()
        if is_full or self.fetch_is_due or self.log_is_due or self.checkpoint_is_due:
            self._count_steps()
            with self.failing_together():
                self.losses.update(self.metrics.fetch())
        self.clock.lap("comm")
        self._advance()

    def _count_steps(self) -> None:
        """Counts the episodes that have ended with the steps kept.

        Raises:
            NonFiniteError: tensor environments have brought NaN or infinity with one.
        """
        if self._tensor_episodes is None:
            self.episodes.flush(self.fabric, self._take_infos())
            return
        with self.failing_together():
            summary = self._tensor_episodes.take_summary(self.storage)
        self.episodes.add_summary(self.fabric, summary)

    def _take_infos(self) -> np.ndarray | None:
        """Numbers that environments have reported at the ends of episodes since the last call, [E, K]."""
        return None if self._envs is None else self._envs.take_episode_infos()  # type: ignore[attr-defined]

    @property
    def fetch_is_due(self) -> bool:
        """True if enough updates or steps have been kept to be worth a fetch."""
        return max(self.metrics.num_pending, self.episodes.num_pending) >= FETCH_EVERY

    def _advance(self) -> None:
        assert self._folder is not None
        self._folder.advance(self.global_step, self.episodes.mean_return)

    @property
    def evaluation_is_due(self) -> bool:
        """True if the agent is to be evaluated in this iteration, and has not been yet; in the last it is, unless a
        signal has ended the run."""
        step, every, before = self.global_step, self.args.eval_every, self._evaluated_step
        if every == 0 or step == before or self.exit_code > 0:
            return False
        return step // every > before // every or step + self._iteration_steps > self.args.total_timesteps

    def evaluate(self, agent: nn.Module) -> None:
        """Plays greedy episodes if an evaluation is due, and keeps for the log how they went; all ranks call it.

        If the agent has never done better, the iteration ends in a checkpoint, which is the best. The run ends with
        this iteration if the mean return is `stop_at_return` or more, or if a signal has come meanwhile.

        Raises:
            RunError: as `Evaluation.play`.
        """
        if self._evaluation is None or not self.evaluation_is_due:
            return
        self._evaluated_step = self.global_step
        with self.failing_together():
            played = self._evaluation.play(agent, self.global_step, self._signals, self.while_evaluating)
        if self.exit_code > 0:
            self._is_last = True
        else:
            self._eval_charts = self._evaluation.charts(played)
            self._score = self._eval_return = self._eval_charts["eval/return_mean"]
            if self.args.stop_at_return is not None and self._score >= self.args.stop_at_return:
                self._is_last = True
                if self.team.global_rank == 0:
                    text = f"an evaluation's mean return, {self._score:.2f}, has reached --stop-at-return"
                    print(f"stopping at step {self.global_step}: {text}", file=sys.stderr, flush=True)
        self.clock.lap("eval")

    @property
    def log_is_due(self) -> bool:
        """True if this iteration is logged; the last one always is, and one with an evaluation."""
        assert self._folder is not None
        evaluated = self.evaluation_is_due or bool(self._eval_charts)
        return self._folder.wants_log(self.global_step, self.is_last) or evaluated

    def log(self, charts: dict[str, float]) -> None:
        """Logs charts, and beside them episodes, losses, speed and where the time went since the last entry."""
        assert self._folder is not None
        speed = {"charts/SPS": self._folder.sps(self.global_step)}
        if self.episodes.returns:
            speed["charts/return_mean"] = self.episodes.mean_return
        self._remarks.make(self)
        numbers = self.episodes.compute() | self.losses.compute() | self.clock.shares()
        self._folder.log(charts | self.charts | speed | numbers | self._eval_charts, self.global_step)
        self.charts, self._eval_charts = {}, {}

    @property
    def checkpoint_is_due(self) -> bool:
        """True if this iteration ends in a checkpoint, or may, as long as an evaluation is due; the last one does."""
        assert self._folder is not None
        best = self.evaluation_is_due or self._score > self._folder.best_return
        return self._folder.wants_checkpoint(self.global_step, self.is_last) or (best and self.args.save_model)

    def checkpoint(self, rb: Replay | None = None, **parts: Any) -> None:
        """Saves the parts that `restore` has named, if a checkpoint is due.

        Args:
            rb: this rank's replay buffer, which is saved unless the arguments say otherwise; trainers save theirs.
            parts: what else there is with a `state_dict`.
        """
        if self.checkpoint_is_due:
            if self.trainers is not None:
                self.trainers.save()  # → Order, ← Answer, State
            state = {name: part.state_dict() for name, part in (self._parts | parts).items()}
            if self._scaler is not None:
                state["scaler"] = self._scaler.state_dict()
            if self._tensor_episodes is not None:
                envs = self._tensor_episodes.state_dict(self.storage, *self._along())
                state |= {"envs": envs} if envs else {}
            state["generators"] = self.generators
            if self.generators is None:
                state["generators"] = rank_generators(self.fabric, self.act_rng, self.train_rng)
            shard = None
            if rb is not None and self.args.checkpoint_buffer:
                if self.trainers is None:
                    shard = self.shard(rb)
                else:
                    state["shards"] = self.trainers.count
            self.save(state, shard)
            if self.trainers is not None:
                self.trainers.saved()
        self.clock.lap("log")

    def shard(self, rb: Replay) -> dict[str, Any]:
        """This rank's part of a checkpoint: its replay buffer, and the generator on a GPU that samples it, if any."""
        own = {} if self.device_rng is self.train_rng else {"device_rng": self.device_rng.get_state()}
        return rb.state_dict() | own

    def save(self, state: dict[str, Any], shard: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint now, of this state and what every run has."""
        assert self._folder is not None
        spaces = {"obs": structure_of(self.spaces.given), "actions": structure_of(self.action_space)}
        own = {"spaces": spaces, "mask_size": self.mask_size, "episodes": self.episodes.state_dict()}
        own |= {"player_device": self._chosen_device} if self._chosen_device else {}
        own["world_size"] = self.fabric.world_size if self.trainers is None else 1  # players are as one rank
        mean_return = self.episodes.mean_return if self._evaluation is None else self._score
        self._folder.save(self.global_step, mean_return, own | state, shard)


def _are_finite(obs: Any) -> bool:
    """Tells if observations, an array or a tensor, are finite; images are."""
    if isinstance(obs, Tensor):
        return bool(obs.isfinite().all())
    return obs.dtype.kind != "f" or bool(np.isfinite(obs).all())
