"""Environments in tensor code: equal to Gymnasium's, with episodes that begin and end as theirs do."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from fabricrl.envs.torch import cheetah, reach
from fabricrl.envs.torch.cartpole import CartPole
from fabricrl.envs.torch.cheetah import PlanarCheetah
from fabricrl.envs.torch.env import TorchEnv
from fabricrl.envs.torch.pendulum import Pendulum
from fabricrl.envs.torch.reach import Reach
from tests.conftest import NoValues

TWINS = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0"]
IDS = [f"torch/{name}" for name in (*TWINS, "Reach-v0", "PlanarCheetah-v1")]
STEPS, COUNT = 1000, 2


def make(env_id: str, num_envs: int = COUNT, seed: int = 1, **settings: Any) -> Any:
    envs = gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **settings)
    envs.reset(seed=seed)
    envs.action_space.seed(seed)
    return envs


def actions_of(envs: Any) -> Tensor:
    return torch.from_numpy(np.asarray(envs.action_space.sample()))


def start_at(env: gym.Env, state: Tensor) -> None:
    """Begins an episode of Gymnasium's in a state of ours."""
    env.reset()
    kind = np.float32 if "MountainCar" in str(env) else np.float64  # as they keep it
    env.unwrapped.state = state.numpy().astype(kind)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", TWINS)
