"""Recurrent PPO end to end: what only memory can solve, masked velocities, resuming, ranks, spaces and evaluation."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from fabricrl import evaluate
from fabricrl.algos import run as run_module
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo_recurrent import ppo_recurrent as script
from fabricrl.algos.ppo_recurrent import utils
from fabricrl.algos.ppo_recurrent.agent import RecurrentPPOAgent
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs
from fabricrl.algos.run import Run
from fabricrl.algos.sac import sac
from fabricrl.data import Batch
from fabricrl.envs import make_envs
from fabricrl.envs.spaces import env_actions
from fabricrl.envs.wrappers import MaskVelocities
from fabricrl.models import models
from fabricrl.utils.checkpoint import save_checkpoint
from fabricrl.utils.errors import ConfigError
from fabricrl.utils.update import Runner
from tests.envs import ODD_SPACES, Recall, vectors
from tests.process import Finished, Team, call, differences, load, logged, run_team, saved_steps, stopped_in
from tests.test_recurrent import cell
from tests.test_resume import content
from tests.test_run import TAGS
from tests.test_spaces import ACTIONS, OBSERVATIONS

MODULE = script.__name__


def played(path: Path, *flags: object) -> dict[str, Any]:
    finished = call(evaluate.main, path, "--json", *flags)
    assert finished.code == 0
    return json.loads(finished.out)


# --- What only memory can solve

DELAY = 8
RECALL = ["--env-id", "tests.envs:Recall-v0", "--env-kwargs", f'{{"delay": {DELAY}}}', "--num-envs", 16]
RECALL += ["--num-steps", 32, "--total-timesteps", 15360, "--learning-rate", 5e-3]  # episodes of 9 steps cross rollouts
MEMORIES: dict[str, list[object]] = {
    "lstm": [],
    "gru, shared": ["--rnn-type", "gru", "--shared-core"],
    # What it did before is told with every zero, too, so that it takes longer to find out what matters
    "lstm, told all": ["--prev-action", "--prev-reward", "--encoder-sizes", 8, "--total-timesteps", 30720],
}


def last_actions(state: dict[str, Any], make: Any, greedy: bool) -> list[int]:
    """Actions of a policy at the ends of two episodes, with cue −1 and with cue +1, and equal noise."""
    args = SimpleNamespace(**state["args"])
    actions = []
    for cue in (-1, 1):
        env = Recall(DELAY)
        envs = SyncVectorEnv([lambda: Recall(DELAY)])
        agent = make.make_agent(args, envs)
        agent.load_state_dict(state["agent"])
        policy = make.make_policy(agent, envs, greedy, 7)
        obs, done, reward = env.reset(seed=0)[0], True, 0.0
        env.cue = cue
        obs[:] = cue
        for _ in range(DELAY + 1):
            action = policy(obs[None], np.array([reward]), np.array([done]))[0]
            obs, reward, done, _, _ = env.step(action)
        assert done
        assert reward == (action == (cue + 1) // 2)
        actions.append(int(action))
    return actions


@pytest.mark.parametrize("memory", MEMORIES)
def test_recalling_the_first_observation_is_learned_with_memory(memory: str, tmp_path: Path) -> None:
    flags = [*RECALL, "--rnn-hidden-size", 16, "--hidden-sizes", 16, *MEMORIES[memory]]
    finished = call(script.main, *flags, "--log-dir", tmp_path)
    assert played(finished.folder, "--episodes", 100, "--mode", "greedy")["greedy"]["return_mean"] >= 0.95
    assert last_actions(load(finished.checkpoint), utils, greedy=True) == [0, 1]


def test_recalling_the_first_observation_cannot_be_learned_without_memory(tmp_path: Path) -> None:
    """The last action is the same whatever the cue was, so that one of the two cues is always answered wrongly."""
    from fabricrl.algos.ppo import utils as without

    finished = call(ppo.main, *RECALL, "--log-dir", tmp_path)
    state = load(finished.checkpoint)
    for greedy in (True, False):
        first, second = last_actions(state, without, greedy)
        assert first == second
    result = played(finished.folder, "--episodes", 200)
    for mode in result.values():  # 1/2 in expectation, with a deviation of 0.035 over 200 cues; four of them
        assert mode["return_mean"] <= 0.65


# --- Masked velocities

MASKS = {
    "CartPole-v1": [1, 3],
    "MountainCar-v0": [1],
    "MountainCarContinuous-v0": [1],
    "Pendulum-v1": [2],
    "LunarLander-v3": [2, 3, 5],
}


@pytest.mark.parametrize("env_id", MASKS)
def test_velocities_are_zero_and_everything_else_is_as_it_was(env_id: str, tmp_path: Path) -> None:
    if env_id.startswith("LunarLander"):
        pytest.importorskip("Box2D")
    plain, masked = (
        make_envs(PPOArgs(env_id=env_id, num_envs=2, mask_velocities=mask), 0, tmp_path) for mask in (False, True)
    )
    assert masked.single_observation_space == plain.single_observation_space
    masked.action_space.seed(1)
    obs, expected = masked.reset(seed=3)[0].copy(), plain.reset(seed=3)[0].copy()
    kept = [i for i in range(obs.shape[1]) if i not in MASKS[env_id]]
    seen, finals = [], 0
    for _ in range(230):  # until episodes end: Pendulum's and MountainCar's take 200 steps, if nothing is reached
        seen.append(expected[:, MASKS[env_id]])
        assert not obs[:, MASKS[env_id]].any()
        assert np.array_equal(obs[:, kept], expected[:, kept])
        actions = masked.action_space.sample()
        (obs, *_, infos), (expected, *_, other) = masked.step(actions), plain.step(actions)
        obs, expected = obs.copy(), expected.copy()
        for final, of_plain in zip(infos.get("final_obs", ()), other.get("final_obs", ()), strict=True):
            if final is not None:
                finals += 1
                assert not final[MASKS[env_id]].any()
                assert np.array_equal(final[kept], of_plain[kept])
    assert np.any(seen, axis=(0, 1)).all(), "there was nothing to mask"
    assert finals or env_id == "MountainCarContinuous-v0"  # 999 steps
    plain.close()
    masked.close()


def test_the_array_of_the_environment_is_left_alone() -> None:
    class Keeping(gym.Env):
        spec = SimpleNamespace(id="Pendulum-v1")
        observation_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
        action_space = gym.spaces.Discrete(2)
        obs = np.ones(3, np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple:
            return self.obs, {}

        def step(self, action: Any) -> tuple:
            return self.obs, 0.0, False, False, {}

    env = MaskVelocities(Keeping())
    assert env.reset()[0].tolist() == [1.0, 1.0, 0.0]
    assert env.step(0)[0].tolist() == [1.0, 1.0, 0.0]
    assert Keeping.obs.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("main", [ppo.main, sac.main, script.main], ids=lambda main: main.__module__.split(".")[-1])
@pytest.mark.parametrize(
    "flags",
    [("Acrobot-v1", "{}"), ("tests.envs:Odd-v0", '{"obs": "dict", "action": "box"}')],
    ids=lambda flags: flags[0],
)
def test_velocities_of_an_environment_that_is_not_known_cannot_be_masked(
    main: Callable[[], int], flags: tuple[str, str], tmp_path: Path
) -> None:
    line = ["--env-id", flags[0], "--env-kwargs", flags[1], "--mask-velocities", "--log-dir", tmp_path]
    with pytest.raises(ConfigError, match="--mask-velocities") as caught:
        call(main, *line)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert all(env_id.split("-")[0] in message for env_id in (*MASKS, flags[0].split(":")[-1]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("main", [ppo.main, sac.main, script.main], ids=lambda main: main.__module__.split(".")[-1])
def test_every_script_masks_what_it_learns_from_and_evaluation_masks_it_too(
    main: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of observations say what was seen: of a velocity that is masked, always zero."""
    flags = ["--env-id", "Pendulum-v1", "--norm-obs", "--total-timesteps", 256, "--mask-velocities"]
    flags += ["--num-envs", 2, "--hidden-sizes", 8]
    flags += ["--learning-starts", 240, "--batch-size", 8] if main is sac.main else ["--num-steps", 128]
    finished = call(main, *flags, "--log-dir", tmp_path)
    variance = load(finished.checkpoint)["agent"]["obs_normalizer.var"]
    assert variance[2] == 0
    assert variance[:2].all()
    seen = []
    play = evaluate.play

    def watched(envs: Any, policy: Callable, *rest: Any) -> Any:
        def spy(obs: np.ndarray, *given: Any) -> Any:
            seen.append(obs.copy())
            return policy(obs, *given)

        return play(envs, spy, *rest)

    monkeypatch.setattr(evaluate, "play", watched)
    played(finished.folder, "--episodes", 1, "--mode", "greedy")
    assert len(seen) == 200
    assert np.any(seen, axis=(0, 1)).tolist() == [True, True, False]


