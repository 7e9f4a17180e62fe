"""Action masks: the masked distribution, and masks on their way from an environment to the loss."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from fabricrl import evaluate
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.envs import check_env, make_envs
from fabricrl.envs.spaces import mask_choices
from fabricrl.envs.wrappers import Masks
from fabricrl.models.distributions import make_head
from fabricrl.utils.errors import EnvError
from tests.envs import MASKED, Masked
from tests.process import call, differences, load, run_team

SPACES: dict[str, Space] = {
    "discrete": Discrete(5, start=2),
    "uneven multi-discrete": MultiDiscrete([3, 2, 4]),
    "even multi-discrete": MultiDiscrete([3, 3]),
    "multi-binary": MultiBinary(3),
}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
TINY = ["--num-envs", 4, "--num-steps", 32, "--total-timesteps", 512, "--hidden-sizes", 16, "--learning-rate", 3e-3]
SCRIPTS = {"ppo": ppo, "ppo_recurrent": ppo_recurrent}


def random_masks(space: Space, count: int, seed: int = 0) -> Tensor:
    """Masks [count, S] that leave each variable a choice."""
    rng, parts = np.random.default_rng(seed), []
    for n in mask_choices(space):
        part = rng.random((count, n)) < 0.5
        part[np.arange(count), rng.integers(n, size=count)] = True
        parts.append(part)
    return torch.from_numpy(np.concatenate(parts, 1))


def by_hand(space: Space, params: Tensor, masks: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the variables of a single row: log of p(a) = e^l_a / Σ_allowed e^l_k, and −Σ_allowed p_k log p_k."""
    choices = mask_choices(space)
    if isinstance(space, MultiBinary):  # a bit with logit l is a choice between 0, with logit 0, and 1, with l
        params = torch.stack((torch.zeros_like(params), params), 1).flatten()
    logprob = entropy = torch.zeros((), dtype=params.dtype)
    for logits, mask, action in zip(params.split(choices), masks.split(choices), actions, strict=True):
        weights = [logits[k].exp() for k in range(len(logits)) if mask[k]]
        probs = [weight / sum(weights) for weight in weights]
        logprob = logprob + probs[int(mask[: int(action)].sum())].log()
        entropy = entropy - sum(p * p.log() for p in probs)
    return logprob, entropy


@each_space
def test_probability_entropy_and_gradients_are_those_of_the_masked_distribution(space: Space) -> None:
    head = make_head(space).double()
    masks, rng = random_masks(space, 20), torch.Generator().manual_seed(1)
    params = 2 * torch.randn(20, head.size, generator=rng, dtype=torch.float64)
    actions = head.sample(params, head.noise((20,), rng).double(), masks)
    ours, theirs = params.clone().requires_grad_(), params.clone().requires_grad_()
    logprobs, entropy = head.logprob_and_entropy(ours, actions, masks)
    rows = [by_hand(space, *row) for row in zip(theirs, masks, actions, strict=True)]
    expected, expected_entropy = (torch.stack(column) for column in zip(*rows, strict=True))
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    weights = torch.randn(20, generator=rng, dtype=torch.float64)
    (weights * logprobs + entropy).sum().backward()
    (weights * expected + expected_entropy).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@each_space
def test_they_are_those_of_sb3_contrib(space: Space) -> None:
    """Of the distributions of MaskablePPO, on the same batch."""
    distributions = pytest.importorskip("sb3_contrib.common.maskable.distributions")
    head, masks, rng = make_head(space), random_masks(space, 64), torch.Generator().manual_seed(1)
    params = 2 * torch.randn(64, head.size, generator=rng)
    actions = head.sample(params, head.noise((64,), rng), masks)
    logprobs, entropy = head.logprob_and_entropy(params, actions, masks)
    theirs = distributions.make_masked_proba_distribution(space)
    if isinstance(space, MultiBinary):  # which has a logit for 0, too
        params = torch.stack((torch.zeros_like(params), params), -1).flatten(1)
    theirs.proba_distribution(params)
    theirs.apply_masking(masks.numpy())
    given = actions[:, 0] if isinstance(space, Discrete) else actions
    torch.testing.assert_close(logprobs, theirs.log_prob(given), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy, theirs.entropy(), rtol=1e-5, atol=1e-6)
    greedy = head.mode(head_params(space, params), masks)
    torch.testing.assert_close(greedy.flatten(), theirs.mode().flatten().to(greedy.dtype))


def head_params(space: Space, params: Tensor) -> Tensor:
    """Parameters of sb3-contrib's bits as ours."""
    return params[:, 1::2] - params[:, ::2] if isinstance(space, MultiBinary) else params


