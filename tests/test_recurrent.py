"""Memory in pieces: cells, sequences, the packed path against a loop over single steps, the buffer, and the agent."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Space
from torch import Tensor, nn

from fabricrl.algos.ppo_recurrent.agent import RecurrentPPOAgent
from fabricrl.data import Batch, RecurrentRolloutBuffer
from fabricrl.models.distributions import make_head
from fabricrl.models.recurrent import Layout, RecurrentCore, Sequences
from fabricrl.utils.recording import recording
from tests.envs import vectors

KINDS = ("lstm", "gru")
INPUTS, HIDDEN = 3, 5
SPACES = {
    "Discrete": Discrete(3),
    "MultiDiscrete": MultiDiscrete([2, 3]),
    "MultiBinary": MultiBinary(2),
    "Box": Box(-1.0, 1.0, (2,)),
}


# --- The same once more, from the formulas


def cell(core: RecurrentCore, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step: inputs [N, I] and states [N, state_size] → outputs [N, H] and the states after, gate by gate.

    LSTM: c' = σ(f) c + σ(i) tanh(g),  h' = σ(o) tanh(c')
    GRU:  n = tanh(W x + b + σ(r) (U h + b')),  h' = (1 − σ(z)) n + σ(z) h
    """
    if core.encoder is not None:
        for layer in (*core.encoder.hidden, core.encoder.out):
            x = torch.tanh(x @ layer.weight.T + layer.bias)
    weights, layers, kind = dict(core.rnn.named_parameters()), core.num_layers, type(core.rnn)
    parts = state.reshape(len(state), -1, layers, core.hidden_size)  # outputs of all layers, then cells of all layers
    after_h, after_c = [], []
    for layer in range(layers):
        h = parts[:, 0, layer]
        from_x = x @ weights[f"weight_ih_l{layer}"].T + weights[f"bias_ih_l{layer}"]
        from_h = h @ weights[f"weight_hh_l{layer}"].T + weights[f"bias_hh_l{layer}"]
        if kind is nn.LSTM:
            i, f, g, o = (from_x + from_h).chunk(4, -1)
            c = torch.sigmoid(f) * parts[:, 1, layer] + torch.sigmoid(i) * torch.tanh(g)
            x = torch.sigmoid(o) * torch.tanh(c)
            after_c.append(c)
        else:
            (r_x, z_x, n_x), (r_h, z_h, n_h) = from_x.chunk(3, -1), from_h.chunk(3, -1)
            z = torch.sigmoid(z_x + z_h)
            x = (1 - z) * torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h) + z * h
        after_h.append(x)
    return x, torch.cat([*after_h, *after_c], -1)


def walk(core: RecurrentCore, x: Tensor, states: Tensor, begins: set[int]) -> Tensor:
    """Rows [B, I] one after the other → [B, H]; a row in `begins` starts from its own of `states` [B, state_size]."""
    outputs, state = [], states[:1]
    for row in range(len(x)):
        state = states[row : row + 1] if row in begins else state
        output, state = cell(core, x[row : row + 1], state)
        outputs.append(output)
    return torch.cat(outputs)


def cut(dones: Tensor, length: int) -> list[list[int]]:
    """The sequences of a rollout as lists of rows, which count environment by environment."""
    steps, envs = dones.shape
    sequences: list[list[int]] = []
    for env in range(envs):
        for t in range(steps):
            if t == 0 or dones[t - 1, env] or len(sequences[-1]) == length:
                sequences.append([])
            sequences[-1].append(env * steps + t)
    return sequences


