"""Errors and faults that name their true cause, and pictures that are recorded however they come."""

import contextlib
import io
import json
import pickle
import re
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from fabricrl import evaluate
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.args import PPOArgs
from fabricrl.algos.ppo.utils import ACTION_SPACES, make_agent
from fabricrl.algos.sac.args import SACArgs
from fabricrl.algos.sac.utils import make_agent as make_sac_agent
from fabricrl.envs import check_env, make_env, make_envs, play
from fabricrl.envs.envpool import EnvPoolVectorEnv
from fabricrl.envs.wrappers import NameFailures, as_frame
from fabricrl.models.models import RunningNormalizer
from fabricrl.utils.errors import ConfigError, EnvError, NonFiniteError
from tests.process import Finished, call

PLAIN = ["--num-envs", 1, "--num-threads", 1, "--hidden-sizes", 8, "--logger", "csv"]
PLAIN += ["--num-steps", 8, "--num-minibatches", 2, "--update-epochs", 1, "--total-timesteps", 32]


class Plain(gym.Env):
    """Episodes of five steps, and whatever `fault` says is wrong."""

    observation_space: Any = Box(-9.0, 9.0, (2,), np.float32)
    action_space: Any = Discrete(2)

    def __init__(self, fault: str = "") -> None:
        self.fault, self.steps = fault, 0
        if fault == "metadata":
            self.metadata = None  # type: ignore[assignment]
        if fault == "observations of gym":
            self.observation_space = Foreign()
        if fault == "actions of gym":
            self.action_space = Foreign()
        if fault.startswith("no "):
            setattr(self, f"{fault.removeprefix('no ')}_space", None)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        if self.fault == "ctrl-c in reset":
            raise KeyboardInterrupt
        obs = np.zeros(2, np.float32)
        return {"only obs": obs, "nothing": None, "list of two": [0.5, 0.5]}.get(self.fault, (obs, {}))

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.fault == "ctrl-c":
            raise KeyboardInterrupt
        if self.fault == "own":
            _, _ = (1, 2, 3)  # type: ignore[misc]
        obs = np.full(2, np.nan if self.fault == "nan" and self.steps > 2 else 0, np.float32)
        reward = np.nan if self.fault == "nan reward" and self.steps > 2 else 1.0
        return (obs, reward, self.steps >= 5, False, {})[: 4 if self.fault == "four" else 5]


class Older(Plain):
    """Written for gym, before `reset` took a seed."""

    def reset(self) -> Any:  # type: ignore[override]
        return np.zeros(2, np.float32)


class Foreign:
    """A space of another library."""

    def __str__(self) -> str:
        return "Box(2,)"


Foreign.__module__, Foreign.__name__ = "gym.spaces.box", "Box"


