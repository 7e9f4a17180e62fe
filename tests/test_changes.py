"""Copies of scripts with the changes that readers make, of at most 15 lines and nowhere else, train.

Each change is a list of replacements (what stands there, what takes its place), by which the test writes the copy.
"""

import difflib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from fabricrl.algos.ppo import ppo
from fabricrl.algos.run import Run
from fabricrl.algos.sac import sac
from fabricrl.utils.update import Runner
from tests.conftest import Trained
from tests.pixel_envs import Catch

MOST = 15  # lines

IMPORTS = "import torch\nfrom gymnasium"
ENVS = "from fabricrl.envs import rescale_actions\n"
AGENT = "        agent = make_agent(args, envs)\n"
CRITICS = """\
        agent.critics = {}
        agent.target_critics = copy.deepcopy(agent.critics)
"""
QUANTILES = [
    (IMPORTS, f"import copy\n{IMPORTS}"),
    (ENVS, f"{ENVS}from fabricrl.models.models import MLP\n"),
    (
        "class Learner",
        """\
class QuantileCritics(nn.Module):
    def __init__(self, count, inputs, hidden_sizes):
        super().__init__()
        self.networks = nn.ModuleList(MLP(inputs, 25, hidden_sizes, "relu") for _ in range(count))

    def forward(self, obs, actions):
        return torch.stack([network(torch.cat((obs, actions), -1)) for network in self.networks])  # [C, B, Q]


class Learner""",
    ),
    (
        "agent.target_critics(batch.next_obs, next_actions)  # [C, B]",
        "agent.target_critics(batch.next_obs, next_actions).mT  # [C, Q, B]",
    ),
    (
        "    loss = critic_loss(q, targets)\n",
        """\
    errors, taus = targets.T[:, None] - q[..., None], (torch.arange(25, device=q.device)[:, None] + 0.5) / 25
    loss = ((taus - (errors.detach() < 0).float()).abs() * errors.abs()).mean((1, 2, 3)).sum()  # [C, B, Q, Q]
""",
    ),
    ("q = critics(features, actions).amin(0)", "q = critics(features, actions).mean(-1).amin(0)"),
    (
        AGENT,
        AGENT
        + CRITICS.format(
            "QuantileCritics(args.num_critics, run.obs_space.shape[0] + agent.head.num_actions, args.hidden_sizes)"
        ),
    ),
]
ENCODER = [
    (IMPORTS, f"import copy\n{IMPORTS}"),
    (
        "class Learner",
        """\
class Encoder(nn.Module):
    def __init__(self, space):
        super().__init__()
        (self.image,) = space.images.values()
        layers = nn.Conv2d(1, 8, 3, 2), nn.SiLU(), nn.Conv2d(8, 8, 3, 2), nn.SiLU(), nn.Flatten()
        self.layers = nn.Sequential(*layers, nn.Linear(512, 50))

    def forward(self, obs):
        return self.layers(self.image.of(obs) / 255)


class Learner""",
    ),
    (
        AGENT,
        f"{AGENT}        agent.critics.encoder = Encoder(run.obs_space)\n"
        "        agent.target_critics = copy.deepcopy(agent.critics)\n",
    ),
]
AUXILIARY = [
    (AGENT, f"{AGENT}        agent.reward_head = nn.Linear(args.num_critics, 1)\n"),
    (
        "run.setup(agent.critics, Adam(agent.critics.parameters(), run.args.q_lr))",
        "run.setup(\n"
        "        agent.critics, Adam([*agent.critics.parameters(), *agent.reward_head.parameters()], run.args.q_lr)\n"
        "    )",
    ),
    (
        "    loss = critic_loss(q, targets)\n",
        """\
    loss = critic_loss(q, targets)
    if moves_targets:
        loss = loss + (agent.reward_head(q.T).squeeze(-1) - batch.rewards).square().mean()
""",
    ),
]
SPECTRAL = [(AGENT, f"{AGENT}        nn.utils.parametrizations.spectral_norm(agent.critic.hidden[1])\n")]
REPLACED = [(AGENT, f"{AGENT}        agent.actor.hidden[0] = nn.Linear(run.obs_space.shape[0], 16, bias=False)\n")]


class CatchByBox(gym.ActionWrapper):
    """Catch, with actions as SAC takes them."""

    def __init__(self) -> None:
        super().__init__(Catch())
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)

    def action(self, action: np.ndarray) -> int:
        return int(np.clip(np.round(action[0]) + 1, 0, 2))


gym.register("CatchByBox-v0", entry_point=CatchByBox)

