"""PPO on a CartPole that lives on the GPU: rollout and update as compiled, captured functions. Prints steps per second."""

import math, sys, time, torch, torch.nn.functional as F

dev = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
torch.set_float32_matmul_precision("high")
N, T, M, E, H = int(sys.argv[1]), 32, 4, 4, 64
compiled = sys.argv[2] == "1"
sh = [(4, H), (H,), (H, H), (H,), (H, 2), (2,), (4, H), (H,), (H, H), (H,), (H, 1), (1,)]


def views(v):
    return [x.view(s) for x, s in zip(v.split([torch.Size(s).numel() for s in sh]), sh)]


v = torch.cat(
    [
        (
            torch.nn.init.orthogonal_(torch.empty(s), math.sqrt(2) if i not in (4,) else 0.01)
            if len(s) > 1
            else torch.zeros(s)
        ).flatten()
        for i, s in enumerate(sh)
    ]
).to(dev)
m, s2, t = torch.zeros_like(v), torch.zeros_like(v), torch.zeros((), device=dev)


def logits(p, x):
    return torch.addmm(p[5], torch.tanh(torch.addmm(p[3], torch.tanh(torch.addmm(p[1], x, p[0])), p[2])), p[4])


def value(p, x):
    return torch.addmm(
        p[11], torch.tanh(torch.addmm(p[9], torch.tanh(torch.addmm(p[7], x, p[6])), p[8])), p[10]
    ).squeeze(-1)


def env_step(s, k, a):
    x, xd, th, thd = s.unbind(-1)
    f = 20.0 * a - 10.0
    c, sn = th.cos(), th.sin()
    tmp = (f + 0.05 * thd * thd * sn) / 1.1
    acc = (9.8 * sn - c * tmp) / (0.5 * (4 / 3 - 0.1 * c * c / 1.1))
    xa = tmp - 0.05 * acc * c / 1.1
    n = torch.stack((x + 0.02 * xd, xd + 0.02 * xa, th + 0.02 * thd, thd + 0.02 * acc), -1)
    term = (n[:, 0].abs() > 2.4) | (n[:, 2].abs() > 0.2094395)
    k = k + 1
    trunc = (k >= 500) & ~term
    done = term | trunc
    fresh = torch.rand_like(n) * 0.1 - 0.05
    return torch.where(done[:, None], fresh, n), torch.where(done, 0, k), term, trunc, n, done


state, count = (torch.rand(N, 4, device=dev) * 0.1 - 0.05), torch.zeros(N, dtype=torch.long, device=dev)
O, Ac, R, Dn, St = (torch.zeros(T, N, *e, device=dev) for e in ((4,), (), (), (), ()))


def rollout_step(i):
    p = views(v)
    lg = logits(p, state)
    a = (lg - torch.log(-torch.log(torch.rand_like(lg)))).argmax(-1).float()
    n, k, term, trunc, final, done = env_step(state, count, a)
    O[i] = state
    Ac[i] = a
    R[i] = 1.0 + 0.99 * trunc * value(p, final)
    Dn[i] = done.float()
    St[i] = count.float() + 1
    state.copy_(n)
    count.copy_(k)


B = N * T
flat = [torch.zeros(B, 4, device=dev)] + [torch.zeros(B, device=dev) for _ in range(5)]
order = torch.zeros(M, B // M, dtype=torch.long, device=dev)


def returns():
    p = views(v)
    val = value(p, O.view(-1, 4)).view(T, N)
    nv = value(p, state)
    adv = torch.zeros(N, device=dev)
    out = []
    for i in range(T - 1, -1, -1):
        nd = 1 - Dn[i]
        delta = R[i] + 0.99 * nd * nv - val[i]
        adv = delta + 0.99 * 0.95 * nd * adv
        out.append(adv)
        nv = val[i]
    adv = torch.stack(out[::-1])
    lp = logits(p, O.view(-1, 4)).log_softmax(-1).gather(-1, Ac.view(-1, 1).long()).squeeze(-1)
    for d, x in zip(flat, (O.view(-1, 4), Ac.view(-1), lp, adv.view(-1), (adv + val).view(-1), val.view(-1))):
        d.copy_(x)


def loss(v, o, a, lp0, adv, ret, v0):
    p = views(v)
    ls = logits(p, o).log_softmax(-1)
    lp = ls.gather(-1, a[:, None].long()).squeeze(-1)
    ent = -(ls.exp() * ls).sum(-1).mean()
    r = (lp - lp0).exp()
    adv = (adv - adv.mean()) / (adv.std() + 1e-8)
    val = value(p, o)
    return (
        -torch.min(r * adv, r.clamp(0.8, 1.2) * adv).mean()
        + 0.25 * torch.max((val - ret) ** 2, (v0 + (val - v0).clamp(-0.2, 0.2) - ret) ** 2).mean()
        - 0.01 * ent
    )


def minibatch(rows):
    g = torch.func.grad(loss)(v, *(x.index_select(0, rows) for x in flat))
    g = g * (0.5 / (g.norm() + 1e-6)).clamp(max=1)
    m.lerp_(g, 0.1)
    s2.mul_(0.999).addcmul_(g, g, value=0.001)
    t.add_(1)
    v.addcdiv_(m / (1 - 0.9**t), (s2 / (1 - 0.999**t)).sqrt_().add_(1e-5), value=-3e-3)


def capture(fn):
    if dev == "cpu":

        class G:
            replay = staticmethod(fn)

        return G
    s = torch.cuda.Stream()
    s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(s)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        fn()
    return g


with torch.no_grad():
    t0 = time.perf_counter()
    rs, rt, mb = (
        (torch.compile(f) for f in (rollout_step, returns, minibatch))
        if compiled
        else (rollout_step, returns, minibatch)
    )

    def whole_rollout():
        for i in range(T):
            rollout_step(i)

    wr = torch.compile(whole_rollout) if compiled else whole_rollout
    gr, gt, ge = capture(wr), capture(rt), capture(lambda: [mb(order[i]) for i in range(M)])
    ready = time.perf_counter() - t0
    if dev == "cuda":
        torch.cuda.synchronize()
    K = int(2e6 // B) + 5 if dev == "cpu" else max(int(3e7 // B), 40)
    t0 = time.perf_counter()
    for it in range(K):
        gr.replay()
        gt.replay()
        for _ in range(E):
            order.copy_(torch.randperm(B, device=dev)[: B // M * M].view(M, -1))
            ge.replay()
    if dev == "cuda":
        torch.cuda.synchronize()
    el = time.perf_counter() - t0
    ended = St[Dn > 0]
    print(
        f"result device cartpole N={N} compiled={compiled}: {K * B / el / 1e6:.2f} M steps/s, {K * B / 1e6:.1f} M steps in {el:.1f} s, ready after {ready:.0f} s, last episodes {ended.mean().item() if len(ended) else float('nan'):.0f} long ({len(ended)})",
        flush=True,
    )