class Drawn(Plain):
    """The example of the README: no argument for render modes, and `render` gives pictures in the way of `kind`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, kind: str = "colours", rows: int = 16) -> None:
        super().__init__()
        self.kind, self.rows, self.calls = kind, rows, 0

    def render(self) -> Any:
        self.calls += 1
        picture = np.zeros((self.rows, 18, 3), np.uint8)
        picture[:, :9] = 200
        if self.kind == "raises" or (self.kind == "raises once" and self.calls == 4):
            raise RuntimeError("the screen\nis dark")
        if self.kind == "changing":
            return picture[: self.rows - 4 * (self.calls % 2)]
        return {
            "grey": picture[..., 0],
            "grey with channel": picture[..., :1],
            "transparent": np.dstack([picture, picture[..., 0]]),
            "channels first": np.moveaxis(picture, -1, 0),
            "share": picture / np.float32(200) * np.float32(200 / 255),
            "real": picture.astype(np.float64),
            "integers": picture.astype(np.int64),
            "list": picture.tolist(),
            "frames": [np.zeros_like(picture), picture],
            "tensor": torch.from_numpy(picture),
            "none": None,
            "text": "+--+",
        }.get(self.kind, picture)


for _env in (Plain, Older, Drawn):
    gym.register(f"{_env.__name__}-v0", entry_point=_env, max_episode_steps=50)


def args_for(env_id: str = "Plain-v0", num_envs: int = 1, **kwargs: Any) -> PPOArgs:
    return PPOArgs(env_id=f"tests.test_misled:{env_id}", env_kwargs=json.dumps(kwargs), num_envs=num_envs)


def complaint(env_id: str, kind: type[Exception] = ConfigError, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        check_env(PPOArgs(env_id=env_id, **settings), ACTION_SPACES, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Environments that cannot be had


@pytest.mark.parametrize(("env_id", "newest"), [("Swimmer-v3", "Swimmer-v5"), ("Hopper-v2", "Hopper-v5")])
def test_versions_that_gymnasium_has_removed_are_reported_as_such(env_id: str, newest: str) -> None:
    message = complaint(env_id)
    assert "moved to the gymnasium-robotics project" in message
    assert f"there is {newest}" in message
    assert "pip install" not in message


def test_a_module_is_named_without_the_ending_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some_envs.py").write_text("")
    assert complaint("some_envs.py:Thing-v0").endswith("--env-id some_envs.py:Thing-v0: name the module without .py")


@pytest.mark.parametrize("module", ["my_mujoco_envs", "box2d_games", "ale_py_things"])
def test_a_module_with_the_name_of_a_package_in_its_own_is_not_taken_for_it(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert f"there is no module {module};" in complaint(f"{module}:Thing-v0")
    (tmp_path / f"{module}.py").write_text("import something_else\n")
    message = complaint(f"{module}:Thing-v0")
    assert "No module named 'something_else'" in message
    assert "pip install" not in message
    sys.modules.pop(module, None)


def test_a_name_that_a_package_has_not_is_no_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_there.py").write_text("from json import nothing\n")
    message = complaint("half_there:Thing-v0")
    assert "cannot import name 'nothing' from 'json'" in message
    assert "not installed" not in message


@pytest.mark.parametrize("env_id", ["Target-v0", "Depot-v0", "MyEnv-v3"])
def test_an_id_without_a_module_gets_advice_on_naming_one(env_id: str) -> None:
    message = complaint(env_id)
    assert f"as in my_envs:{env_id}" in message
    assert "did you mean" not in message


def test_an_error_of_gymnasium_that_is_not_about_the_id_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plain, "metadata", None)
    message = complaint("tests.test_misled:Plain-v0", EnvError)
    assert "InvalidMetadata" in message
    assert "known environment" not in message


def test_a_constructor_that_fails_with_a_type_error_of_its_own_is_not_blamed_on_the_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Plain, fault: str) -> None:
        dict.fromkeys([1], 2, 3)  # type: ignore[call-overload]

    monkeypatch.setattr(Plain, "__init__", broken)
    assert "cannot be built: TypeError" in complaint("tests.test_misled:Plain-v0", EnvError, env_kwargs='{"fault": ""}')
    assert "--env-kwargs {} does not fit" in complaint("tests.test_misled:Plain-v0")


def test_an_error_of_ones_own_code_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of one's own that has called what failed."""

    def broken(self: Plain, fault: str = "") -> None:
        np.zeros(3).reshape(2)

    monkeypatch.setattr(Plain, "__init__", broken)
    line = broken.__code__.co_firstlineno + 1
    text = f"cannot be built: ValueError: cannot reshape array of size 3 into shape (2,) in broken, line {line} of "
    assert text in complaint("tests.test_misled:Plain-v0", EnvError)


def test_an_error_without_a_text_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Plain, fault: str = "") -> None:
        raise AssertionError

    monkeypatch.setattr(Plain, "__init__", broken)
    place = rf"cannot be built: AssertionError in broken, line \d+ of .*{Path(__file__).name}"
    assert re.search(place, complaint("tests.test_misled:Plain-v0", EnvError))


