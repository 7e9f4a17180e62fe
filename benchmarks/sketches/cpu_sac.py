"""SAC's whole update on the CPU: eager autograd over flat vectors against one compiled function. Two threads, LunarLander's sizes."""

import math, time, sys, torch, torch.nn.functional as F

torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
torch.manual_seed(0)
D, A, B, H, C = 8, 2, 256, 256, 2
ash = [(D, H), (H,), (H, H), (H,), (H, 2 * A), (2 * A,), (1,)]
qsh = [(C, D + A, H), (C, 1, H), (C, H, H), (C, 1, H), (C, H, 1), (C, 1, 1)]


def views(v, shapes):
    return [x.view(s) for x, s in zip(v.split([torch.Size(s).numel() for s in shapes]), shapes)]


new = lambda sh: torch.cat(
    [
        torch.randn(torch.Size(x)).flatten() / math.sqrt(x[-2])
        if len(x) > 1 and x[-2] > 1
        else torch.zeros(torch.Size(x)).flatten()
        for x in sh
    ]
)
av, qv = new(ash), new(qsh)
tv = qv.clone()
st = [[torch.zeros_like(v), torch.zeros_like(v), torch.zeros(())] for v in (av, qv)]


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
    return a, (-0.5 * e * e - ls - 0.919 - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


def adam(v, m, s, t, g, lr):
    m.lerp_(g, 0.1)
    s.mul_(0.999).addcmul_(g, g, value=0.001)
    t.add_(1)
    v.addcdiv_(m / (1 - 0.9**t), (s / (1 - 0.999**t)).sqrt_().add_(1e-8), value=-lr)


def qloss(v, s, a, y):
    return 0.5 * (q(v, torch.cat((s, a), -1)) - y).square().mean(1).sum()


def ploss(v, s, e):
    a, lp = pi(v, s, e)
    al = v[-1]
    return (al.detach().exp() * lp - q(qv, torch.cat((s, a), -1)).amin(0)).mean() - (al * (lp.detach().mean() - A))


def step(s, a, r, d, s2, e1, e2):
    a2, lp2 = pi(av, s2, e1)
    y = r + 0.99 * (1 - d) * (q(tv, torch.cat((s2, a2), -1)).amin(0) - av[-1].exp() * lp2)
    adam(qv, *st[1], torch.func.grad(qloss)(qv, s, a, y), 1e-3)
    tv.lerp_(qv, 0.005)
    adam(av, *st[0], torch.func.grad(ploss)(av, s, e2), 3e-4)


pa, pq = torch.nn.Parameter(av.clone()), torch.nn.Parameter(qv.clone())
oa, oq = torch.optim.Adam([pa], 3e-4, fused=True), torch.optim.Adam([pq], 1e-3, fused=True)


def eager(s, a, r, d, s2, e1, e2):
    with torch.no_grad():
        a2, lp2 = pi(pa, s2, e1)
        y = r + 0.99 * (1 - d) * (q(tv, torch.cat((s2, a2), -1)).amin(0) - pa[-1].exp() * lp2)
    oq.zero_grad()
    qloss(pq, s, a, y).backward()
    oq.step()
    tv.lerp_(pq.detach(), 0.005)
    a, lp = pi(pa, s, e2)
    al = pa[-1]
    qd = pq.detach()
    l = (al.detach().exp() * lp - q(qd, torch.cat((s, a), -1)).amin(0)).mean() - (al * (lp.detach().mean() - A))
    oa.zero_grad()
    l.backward()
    oa.step()


def bench(name, f, n=300):
    xs = lambda: (
        torch.randn(B, D),
        torch.randn(B, A),
        torch.randn(B),
        torch.zeros(B),
        torch.randn(B, D),
        torch.randn(B, A),
        torch.randn(B, A),
    )
    b = [xs() for _ in range(8)]
    for i in range(30):
        f(*b[i % 8])
    best = []
    for _ in range(5):
        t = time.perf_counter()
        for i in range(n):
            f(*b[i % 8])
        best.append((time.perf_counter() - t) / n * 1e3)
    print(f"{name}: {sorted(best)[2]:.2f} ms an update (min {min(best):.2f})", flush=True)


bench("eager autograd", eager)
with torch.no_grad():
    t = time.perf_counter()
    c = torch.compile(step)
    bench("compiled whole update", c)
    print(f"{time.perf_counter() - t:.0f} s with compiling")