@pytest.mark.parametrize("module", [ppo, script], ids=["ppo", "ppo_recurrent"])
def test_the_first_rollout_is_learned_from_as_it_is_normalised(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Observations of hundreds, clipped to ±10 for want of statistics, would all look the same."""
    learned, train = [], module.train

    def watched(run: Any, step: Any, data: Any, *rest: Any) -> Any:
        learned.append(data.obs.clone())
        return train(run, step, data, *rest)

    monkeypatch.setattr(module, "train", watched)
    flags = ["--env-id", "tests.envs:Scaled-v0", "--norm-obs", "--num-envs", 2, "--num-steps", 64, "--hidden-sizes", 8]
    finished = call(module.main, *flags, "--total-timesteps", 256, "--log-dir", tmp_path)
    first, second = learned
    torch.testing.assert_close(first.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(first.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-4)
    assert load(finished.checkpoint)["agent"]["obs_normalizer.count"] == 256  # each rollout once
    assert second.abs().max() < 10
    rates = [value for _, value in logged(finished.folder)["charts/learning_rate"]]
    assert rates == [pytest.approx(2.5e-4 / 2)]  # of the second iteration of two


def test_checkpoints_from_before_velocities_could_be_masked_are_still_played(tmp_path: Path) -> None:
    flags = ["--num-envs", 2, "--num-steps", 16, "--total-timesteps", 32, "--log-dir", tmp_path]
    state = load(call(ppo.main, *flags).checkpoint)
    args = {name: value for name, value in state["args"].items() if name != "mask_velocities"}
    older = save_checkpoint(tmp_path, 32, state | {"args": args}, keep=1)
    assert played(older, "--episodes", 1, "--mode", "greedy")["greedy"]["episodes"] == 1


# --- Resuming

# As for PPO: episodes of 8 steps end with the rollouts of 32, and everything that has a state is on
FLAGS = ["--env-id", "tests.envs:Deterministic-v0", "--num-envs", 2, "--num-steps", 32, "--total-timesteps", 640]
FLAGS += ["--rnn-hidden-size", 8, "--hidden-sizes", 8, "--learning-rate", 1e-2, "--num-threads", 1]
FLAGS += ["--log-every", 64, "--checkpoint-every", 128, "--keep-checkpoints", 100]
ALL = ["--prev-action", "--prev-reward", "--norm-obs", "--norm-reward", "--anneal-clip", "--anneal-ent"]
VARIANTS: dict[str, list[object]] = {
    "as it comes": [],
    "lstm, all": [*ALL, "--sequence-length", 5],
    "gru, shared, all": [*ALL, "--rnn-type", "gru", "--shared-core", "--rnn-layers", 2, "--encoder-sizes", 8],
    "box, truncated": [*ALL, "--env-kwargs", '{"continuous": true, "truncate": true}', "--target-kl", 0.02],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_and_resumed_run_equals_the_straight_run_to_the_last_bit(variant: str, tmp_path: Path) -> None:
    flags = [*FLAGS, *VARIANTS[variant]]
    straight = call(script.main, *flags, "--log-dir", tmp_path / "straight")
    assert saved_steps(straight.folder) == [128, 256, 384, 512, 640]
    with stopped_in(3):
        first = call(script.main, *flags, "--log-dir", tmp_path / "resumed")
    assert (first.code, first.result["steps"]) == (143, "192")
    second = call(script.main, "--resume", first.folder)
    assert second.folder == first.folder
    assert differences(content(straight.checkpoint), content(second.checkpoint)) == []
    assert differences(content(straight.checkpoint), content(first.checkpoint)), "192 steps equal 640"
    entries = [logged(folder)["losses/value_loss"] for folder in (straight.folder, second.folder)]
    assert entries[0] == entries[1]
    again = call(script.main, "--resume", first.folder)
    assert (again.code, again.result["steps"]) == (0, "640")
    assert "nothing to do" in again.err


def test_a_resumed_run_begins_episodes_of_its_own_without_memory_of_those_that_were_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environments start anew, and so does memory, in the middle of an episode or not."""
    flags = [*FLAGS, "--env-kwargs", '{"length": 1000}', "--total-timesteps", 128, "--prev-reward"]
    first = call(script.main, *flags, "--log-dir", tmp_path)
    memories = []
    rollout = script.rollout

    def watched(run: Run, player: Any, envs: Any, rb: Any) -> None:
        memories.append(rb.memory[0].clone())
        rollout(run, player, envs, rb)

    monkeypatch.setattr(script, "rollout", watched)
    call(script.main, "--resume", first.folder, "--total-timesteps", 256)
    assert [memory.any().item() for memory in memories] == [False, True]


def test_the_discounted_reward_that_scales_rewards_is_carried_from_rollout_to_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = []
    discounted_returns = models.discounted_returns

    def watched(rewards: torch.Tensor, dones: torch.Tensor, before: torch.Tensor, gamma: float) -> tuple:
        returns, after = discounted_returns(rewards, dones, before.clone(), gamma)
        carried.append((before.tolist(), after.tolist()))
        return returns, after

    monkeypatch.setattr(models, "discounted_returns", watched)
    flags = [*FLAGS, "--env-kwargs", '{"length": 1000}', "--total-timesteps", 192, "--norm-reward"]
    call(script.main, *flags, "--log-dir", tmp_path)
    (before, first), (second, then), (third, _) = carried
    assert not any(before)
    assert all(first)
    assert (second, third) == (first, then)


# --- Ranks


def spy(rank: int) -> None:
    """Notes the parameters and the data of each rank after every update."""
    notes = Path(os.environ["SPY"]).with_suffix(f".{rank}")
    train = script.train

    def sha(*tensors: torch.Tensor) -> str:
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def watched(run: Run, step: Any, data: Batch, *rest: Any) -> Any:
        result = train(run, step, data, *rest)
        vector, *moments = run._optimizers[0].tensors()
        entry = {"parameters": sha(vector), "moments": sha(*moments)}
        entry |= {f"data/{name}": sha(data.columns[name]) for name in ("obs", "actions", "states", "advantages")}
        with notes.open("a") as file:
            print(json.dumps(entry), file=file)
        return result

    script.train = watched  # type: ignore[assignment]


def team(folder: Path, *flags: object) -> tuple[Team, list[list[dict[str, str]]]]:
    """Two ranks, and what each noted."""
    ended = run_team(MODULE, *flags, folder=folder, prepare=spy, variables={"SPY": str(folder / "notes")})
    return ended, [[json.loads(line) for line in (folder / f"notes.{r}").read_text().splitlines()] for r in (0, 1)]


@pytest.mark.parametrize("variant", ["lstm, all", "gru, shared, all"])
def test_two_ranks_agree_after_every_update_learn_from_different_data_and_resume_to_the_last_bit(
    variant: str, tmp_path: Path
) -> None:
    flags = [*FLAGS, *VARIANTS[variant], "--total-timesteps", 512, "--checkpoint-every", 128]
    straight, (first, second) = team(tmp_path / "straight", *flags, "--log-dir", tmp_path / "logs")
    assert len(first) == len(second) == 4
    for ours, theirs in zip(first, second, strict=True):
        same = {name for name in ours if ours[name] == theirs[name]}
        assert same == {"parameters", "moments"}
    assert len({entry["parameters"] for entry in first}) == 4
    last = Path(straight.result["checkpoint"])
    half = last.with_name(f"step_{256:012d}.ckpt")
    resumed, ranks = team(tmp_path / "resumed", "--resume", half, "--log-dir", tmp_path / "again")
    assert differences(content(last), content(resumed.result["checkpoint"])) == []
    assert ranks == [first[2:], second[2:]]


# --- Evaluation


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    flags = ["--mask-velocities", "--total-timesteps", 6144, "--num-steps", 64, "--learning-rate", 5e-3, "--norm-obs"]
    flags += ["--prev-action", "--prev-reward", "--rnn-hidden-size", 16, "--log-every", 512, "--checkpoint-every", 2048]
    return call(script.main, *flags, "--log-dir", tmp_path_factory.mktemp("cartpole"))


def restored(finished: Finished) -> RecurrentPPOAgent:
    state = load(finished.checkpoint)
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")])
    agent = utils.make_agent(SimpleNamespace(**state["args"]), envs)
    agent.load_state_dict(state["agent"])
    return agent


@torch.no_grad()
def greedy_action(agent: RecurrentPPOAgent, obs: np.ndarray, before: list[float], state: torch.Tensor) -> tuple:
    """The policy written out: mask, normalise, join the action and reward before, one step of the core, two layers."""
    mean, var = (agent.obs_normalizer.mean, agent.obs_normalizer.var)  # type: ignore[union-attr]
    masked = torch.tensor([obs[0], 0.0, obs[2], 0.0], dtype=torch.float64)
    x = ((masked - mean) / (var + 1e-8).sqrt()).clamp(-10, 10).float()
    features, state = cell(agent.actor_core, torch.cat((x, torch.tensor(before)))[None], state)
    (layer,) = agent.actor.hidden
    hidden = torch.tanh(features[0] @ layer.weight.T + layer.bias)
    return int((agent.actor.out.weight @ hidden + agent.actor.out.bias).argmax()), state


def test_greedy_results_equal_a_loop_written_by_hand(cartpole: Finished) -> None:
    """3 environments play 3, 2 and 2 of 7 episodes, one after the other; each episode begins without memory."""
    agent = restored(cartpole)
    returns, forgetful = [], []
    for seed, episodes in ((50, 3), (51, 2), (52, 2)):
        for forgets, results in ((True, returns), (False, forgetful)):
            env = gym.make("CartPole-v1")
            before, state = [0.0] * 3, torch.zeros(1, 2 * 16)
            for episode in range(episodes):
                if forgets:
                    before, state = [0.0] * 3, torch.zeros(1, 2 * 16)
                obs, _ = env.reset(seed=seed if episode == 0 else None)
                score, done = 0.0, False
                while not done:
                    action, state = greedy_action(agent, obs, before, state)
                    obs, reward, terminated, truncated, _ = env.step(action)
                    before = [float(action == 0), float(action == 1), float(reward)]
                    score, done = score + float(reward), terminated or truncated
                results.append(score)
    assert len(set(returns)) > 1, "all episodes alike: nothing is compared"
    assert returns != forgetful, "whether episodes begin without memory makes no difference"
    result = played(cartpole.checkpoint, "--episodes", 7, "--num-envs", 3, "--seed", 50)["greedy"]
    expected = {
        "return_mean": np.mean(returns), "return_std": np.std(returns), "return_min": min(returns),
        "return_max": max(returns), "length_mean": np.mean(returns), "length_std": np.std(returns),
        "length_min": min(returns), "length_max": max(returns), "episodes": 7,
    }  # fmt: skip
    assert result == pytest.approx(expected)


def test_both_modes_are_played_and_play_the_same_when_repeated(cartpole: Finished) -> None:
    before = cartpole.checkpoint.read_bytes()
    result = played(cartpole.folder, "--episodes", 6)
    assert result.keys() == {"greedy", "sampled"}
    assert result["greedy"] != result["sampled"]
    assert played(cartpole.checkpoint, "--episodes", 6) == result
    assert cartpole.checkpoint.read_bytes() == before


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("space", ["discrete_start", "multi_discrete", "multi_binary", "box"])
def test_the_policy_of_an_evaluation_remembers_and_forgets_where_an_episode_was_done(space: str, greedy: bool) -> None:
    """Four environments with ends, observations and rewards from a die."""
    envs = SimpleNamespace(single_action_space=ODD_SPACES[space])
    options = {"prev_action": True, "prev_reward": True, "rnn_type": "gru", "rnn_hidden_size": 8}
    agent = RecurrentPPOAgent(vectors(3), ODD_SPACES[space], **options)  # type: ignore[arg-type]
    with torch.no_grad():
        agent.actor.out.weight.normal_(generator=torch.Generator().manual_seed(1))
    policy = utils.make_policy(agent, envs, greedy, 5)  # type: ignore[arg-type]
    rng, noise_rng = np.random.default_rng(0), torch.Generator().manual_seed(5)
    memory, dones = torch.zeros(4, agent.memory_size), np.ones(4, bool)
    for _ in range(12):
        obs, rewards = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=4)
        actions = policy(obs, rewards, dones)
        told = torch.as_tensor(rewards, dtype=torch.float32)[:, None]
        size = agent.head.encoded_size
        memory = torch.cat((memory[:, :size], told, memory[:, size + 1 :]), 1)  # the reward comes with the observation
        memory[dones] = 0.0
        with torch.no_grad():
            inputs = torch.cat((torch.as_tensor(obs), memory[:, : size + 1]), 1)
            features, actor_state = cell(agent.actor_core, inputs, memory[:, size + 1 : size + 9])
            _, critic_state = cell(agent.critic_core, inputs, memory[:, size + 9 :])  # type: ignore[arg-type]
            params = agent.actor(features)
            drawn = agent.head.mode(params) if greedy else agent.head.sample(params, agent.head.noise((4,), noise_rng))
        expected = env_actions(ODD_SPACES[space], drawn.numpy())
        np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-5)
        memory = torch.cat((agent.head.encode(drawn), torch.zeros(4, 1), actor_state, critic_state), 1)
        dones = rng.random(4) < 0.3