@pytest.mark.parametrize("what", ["observation", "action"])
def test_a_space_of_gym_is_recognised(what: str) -> None:
    message = complaint("tests.test_misled:Plain-v0", env_kwargs=json.dumps({"fault": f"{what}s of gym"}))
    assert f"{what} space Box(2,) is a gym.spaces.box.Box, none of Gymnasium's" in message


@pytest.mark.parametrize("what", ["observation", "action"])
def test_a_missing_space_is_reported_as_such(what: str) -> None:
    message = complaint("tests.test_misled:Plain-v0", EnvError, env_kwargs=json.dumps({"fault": f"no {what}"}))
    assert message == f"Plain has no {what}_space"


def test_an_environment_without_metadata_is_trained_on(tmp_path: Path) -> None:
    flags = ["--env-id", "tests.test_misled:Plain-v0", "--env-kwargs", '{"fault": "metadata"}', *PLAIN]
    assert call(ppo.main, *flags, "--log-dir", tmp_path).code == 0


@pytest.mark.parametrize(
    ("env_id", "fault", "call_", "words"),
    [
        ("Older-v0", "", "reset", "unexpected keyword argument 'seed'"),
        ("Plain-v0", "only obs", "reset", "a ndarray, not (observation, info)"),
        ("Plain-v0", "nothing", "reset", "a NoneType, not (observation, info)"),
        ("Plain-v0", "list of two", "reset", "a list, not (observation, info)"),
        ("Plain-v0", "four", "step", "expected 5, got 4"),
    ],
)
def test_answers_in_the_way_of_gym_are_refused_with_what_gymnasium_asks_for(
    env_id: str, fault: str, call_: str, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(make_envs(args_for(env_id, fault=fault), 0, Path("nowhere"))) as envs:
        if call_ == "step":
            envs.reset(seed=[1])
        with pytest.raises(EnvError) as caught:
            envs.reset(seed=[1]) if call_ == "reset" else envs.step(np.zeros(1, np.int64))
    message = str(caught.value)
    assert message.startswith("environment 0 ")
    assert call_ in message
    assert words in message
    assert "Gymnasium asks for reset(seed=None, options=None)" in message
    assert "Traceback" not in capfd.readouterr().err


def test_the_same_words_from_within_an_environment_are_its_own_failure(capfd: pytest.CaptureFixture[str]) -> None:
    env = NameFailures(make_env(args_for(fault="own")), 3)
    env.reset(seed=1)
    with pytest.raises(EnvError, match="environment 3 failed in step: ValueError: too many values to unpack"):
        env.step(0)
    assert "Traceback" in capfd.readouterr().err


# --- Evaluation


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    flags = ["--env-id", "tests.test_misled:Plain-v0", *PLAIN]
    return call(ppo.main, *flags, "--log-dir", tmp_path_factory.mktemp("misled"))


@pytest.mark.parametrize("fault", ["ctrl-c", "ctrl-c in reset"])
def test_an_interrupt_while_an_environment_steps_is_no_fault_of_it(
    fault: str, trained: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plain.__init__, "__defaults__", (fault,))
    with pytest.raises(KeyboardInterrupt):
        call(evaluate.main, trained.checkpoint, "--episodes", 1)


def test_a_terminal_of_ascii_gets_its_table(trained: Finished) -> None:
    table = call(evaluate.main, trained.checkpoint, "--episodes", 2, encoding="ascii").out
    assert "5.00 +- 0.00" in table.encode("ascii").decode()
    assert "5.00 ± 0.00" in call(evaluate.main, trained.checkpoint, "--episodes", 2).out


@pytest.mark.parametrize(("fault", "words"), [("nan", "observation"), ("nan reward", "reward")])
def test_evaluation_of_what_is_not_finite_ends_with_code_5(
    fault: str, words: str, trained: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plain.__init__, "__defaults__", (fault,))
    with pytest.raises(NonFiniteError, match=f"{words} of environment 0 is not finite"):
        call(evaluate.main, trained.checkpoint, "--episodes", 1)


def test_numbers_in_records_are_looked_at_too() -> None:
    space = make_env(PPOArgs(env_id="tests.image_envs:Pictures-v0", env_kwargs='{"obs": "dict"}')).observation_space
    records = np.full((2, space.shape[0]), 255, np.uint8)  # as floats, 255 255 255 255 is NaN
    with pytest.raises(NonFiniteError, match="observation of environment 0"):
        play._check_finite(records, np.zeros(2), space)
    records[:, : 4 * space.num_floats] = 0
    play._check_finite(records, np.zeros(2), space)


# --- Pictures

PICTURES = [
    "colours", "grey", "grey with channel", "transparent", "channels first", "share", "real", "integers", "list",
    "frames", "tensor",
]  # fmt: skip


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_in_every_form_become_frames(kind: str) -> None:
    frame = as_frame(Drawn(kind).render())
    assert frame.dtype == np.uint8
    assert frame.shape == (16, 18, 3)
    assert np.array_equal(frame, Drawn().render())


def test_frames_have_even_sides_and_one_size() -> None:
    odd = np.arange(15 * 17 * 3, dtype=np.uint8).reshape(15, 17, 3)
    frame = as_frame(odd)
    assert frame.shape == (16, 18, 3)
    assert np.array_equal(frame[:15, :17], odd)
    assert np.array_equal(frame[15, :17], odd[14])  # continued
    assert as_frame(odd, (10, 20)).shape == (10, 20, 3)
    assert as_frame(np.ones((16, 18), bool)).min() == 255


def videos(kind: str, tmp_path: Path, rows: int = 16) -> tuple[Finished, list[Path]]:
    kwargs = json.dumps({"kind": kind, "rows": rows})
    flags = ["--env-id", "tests.test_misled:Drawn-v0", "--env-kwargs", kwargs, *PLAIN]
    finished = call(ppo.main, *flags, "--capture-video", "--video-every", 4, "--log-dir", tmp_path)
    return finished, sorted(finished.folder.glob("videos/*.mp4"))


@pytest.mark.parametrize(("kind", "rows"), [("grey", 16), ("share", 15), ("changing", 17)])
def test_an_environment_without_an_argument_for_render_modes_is_recorded(kind: str, rows: int, tmp_path: Path) -> None:
    finished, found = videos(kind, tmp_path, rows)
    assert [path.name for path in found] == ["train-episode-0.mp4", "train-episode-4.mp4"]
    assert "warning" not in finished.err
    frames = imageio.imread(found[0])
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    assert len(frames) == 6  # of a reset and five steps
    assert frames[:, :8, :8].mean() > 150
    assert frames[:, :8, 10:].mean() < 50


def test_it_is_shown_in_a_window_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    check_env(args_for("Drawn-v0"), ACTION_SPACES, "human")
    with contextlib.closing(make_env(args_for("Drawn-v0"), "human")) as env:
        env.reset(seed=1)
        env.step(0)
        assert env.unwrapped.calls == 2
    with pytest.raises(ConfigError, match="cannot be rendered as 'human'"):
        check_env(args_for("Plain-v0"), ACTION_SPACES, "human")


@pytest.mark.parametrize(("kind", "count"), [("raises", 0), ("raises once", 1), ("none", 0), ("text", 0)])
def test_an_environment_that_cannot_be_drawn_costs_its_videos_and_one_warning(
    kind: str, count: int, tmp_path: Path
) -> None:
    finished, found = videos(kind, tmp_path)
    assert finished.code == 0
    assert len(found) == count
    (warning,) = [line for line in finished.err.splitlines() if line.startswith("warning:")]
    assert warning.endswith(": no more videos")
    assert ("the screen is dark" in warning) == kind.startswith("raises")


def test_evaluation_does_not_tell_of_videos_that_are_not_there(tmp_path: Path) -> None:
    finished, _ = videos("raises", tmp_path)
    flags = ["--episodes", 1, "--mode", "greedy", "--capture-video"]
    watched = call(evaluate.main, finished.checkpoint, *flags)
    assert watched.code == 0
    assert "greedy   return" in watched.out
    assert "videos in" not in watched.out


@pytest.mark.parametrize("kind", ["colours", "raises once"])
def test_a_video_that_cannot_be_written_costs_one_warning(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gym.wrappers.RecordVideo, "stop_recording", full)
    finished, found = videos(kind, tmp_path)
    assert (finished.code, found) == (0, [])
    (warning,) = [line for line in finished.err.splitlines() if line.startswith("warning:")]
    assert warning == "warning: a video cannot be written (OSError: [Errno 28] No space left on device): no more videos"


# --- Lives, and copies of normalisers


class Pool:
    """Two games of EnvPool's with three lives, of which each step costs the first game one."""

    spec = SimpleNamespace(config=SimpleNamespace(max_episode_steps=100))
    observation_space, action_space = Box(-9.0, 9.0, (2,), np.float32), Discrete(2)

    def __init__(self) -> None:
        self.lives = np.full(2, 3)

    def reset(self, which: Any = None) -> tuple:
        index = np.arange(2) if which is None else which
        self.lives[index] = 3
        return np.zeros((len(index), 2), np.float32), {"env_id": index, "lives": self.lives[index]}

    def step(self, actions: np.ndarray) -> tuple:
        self.lives[0] -= 1
        ended = self.lives == 0
        return np.zeros((2, 2), np.float32), np.ones(2), ended, ended, {"lives": self.lives.copy()}


def test_a_life_lost_in_the_first_step_of_a_game_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EnvPoolVectorEnv, "_make", lambda self, *_: Pool())
    args = PPOArgs(env_id="Plain-v0", num_envs=2, life_loss=True)
    envs = EnvPoolVectorEnv(args, Plain())
    envs.reset(seed=[1, 2])
    told = [envs.step(np.zeros(2, np.int64))[-1]["life_lost"].tolist() for _ in range(7)]
    assert told == [[True, False]] * 7


