"""Mistakes on the command line end in one line that names the argument, before anything starts; exit code 2."""

import contextlib
import dataclasses
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from torch._inductor import config as inductor

from fabricrl import evaluate
from fabricrl.algos import run as run_module
from fabricrl.algos.args import STEP_BYTES, check_sizes
from fabricrl.algos.command_line import parse
from fabricrl.algos.droq.args import DroQArgs
from fabricrl.algos.off_policy.updates import make_schedule
from fabricrl.algos.ppo import ppo
from fabricrl.algos.ppo.agent import PPOAgent
from fabricrl.algos.ppo.args import PPOArgs, PPODecoupledArgs
from fabricrl.algos.ppo_recurrent.args import RecurrentPPOArgs
from fabricrl.algos.sac import sac
from fabricrl.algos.sac.args import SACArgs
from fabricrl.envs.spaces import check_action_space, check_observation_space
from fabricrl.utils.errors import ConfigError
from fabricrl.utils.spelling import OTHER_NAMES
from fabricrl.utils.update import has_compiler
from tests.process import EVALUATE, FORKED, PPO, PYTHON, call, run


@pytest.fixture(autouse=True)
def nothing_starts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ranks nor environments of a run; tests of launching itself are marked by their name."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the mistake was not noticed before anything started")

    if "launch" not in request.node.name:
        monkeypatch.setattr(run_module, "launch", forbidden)
    monkeypatch.setattr(run_module, "make_envs", forbidden)
    monkeypatch.setattr(run_module, "RunFolder", forbidden)


