"""Values from environments: converted where they fit the space's promise, refused by name where they do not."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space
from gymnasium.vector import AutoresetMode, VectorEnv

from fabricrl.algos.droq import droq
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo.utils import ACTION_SPACES
from fabricrl.algos.ppo_recurrent import ppo_recurrent
from fabricrl.algos.sac import sac
from fabricrl.envs import check_env, make_env, make_envs
from fabricrl.envs.spaces import text_of
from fabricrl.envs.values import Observation
from fabricrl.utils.errors import ConfigError, EnvError, NonFiniteError
from tests.conftest import Trained
from tests.envs import ODD_SPACES
from tests.process import call
from tests.value_envs import BYTES, ENDS, FORMS, MISFITS, PAIR, REWARDS, Answering
from tests.vector_envs import StaggeredVector

TINY = ["--num-envs", 2, "--num-threads", 1, "--hidden-sizes", 8, "--logger", "csv"]
ON = [*TINY, "--num-steps", 8, "--num-minibatches", 2, "--update-epochs", 1, "--total-timesteps", 32]
OFF = [*TINY, "--batch-size", 4, "--learning-starts", 8, "--total-timesteps", 24, "--buffer-size", 50]
SCRIPTS: dict[str, tuple[Any, list[Any]]] = {
    "ppo": (ppo, ON),
    "ppo_recurrent": (ppo_recurrent, [*ON, "--rnn-hidden-size", 8]),
    "sac": (sac, OFF),
    "droq": (droq, [*OFF, "--replay-ratio", 2]),
}


def args_for(num_envs: int = 1, vectorization: str = "sync", flags: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    settings = {"env_id": "tests.value_envs:Answering-v0", "env_kwargs": json.dumps(kwargs), "num_envs": num_envs}
    return PPOArgs(**settings | {"vectorization": vectorization} | (flags or {}))


@contextlib.contextmanager
def environments(*given: Any, **kwargs: Any) -> Iterator[VectorEnv]:
    with contextlib.closing(make_envs(args_for(*given, **kwargs), 0, Path("nowhere"))) as envs:
        yield envs


def zeros(envs: VectorEnv) -> np.ndarray:
    return np.zeros((envs.num_envs, 1), np.float32)


def played(vectorization: str, **kwargs: Any) -> list[tuple[np.ndarray, ...]]:
    """Results of twelve steps of two environments, with final observations."""
    with environments(2, vectorization, **kwargs) as envs:
        answers = [(envs.reset(seed=[1, 2])[0].copy(),)]
        for _ in range(12):
            obs, rewards, terminated, truncated, infos = envs.step(zeros(envs))
            finals = [np.array(final) for final in infos.get("final_obs", ())]
            answers.append((obs.copy(), rewards.copy(), terminated.copy(), truncated.copy(), *finals))
    return answers


def equal(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(
        len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(first, second, strict=True)
    )


# --- What can be converted


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_numbers_are_the_same_in_whatever_form_they_come(vectorization: str) -> None:
    expected = played(vectorization)
    assert any(len(answer) > 4 for answer in expected), "no episode ended"
    for form in FORMS if vectorization == "sync" else ("list", "tensor"):
        assert equal(played(vectorization, form=form), expected), form


@pytest.mark.parametrize("space", ["box_2d", "box_int", "discrete", "multi_binary_2d", "multi_discrete_2d"])
def test_so_are_those_of_other_spaces(space: str) -> None:
    expected = played("sync", space=space)
    for form in ("list", "tensor", "double"):
        assert equal(played("sync", space=space, form=form), expected), form


@pytest.mark.parametrize("algo", SCRIPTS)
def test_every_algorithm_learns_the_same_from_lists_and_tensors(
    algo: str, train: Callable[..., Trained], tmp_path: Path
) -> None:
    script, flags = SCRIPTS[algo]
    weights = []
    for form in ("array", "list", "tensor"):
        kwargs = json.dumps({"form": form, "reward": "row"})
        run = train(
            script.main, "--env-id", "tests.value_envs:Answering-v0", "--env-kwargs", kwargs, *flags,
            "--log-dir", tmp_path / form,
        )  # fmt: skip
        assert run.code == 0
        weights.append(run.weights)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_one_number_is_one_number_whatever_its_shape() -> None:
    assert Observation(Box(-1.0, 1.0, (), np.float32))(np.array([0.5]), True).shape == ()
    assert Observation(Box(-1.0, 1.0, (1,), np.float32))(0.5, True).tolist() == [0.5]
    for value in (2, np.int8(2), 2.0, np.array(2), np.array([2]), [2], torch.tensor(2), True + 1):
        assert int(Observation(Discrete(3))(value, True)) == 2


def test_what_fits_is_passed_on_without_a_copy() -> None:
    for space in (*ODD_SPACES.values(), BYTES):
        if isinstance(space, Box | MultiBinary | MultiDiscrete):
            obs = space.sample()
            assert Observation(space)(obs, True) is obs


@pytest.mark.parametrize("kind", [kind for kind in ODD_SPACES if "sequence" not in kind and kind != "text"])
def test_every_element_of_a_space_is_accepted(kind: str) -> None:
    space, take = ODD_SPACES[kind], Observation(ODD_SPACES[kind])
    for _ in range(50):
        take(space.sample(), True)


@pytest.mark.parametrize(
    "space",
    [
        Discrete(4, start=-2),
        Box(-3, 2, (), np.int8),
        Box(0, 1, (), np.bool_),
        Box(0, 255, (), np.uint8),
        Box(-128, 127, (), np.int8),
        MultiDiscrete([3], start=[2]),
        MultiBinary(1),
    ],
    ids=str,
)
def test_integers_are_taken_exactly_where_they_are_in_the_space(space: Space) -> None:
    take = Observation(space)
    for value in (*range(-6, 7), -129, -128, 127, 128, 255, 256, 2**40):
        for given in (value, float(value), np.array(value), torch.tensor(value)):
            inside = bool(space.contains(np.full(space.shape, value).astype(space.dtype)))
            inside = inside and int(np.array(value).astype(space.dtype)) == value
            try:
                taken = take(given, False)
            except EnvError:
                assert not inside, (given, space)
            else:
                assert inside, (given, space)
                assert int(np.asarray(taken).item()) == value


# --- What does not fit


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("at", [0, 2])
def test_an_observation_that_does_not_fit_its_space_is_reported_in_one_line(kind: str, at: int) -> None:
    with environments(discrete=True, late=kind, at=at) as envs:
        if at:
            envs.reset(seed=[1])
            envs.step(np.zeros(1, np.int64))
        with pytest.raises(EnvError) as caught:
            envs.step(np.zeros(1, np.int64)) if at else envs.reset(seed=[1])
    message = str(caught.value)
    assert message.startswith(f"environment 0 returned from {'step' if at else 'reset'} ")
    assert MISFITS[kind][2] in message
    assert "its space is " in message or "is no array" in message
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore:.*ERROR")
@pytest.mark.parametrize("kind", ["fractions", "large bytes", "turned"])
def test_so_it_is_from_a_process_of_its_own(kind: str) -> None:
    """Shared memory would cut it off: 0.9 to 0, 300 to 44."""
    with environments(2, "async", discrete=True, late=kind, at=1) as envs:
        envs.reset(seed=[1, 2])
        with pytest.raises(EnvError, match=r"environment [01] returned from step an observation"):
            envs.step(np.zeros(2, np.int64))


@pytest.mark.parametrize("algo", SCRIPTS)
def test_every_script_ends_with_code_4_and_one_line(
    algo: str, script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a trial, by which the kind of vector environment is chosen, meets it first."""
    module, flags = SCRIPTS[algo]
    kwargs = json.dumps({"late": "fractions", "at": 3})
    line = ["--env-id", "tests.value_envs:Answering-v0", "--env-kwargs", kwargs, *flags, "--log-dir", tmp_path]
    with pytest.raises(EnvError, match=r"0\.3, which is not an integer") as caught:
        script(module.main, *line)
    assert caught.value.exit_code == 4
    err = capsys.readouterr().err
    assert "vectorization: sync" in err
    assert "Traceback" not in err
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert all("start from equal observations" in line for line in warnings)


