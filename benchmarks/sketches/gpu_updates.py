"""End-to-end sketches on one GPU: whole updates as captured graphs. Prints steps per second of SAC and PPO on HalfCheetah-v5, and what parts cost."""

import math, sys, time
import gymnasium as gym, numpy as np, torch, torch.nn as nn, torch.nn.functional as F

dev = "cuda"
torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_float32_matmul_precision("high")


def capture(fn, warm=3):
    s = torch.cuda.Stream()
    s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for _ in range(warm):
            fn()
    torch.cuda.current_stream().wait_stream(s)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        fn()
    return g


def timed(g, n=1000):
    torch.cuda.synchronize()
    t = time.perf_counter()
    for _ in range(n):
        g.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - t) / n * 1e6


def views(v, shapes):
    return [x.view(s) for x, s in zip(v.split([torch.Size(s).numel() for s in shapes]), shapes)]


def adam(v, m, s, t, g, lr, eps):
    m.lerp_(g, 0.1)
    s.mul_(0.999).addcmul_(g, g, value=0.001)
    t.add_(1)
    v.addcdiv_(m / (1 - 0.9**t), (s / (1 - 0.999**t)).sqrt_().add_(eps), value=-lr)


def sac(compiled):
    D, A, B, H, C = 17, 6, 256, 256, 2
    ash = [(D, H), (H,), (H, H), (H,), (H, 2 * A), (2 * A,), (1,)]
    qsh = [(C, D + A, H), (C, 1, H), (C, H, H), (C, 1, H), (C, H, 1), (C, 1, 1)]
    new = lambda sh: torch.cat(
        [
            torch.randn(torch.Size(x)).flatten() / math.sqrt(x[-2])
            if len(x) > 1 and x[-2] > 1
            else torch.zeros(torch.Size(x)).flatten()
            for x in sh
        ]
    ).to(dev)
    av, qv = new(ash), new(qsh)
    tv = qv.clone()
    st = [[torch.zeros_like(v), torch.zeros_like(v), torch.zeros((), device=dev)] for v in (av, qv)]
    ring = torch.zeros(1_000_000, 2 * D + A + 2, device=dev)
    size = torch.full((), 1000, device=dev)

    def q(v, x):
        p = views(v, qsh)
        x = x.expand(C, *x.shape)
        x = torch.relu(torch.baddbmm(p[1], x, p[0]))
        x = torch.relu(torch.baddbmm(p[3], x, p[2]))
        return torch.baddbmm(p[5], x, p[4]).squeeze(-1)

    def pi(v, s, e):
        p = views(v, ash)
        x = torch.relu(torch.addmm(p[1], s, p[0]))
        x = torch.relu(torch.addmm(p[3], x, p[2]))
        mu, ls = torch.addmm(p[5], x, p[4]).chunk(2, -1)
        ls = -5 + 3.5 * (torch.tanh(ls) + 1)
        u = mu + ls.exp() * e
        a = torch.tanh(u)
        lp = (-0.5 * e * e - ls - 0.919 - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)
        return a, lp

    def batch():
        idx = (torch.rand(B, device=dev) * size).long()
        return ring.index_select(0, idx).split([D, A, 1, 1, D], -1)

    def qloss(v, s, a, y):
        return 0.5 * (q(v, torch.cat((s, a), -1)) - y).square().mean(1).sum()

    def critic():
        s, a, r, d, s2 = batch()
        a2, lp2 = pi(av, s2, torch.randn(B, A, device=dev))
        y = r[:, 0] + 0.99 * (1 - d[:, 0]) * (q(tv, torch.cat((s2, a2), -1)).amin(0) - av[-1].exp() * lp2)
        g = torch.func.grad(qloss)(qv, s, a, y)
        adam(qv, *st[1], g, 1e-3, 1e-8)
        tv.lerp_(qv, 0.005)

    def ploss(v, s, e):
        a, lp = pi(v, s, e)
        al = v[-1]
        return (al.detach().exp() * lp - q(qv, torch.cat((s, a), -1)).amin(0)).mean() - (al * (lp.detach().mean() - A))

    def actor():
        s = batch()[0]
        g = torch.func.grad(ploss)(av, s, torch.randn(B, A, device=dev))
        adam(av, *st[0], g, 3e-4, 1e-8)

    obs_in, act_out = torch.zeros(1, D, device=dev), torch.zeros(1, A, device=dev)

    def act():
        act_out.copy_(pi(av, obs_in, torch.randn(1, A, device=dev))[0])

    with torch.no_grad():
        fs = [critic, actor, act]
        t0 = time.perf_counter()
        if compiled:
            fs = [torch.compile(f) for f in fs]
        gc, ga, gact = [capture(f) for f in fs]
        took = time.perf_counter() - t0
        print(
            f"sac {'compiled+' if compiled else ''}captured: critic {timed(gc):.0f} us, actor {timed(ga):.0f} us, act {timed(gact):.0f} us; ready after {took:.0f} s",
            flush=True,
        )
        env = gym.make("HalfCheetah-v5")
        obs, _ = env.reset(seed=0)
        row = torch.zeros(1, 2 * D + A + 2).pin_memory()
        host = torch.zeros(1, A).pin_memory()
        rown = row.numpy()
        obs_pin = torch.zeros(1, D).pin_memory()
        n = 0
        torch.cuda.synchronize()
        N = 4000
        t0 = time.perf_counter()
        for i in range(N):
            obs_pin.numpy()[0] = obs
            obs_in.copy_(obs_pin, non_blocking=True)
            gact.replay()
            host.copy_(act_out, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            a = host.numpy()[0]
            o2, r, term, trunc, _ = env.step(a)
            rown[0, :D] = obs
            rown[0, D : D + A] = a
            rown[0, D + A] = r
            rown[0, D + A + 1] = term
            rown[0, D + A + 2 :] = o2
            ring[i % 1_000_000].copy_(row[0], non_blocking=True)
            torch.cuda.current_stream().synchronize()
            obs = env.reset()[0] if trunc or term else o2
            gc.replay()
            if i % 2:
                ga.replay()
                ga.replay()
        torch.cuda.synchronize()
        print(f"result sac sketch compiled={compiled}: {N / (time.perf_counter() - t0):.0f} steps/s", flush=True)


def ppo(compiled, M=32, B=64, device_act="cpu"):
    D, A, H, T = 17, 6, 64, 2048
    sh = [(D, H), (H,), (H, H), (H,), (H, A), (A,), (D, H), (H,), (H, H), (H,), (H, 1), (1,), (A,)]
    v = torch.cat(
        [(torch.randn(torch.Size(x)) / math.sqrt(x[0]) if len(x) > 1 else torch.zeros(x)).flatten() for x in sh]
    ).to(dev)
    m, s, t = torch.zeros_like(v), torch.zeros_like(v), torch.zeros((), device=dev)
    data = torch.randn(T, D + A + 4, device=dev)
    order = torch.arange(T, device=dev).view(M, B)

    def mu_of(p, x):
        return torch.addmm(p[5], torch.tanh(torch.addmm(p[3], torch.tanh(torch.addmm(p[1], x, p[0])), p[2])), p[4])

    def loss(v, x):
        o, a, lp0, adv, ret, v0 = x.split([D, A, 1, 1, 1, 1], -1)
        p = views(v, sh)
        mu = mu_of(p, o)
        ls = p[12]
        lp = (-0.5 * ((a - mu) / ls.exp()).square() - ls - 0.919).sum(-1, True)
        ratio = (lp - lp0).exp()
        adv = (adv - adv.mean()) / (adv.std() + 1e-8)
        val = torch.addmm(p[11], torch.tanh(torch.addmm(p[9], torch.tanh(torch.addmm(p[7], o, p[6])), p[8])), p[10])
        return (
            -torch.min(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()
            + 0.25 * torch.max((val - ret) ** 2, (v0 + (val - v0).clamp(-0.2, 0.2) - ret) ** 2).mean()
        )

    def minibatch(rows):
        g = torch.func.grad(loss)(v, data.index_select(0, rows))
        g = g * (0.5 / (g.norm() + 1e-6)).clamp(max=1)
        adam(v, m, s, t, g, 3e-4, 1e-5)

    with torch.no_grad():
        f = torch.compile(minibatch) if compiled else minibatch
        t0 = time.perf_counter()
        for _ in range(3):
            f(order[0])
        g = capture(lambda: [f(order[i]) for i in range(M)])
        took = time.perf_counter() - t0
        print(
            f"ppo {'compiled+' if compiled else ''}captured epoch: {timed(g, 100) / M:.1f} us a minibatch of {B}; ready after {took:.0f} s",
            flush=True,
        )
        env = gym.make("HalfCheetah-v5")
        o, _ = env.reset(seed=0)
        n = 0
        t0 = time.perf_counter()
        host = torch.zeros(T, D + A + 4)
        for it in range(4):
            vc = v.cpu()
            p = views(vc, sh)
            noise = torch.randn(T, A) * p[12].exp()
            hn = host.numpy()
            for i in range(T):
                x = torch.from_numpy(o[None].astype(np.float32))
                a = (mu_of(p, x)[0] + noise[i]).numpy()
                hn[i, :D] = o
                hn[i, D : D + A] = a
                o, r, te, tr, _ = env.step(np.clip(a, -1, 1))
                hn[i, D + A] = r
                if te or tr:
                    o, _ = env.reset()
            data.copy_(host, non_blocking=True)
            for _ in range(10):
                order.copy_(torch.randperm(T, device=dev).view(M, B))
                g.replay()
        torch.cuda.synchronize()
        print(
            f"result ppo sketch compiled={compiled}: {4 * T / (time.perf_counter() - t0):.0f} steps/s (acting on the CPU)",
            flush=True,
        )


def atari():
    import ale_py
    from ale_py.vector_env import AtariVectorEnv

    for n in (8, 16, 64, 128):
        e = AtariVectorEnv(game="pong", num_envs=n)
        e.reset(seed=0)
        a = np.zeros(n, np.int64)
        k = 6000 // n + 20
        for _ in range(5):
            e.step(a)
        t0 = time.perf_counter()
        for _ in range(k):
            e.step(a)
        print(f"result ale vector env alone, {n}: {n * k / (time.perf_counter() - t0):.0f} steps/s", flush=True)


{
    "sac": lambda: sac(False),
    "sacc": lambda: sac(True),
    "ppo": lambda: ppo(False),
    "ppoc": lambda: ppo(True),
    "atari": atari,
}[sys.argv[1]]()