def complaint(*flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call(ppo.main, *flags)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


VALUES = [
    # case 34 of the list of faults: counts
    ("--num-envs", "0", "at least 1"),
    ("--num-envs", "-3", "at least 1"),
    ("--num-envs", "1.5", "a whole number"),
    ("--num-envs", "two", "a whole number"),
    ("--num-steps", "0", "at least 1"),
    ("--num-minibatches", "0", "at least 1"),
    ("--update-epochs", "0", "at least 1"),
    ("--total-timesteps", "0", "at least 1"),
    ("--num-threads", "0", "at least 1"),
    ("--keep-checkpoints", "0", "at least 1"),
    ("--checkpoint-every", "-1", "0 or more"),
    ("--log-every", "0", "at least 1"),
    ("--video-every", "0", "at least 1"),
    ("--num-nodes", "0", "at least 1"),
    ("--node-rank", "1", "num-nodes"),
    ("--main-port", "70000", "65535"),
    ("--seed", "-1", "between 0"),
    # case 45: rates and coefficients
    ("--learning-rate", "0", "above 0"),
    ("--learning-rate", "-0.1", "above 0"),
    ("--learning-rate", "nan", "above 0"),
    ("--learning-rate", "inf", "above 0"),
    ("--learning-rate", "fast", "a number"),
    ("--gamma", "1.01", "between 0 and 1"),
    ("--gamma", "-0.1", "between 0 and 1"),
    ("--gamma", "nan", "between 0 and 1"),
    ("--gae-lambda", "2", "between 0 and 1"),
    ("--clip-coef", "0", "above 0"),
    ("--ent-coef", "-1", "between 0"),
    ("--vf-coef", "nan", "between 0"),
    ("--max-grad-norm", "-1", "between 0"),
    ("--target-kl", "0", "above 0"),
    ("--activation", "sine", "tanh"),
    ("--vectorization", "threads", "sync"),
    ("--logger", "paper", "tensorboard"),
    ("--matmul-precision", "low", "medium"),
    ("--precision", "33-true", "bf16-mixed"),
    ("--preset", "atary", "mujoco"),
    ("--exp-name", "a/b", "letters"),
    ("--env-kwargs", "{length: 3}", "JSON object"),
    ("--env-kwargs", "[1]", "JSON object"),
    ("--env-kwargs", '{"a": 1, "a": 2}', "JSON object"),
    # numbers that are too large
    ("--total-timesteps", "1000000000000", "at most 999999999999"),
    ("--total-timesteps", "1e30", "an integer below 2^63"),
    ("--total-timesteps", "1e400", "a whole number"),
    ("--total-timesteps", "1e-3", "a whole number"),
    ("--total-timesteps", "inf", "a whole number"),
    ("--num-threads", "100000", "at most"),
    ("--num-nodes", "100000", "at most 10000"),
    ("--update-epochs", "1001", "at most 1000"),
    ("--action-repeat", "1001", "at most 1000"),
    ("--noop-max", "1001", "at most 1000"),
    ("--frame-stack", "65", "at most 64"),
    ("--cnn-features", "65537", "at most 65536"),
    ("--resize", "4097", "at most 4096"),
    ("--clip-coef", "1e308", "at most 1e+30"),
    ("--learning-rate", "1e31", "at most 1e+30"),
    ("--ent-coef", "1e31", "1e+30"),
    ("--max-grad-norm", "1e31", "1e+30"),
    ("--target-kl", "1e31", "1e+30"),
    ("--accelerator", "tpu", "cpu"),
]


@pytest.mark.parametrize(("flag", "value", "allowed"), VALUES, ids=[f"{flag}={value}" for flag, value, _ in VALUES])
def test_a_value_that_is_not_allowed_is_refused_with_flag_value_and_what_is_allowed(
    flag: str, value: str, allowed: str
) -> None:
    message = complaint(flag, value)
    assert flag in message
    assert value in message or float(value) == float(message.split(" is ")[1].split(":")[0])
    assert allowed in message


def test_hidden_sizes_below_one_and_networks_without_end_are_refused() -> None:
    assert "--hidden-sizes" in complaint("--hidden-sizes", 64, 0)
    assert "at most 100 integers" in complaint("--hidden-sizes", *[1] * 101)


@pytest.mark.parametrize("text", ["1e6", "1E+6", "1000000.0", "1_000_000", "1000000", "0.1e7"])
def test_whole_numbers_are_taken_as_people_write_them(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["ppo.py", "--total-timesteps", text, "--hidden-sizes", "3.2e1", "16", "--resize=4e1"]
    )
    args = parse(PPOArgs, "ppo")
    assert (args.total_timesteps, args.hidden_sizes, args.resize) == (1_000_000, (32, 16), 40)
    assert type(args.total_timesteps) is int


def test_json_that_is_deep_or_huge_is_refused_in_a_short_line() -> None:
    for text in (
        "[" * 100_000,
        '{"a":' * 60 + "1" + "}" * 60,
        '{"a": "' + "x" * 100_000 + '"}',
        f'{{"a": {"9" * 5000}}}',
    ):
        message = complaint("--env-kwargs", text)
        assert "JSON object" in message
        assert len(message) < 1000
    assert PPOArgs(env_kwargs='{"a":' * 40 + "1" + "}" * 40)
    assert "levels" in complaint("--env-kwargs", '{"a":' * 60 + "1" + "}" * 60)
    assert "levels" not in complaint("--env-kwargs", '{"a": [' + "[1], " * 60 + "]}")  # a comma too many


# --- What does not fit into memory


MIB = 2**20
TOO_LARGE = [
    (PPOArgs, {"num_envs": 10**11, "num_steps": 1, "total_timesteps": 10**11, "num_minibatches": 1}, "--num-envs"),
    (PPOArgs, {"num_envs": 132, "vectorization": "async", "total_timesteps": 10**6}, "--num-envs"),
    (PPOArgs, {"num_steps": 10**7, "total_timesteps": 10**9}, "--num-envs × --num-steps"),
    (PPOArgs, {"hidden_sizes": (10_000, 10_000)}, "--hidden-sizes"),
    (RecurrentPPOArgs, {"rnn_hidden_size": 3000}, "--hidden-sizes"),
    (RecurrentPPOArgs, {"rnn_layers": 100, "rnn_hidden_size": 300}, "--hidden-sizes"),
    (RecurrentPPOArgs, {"encoder_sizes": (10_000, 10_000)}, "--hidden-sizes"),
    (SACArgs, {"hidden_sizes": (10_000, 10_000)}, "--hidden-sizes, --num-critics"),
    (SACArgs, {"num_critics": 1000, "hidden_sizes": (300, 300)}, "--hidden-sizes, --num-critics"),
    (DroQArgs, {"batch_size": 10**6, "replay_ratio": 100.0}, "--batch-size × --replay-ratio × --num-envs"),
]


@pytest.mark.parametrize(
    ("kind", "given", "flags"), TOO_LARGE, ids=[f"{kind.__name__}-{g}" for kind, g, _ in TOO_LARGE]
)
def test_what_does_not_fit_into_memory_is_refused_with_the_figures(
    kind: type[PPOArgs], given: dict[str, Any], flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fabricrl.algos.args.available_memory", lambda: 1024.0 * MIB)
    with pytest.raises(
        ConfigError, match=r"only 1\.00 GiB of memory is free, too little for .*: .* GiB or more"
    ) as caught:
        kind(**given).check_machine()
    assert str(caught.value).startswith(f"{flags}: ")
    kind().check_machine()  # the defaults need little
    monkeypatch.setattr("fabricrl.algos.args.available_memory", lambda: 2.0**80)
    kind(**given).check_machine()


def test_each_rank_draws_batches_for_the_steps_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    args = SACArgs(num_envs=4, replay_ratio=10.0, batch_size=1000)
    monkeypatch.setattr("fabricrl.algos.args.available_memory", lambda: 1.5 * 4 * 10 * 1000 * STEP_BYTES)
    args.check_batches()
    with pytest.raises(ConfigError, match=r"× ranks: only .* the batches of an iteration, 80000 transitions"):
        args.check_batches(2)
    run = SimpleNamespace(args=args, fabric=SimpleNamespace(world_size=2), trainers=None, state={})
    run.team, run.failing_together = SimpleNamespace(global_rank=0), contextlib.nullcontext
    with pytest.raises(ConfigError, match="80000 transitions"):
        make_schedule(run)  # type: ignore[arg-type]


def test_memory_is_looked_at_before_anything_starts() -> None:
    assert "GiB" in complaint("--hidden-sizes", 10**7, 10**7)


def test_what_spaces_make_of_a_run_is_looked_at_as_soon_as_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabricrl.algos.args.available_memory", lambda: 1.5 * MIB)
    flags = ["--env-id", "tests.image_envs:CountingImages-v0", "--hidden-sizes"]
    message = complaint(*flags)  # 4 × 128 images of 36 × 38 × 4 bytes; without them it would be 16 KiB
    assert message.startswith("--num-envs × --num-steps: only 0.00 GiB of memory is free, too little for rollouts")
    assert "512 observations of 5472 bytes" in message
    message = complaint(*flags, "--num-steps", 1, "--num-minibatches", 1)
    assert message.startswith("--env-id, --hidden-sizes: ")


@pytest.mark.parametrize(
    ("algo", "kind", "given", "obs_space", "action_space", "flags"),
    [
        ("ppo", PPOArgs, {}, Box(-1, 1, (3,)), Discrete(2 * 10**6), "--env-id, --hidden-sizes"),
        ("ppo", PPOArgs, {"num_steps": 1, "num_minibatches": 1}, Box(-1, 1, (10**6,)), Discrete(2), "--env-id"),
        ("ppo", PPOArgs, {"num_steps": 1000}, Box(-1, 1, (10**5,)), Discrete(2), "--num-envs × --num-steps"),
        (
            "ppo",
            PPODecoupledArgs,
            {"max_lag": 100},
            Box(-1, 1, (6000,)),
            Discrete(2),
            "--num-envs × --num-steps × --max-lag",
        ),
        ("sac", SACArgs, {}, Box(-1, 1, (10**6,)), Box(-1, 1, (2,)), "--env-id, --hidden-sizes"),
        ("droq", DroQArgs, {"num_envs": 10**5}, Box(-1, 1, (3000,)), Box(-1, 1, (2,)), "--num-envs"),
    ],
)
def test_observations_and_actions_that_make_a_run_too_large_are_refused_with_the_figures(
    algo: str,
    kind: type[PPOArgs],
    given: dict[str, Any],
    obs_space: Box,
    action_space: Any,
    flags: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = kind(**given)
    monkeypatch.setattr("fabricrl.algos.args.available_memory", lambda: 1024.0 * MIB)
    with pytest.raises(
        ConfigError, match=r"only 1\.00 GiB of memory is free, too little for .*: .* GiB or more"
    ) as caught:
        check_sizes(args, algo, obs_space, action_space)
    assert str(caught.value).startswith(flags)
    check_sizes(args, algo, Box(-1, 1, (3,)), Box(-1, 1, (2,)))  # such a space needs little
    monkeypatch.setattr("fabricrl.algos.args.available_memory", lambda: 2.0**80)
    check_sizes(args, algo, obs_space, action_space)


def test_the_weights_that_are_counted_are_those_of_the_agent_and_nothing_is_drawn() -> None:
    args, spaces = PPOArgs(), (Box(-1, 1, (5,)), Discrete(3))
    agent = PPOAgent(*spaces)
    state = torch.get_rng_state()
    with mock.patch("fabricrl.algos.args.require_memory") as require:
        check_sizes(args, "ppo", *spaces)
    assert torch.equal(torch.get_rng_state(), state)
    assert require.call_args.args[2] == 16 * sum(part.numel() for part in agent.parameters())


@pytest.mark.parametrize("space", [Discrete(10**8), MultiDiscrete([10**8, 2]), Dict({"a": Discrete(10**8)})])
def test_spaces_of_a_hundred_million_parts_are_refused(space: Any) -> None:
    with pytest.raises(ConfigError, match=r"observation space .* has 10000000\d numbers.*: at most 50000000"):
        check_observation_space(space)
    if not isinstance(space, Dict):
        with pytest.raises(ConfigError, match=r"action space .* at most 50000000"):
            check_action_space(space, (Discrete, MultiDiscrete))


def test_more_environments_in_processes_than_files_may_be_open_are_refused() -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, limits[1]))
    try:
        message = complaint("--vectorization", "async", "--num-envs", 437)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert message.startswith("--num-envs is 437: with --vectorization async it must be at most 436")


@pytest.mark.parametrize(
    ("steps", "minibatches", "nearest"),
    [(10**9 + 7, 3, "1"), (10**9, 999_999_999, "500000000"), (2 * 10**9, 3, "2 and 4")],
)
def test_minibatches_of_a_rollout_of_any_size_are_checked_at_once(steps: int, minibatches: int, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:  # the first is a prime
        PPOArgs(num_envs=1, num_steps=steps, num_minibatches=minibatches, total_timesteps=10**11)
    assert str(caught.value).endswith(f"nearest are {nearest}")


@pytest.mark.parametrize(("typo", "meant"), [("--learning-rat", "--learning-rate"), ("--num-env", "--num-envs")])
def test_an_unknown_flag_is_refused_with_the_nearest_one(typo: str, meant: str) -> None:
    message = complaint(typo, 1)
    assert typo in message
    assert f"did you mean {meant}?" in message


def test_a_flag_that_resembles_none_and_a_stray_word_are_refused() -> None:
    assert "--zzz" in complaint("--zzz", 1)
    assert "CartPole-v1" in complaint("CartPole-v1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lerning-rate 1e-3", "--lerning-rate is not an argument; did you mean --learning-rate?"),
        ("--learning_rte=1e-3", "--learning_rte is not an argument; did you mean --learning-rate?"),
        ("--lr 1e-3", "--lr is not an argument; did you mean --learning-rate?"),
        ("--n_epochs 4 --zzz", "--n_epochs is not an argument; did you mean --update-epochs?"),
        ("--zzz", "--zzz is not an argument; --help-all lists those there are"),
        ("--env-id CartPole-v1 8,9", "8,9 is neither an argument nor the value of one; see --help"),
        ("--anneal_lr False", "--anneal-lr takes no value, and has False: write --anneal-lr or --no-anneal-lr"),
        ("--norm-obs=true", "--norm-obs takes no value, and has true: write --norm-obs or --no-norm-obs"),
        ("--seed 3 --seed 1.5", "--seed is 1.5: it must be a whole number"),
        ("--seed --cuda", "--seed has no value: it must be a whole number"),
        ("--gamma=high", "--gamma is high: it must be a number"),
        ("--target-kl x", "--target-kl is x: it must be a number, or None"),
        ("--hidden-sizes 64,64", "--hidden-sizes is 64,64: it must be whole numbers with spaces between them"),
        ("--hidden_sizes 64 x --cuda", "--hidden-sizes is 64 x: it must be whole numbers with spaces between them"),
        ("--activation gelu", "--activation is gelu: it must be one of tanh, relu, elu, silu"),
    ],
)
def test_a_mistake_names_the_argument_what_was_given_and_what_is_allowed(words: str, message: str) -> None:
    assert complaint(*words.split()) == message


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_of_other_libraries_lead_to_ours(name: str) -> None:
    ours = OTHER_NAMES[name]
    kinds = {ppo.main: PPOArgs, sac.main: SACArgs}
    known = {main: {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(kind)} for main, kind in kinds.items()}
    assert set(ours) <= set().union(*known.values())
    main = next(main for main in kinds if ours[0] in known[main] and f"--{name}" not in known[main])
    with pytest.raises(ConfigError, match=f"^--{name} is not an argument; did you mean {ours[0]}( or .*)?\\?$"):
        call(main, f"--{name}", 1)