def test_every_tag_of_the_design_is_logged_and_checkpoints_are_written_as_often_as_asked(cartpole: Finished) -> None:
    assert cartpole.folder.parts[-3:-1] == ("ppo_recurrent", "CartPole-v1")
    assert saved_steps(cartpole.folder) == [2048, 4096, 6144]
    scalars = logged(cartpole.folder)
    for tag in TAGS:
        steps = [step for step, _ in scalars[tag]]
        if tag.startswith("charts/episodic"):  # where one has ended
            assert set(range(512, 2049, 512)) <= set(steps) <= set(range(512, 6145, 512))
        else:
            assert steps == list(range(512, 6145, 512)), tag
        assert all(math.isfinite(value) for _, value in scalars[tag]), tag
    shares = [values for tag, values in scalars.items() if tag.startswith("time/")]
    for entry in zip(*shares, strict=True):
        assert sum(share for _, share in entry) == pytest.approx(1, abs=1e-4)
    state = load(cartpole.checkpoint)
    assert int(cartpole.result["episodes"]) == state["episodes"]["count"] > 0
    assert float(cartpole.result["return_mean"]) == pytest.approx(np.mean(state["episodes"]["returns"]), abs=0.01)


# --- Spaces


@pytest.mark.parametrize(("obs", "action"), list(zip(OBSERVATIONS, cycle(ACTIONS), strict=False)))
def test_every_space_is_trained_on_and_played(obs: str, action: str, tmp_path: Path) -> None:
    """The environment refuses actions that are not in its space. Episodes take 5 steps."""
    env_kwargs = json.dumps({"obs": obs, "action": action})
    flags = ["--env-id", "tests.envs:Odd-v0", "--env-kwargs", env_kwargs, "--num-envs", 2, "--num-steps", 8]
    flags += ["--num-minibatches", 2, "--total-timesteps", 32, "--rnn-hidden-size", 8, "--hidden-sizes", 8]
    flags += ["--prev-action", "--prev-reward", "--norm-obs", "--norm-reward"]
    finished = call(script.main, *flags, "--log-dir", tmp_path)
    state = load(finished.checkpoint)["agent"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    told = state["actor_core.rnn.weight_ih_l0"].shape[1] - OBSERVATIONS[obs] - 1
    space = ODD_SPACES[action]
    if isinstance(space, gym.spaces.MultiDiscrete):
        assert told == space.nvec.size * space.nvec.max()
    else:
        assert told == gym.spaces.flatdim(space)
    result = played(finished.folder, "--episodes", 3)
    assert result["greedy"]["length_mean"] == result["sampled"]["length_mean"] == 5


# --- Mistakes


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--sequence-length", "0", "at least 1"),
        ("--sequence-length", "all", "a whole number"),
        ("--rnn-hidden-size", "0", "at least 1"),
        ("--rnn-hidden-size", "-8", "at least 1"),
        ("--rnn-layers", "0", "at least 1"),
        ("--rnn-type", "elman", "lstm"),
        ("--encoder-sizes", "0", "at least 1"),
        ("--hidden-sizes", "0", "at least 1"),
        ("--num-minibatches", "3", "divide"),
        ("--total-timesteps", "1000", "at least"),
        ("--share-core", "1", "--shared-core"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_before_anything_starts(
    flag: str, value: str, allowed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the mistake was not noticed before anything started")

    for name in ("launch", "make_envs", "RunFolder"):
        monkeypatch.setattr(run_module, name, forbidden)
    with pytest.raises(ConfigError) as caught:
        call(script.main, flag, value, "--log-dir", tmp_path)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert flag in message
    assert allowed in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence_length", 0),
        ("rnn_hidden_size", 0),
        ("rnn_layers", 0),
        ("rnn_type", "elman"),
        ("encoder_sizes", (8, 0)),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} is "):
        RecurrentPPOArgs(**{name: value})


# --- Other ways of computing the same


def weights(finished: Finished) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load(finished.checkpoint)["agent"].values()])