@pytest.mark.parametrize("late", ["beyond", "beyond in a list", "beyond in a part"])
def test_real_numbers_beyond_their_bounds_are_reported_at_resets_and_if_asked_in_every_step(late: str) -> None:
    with environments(late=late) as envs, pytest.raises(EnvError, match=r"reset .*observation with 9\.5"):
        envs.reset(seed=[1])
    with environments(late=late, at=1) as envs:
        envs.reset(seed=[1])
        assert envs.step(zeros(envs))[0].tolist() == [[0.0, 9.5]]
    with environments(late=late, at=1, flags={"check_spaces": True}) as envs:
        envs.reset(seed=[1])
        with pytest.raises(EnvError, match=r"step .*observation with 9\.5"):
            envs.step(zeros(envs))


def test_that_flag_is_refused_where_it_would_change_nothing() -> None:
    with pytest.raises(ConfigError, match="--check-spaces is set: it needs another --vectorization than envpool"):
        check_env(args_for(vectorization="envpool", flags={"check_spaces": True}), ACTION_SPACES, None)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rounding_beyond_a_bound_ends_no_run(dtype: type) -> None:
    low, high = np.array([-1.0, 0.0, -1000.0], dtype), np.array([1.0, 3.0, 1000.0], dtype)
    take, eps = Observation(Box(low, high, dtype=dtype)), np.finfo(dtype).eps
    take(high + 3 * eps * high, True)
    take(low - 3 * eps * abs(high), True)
    with pytest.raises(EnvError, match="out of range"):
        take(high + dtype(0.1) * high, True)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_final_observation_that_is_not_finite_is_noticed_at_a_termination(kind: str, tmp_path: Path) -> None:
    flags = ["--env-id", "tests.value_envs:Answering-v0", "--env-kwargs", f'{{"late": "{kind}", "at": 5}}', *ON]
    with pytest.raises(NonFiniteError, match="final observation of environment 0 is not finite"):
        call(ppo.main, *flags, "--log-dir", tmp_path)