@pytest.mark.parametrize(("flags", "what"), [(["--track"], "--track"), (["--logger", "wandb"], "--logger wandb")])
def test_a_logger_without_its_package_is_refused_with_the_command_that_installs_it(
    flags: list[str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert complaint(*flags) == f"{what} needs a package that is not installed: pip install -e '.[wandb]'"


def test_mistakes_are_reported_whatever_characters_the_terminal_can_print() -> None:
    for flag in ("--learning-rat", "--zzz"):
        with pytest.raises(ConfigError, match=flag):
            call(ppo.main, flag, 1, encoding="ascii")


# --- Case 35: minibatches


def test_minibatches_that_do_not_divide_the_rollout_are_refused_with_the_nearest_that_do() -> None:
    message = complaint("--num-envs", 2, "--num-steps", 10, "--num-minibatches", 3)  # 20 = 2 × 10 = 4 × 5
    assert "--num-minibatches is 3" in message
    assert "20" in message
    assert "2 and 4" in message


def test_minibatches_of_one_row_are_refused_if_advantages_are_normalised() -> None:
    flags = ["--num-envs", 1, "--num-steps", 4, "--num-minibatches", 4]
    assert "at least 2" in complaint(*flags)
    with pytest.raises(AssertionError, match="not noticed"):  # legal without: the run would start
        call(ppo.main, *flags, "--no-norm-adv")


# --- Case 44: shorter than one iteration


def test_a_run_that_is_shorter_than_one_iteration_is_refused() -> None:
    message = complaint("--num-envs", 4, "--num-steps", 128, "--total-timesteps", 511)
    assert "--total-timesteps" in message
    assert "511" in message
    assert "512" in message


# --- Cases 37 to 39: environments


def test_the_preset_of_atari_is_refused_elsewhere() -> None:
    message = complaint("--preset", "atari", "--env-id", "CartPole-v1")
    assert message.startswith("--env-id is CartPole-v1")
    assert "ALE/Pong-v5" in message


def test_arguments_of_an_environment_that_are_no_json_are_told_of_quotes_and_too_long_ones_of_the_limit() -> None:
    assert "in single quotes for the shell" in complaint("--env-kwargs", "{continuous:true}")
    for much in ('{"a": "' + "x" * 100_000 + '"}', '{"a": ' + "[" * 60 + "]" * 60 + "}"):
        assert "at most 100 000 characters and 50 levels" in complaint("--env-kwargs", much)


def test_an_unknown_environment_is_refused_with_close_names() -> None:
    message = complaint("--env-id", "CartPol-v1")
    assert "--env-id CartPol-v1" in message
    assert "CartPole-v1" in message.split("did you mean")[1]
    assert "Did you mean" not in message  # Gymnasium's own, which knows of no versions
    assert "did you mean tests.envs:Deterministic-v0?" in complaint("--env-id", "tests.envs:Determinstic-v0")


@pytest.mark.parametrize("env_id", ["nosuchmodule:Thing-v0", "tests.envs:NoSuch-v0", "CartPole-v99", "::", ""])
def test_an_environment_that_cannot_be_had_is_refused_by_name(env_id: str) -> None:
    assert f"--env-id {env_id}" in complaint("--env-id", env_id)


@pytest.mark.parametrize(
    ("env_id", "package", "folder", "extra"),
    [
        ("LunarLander-v3", "Box2D", "gymnasium.envs.box2d", "box2d"),
        ("Hopper-v4", "mujoco", "gymnasium.envs.mujoco", "mujoco"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, env_id: str, package: str, folder: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(folder) or name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    message = complaint("--env-id", env_id)
    assert f"--env-id {env_id}" in message
    assert f"pip install -e '.[{extra}]'" in message
    for name in [name for name in sys.modules if name.startswith(folder)]:
        sys.modules.pop(name)  # those that were imported without the package


def test_constructor_arguments_that_an_environment_does_not_have_are_refused() -> None:
    message = complaint("--env-kwargs", '{"gravitation": 3}')
    assert "--env-kwargs" in message
    assert "gravitation" in message


@pytest.mark.parametrize(
    ("kwargs", "space"),
    [('{"action": "tuple"}', "Tuple"), ('{"action": "box_int"}', "int64"), ('{"action": "dict"}', "Dict")],
)
def test_an_action_space_that_is_not_supported_is_refused_with_those_that_are(kwargs: str, space: str) -> None:
    message = complaint("--env-id", "tests.envs:Odd-v0", "--env-kwargs", kwargs)
    assert "action space" in message
    assert space in message
    assert "Box" in message


@pytest.mark.parametrize(("kwargs", "space"), [('{"obs": "sequence"}', "Sequence"), ('{"obs": "text"}', "Text")])
def test_an_observation_space_that_is_not_supported_is_refused_with_those_that_are(kwargs: str, space: str) -> None:
    message = complaint("--env-id", "tests.envs:Odd-v0", "--env-kwargs", kwargs)
    assert "observation space" in message
    assert space in message
    assert "MultiBinary" in message


def test_video_of_an_environment_that_cannot_be_drawn_is_refused() -> None:
    assert "rgb_array" in complaint("--env-id", "tests.envs:Odd-v0", "--capture-video")


# --- Case 21: folders


def test_a_log_folder_that_is_a_file_or_lies_under_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "logs"):
        message = complaint("--log-dir", folder)
        assert f"--log-dir is {folder}" in message
    assert file.read_text() == ""


def test_a_log_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # a superuser could write anywhere
    assert "--log-dir" in complaint("--log-dir", tmp_path)


# --- Case 46: hardware


@pytest.mark.parametrize(
    "flags",
    [
        ("--accelerator", "abacus"),
        ("--strategy", "hope"),
        ("--devices", "0"),
        ("--devices", "many"),
    ],
    ids=" ".join,
)
def test_launch_refuses_hardware_and_strategies_that_do_not_exist(flags: tuple[str, str]) -> None:
    message = complaint(*flags)
    assert flags[0] in message
    assert flags[1] in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("flags", [("--accelerator", "cuda"), ("--cuda",)], ids=" ".join)
def test_launch_refuses_a_gpu_that_is_not_there(flags: tuple[str, ...]) -> None:
    text = complaint(*flags)
    assert "--accelerator cuda" in text
    assert "train with --accelerator cpu" in text


def test_launch_refuses_a_policy_on_a_gpu_beside_training_on_the_cpu() -> None:
    """Before environments start; a decoupled player, which may act where nobody trains, has a test of its own."""
    message = complaint("--player-device", "cuda")
    assert message == "--player-device is cuda: it must be cpu or auto where the run trains on the CPU"


def test_compiling_without_a_compiler_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    message = complaint("--compile")
    assert "--compile needs a C++ compiler" in message
    assert "apt install g++" in message


@pytest.mark.parametrize(
    ("platform", "there", "named", "suffices"),
    [
        ("linux", "g++", None, True),
        ("linux", "clang++", None, False),
        ("linux", "clang++", "clang++", True),
        ("linux", "g++", "clang++", False),
        ("darwin", "clang++", None, True),
        ("darwin", "g++", None, False),
    ],
)
def test_the_compiler_is_the_one_that_pytorch_looks_for(
    platform: str, there: str, named: str | None, suffices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name == there else None)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delenv("CXX", raising=False)
    if named:
        monkeypatch.setenv("CXX", named)
    assert has_compiler() == suffices
    if platform == sys.platform == "linux" and named is None:
        assert inductor.cpp.cxx[1] == "g++", "PyTorch looks for another one by now"


def test_launch_refuses_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what launch() sets goes away again
        monkeypatch.delenv(name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = complaint("--num-nodes", 2, "--devices", 1, "--strategy", "ddp", "--main-port", port)
    assert f"--main-port {port}" in message


def test_launch_refuses_what_the_launcher_has_chosen_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv("LT_DEVICES", "2")
    message = complaint("--devices", 4)
    assert "--devices 4" in message
    assert "launcher" in message


# --- Evaluation


@pytest.mark.parametrize(("flag", "value"), [("--episodes", "0"), ("--num-envs", "-1")])
def test_evaluation_refuses_counts_below_one(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} is {value}"):
        call(evaluate.main, "missing.ckpt", flag, value)


# --- As a user sees it


def test_real_processes_end_with_code_2_and_exactly_one_line_on_standard_error(tmp_path: Path) -> None:
    commands = {
        "--num-envs": [PPO, "--num-envs", "0", "--devices", "2", "--strategy", "ddp"],
        "--learning-rat": [PPO, "--learning-rat", "1"],
    }
    for (named, arguments), python in zip(commands.items(), (PYTHON, FORKED), strict=True):
        ended = run(*python, *arguments, cwd=tmp_path)
        assert ended.code == 2, ended.report()
        assert ended.out == ""
        lines = ended.err.splitlines()
        assert len(lines) == 1, ended.report()
        assert lines[0].startswith("error: ")
        assert named in lines[0]
    ended = run(*FORKED, EVALUATE, tmp_path / "missing.ckpt", cwd=tmp_path)
    assert ended.code == 3, ended.report()
    assert ended.err.splitlines() == ["error: cannot read checkpoint missing.ckpt: No such file or directory"]
    assert not list(tmp_path.iterdir())