ONCE = [*FLAGS, *ALL[:2], "--env-kwargs", '{"length": 5}', "--total-timesteps", 64]


@pytest.mark.parametrize("core", [[], ["--rnn-type", "gru", "--shared-core"]], ids=["lstm", "gru, shared"])
def test_an_update_in_half_precision_is_near_the_plain_one(core: list[object], tmp_path: Path) -> None:
    plain, other = (
        weights(call(script.main, *ONCE, *core, "--log-dir", tmp_path, *more))
        for more in ([], ["--precision", "bf16-mixed"])
    )
    difference = (plain - other).abs()
    # Sixteen steps of Adam at up to 0.01 each could lead apart by 0.32
    assert 0 < difference.mean() < 0.01
    assert difference.max() < 0.1


@pytest.mark.parametrize("core", [[], ["--rnn-type", "gru", "--shared-core"]], ids=["lstm", "gru, shared"])
def test_compiled_updates_equal_the_plain_ones_and_are_not_compiled_for_each_layout(
    core: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the compiler but the writing of kernels, which takes longest."""
    graphs = []
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: (graphs.append(graph), graph)[1])
    flags = [*ONCE, *core, "--anneal-clip", "--anneal-ent", "--total-timesteps", 512, "--log-dir", tmp_path]
    plain = weights(call(script.main, *flags))
    assert not graphs
    compiled = weights(call(script.main, *flags, "--compile"))
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-3)
    assert len(graphs) == 2  # of eight iterations with 16 minibatches each, and acting


def test_graphs_for_layouts_of_all_sizes_hold_one_compiled_program(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of the compiler but the writing of kernels; a graph is the plain call."""
    flags, programs, graphs = [*ONCE, "--total-timesteps", 256], [], []
    plain = train(script.main, *flags)

    def capture(runner: Runner, function: Callable[..., Any], inputs: list[torch.Tensor], reused: bool) -> Any:
        with runner.restoring_state():
            function(inputs)
        graphs.append(function)
        return function

    monkeypatch.setattr(run_module, "Runner", lambda compile, capture, *rest: Runner(compile, True, *rest))
    monkeypatch.setattr(Runner, "_capture_variant", capture)
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: (programs.append(graph), graph)[1])
    compiled = train(script.main, *flags, "--compile", "--log-dir", tmp_path / "compiled")
    torch.testing.assert_close(compiled.weights, plain.weights, rtol=0, atol=1e-3)
    assert len(programs) == 2  # the update, and acting
    assert len(graphs) > 3  # one for each size