@each_space
@pytest.mark.parametrize("noise", ["drawn", "as large as it gets"])
def test_a_forbidden_action_is_never_drawn_and_each_allowed_one_is(space: Space, noise: str) -> None:
    """In 10⁵ draws; and not where the noise is infinite, as a generator may once in 10¹⁶ draws have it."""
    head, masks, rng = make_head(space), random_masks(space, 100_000), torch.Generator().manual_seed(1)
    params = torch.randn(100_000, head.size, generator=rng)
    drawn = head.noise((100_000,), rng)
    if noise != "drawn":
        drawn = drawn.masked_fill(torch.rand(drawn.shape, generator=rng) < 0.3, torch.inf)
    for actions in (head.sample(params, drawn, masks), head.mode(params, masks)):
        allowed = [mask.gather(1, actions[:, i : i + 1].long()) for i, mask in enumerate(parts(space, masks))]
        assert all(column.all() for column in allowed)
    if noise == "drawn":
        for i, mask in enumerate(parts(space, masks)):
            for choice in range(mask.shape[1]):
                assert (head.sample(params, drawn, masks)[:, i] == choice).sum() > 1000


def parts(space: Space, masks: Tensor) -> tuple[Tensor, ...]:
    """The masks of each variable, [*, n]."""
    return masks.split(mask_choices(space), -1)