def laid_out(rows: list[int], layout: Layout) -> list[list[int]]:
    """The rows of a minibatch, sequence by sequence, as they stand side by side."""
    length, columns = layout.size.tolist()
    sequences: list[dict[int, int]] = [{} for _ in range(columns)]
    for row, place in zip(rows, layout.place.tolist(), strict=True):
        assert place // columns not in sequences[place % columns], "two rows in one place"
        sequences[place % columns][place // columns] = row
    for sequence in sequences:
        assert sorted(sequence) == list(range(len(sequence))), "padding before the end"
    assert [sequence[0] for sequence in sequences] == [rows[i] for i in layout.first[:columns].tolist()]
    assert len(layout.first) == len(rows)  # a fixed shape
    assert length == max(map(len, sequences))
    return [[sequence[step] for step in range(len(sequence))] for sequence in sequences]


def shaken(module: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """With other parameters than those of the start, among which biases are zero."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return module.to(dtype)


def random_dones(steps: int, envs: int, share: float, seed: int) -> Tensor:
    return torch.rand(steps, envs, generator=torch.Generator().manual_seed(seed)) < share


# --- The core

CORES = pytest.mark.parametrize(
    ("kind", "layers", "encoder"), list(itertools.product(KINDS, (1, 2), ((), (4,), (6, 4)))), ids=str
)


@CORES
def test_a_step_is_the_formula(kind: str, layers: int, encoder: tuple[int, ...]) -> None:
    core = shaken(RecurrentCore(kind, INPUTS, HIDDEN, layers, encoder))
    assert core.state_size == HIDDEN * layers * (2 if kind == "lstm" else 1)
    x, state = torch.randn(7, INPUTS), torch.randn(7, core.state_size)
    for ours, theirs in zip(core.step(x, state), cell(core, x, state), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)
@CORES
def test_packed_sequences_equal_a_loop_over_steps_in_outputs_and_all_gradients(
    kind: str, layers: int, encoder: tuple[int, ...], dtype: torch.dtype, error: float
) -> None:
    """Over random ends of episodes: none, some, and an end after nearly every step."""
    steps, envs = 9, 4
    for seed, (share, length) in enumerate(((0.0, 128), (0.2, 128), (0.2, 4), (0.1, 1), (0.8, 3))):
        core = shaken(RecurrentCore(kind, INPUTS, HIDDEN, layers, encoder), dtype)
        dones = random_dones(steps, envs, share, seed)
        layout = Sequences(dones, length).in_order()
        begins = {sequence[0] for sequence in cut(dones, length)}
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(steps * envs, INPUTS, generator=rng, dtype=dtype)
        states = torch.randn(steps * envs, core.state_size, generator=rng, dtype=dtype)
        weights = torch.randn(steps * envs, HIDDEN, generator=rng, dtype=dtype) / (steps * envs)

        def outcome(packed: bool, core=core, layout=layout, begins=begins, x=x, states=states, weights=weights) -> list:
            x, states = x.clone().requires_grad_(), states.clone().requires_grad_()
            outputs = core(x, states[layout.first], layout) if packed else walk(core, x, states, begins)
            core.zero_grad()
            (outputs * weights).sum().backward()
            return [outputs.detach(), x.grad, states.grad, *(p.grad.clone() for p in core.parameters())]

        for ours, theirs in zip(outcome(True), outcome(False), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=error)
            assert theirs.abs().max() > 1e-4, "nothing is compared"


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_later_and_what_belongs_to_others_changes_nothing(kind: str) -> None:
    """Neither padding nor other sequences reach a row."""
    core = RecurrentCore(kind, INPUTS, HIDDEN)
    x, states = torch.randn(8, INPUTS), torch.randn(3, core.state_size)
    layout = Sequences(torch.tensor([0, 0, 0, 1, 1, 0, 0, 0], dtype=torch.bool)[:, None], 128).in_order()
    assert laid_out(list(range(8)), layout) == [[0, 1, 2, 3], [4], [5, 6, 7]]
    before = core(x, states, layout)
    x[2:4] = torch.nan
    torch.testing.assert_close(core(x, states, layout)[[0, 1, 4, 5, 6, 7]], before[[0, 1, 4, 5, 6, 7]])
    x[4] = torch.nan  # the only row of a sequence that is padded
    torch.testing.assert_close(core(x, states, layout)[[0, 1, 5, 6, 7]], before[[0, 1, 5, 6, 7]])


def test_weights_start_orthogonal_and_biases_at_zero() -> None:
    for kind in KINDS:
        core = RecurrentCore(kind, INPUTS, HIDDEN, 2, (4,))
        for name, parameter in core.rnn.named_parameters():
            if "bias" in name:
                assert not parameter.any(), name
            else:  # tall: columns of length 1 that are orthogonal
                torch.testing.assert_close(parameter.T @ parameter, torch.eye(parameter.shape[1]))


# --- Sequences


def test_sequences_of_a_small_rollout_by_hand() -> None:
    """Two environments of six steps: rows 0 to 5 and 6 to 11."""
    dones = torch.zeros(6, 2, dtype=torch.bool)
    dones[1, 0] = dones[5, 1] = True
    assert cut(dones, 128) == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    for length, expected in (
        (128, [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]),
        (4, [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]),
        (3, [[0, 1], [2, 3, 4], [5], [6, 7, 8], [9, 10, 11]]),
        (1, [[row] for row in range(12)]),
    ):
        sequences = Sequences(dones, length)
        assert [list(range(a, a + n)) for a, n in zip(sequences.first, sequences.lengths, strict=True)] == expected
        assert laid_out(list(range(12)), sequences.in_order()) == expected


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("length", [1, 3, 8, 128])
def test_every_epoch_has_every_row_once_in_minibatches_of_equal_size_and_pieces_of_one_episode(
    share: float, length: int
) -> None:
    steps, envs = 12, 4
    for seed in range(3):
        dones = random_dones(steps, envs, share, seed)
        wholes = cut(dones, length)
        home = {row: whole for whole in wholes for row in whole}
        sequences, rng = Sequences(dones, length), torch.Generator().manual_seed(seed)
        assert laid_out(list(range(steps * envs)), sequences.in_order()) == wholes
        for count in (1, 2, 3, 16, 48):
            order, layouts = sequences.minibatches(count, rng)
            assert order.shape == (count, steps * envs // count)
            assert sorted(order.flatten().tolist()) == list(range(steps * envs))
            cuts = 0
            for rows, layout in zip(order.tolist(), layouts, strict=True):
                pieces = laid_out(rows, layout)
                assert [row for piece in pieces for row in piece] == rows  # one after the other, as the rows come
                for i, piece in enumerate(pieces):
                    whole = home[piece[0]]
                    at = whole.index(piece[0])
                    assert piece == whole[at : at + len(piece)]  # of one episode, in order, not too long
                    assert at == 0 or i == 0, "begun anew within a minibatch"
                    assert piece[-1] == whole[-1] or i == len(pieces) - 1, "broken off within a minibatch"
                    cuts += at > 0
            assert cuts <= count - 1


def test_epochs_differ_and_a_generator_says_how() -> None:
    sequences = Sequences(random_dones(16, 4, 0.2, 0), 8)

    def epochs(seed: int) -> list[list[list[int]]]:
        rng = torch.Generator().manual_seed(seed)
        return [sequences.minibatches(4, rng)[0].tolist() for _ in range(20)]

    assert epochs(1) == epochs(1)
    assert epochs(1) != epochs(2)
    firsts = {epoch[0][0] for epoch in epochs(1)}
    assert len(firsts) > 8, "the same sequences are trained on first in all epochs"


# --- The buffer


def step(rb: RecurrentRolloutBuffer, t: int, terminated: list[int], truncated: list[int], memory: Tensor) -> None:
    """Adds a step in which these of 4 environments end."""
    ended = [np.isin(np.arange(4), which) for which in (terminated, truncated)]
    infos = {"final_obs": np.array([np.full(1, 10.0 * t + env, np.float32) for env in range(4)])}
    rb.add(t, np.zeros((4, 1), np.int64), np.zeros((4, 1), np.float32), np.zeros(4), *ended, infos)
    rb.remember(t, memory)


def test_the_buffer_forgets_where_an_episode_ends_and_keeps_what_was_remembered_at_time_limits() -> None:
    rb = RecurrentRolloutBuffer(3, 4, vectors(1), 1, torch.int64, 2)
    memories = [100.0 * (t + 1) + torch.arange(8.0).view(4, 2) for t in range(3)]
    rb.start(np.zeros((4, 1), np.float32))
    assert not rb.memory[0].any()
    step(rb, 0, [], [], memories[0])
    step(rb, 1, [0, 2], [1, 2, 3], memories[1])  # 2 is terminated as well as truncated
    step(rb, 2, [], [0], memories[2])
    assert torch.equal(rb.memory[1], memories[0])
    assert not rb.memory[2].any()
    assert torch.equal(rb.memory[3, 1:], memories[2][1:])
    assert not rb.memory[3, 0].any()
    t, env, obs = rb.truncated_episodes()
    assert (t.tolist(), env.tolist()) == ([1, 1, 2], [1, 3, 0])
    assert torch.equal(rb.final_memory(), torch.stack((memories[1][1], memories[1][3], memories[2][0])))
    assert obs[:, 0].tolist() == [11.0, 13.0, 20.0]
    last = rb.memory[3].clone()
    rb.start()
    assert torch.equal(rb.memory[0], last)
    step(rb, 0, [], [2], memories[0])
    assert torch.equal(rb.final_memory(), memories[0][2:3])  # nothing is left of the last rollout's
    rb.start(np.zeros((4, 1), np.float32))
    assert not rb.memory[0].any()


# --- The agent


def make(space: Space, **changes: Any) -> RecurrentPPOAgent:
    settings: dict[str, Any] = {"rnn_hidden_size": HIDDEN, "hidden_sizes": (4,)}
    return shaken(RecurrentPPOAgent(vectors(2), space, **(settings | changes)))


@pytest.mark.parametrize(
    ("space", "actions", "expected"),
    [
        (Discrete(3, start=7), [[0], [2]], [[1, 0, 0], [0, 0, 1]]),
        (MultiDiscrete([3, 3]), [[0, 1], [2, 2]], [[1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 1]]),
        (MultiDiscrete([2, 3]), [[1, 2], [0, 0]], [[0, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0]]),  # two of three places
        (MultiBinary(3), [[1.0, 0.0, 1.0]], [[1, 0, 1]]),
        (Box(-1.0, 1.0, (2,)), [[-3.5, 0.25]], [[-3.5, 0.25]]),  # as drawn
        (Box(-1.0, 1.0, (2, 2)), [[1.0, 2.0, 3.0, 4.0]], [[1, 2, 3, 4]]),
    ],
    ids=str,
)
def test_actions_as_networks_take_them_by_hand(space: Space, actions: list, expected: list) -> None:
    head = make_head(space)
    encoded = head.encode(torch.tensor(actions, dtype=head.dtype))
    assert encoded.dtype == torch.float32
    assert encoded.tolist() == expected
    assert head.encoded_size == len(expected[0])


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize(("prev_action", "prev_reward"), itertools.product((False, True), repeat=2))
def test_memory_is_previous_action_reward_and_states_of_the_cores(
    prev_action: bool, prev_reward: bool, shared: bool
) -> None:
    agent = make(Discrete(3), prev_action=prev_action, prev_reward=prev_reward, shared_core=shared)
    assert (agent.critic_core is None) == shared
    states = torch.randn(2, 2 * HIDDEN * (1 if shared else 2))
    memory = agent.remember(torch.tensor([[2], [0]]), torch.tensor([0.5, -7.0]), states)
    expected = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]] if prev_action else [[], []]
    expected = [row + [reward] * prev_reward for row, reward in zip(expected, (0.5, -7.0), strict=True)]
    assert memory.shape == (2, agent.memory_size)
    assert torch.equal(memory, torch.cat((torch.tensor(expected), states), -1))
    assert torch.equal(agent.states(memory), states)
    obs = torch.randn(2, 2)
    assert torch.equal(agent.inputs(obs, agent.previous(memory)), torch.cat((obs, torch.tensor(expected)), -1))


def test_only_the_observation_is_normalised() -> None:
    agent = make(Discrete(3), prev_action=True, prev_reward=True, norm_obs=True)
    agent.obs_normalizer.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # means 2 and 20, deviations 1 and 10
    memory = torch.cat((torch.tensor([[0.0, 1.0, 0.0, 50.0]]), torch.randn(1, 4 * HIDDEN)), -1)
    inputs = agent.inputs(agent.prepare(torch.tensor([[4.0, 5.0]])), agent.previous(memory))
    torch.testing.assert_close(inputs, torch.tensor([[2.0, -1.5, 0.0, 1.0, 0.0, 50.0]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_acting_values_and_states_are_the_formulas(shared: bool, kind: str) -> None:
    agent = make(Discrete(3), rnn_type=kind, shared_core=shared, prev_action=True, rnn_layers=2)
    obs, memory = torch.randn(6, 2), torch.randn(6, agent.memory_size)
    x, size = torch.cat((obs, memory[:, :3]), -1), agent.actor_core.state_size
    features, after = cell(agent.actor_core, x, memory[:, 3 : 3 + size])
    value_features = features
    if not shared:
        value_features, of_critic = cell(agent.critic_core, x, memory[:, 3 + size :])
        after = torch.cat((after, of_critic), -1)
    noise = agent.head.noise((6,), torch.Generator().manual_seed(1))
    logits = agent.actor(features)
    for (actions, states), expected in (
        (agent.act(obs, memory, noise), (logits + noise[:, 0]).argmax(-1)),
        (agent.greedy(obs, memory), logits.argmax(-1)),
    ):
        assert torch.equal(actions[:, 0], expected)
        torch.testing.assert_close(states, after)
    torch.testing.assert_close(agent.value(obs, memory), agent.critic(value_features)[:, 0])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_minibatches_of_the_agent_equal_a_loop_over_steps_in_outputs_and_all_gradients(
    kind: str, shared: bool, space: str
) -> None:
    agent = make(SPACES[space], rnn_type=kind, shared_core=shared, encoder_sizes=(4,), prev_action=True)
    steps, envs, length, count = 10, 3, 4, 3
    rows, size = steps * envs, agent.actor_core.state_size
    dones, rng = random_dones(steps, envs, 0.2, 5), torch.Generator().manual_seed(6)
    inputs = torch.randn(rows, agent.actor_core.inputs, generator=rng)
    states = torch.randn(rows, agent.states(torch.zeros(1, agent.memory_size)).shape[1], generator=rng)
    actions = agent.head.sample(
        torch.randn(rows, agent.head.size, generator=rng), agent.head.noise((rows,), rng)
    ).detach()
    starts = {sequence[0] for sequence in cut(dones, length)}
    order, layouts = Sequences(dones, length).minibatches(count, rng)
    weights = torch.randn(3, rows // count, generator=rng) / rows
    for minibatch, layout in zip(order, layouts, strict=True):
        x, own, begins = inputs[minibatch], states[minibatch], {0}
        begins |= {i for i, row in enumerate(minibatch.tolist()) if row in starts}
        obs, previous = x.split([2, x.shape[1] - 2], -1)
        columns = {"obs": obs, "previous": previous, "actions": actions[minibatch], "states": own[layout.first]}
        packed = agent(Batch(layout=layout, **columns))
        features = values = walk(agent.actor_core, x, own[:, :size], begins)
        if not shared:
            values = walk(agent.critic_core, x, own[:, size:], begins)
        loop = (*agent.head.logprob_and_entropy(agent.actor(features), actions[minibatch]), agent.critic(values)[:, 0])
        gradients = []
        for ours in (packed, loop):
            agent.zero_grad()
            sum((w * column).sum() for w, column in zip(weights, ours, strict=True)).backward()
            gradients.append([parameter.grad.clone() for parameter in agent.parameters()])
        for ours, theirs in zip((*packed, *gradients[0]), (*loop, *gradients[1]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("world_size", "length"), [(1, 5), (2, 5), (2, 128), (3, 3)])
def test_parts_of_a_rollout_are_cut_into_the_sequences_of_the_whole(world_size: int, length: int) -> None:
    """If each part has whole environments. A part knows where its sequences end, and nothing of environments."""
    dones = random_dones(12, 6, 0.2, 1)
    whole = Sequences(dones, length)
    size = len(whole.ends) // world_size
    parts = [Sequences(whole.ends[i : i + size, None], length) for i in range(0, len(whole.ends), size)]
    assert [int(first) + i * size for i, part in enumerate(parts) for first in part.first] == whole.first.tolist()
    assert [int(n) for part in parts for n in part.lengths] == whole.lengths.tolist()


@pytest.mark.parametrize(("passes", "fits"), [(8, True), (9, False)])
def test_too_many_passes_before_a_compiled_backward_pass_are_told(passes: int, fits: bool) -> None:
    core = RecurrentCore("gru", 3, 4)
    layout = Sequences(torch.tensor([[False], [True]]), 2).in_order()
    with recording():
        outputs = [core(torch.ones(2, 3), torch.zeros(2, 4), layout) for _ in range(passes)]
    if fits:
        outputs[0].sum().backward()
        assert core.rnn.weight_ih_l0.grad is not None
    else:
        with pytest.raises(RuntimeError, match="the last 8 passes through recurrent cores are kept"):
            outputs[0].sum().backward()
