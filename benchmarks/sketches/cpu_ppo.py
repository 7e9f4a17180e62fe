import time, torch, torch.nn.functional as F, sys

torch.set_num_threads(1)
torch.manual_seed(0)
D, A, H, B = 4, 2, 64, int(sys.argv[1]) if len(sys.argv) > 1 else 64
shapes = [(H, D), (H,), (H, H), (H,), (A, H), (A,), (H, D), (H,), (H, H), (H,), (1, H), (1,)]
sizes = [torch.Size(s).numel() for s in shapes]
P = sum(sizes)


def views(v):
    return [x.view(s) for x, s in zip(v.split(sizes), shapes)]


def loss_fn(v, obs, act, lp0, adv, ret, v0):
    p = views(v)
    h = torch.tanh(F.linear(torch.tanh(F.linear(obs, p[0], p[1])), p[2], p[3]))
    logits = F.linear(h, p[4], p[5])
    lsm = logits.log_softmax(-1)
    lp = lsm.gather(-1, act).squeeze(-1)
    ent = -(lsm.exp() * lsm).sum(-1).mean()
    h = torch.tanh(F.linear(torch.tanh(F.linear(obs, p[6], p[7])), p[8], p[9]))
    val = F.linear(h, p[10], p[11]).squeeze(-1)
    lr = lp - lp0
    r = lr.exp()
    pg = -torch.min(r * adv, r.clamp(0.8, 1.2) * adv).mean()
    vl = 0.5 * torch.max((val - ret).square(), (v0 + (val - v0).clamp(-0.2, 0.2) - ret).square()).mean()
    return pg + 0.5 * vl - 0.01 * ent, (pg.detach(), vl.detach(), ent.detach(), lr.detach())


def adam(v, g, m, s, t, lr):
    norm = g.norm()
    g = g * (0.5 / (norm + 1e-6)).clamp(max=1.0)
    m = m.lerp(g, 0.1)
    s = s * 0.999 + 0.001 * g * g
    return v - lr * (m / (1 - 0.9**t)) / ((s / (1 - 0.999**t)).sqrt() + 1e-5), m, s


def step(v, m, s, t, lr, *batch):
    g, aux = torch.func.grad(loss_fn, has_aux=True)(v, *batch)
    nv, nm, ns = adam(v, g, m, s, t, lr)
    v.copy_(nv)
    m.copy_(nm)
    s.copy_(ns)
    t.add_(1)
    return aux


def epoch(v, m, s, t, lr, data, order):
    out = []
    for rows in order.unbind(0):
        out.append(step(v, m, s, t, lr, *(c.index_select(0, rows) for c in data)))
    return [torch.stack(c) for c in zip(*out)]


N = 4 * B
data = [torch.randn(N, D), torch.randint(0, A, (N, 1)), torch.randn(N), torch.randn(N), torch.randn(N), torch.randn(N)]


def state():
    return torch.randn(P) * 0.1, torch.zeros(P), torch.zeros(P), torch.ones(()), torch.tensor(3e-4)


def bench(name, f, n):
    for _ in range(20):
        f()
    t = time.perf_counter()
    for _ in range(n):
        f()
    print(f"{name}: {(time.perf_counter() - t) / n * 1e6:.0f} us", flush=True)


b = [c[:B] for c in data]
# eager autograd
v, m, s, t, lr = state()
par = torch.nn.Parameter(v.clone())
opt = torch.optim.Adam([par], lr=3e-4, eps=1e-5, fused=True)


def eager():
    opt.zero_grad()
    l, aux = loss_fn(par, *b)
    l.backward()
    g = par.grad
    g.mul_((0.5 / (g.norm() + 1e-6)).clamp_(max=1.0))
    opt.step()


bench("eager autograd, flat", eager, 500)
with torch.no_grad():
    st = state()
    tt = time.perf_counter()
    c = torch.compile(step, fullgraph=True)
    c(*st, *b)
    print(f"compile one step {time.perf_counter() - tt:.1f} s")
    bench("compiled whole step", lambda: c(*st, *b), 2000)
    order = torch.randperm(N).view(4, B)
    tt = time.perf_counter()
    c4 = torch.compile(epoch, fullgraph=True)
    c4(*st, data, order)
    print(f"compile an epoch of 4 {time.perf_counter() - tt:.1f} s")
    bench("compiled epoch of 4 minibatches, each", lambda: c4(*st, data, order), 1000)