def test_a_thousand_random_steps_are_those_of_gymnasium(name: str, dtype: str) -> None:
    """In double precision along whole episodes; in single precision step by step, since some of these are chaotic."""
    ours, theirs = make(f"torch/{name}", dtype=dtype), [gym.make(name) for _ in range(COUNT)]
    ended = 0
    for env, state in zip(theirs, ours.state, strict=True):
        start_at(env, state)
    for _ in range(STEPS):
        if dtype == "float32":
            for env, state in zip(theirs, ours.state, strict=True):
                env.unwrapped.state = state.numpy().astype(np.float64)  # type: ignore[attr-defined]
        actions = actions_of(ours)
        obs, rewards, terminated, truncated, infos = ours.step(actions)
        for i, env in enumerate(theirs):
            action = actions[i].double().numpy() if actions.is_floating_point() else int(actions[i])
            their_obs, reward, their_terminated, their_truncated, _ = env.step(action)
            np.testing.assert_allclose(infos["final_obs"][i], their_obs, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(rewards[i], float(reward), rtol=1e-5, atol=1e-5)
            assert (bool(terminated[i]), bool(truncated[i])) == (their_terminated, their_truncated)
            if their_terminated or their_truncated:
                ended += 1
                start_at(env, ours.state[i])
            else:
                assert torch.equal(obs[i], infos["final_obs"][i])
    assert ended >= COUNT  # CartPole's end early, the others by their time limits


@pytest.mark.parametrize("name", TWINS)
def test_spaces_limits_and_the_single_twin_are_those_of_gymnasium(name: str) -> None:
    ours, theirs, single = make(f"torch/{name}"), gym.make(name), gym.make(f"torch/{name}")
    assert theirs.spec is not None
    assert ours.single_observation_space == theirs.observation_space == single.observation_space
    assert ours.single_action_space == theirs.action_space == single.action_space
    assert ours.max_episode_steps == theirs.spec.max_episode_steps
    assert type(single.unwrapped) is type(theirs.unwrapped)


@pytest.mark.parametrize("name", TWINS)
def test_episodes_begin_where_those_of_gymnasium_do(name: str) -> None:
    ours = make(f"torch/{name}", 4000)
    first, _ = ours.reset(seed=2)
    theirs = gym.make(name)
    rows = np.array([theirs.reset(seed=seed)[0] for seed in range(2000)])
    for column, other in zip(first.numpy().T, rows.T, strict=True):
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            room = 0.06 * max(np.ptp(other), 1e-6)  # four deviations of such a quantile
            assert abs(np.quantile(column, share) - np.quantile(other, share)) <= room


@pytest.mark.parametrize("env_id", IDS)
def test_both_ways_to_reset_play_the_same_episodes(env_id: str) -> None:
    """One step that only resets, and earns nothing, lies between two episodes where they reset a step later."""
    same, later = make(env_id, 3, max_episode_steps=5), make(env_id, 3, max_episode_steps=5, autoreset_mode="next_step")
    assert same.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert later.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    for t in range(1, 13):
        actions = actions_of(same)
        if t in (6, 12):  # all episodes end by their limit
            before = later.state.clone()
            _, *columns, _ = later.step(actions)
            assert not any(column.any() for column in (*columns, later.steps))
            assert not torch.equal(before, later.state)
            same.state.copy_(later.state)  # each has drawn a first state of its own
            continue
        ours, theirs = same.step(actions), later.step(actions)
        assert torch.equal(ours[-1]["final_obs"], theirs[0])
        for column, other in zip(ours[1:4], theirs[1:4], strict=True):
            assert torch.equal(column, other)
        assert ours[3].all() == (t % 6 == 5)
        if t % 6 == 5:
            assert not same.steps.any()
            assert not torch.equal(ours[0], ours[-1]["final_obs"])


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("mode", ["same_step", "next_step"])
def test_a_state_that_is_loaded_goes_on_to_the_bit(env_id: str, mode: str) -> None:
    settings = {"max_episode_steps": 7, "autoreset_mode": mode}
    first, second = make(env_id, seed=1, **settings), make(env_id, seed=2, **settings)
    for _ in range(10):
        first.step(actions_of(first))
    second.load_state_dict(first.state_dict())
    for _ in range(20):
        actions = actions_of(first)
        ours, theirs = first.step(actions), second.step(actions)
        for column, other in zip(ours[:4], theirs[:4], strict=True):
            assert torch.equal(column, other)


@pytest.mark.parametrize("env_id", IDS)
def test_seeds_decide_and_environments_differ(env_id: str) -> None:
    envs = make(env_id, 64)
    first, _ = envs.reset(seed=5)
    again, _ = envs.reset()
    repeated, _ = envs.reset(seed=5)
    assert torch.equal(first, repeated)
    assert not torch.equal(first, again)
    assert len(first.unique(dim=0)) == 64
    assert envs.observation_space.contains(first.numpy())


@pytest.mark.parametrize("env_id", IDS)
def test_numbers_drawn_ahead_are_fresh_in_each_step_and_the_step_is_made_of_tensors_alone(env_id: str) -> None:
    envs = make(env_id, max_episode_steps=1)
    envs.draw(3)
    first = [envs.step(actions_of(envs))[0] for _ in range(3)]
    envs.draw(3)
    first += [envs.step(actions_of(envs))[0] for _ in range(3)]
    assert len({obs.numpy().tobytes() for obs in first}) == 6
    memory = [tensor.data_ptr() for tensor in envs.tensors()]
    envs.step(actions_of(envs))
    assert memory == [tensor.data_ptr() for tensor in envs.tensors()]  # changed in place, as a graph replays it


class NoCopies(NoValues):
    """Refuses tensors of the host's numbers as well, which `torch.tensor` and `new_tensor` make."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is self.aten.lift_fresh:
            raise RuntimeError("operation not permitted when stream is capturing: a copy from the host")
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("env_id", IDS)
def test_a_step_can_be_recorded_on_a_gpu(env_id: str) -> None:
    envs = make(env_id)
    envs.draw(2)
    actions = actions_of(envs)
    with NoCopies():
        envs.step(actions)
        with pytest.raises(RuntimeError, match="a copy from the host"):
            actions.new_tensor([1.0])


# --- The arm, which Gymnasium does not have


def energy(state: Tensor) -> Tensor:
    """Kinetic energy of two thin rods: ½ m v² of their centres, and ½ I ω² with I = m l² / 12."""
    angle1, angle2, speed1, speed2 = state[:, :4].unbind(-1)
    length, mass, both = reach.LENGTH, reach.MASS, speed1 + speed2
    middle = length / 2
    v1 = (middle * speed1).square()
    vx = -length * speed1 * angle1.sin() - middle * both * (angle1 + angle2).sin()
    vy = length * speed1 * angle1.cos() + middle * both * (angle1 + angle2).cos()
    inertia = mass * length**2 / 12
    return 0.5 * (mass * (v1 + vx.square() + vy.square()) + inertia * (speed1.square() + both.square()))


def test_the_arm_keeps_its_energy_without_motors_and_friction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "FRICTION", 0.0)
    monkeypatch.setattr(reach, "SUBSTEPS", 2000)
    envs = Reach(8, dtype="float64")
    state = torch.randn(8, 6, dtype=torch.float64)
    before = energy(state)
    state, _, _ = envs.next_state(state, torch.zeros(8, 2))
    torch.testing.assert_close(energy(state), before, rtol=1e-3, atol=1e-4)


def test_motors_do_the_work_that_the_arm_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power is torque times speed, of each joint."""
    monkeypatch.setattr(reach, "FRICTION", 0.0)
    monkeypatch.setattr(reach, "SUBSTEPS", 1)
    monkeypatch.setattr(reach, "SECONDS", 1e-6)
    envs, actions = Reach(8, dtype="float64"), torch.rand(8, 2, dtype=torch.float64) - 0.5
    state = torch.randn(8, 6, dtype=torch.float64)
    after, _, _ = envs.next_state(state, actions)
    torques = actions * torch.tensor(reach.TORQUES, dtype=torch.float64)
    power = (torques * state[:, 2:4]).sum(-1)
    torch.testing.assert_close((energy(after) - energy(state)) / 1e-6, power, rtol=1e-3, atol=1e-3)


def test_rewards_and_successes_of_the_arm_are_of_the_way_that_is_left() -> None:
    envs = Reach(2)
    envs.reset(seed=0)
    envs.state.copy_(torch.tensor([[0.0, math.pi / 2, 0, 0, 0.5, 0.5], [0.0, 0.0, 0, 0, 0.0, 0.5]]))  # tips on a corner
    obs, rewards, terminated, truncated, infos = envs.step(torch.zeros(2, 2))
    torch.testing.assert_close(rewards, torch.tensor([0.0, -math.hypot(1.0, 0.5)]), rtol=0, atol=1e-5)
    assert infos["is_success"].tolist() == [1.0, 0.0]
    assert not torch.stack((terminated, truncated)).any()
    torch.testing.assert_close(obs[1, -2:], torch.tensor([-1.0, 0.5]), rtol=0, atol=1e-5)
    _, effort, _, _, _ = envs.step(torch.tensor([[3.0, 0.0], [0.0, -1.0]]))  # beyond what the motor can
    torch.testing.assert_close(effort + 0.01, rewards, rtol=0, atol=0.02)


# --- The cheetah, which Gymnasium does not have in tensor code

MASSES = torch.tensor(cheetah.MASSES, dtype=torch.float64)


def parts_of(state: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates and velocities of the masses, [N, 6, 2]."""
    places, speeds = state.view(-1, 2, 6, 2).unbind(1)
    return places, speeds


def angles_of(places: Tensor) -> Tensor:
    """Angles of the joints, [N, 4], in the circle that begins opposite to the pose at rest."""
    ways = places.diff(dim=1)
    angles = torch.atan2(ways[..., 1], ways[..., 0]).diff(dim=1)
    bends = torch.tensor(cheetah.BENDS, dtype=places.dtype)
    return torch.remainder(angles - bends + math.pi, 2 * math.pi) - math.pi + bends


def energy_of_cheetah(state: Tensor) -> Tensor:
    """½ m v² of masses, ½ k x² of rods and joints."""
    places, speeds = parts_of(state)
    stretch = places.diff(dim=1).norm(dim=-1) - torch.tensor(cheetah.LENGTHS, dtype=state.dtype)
    bent = angles_of(places) - torch.tensor(cheetah.BENDS, dtype=state.dtype)
    kinetic = (MASSES * speeds.square().sum(-1)).sum(-1)
    return 0.5 * (kinetic + cheetah.ROD * stretch.square().sum(-1) + cheetah.JOINT * bent.square().sum(-1))


def flying(count: int = 8) -> tuple[PlanarCheetah, Tensor]:
    """Cheetahs high in the air, bent and in motion, in double precision."""
    envs = PlanarCheetah(count, dtype="float64")
    state = torch.randn(count, 24, dtype=torch.float64)
    places, _ = parts_of(state)
    bends = torch.tensor(cheetah.BENDS, dtype=torch.float64) + 0.5 * torch.randn(count, 4, dtype=torch.float64)
    angles = torch.cat((torch.zeros(count, 1, dtype=torch.float64), bends), 1).cumsum(1)
    lengths = torch.tensor(cheetah.LENGTHS, dtype=torch.float64) + 0.01 * torch.randn(count, 5, dtype=torch.float64)
    places[:, 0] = torch.tensor([0.0, 100.0])
    places[:, 1:] = places[:, :1] + (lengths[..., None] * torch.stack((angles.cos(), angles.sin()), -1)).cumsum(1)
    return envs, state


@pytest.fixture
def ideal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gravity, and nothing that damps."""
    for name in ("ROD_DAMPING", "JOINT_DAMPING", "GRAVITY"):
        monkeypatch.setattr(cheetah, name, 0.0)


@pytest.mark.usefixtures("ideal")
def test_a_cheetah_that_nothing_acts_on_keeps_its_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cheetah, "SUBSTEPS", 2000)
    envs, state = flying()
    after, _, _ = envs.next_state(state, torch.zeros(8, 4))
    assert ((after - state).view(8, 2, 12).abs().amax(-1) > 0.05).all()
    torch.testing.assert_close(energy_of_cheetah(after), energy_of_cheetah(state), rtol=5e-3, atol=0.0)


@pytest.mark.usefixtures("ideal")
def test_motors_do_the_work_that_the_cheetah_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power is torque times speed, of each joint."""
    monkeypatch.setattr(cheetah, "SUBSTEPS", 1)
    monkeypatch.setattr(cheetah, "SECONDS", 1e-7)
    envs, state = flying()
    places, speeds = parts_of(state)
    turning = (angles_of(places + 1e-6 * speeds) - angles_of(places - 1e-6 * speeds)) / 2e-6
    actions = 2 * torch.rand(8, 4, dtype=torch.float64) - 1
    driven, left = (energy_of_cheetah(envs.next_state(state, a)[0]) for a in (actions, 0 * actions))
    power = (cheetah.TORQUE * actions * turning).sum(-1)
    torch.testing.assert_close((driven - left) / 1e-7, power, rtol=1e-3, atol=1e-2)


def test_motors_rods_and_joints_move_no_centre_of_mass_and_turn_nothing_as_a_whole() -> None:
    """In free fall it falls as a stone does, and its spin stays."""
    envs, state = flying()
    after, _, _ = envs.next_state(state, 2 * torch.rand(8, 4, dtype=torch.float64) - 1)

    def speed_and_spin(state: Tensor) -> tuple[Tensor, Tensor]:
        """Of the centre of mass, and around it."""
        centres = [(MASSES[:, None] * part).sum(1, keepdim=True) / MASSES.sum() for part in parts_of(state)]
        (px, py), (vx, vy) = ((part - c).unbind(-1) for part, c in zip(parts_of(state), centres, strict=True))
        return centres[1][:, 0], (MASSES * (px * vy - py * vx)).sum(-1)

    (before_speed, before_spin), (speed, spin) = speed_and_spin(state), speed_and_spin(after)
    fall = state.new_tensor([0.0, -cheetah.GRAVITY * cheetah.SECONDS])
    torch.testing.assert_close(speed, before_speed + fall, rtol=0, atol=1e-9)
    torch.testing.assert_close(spin, before_spin, rtol=0, atol=1e-9)
    assert ((after - state)[:, 12:].abs() > 1.0).any()


def test_a_cheetah_without_motors_comes_to_rest_on_its_feet_and_stays_there() -> None:
    envs = PlanarCheetah(4, dtype="float64")
    envs.reset(seed=1)
    for _ in range(200):
        obs, *_ = envs.step(torch.zeros(4, 4))
    places, speeds = parts_of(obs)
    assert (places[:, 1:5, 1] > 0.2).all()
    weight = cheetah.normal_forces(places, speeds).sum(-1)
    torch.testing.assert_close(weight, (cheetah.GRAVITY * MASSES.sum()).expand(4), rtol=1e-3, atol=0.0)
    for _ in range(20):
        later, rewards, *_ = envs.step(torch.zeros(4, 4))
        torch.testing.assert_close(rewards, torch.zeros_like(rewards), rtol=0, atol=2e-3)
    torch.testing.assert_close(later, obs, rtol=0, atol=2e-3)


def test_the_ground_pushes_and_never_pulls() -> None:
    places, speeds = torch.zeros(1, 6, 2), torch.zeros(1, 6, 2)
    places[0, :, 1] = torch.tensor([-0.01, -0.01, -0.01, 0.0, 0.01, 0.01])
    speeds[0, :, 1] = torch.tensor([0.0, -1.0, 9.0, -9.0, -9.0, 9.0])  # the third jumps off
    expected = [0.01 * cheetah.GROUND, 0.01 * cheetah.GROUND + cheetah.GROUND_DAMPING, 0.0, 0.0, 0.0, 0.0]
    assert cheetah.normal_forces(places, speeds)[0].tolist() == pytest.approx(expected)


def test_friction_only_slows_and_is_at_most_coulombs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of masses that it hardly slows it takes friction times normal force; nothing of those in the air."""
    monkeypatch.setattr(cheetah, "inner_forces", lambda places, *rest: torch.zeros_like(places))
    monkeypatch.setattr(cheetah, "SUBSTEPS", 1)
    monkeypatch.setattr(cheetah, "SECONDS", 0.0025)
    envs, state = flying(500)
    places, speeds = parts_of(state)
    places[..., 1] = 0.03 * torch.rand(500, 6) - 0.02
    speeds[..., 0] = 10 ** (4 * torch.rand(500, 6) - 3) * torch.randn(500, 6).sign()
    normal = cheetah.normal_forces(places, speeds)
    _, after = parts_of(envs.next_state(state, torch.zeros(500, 4))[0])
    before, now = speeds[..., 0], after[..., 0]
    lost = MASSES * (before - now) * before.sign()  # N s
    most = 0.0025 * torch.tensor(cheetah.FRICTION) * normal
    assert (now * before >= 0).all()
    assert (lost >= -1e-12).all()
    assert (lost <= most + 1e-12).all()
    assert torch.equal(lost > 0, normal > 0)
    fast = (now.abs() > 20 * cheetah.SLOW) & (most / MASSES < 0.01 * now.abs())
    assert (fast & (normal > 0)).sum() > 100
    torch.testing.assert_close(lost[fast], most[fast], rtol=0.02, atol=1e-9)


def test_the_largest_torques_shake_no_cheetah_apart() -> None:
    """Two thousand steps in single precision: torques that are drawn, that turn with all periods, and that stay."""
    envs = PlanarCheetah(24, max_episode_steps=10**6)
    envs.reset(seed=1)
    periods, phases = torch.arange(2.0, 18.0)[:, None], torch.rand(16, 4)
    stay = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1], [1, 1, -1, -1], [1, -1, 1, -1]])
    highest = fastest = longest = 0.0
    for t in range(2000):
        drawn = torch.randint(2, (4, 4)) * 2 - 1.0
        turning = (2 * math.pi * (t / periods + phases)).sin().sign()
        obs, *_ = envs.step(torch.cat((drawn, turning, stay)))
        places, speeds = parts_of(obs)
        stretch = places.diff(dim=1).norm(dim=-1) / torch.tensor(cheetah.LENGTHS) - 1
        highest, fastest = max(highest, places[..., 1].abs().max().item()), max(fastest, speeds.abs().max().item())
        longest = max(longest, stretch.abs().max().item())
    assert obs.isfinite().all()
    assert highest < 3.0
    assert fastest < 30.0
    assert longest < 0.2