# --- Rewards and ends


@pytest.mark.parametrize("reward", [name for name in REWARDS if name not in ("two", "none", "text", "empty")])
def test_a_reward_of_one_number_is_that_number(reward: str) -> None:
    with environments(reward=reward) as envs:
        envs.reset(seed=[1])
        rewards = envs.step(zeros(envs))[1]
    assert rewards.tolist() == [1.0 if reward in ("integer", "truth") else 1.5]


@pytest.mark.parametrize(
    ("reward", "words"),
    [("two", r"shape \(2,\)"), ("empty", r"shape \(0,\)"), ("none", "NoneType"), ("text", "str")],
)
def test_a_reward_that_is_not_one_number_is_reported_with_its_shape_or_type(reward: str, words: str) -> None:
    with environments(reward=reward) as envs:
        envs.reset(seed=[1])
        with pytest.raises(EnvError, match=f"environment 0 returned from step a reward of .*{words}"):
            envs.step(zeros(envs))


@pytest.mark.parametrize("end", [name for name in ENDS if name != "two"])
def test_ends_of_episodes_are_accepted_in_any_form(end: str) -> None:
    for cut in (False, True):
        assert equal(played("sync", end=end, cut=cut), played("sync", cut=cut))


@pytest.mark.parametrize(("cut", "name"), [(False, "terminated"), (True, "truncated")])
def test_two_ends_at_once_are_none(cut: bool, name: str) -> None:
    with environments(end="two", cut=cut) as envs:
        envs.reset(seed=[1])
        with pytest.raises(EnvError, match=rf"`{name}` of type ndarray and shape \(2,\)"):
            envs.step(zeros(envs))


# --- Native environments