@each_space
def test_a_mask_that_allows_all_changes_nothing(space: Space) -> None:
    head, rng = make_head(space), torch.Generator().manual_seed(1)
    params, noise = torch.randn(50, head.size, generator=rng), head.noise((50,), rng)
    masks = torch.ones(50, sum(mask_choices(space)), dtype=torch.bool)
    actions = head.sample(params, noise)
    assert torch.equal(actions, head.sample(params, noise, masks))
    plain, masked = head.logprob_and_entropy(params, actions), head.logprob_and_entropy(params, actions, masks)
    for ours, theirs in zip(plain, masked, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("env", ["Masked", "MaskedByMethod"])
def test_environments_tell_their_masks_in_every_back_end(env: str, kind: str, vectorization: str) -> None:
    """The observation of Masked is the mask itself, also where a new episode begins."""
    args = PPOArgs(
        env_id=f"tests.envs:{env}-v0",
        env_kwargs=f'{{"kind": "{kind}", "length": 3}}',
        num_envs=3,
        vectorization=vectorization,
    )
    size = check_env(args, (Space,), None).mask_size
    assert size == sum(MASKED[kind][1])
    with contextlib.closing(make_envs(args, 0, Path(), masked=True)) as envs:
        obs, infos = envs.reset(seed=[1, 2, 3])
        for _ in range(8):
            assert infos["action_mask"].dtype == bool
            assert infos["action_mask"].tolist() == obs.astype(bool).tolist()
            allowed = np.stack([part.numpy().argmax(1) for part in parts(args_space(kind), torch.tensor(obs))], 1)
            obs, *_, infos = envs.step(ppo.env_actions(args_space(kind), allowed))


def args_space(kind: str) -> Space:
    return MASKED[kind][0]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("kind", MASKED)
def test_training_and_evaluation_draw_what_is_allowed(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked refuses all else. In a minibatch, too, the observation of each row is its mask."""
    script, seen = SCRIPTS[name], []
    update = script.update

    def watched(run: Any, model: Any, optimizer: Any, batch: Any, *rest: Any) -> Tensor:
        seen.append(bool((batch.masks == batch.obs.bool()).all()))
        return update(run, model, optimizer, batch, *rest)

    monkeypatch.setattr(script, "update", watched)
    env = ["--env-id", "tests.envs:Masked-v0", "--env-kwargs", f'{{"kind": "{kind}"}}']
    run = call(script.main, *env, *TINY, "--eval-every", 256, "--log-dir", tmp_path)
    assert run.code == 0
    assert "trial" not in run.err
    assert len(seen) == 4 * 4 * 4
    assert all(seen)
    assert "return" in call(evaluate.main, run.checkpoint, "--episodes", 3).out


def test_it_is_the_same_run_compiled_by_method_and_in_processes(tmp_path: Path, traced: None) -> None:
    plain = call(ppo.main, "--env-id", "tests.envs:Masked-v0", *TINY, "--log-dir", tmp_path / "a")
    by_method = ["--env-id", "tests.envs:MaskedByMethod-v0", *TINY, "--log-dir", tmp_path / "b"]
    other = call(ppo.main, *by_method, "--vectorization", "async")
    compiled = call(ppo.main, *by_method, "--compile")
    assert differences(load(plain.checkpoint)["agent"], load(other.checkpoint)["agent"]) == []
    for name, value in load(plain.checkpoint)["agent"].items():
        torch.testing.assert_close(load(compiled.checkpoint)["agent"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("script", [ppo, ppo_recurrent], ids=["ppo", "ppo_recurrent"])
def test_the_decoupled_run_is_that_of_the_coupled_script(script: Any, tmp_path: Path) -> None:
    flags = ["--env-id", "tests.envs:Masked-v0", "--env-kwargs", '{"kind": "MultiDiscrete"}', *TINY]
    flags += ["--eval-every", 256]
    coupled = call(script.main, *flags, "--log-dir", tmp_path / "a")
    flags += ["--max-lag", 0, "--log-dir", tmp_path / "b"]
    twin = run_team(f"{script.__name__}_decoupled", *flags, folder=tmp_path / "out")
    first, second = load(coupled.checkpoint), load(twin.result["checkpoint"])
    assert differences(first["agent"], second["agent"]) == []
    assert first["best_return"] == second["best_return"]
    assert coupled.result["eval_return_mean"] == twin.result["eval_return_mean"]


def test_without_masks_none_are_stored() -> None:
    args = PPOArgs()
    assert check_env(args, (Space,), None).mask_size == 0
    rb = ppo.RolloutBuffer(4, 2, Box(-1, 1, (3,)), 1, torch.int64)
    assert rb.allowed is rb.mask(0, torch.device("cpu")) is rb.masks(torch.device("cpu")) is None


class Wrong(Masked):
    """A mask of another size, or one that allows nothing."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask

    def action_masks(self) -> Any:
        return self.mask


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (np.ones(4, bool), "an action mask of 4 entries, where its action space needs 5"),
        (np.zeros(5, bool), "an action mask that allows no action"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: np.ndarray, text: str) -> None:
    with pytest.raises(EnvError, match=text):
        Masks(Wrong(mask))({})


def test_masks_of_several_variables_may_come_as_a_tuple_and_as_integers() -> None:
    env = SimpleNamespace(action_space=MultiDiscrete([2, 3]), has_wrapper_attr=lambda name: False)
    masks = Masks(env)  # type: ignore[arg-type]
    given = (np.array([1, 0], np.int8), np.array([0, 1, 1], np.int8))
    assert masks({"action_mask": given}).tolist() == [True, False, False, True, True]
    assert masks({}).all()


class NativeMasked(VectorEnv):
    """Two choices of three, of which one is allowed in turn; the observation is which. Episodes of four steps."""

    def __init__(self, num_envs: int = 1, tells: bool = True) -> None:
        self.num_envs, self.tells = num_envs, tells
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space, self.single_action_space = Box(-1.0, 3.0, (1,), np.float32), Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self._steps = 0
        return self._answer()

    def step(self, actions: np.ndarray) -> tuple:
        if 0 < self._steps < 4 or self._steps == 0:
            assert (actions == self._steps % 3).all()
        self._steps = 0 if self._steps == 4 else self._steps + 1
        obs, infos = self._answer()
        ended = np.full(self.num_envs, self._steps == 4)
        infos["is_success"] = np.arange(self.num_envs) % 2 == 0
        return obs, np.ones(self.num_envs), ended, np.zeros(self.num_envs, bool), infos

    def _answer(self) -> tuple[np.ndarray, dict[str, Any]]:
        choice = np.full(self.num_envs, self._steps % 3)
        masks = np.eye(3, dtype=bool)[choice]
        return choice[:, None].astype(np.float32), {"action_mask": masks} if self.tells else {}


class SingleMasked(gym.Env):
    """One of them."""

    def __init__(self, tells: bool = True) -> None:
        self.observation_space, self.action_space = Box(-1.0, 3.0, (1,), np.float32), Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        return np.zeros(1, np.float32), {"action_mask": np.array([True, False, False])}


gym.register("NativeMasked-v0", entry_point=SingleMasked, vector_entry_point=NativeMasked)


def test_native_environments_tell_masks_and_successes_in_their_infos(tmp_path: Path) -> None:
    from tests.process import logged

    flags = ["--env-id", "NativeMasked-v0", "--vectorization", "native", *TINY]
    run = call(ppo.main, *flags, "--log-dir", tmp_path)
    assert run.code == 0
    assert logged(run.folder)["charts/is_success"][-1][1] == 0.5  # of every second environment
    with pytest.raises(EnvError, match=r"returned no action masks of shape \(4, 3\) from reset; --vectorization sync"):
        call(ppo.main, *flags, "--env-kwargs", '{"tells": false}', "--log-dir", tmp_path / "b")