def test_a_copy_of_a_normaliser_that_loads_statistics_normalises_by_them() -> None:
    first = RunningNormalizer(2)
    first.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    for copy in (deepcopy(RunningNormalizer(2)), pickle.loads(pickle.dumps(RunningNormalizer(2)))):
        copy.load_state_dict(first.state_dict())
        assert torch.equal(copy(torch.ones(1, 2)), first(torch.ones(1, 2)))
        assert copy.center.tolist() == [2.0, 20.0]
    original = RunningNormalizer(2)
    deepcopy(original).load_state_dict(first.state_dict())
    assert original.center.tolist() == [0.0, 0.0]


def test_agents_that_normalise_observations_can_be_pickled() -> None:
    spaces = SimpleNamespace(
        single_observation_space=Plain.observation_space, single_action_space=Box(-1.0, 1.0, (1,), np.float32)
    )
    for args, make in ((PPOArgs(norm_obs=True), make_agent), (SACArgs(norm_obs=True), make_sac_agent)):
        agent = make(args, spaces)  # type: ignore[operator]
        agent.obs_normalizer.update(torch.randn(10, 2))
        stream = io.BytesIO()
        torch.save(agent, stream)
        stream.seek(0)
        for again in (pickle.loads(pickle.dumps(agent)), torch.load(stream, weights_only=False)):
            assert torch.equal(again.obs_normalizer.center, agent.obs_normalizer.center)


@pytest.mark.parametrize("info", [5, {"is_success": 10**400}])
def test_infos_that_cannot_be_read_name_their_environment(info: Any) -> None:
    class Ends(gym.Wrapper):
        def step(self, action: Any) -> tuple:
            return *self.env.step(action)[:2], True, False, info

    env = NameFailures(Ends(make_env(args_for())), 3, ["is_success"])
    env.reset(seed=1)
    with pytest.raises(EnvError, match=r"environment 3 failed in step: (TypeError|OverflowError)"):
        env.step(env.action_space.sample())