class Integers(StaggeredVector):
    """Its observations are integers by their space, and what `late` says from the second step on."""

    def __init__(self, num_envs: int = 1, late: str = "") -> None:
        super().__init__(num_envs)
        self.single_observation_space = Box(-9, 9, (3,), np.int64)
        self.observation_space = Box(-9, 9, (num_envs, 3), np.int64)
        self.late = late

    def reset(self, **given: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros((self.num_envs, 3), np.int64), {}

    def step(self, actions: Any) -> tuple:
        _, *rest = super().step(actions)
        obs: Any = np.ones((self.num_envs, 3))  # whole numbers of another type
        obs[-1, -1] = {"fraction": 0.5, "beyond": 10}.get(self.late, 1)
        return obs, *rest


class OneOfThem(Answering):
    def __init__(self, late: str = "") -> None:
        super().__init__()
        self.observation_space, self.action_space = Box(-9, 9, (3,), np.int64), Discrete(3)


gym.register("Integers-v0", entry_point=OneOfThem, vector_entry_point=Integers)


def test_native_environments_are_checked_and_converted_too() -> None:
    assert Integers().mode == AutoresetMode.NEXT_STEP
    for late, words in (
        ("", ""),
        ("fraction", "0.5, which is not an integer"),
        ("beyond", "10, which is out of range"),
    ):
        args = PPOArgs(
            env_id="tests.test_values:Integers-v0",
            env_kwargs=json.dumps({"late": late}),
            num_envs=16,
            vectorization="native",
        )
        with contextlib.closing(make_envs(args, 0, Path("nowhere"))) as envs:
            envs.reset(seed=[1] * 16)
            actions = np.zeros(16, np.int64)
            if late:
                with pytest.raises(EnvError, match=f"native environments returned from step an observation .*{words}"):
                    envs.step(actions)
            else:
                assert envs.step(actions)[0].dtype == np.int64


# --- Nested parts, and text


def test_nested_parts_become_one_row_in_the_order_of_their_names() -> None:
    with contextlib.closing(make_env(args_for(late="whole"))) as env:
        obs, _ = env.reset(seed=1)
    assert obs.tolist() == [0.25, -0.5, 0, 1, 0, 1, 0, 1, 0]  # arm.angle, arm.grip.0, arm.grip.1, gear
    for keys, expected in ((("arm",), 6), (("arm.grip",), 4), (("gear", "arm.grip.0"), 5)):
        with contextlib.closing(make_env(args_for(late="whole", flags={"obs_keys": keys}))) as env:
            assert env.reset(seed=1)[0].shape == (expected,)


def test_parts_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two parts of one name"):
        Observation(Dict({"a": Dict({"b": PAIR}), "a.b": PAIR}))


def test_text_is_left_out_with_a_notice_that_names_the_keys_which_silence_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_env(args_for(space="dict_text"), ACTION_SPACES, None)
    assert capsys.readouterr().err == (
        "notice: text in observations is left out ('hint'); --obs-keys gear speed silences this\n"
    )
    check_env(args_for(space="dict_text", flags={"obs_keys": ("gear", "speed")}), ACTION_SPACES, None)
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="must be one or more of gear, speed"):
        check_env(args_for(space="dict_text", flags={"obs_keys": ("hint",)}), ACTION_SPACES, None)


def test_the_message_about_a_part_that_is_not_supported_names_the_keys_without_it() -> None:
    with pytest.raises(ConfigError, match=r"unsupported part 'words': .*; --obs-keys speed leaves it out"):
        check_env(args_for(space="dict_sequence"), ACTION_SPACES, None)
    check_env(args_for(space="dict_sequence", flags={"obs_keys": ("speed",)}), ACTION_SPACES, None)


def test_ppo_trains_on_the_observations_of_blackjack(train: Callable[..., Trained]) -> None:
    run = train(ppo.main, "--env-id", "Blackjack-v1", *ON)
    assert run.code == 0
    assert run.state["agent"]["actor.hidden.0.weight"].shape == (8, 32 + 11 + 2)


def test_checkpoints_from_before_know_their_spaces() -> None:
    """Texts that were written for each kind of space that was supported then."""
    texts = {
        "box": "Box(-1.0, 1.0, (3,), float32)",
        "box_2d": "Box(-1.0, 1.0, (6,), float32)",
        "box_half_bounded": "Box([-1. 0.], [ 1. inf], (2,), float32)",
        "box_int": "Box(0, 5, (2,), int64)",
        "dict": "Box([ 0. 0. 0. -1. -1.], 1.0, (5,), float64)",
        "discrete": "Box(0, 1, (3,), int64)",
        "multi_binary_2d": "Box(0, 1, (6,), int8)",
        "multi_discrete_2d": "Box(0, 1, (11,), int64)",
    }
    for space, text in texts.items():
        assert text_of(check_env(args_for(space=space), ACTION_SPACES, None).obs) == text
    images = PPOArgs(env_id="tests.image_envs:Pictures-v0", env_kwargs='{"obs": "dict"}')
    assert text_of(check_env(images, ACTION_SPACES, None, images=True).obs) == (
        "Records(gear: float32 (3,), speed: float32 (3,), camera: uint8 (36, 40, 3), depth: uint8 (37, 39, 1))"
    )