def test_single_precision_agrees_with_double_over_some_steps() -> None:
    single, double = PlanarCheetah(16), PlanarCheetah(16, dtype="float64")
    single.reset(seed=1)
    double.state.copy_(single.state)
    for _ in range(10):
        actions = 2 * torch.rand(16, 4) - 1
        (obs, rewards, *_), (their_obs, their_rewards, *_) = single.step(actions), double.step(actions)
        torch.testing.assert_close(obs.double(), their_obs, rtol=0, atol=5e-3)
        torch.testing.assert_close(rewards.double(), their_rewards, rtol=0, atol=5e-3)


def test_a_step_earns_the_speed_of_the_torso_minus_its_control_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actions beyond what motors can count as the most; coordinates are counted from the torso, wherever it is."""
    monkeypatch.setattr(cheetah, "TORQUE", 0.0)
    envs, state = flying(3)
    state[1:] = state[0].clone()
    _, speeds = parts_of(state)
    speeds[1, :, 0] -= 3.0
    actions = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, -0.5, 9.0, 0.0]])
    after, rewards, terminated = envs.next_state(state, actions)
    expected = rewards[0] - torch.tensor([0.0, 3.0, 0.05 * (1 + 0.25 + 1)], dtype=torch.float64)
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-6)
    assert not terminated.any()
    middle = parts_of(after)[0][:, 2:4, 0].mean(-1)
    torch.testing.assert_close(middle, torch.zeros_like(middle), rtol=0, atol=1e-12)


# --- What a constructor refuses


@pytest.mark.parametrize("settings", [{"dtype": "float16"}, {"autoreset_mode": "never"}])
def test_what_there_is_not_is_refused_by_name(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} is .*: it must be"):
        CartPole(2, **settings)


def test_all_three_functions_are_a_tasks_own() -> None:
    assert issubclass(Pendulum, TorchEnv)
    for name in ("first_state", "next_state", "observe"):
        assert name in vars(Pendulum)
        with pytest.raises(NotImplementedError):
            getattr(TorchEnv, name)(*[None] * (3 if name == "next_state" else 2))