OFF_POLICY = [
    "--env-id", "Pendulum-v1", "--hidden-sizes", 16, 16, "--num-envs", 2, "--learning-starts", 32, "--batch-size", 16,
    "--total-timesteps", 332, "--replay-ratio", 0.5, "--num-threads", 1, "--target-network-frequency", 2,
]  # fmt: skip
ON_POLICY = ["--hidden-sizes", 16, 16, "--num-envs", 2, "--num-steps", 32, "--total-timesteps", 320]
CASES: dict[str, tuple[ModuleType, list[tuple[str, str]], list[Any]]] = {
    "quantile critics": (sac, QUANTILES, OFF_POLICY),
    "convolutional encoder": (sac, ENCODER, [*OFF_POLICY, "--env-id", "tests.test_changes:CatchByBox-v0"]),
    "auxiliary loss at some steps": (sac, AUXILIARY, OFF_POLICY),
    "spectral norm": (ppo, SPECTRAL, ON_POLICY),
    "layer replaced": (ppo, REPLACED, ON_POLICY),
}


def changed_copy(script: ModuleType, changes: list[tuple[str, str]], path: Path) -> Any:
    """The script with these replacements, written to `path` and loaded from there."""
    assert script.__file__ is not None
    before = after = Path(script.__file__).read_text()
    for old, new in changes:
        assert after.count(old) == 1, f"{old!r} stands there {after.count(old)} times"
        after = after.replace(old, new)
    path.write_text(after)
    assert 0 < changed_lines(before, after) <= MOST
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed_lines(before: str, after: str) -> int:
    """Lines that were added or replaced, or removed without replacement; empty ones do not count."""
    old, new = ([line for line in text.splitlines() if line.strip()] for text in (before, after))
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in blocks if kind != "equal")


def test_lines_are_counted_once_each() -> None:
    before = "a\nb\nc\nd\n"
    assert changed_lines(before, before) == 0
    assert changed_lines(before, "a\nb\n\nx\ny\nd\n") == 2  # one replaced, one added
    assert changed_lines(before, "a\nd\n") == 2


@pytest.mark.parametrize("mode", ["eager", "compiled", "captured"])
@pytest.mark.parametrize("name", CASES)
def test_a_copy_with_few_changes_trains(
    name: str,
    mode: str,
    train: Callable[..., Trained],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Captured it is the run that is not, to the last bit."""
    script, changes, settings = CASES[name]
    copied = changed_copy(script, changes, tmp_path / "changed.py")
    flags = ["--compile"] if mode == "compiled" else []
    if mode != "eager":
        request.getfixturevalue({"compiled": "traced", "captured": "captured"}[mode])
    runs: list[tuple[Run, int]] = []
    reset = Run.reset
    monkeypatch.setattr(Run, "reset", lambda run: runs.append((run, run.runner.recordings)) or reset(run))
    short, long = (train(copied.main, *settings, *flags, *more) for more in (["--total-timesteps", 128], []))
    for trained in (short, long):
        assert trained.code == 0
        assert trained.weights.isfinite().all()
    for run, at_start in runs:
        assert (run.runner.recordings > 0) == (mode != "eager")
        # All once more where a head begins late, after the first step without it
        assert run.runner.recordings == at_start * (2 if name == "auxiliary loss at some steps" else 1)
    if mode == "captured":
        monkeypatch.setattr("fabricrl.algos.run.Runner", lambda compile, capture, *rest: Runner(False, False, *rest))
        assert torch.equal(long.weights, train(copied.main, *settings).weights)
    before, after = short.state["agent"], long.state["agent"]
    still = [key for key, value in after.items() if torch.equal(value, before[key])]
    assert still == []  # every parameter, and every buffer, has moved between
    if name == "spectral norm":
        weights = [value for key, value in after.items() if key.startswith("critic.hidden.1.parametrizations.weight")]
        assert sorted(tuple(weight.shape) for weight in weights) == [(16,), (16,), (16, 16)]
    if name == "auxiliary loss at some steps":
        steps = long.state["q_optimizer"]["state"][0]["step"]
        assert steps[-1] == steps[-2] == steps[0] // 2 > 20  # weight and bias of the head


@pytest.mark.parametrize("name", CASES)
def test_a_changed_copy_goes_on_from_its_checkpoints(name: str, train: Callable[..., Trained], tmp_path: Path) -> None:
    script, changes, settings = CASES[name]
    copied = changed_copy(script, changes, tmp_path / "changed.py")
    half = train(copied.main, *settings, "--total-timesteps", 192)
    resumed = train(copied.main, "--resume", half.checkpoint, "--total-timesteps", 320, "--log-dir", tmp_path / "more")
    assert resumed.code == 0
    assert resumed.result["steps"] == "320"
    assert resumed.weights.isfinite().all()
