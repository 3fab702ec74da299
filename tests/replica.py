"""A second implementation of the paper's training, in float64: what the metrics.jsonl of a run has to say.

The model, the losses, AdamW, the schedules and the logged statistics are written here from their equations
(arXiv 2603.08391; docs/equations.md) and from what docs/config.md says of the fields. One process, the whole batch at
once, gradients by autograd: no ranks, no accumulation, no ZeRO, no fused kernels, and nothing of the package. Of the
variants the paper's: banks are read densely, q and k normalised after the rotation, projections have no biases.

Weights are a dictionary by public name; `w` is what one layer reads, `c` the model's section of the configuration.
Shapes: B samples, T tokens, D channels, H query heads and K key/value heads of width d, N loops.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Line = dict[str, Any]

# --------------------------------------------------------------------------------------------------------- the model


def rotated(x: Tensor, theta: float) -> Tensor:
    """[..., T, d]: halves (a, b) -> (a cos - b sin, b cos + a sin); the angle of channel i at t is t theta^(-2i/d)."""
    positions, half = torch.arange(x.shape[-2]), x.shape[-1] // 2
    angle = torch.outer(positions, theta ** -(torch.arange(half, dtype=x.dtype) / half))
    a, b = x.split(half, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attention(w: Weights, x: Tensor, c: Any) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the past; q and k rotated, then RMS-normalised per head; H/K heads share k, v."""

    def heads(name: str, count: int) -> Tensor:
        return (x @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (count, -1)).transpose(1, 2)

    def placed(name: str, count: int) -> Tensor:
        turned = rotated(heads(name, count), c.rope_theta)
        return F.rms_norm(turned, turned.shape[-1:], w[f"self_attn.{name}_norm.weight"], c.rms_norm_eps)

    share = c.num_attention_heads // c.num_key_value_heads
    q = placed("q", c.num_attention_heads)
    k = placed("k", c.num_key_value_heads).repeat_interleave(share, dim=1)
    v = heads("v", c.num_key_value_heads).repeat_interleave(share, dim=1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(-2) @ w["self_attn.o_proj.weight"].T


def block(w: Weights, x: Tensor, scale: Tensor | float, c: Any) -> Tensor:
    """u = x + scale Attn(RMSNorm(x));  u + scale W_down(SiLU(W_gate z) * W_up z), z = RMSNorm(u)."""

    def norm(name: str, h: Tensor) -> Tensor:
        return F.rms_norm(h, h.shape[-1:], w[f"{name}_layernorm.weight"], c.rms_norm_eps)

    u = x + scale * attention(w, norm("input", x), c)
    z = norm("post_attention", u)
    gated = F.silu(z @ w["mlp.gate_proj.weight"].T) * (z @ w["mlp.up_proj.weight"].T)
    return u + scale * (gated @ w["mlp.down_proj.weight"].T)


def inject(w: Weights, h: Tensor, c: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """h + sum over the banks of g * P m, and the gates g.

    m = softmax(q LN_k(K)^T / sqrt(D)) V with q = LN_q(LN_m(h));  g = sigmoid(A h + a), or sigmoid(g0) for ever.
    """

    def norm(name: str, x: Tensor) -> Tensor:
        name = f"memory.{name}"
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], c.rms_norm_eps)

    injected, gates = h, {}
    for bank in ("local", "global"):
        if f"memory.{bank}_keys" not in w:
            continue
        query, keys = norm("query_norm", norm("norm", h)), norm("key_norm", w[f"memory.{bank}_keys"])
        m = (query @ keys.T / math.sqrt(h.shape[-1])).softmax(-1) @ w[f"memory.{bank}_values"]
        if c.gate == "constant":
            opening = torch.tensor(c.gate_init_bias, dtype=h.dtype)
        else:
            opening = h @ w[f"memory.{bank}_gate.weight"].T + w[f"memory.{bank}_gate.bias"]
        gates[f"{bank}_gate"] = opening.sigmoid()
        injected = injected + gates[f"{bank}_gate"] * (m @ w[f"memory.{bank}_proj.weight"].T)
    return injected, gates


def looped_layer(w: Weights, x: Tensor, c: Any) -> tuple[Tensor, Line]:
    """The layer's output y, and means over tokens of what its loops did.

    h_0 = x, R_0 = 1;  for n = 1 ... N:
        h_n = Block(inject(h_n-1), zeta_n),  zeta_n = softplus(s_n)
        lambda_n = sigmoid(w . [h_n; tau_n] + b),  tau_n = (n - 1) / max(1, N - 1)
        p_n = R_n-1 lambda_n, but p_N = R_N-1;  R_n = R_n-1 - p_n
    y = sum of p_n h_n;  expected loops E = sum of n p_n
    """
    h, y, remaining = x, torch.zeros_like(x), torch.ones_like(x[..., 0])
    loops = []
    for n in range(1, c.max_loops + 1):
        before = h
        injected, gates = inject(w, h, c)
        h = block(w, injected, F.softplus(w["step_scales"][n - 1]), c)
        tau = torch.full_like(h[..., :1], (n - 1) / max(1, c.max_loops - 1))
        lam = F.linear(torch.cat([h, tau], -1), w["halting.weight"], w["halting.bias"]).sigmoid().squeeze(-1)
        p = remaining * lam if n < c.max_loops else remaining
        remaining = remaining - p
        y = y + p.unsqueeze(-1) * h
        loops.append({"lambdas": lam, "halting_probs": p, "cosine": F.cosine_similarity(h, before, dim=-1), **gates})
    means = {key: torch.stack([loop[key].mean() for loop in loops]) for key in loops[0]}
    means |= {key: means[key].mean() for key in means if key.endswith("_gate")}
    means["expected_loops"] = sum(n * p for n, p in enumerate(means["halting_probs"], 1))
    return y, means


def losses(weights: Weights, samples: Tensor, c: Any) -> tuple[Tensor, Tensor, Line]:
    """Of samples [B, T + 1]: cross-entropy, ponder cost, and the statistics of all layers.

    The ponder cost is the mean over layers and tokens of (E - 1)/(N - 1).
    """
    x, labels = weights["model.embed_tokens.weight"][samples[:, :-1]], samples[:, 1:]
    shared = {f"memory.{name}": weight for name, weight in _below(weights, "model.memory.").items()}
    layers = []
    for index in range(c.num_hidden_layers):
        w = _below(weights, f"model.layers.{index}.") | shared
        if c.max_loops:
            x, means = looped_layer(w, x, c)
            layers.append(means)
        else:
            x = block(w, x, 1 / (index + 1) if c.residual_scale == "inverse_depth" else 1.0, c)
    x = F.rms_norm(x, x.shape[-1:], weights["model.norm.weight"], c.rms_norm_eps)
    head = weights["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    cross_entropy = F.cross_entropy((x @ head.T).flatten(0, 1), labels.flatten())
    statistics = {key: torch.stack([means[key] for means in layers]) for key in layers[0]} if layers else {}
    cost = (statistics["expected_loops"] - 1).mean() / max(1, c.max_loops - 1) if layers else torch.zeros(())
    return cross_entropy, cost, statistics


def _below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------- the step


def between(start: float, end: float, x: float) -> float:
    """Half a cosine from `start` at x = 0 to `end` at x = 1."""
    return end + (start - end) * (1 + math.cos(math.pi * x)) / 2


def one_cycle(t: int, low: float, high: float, warmup: int, steps: int) -> float:
    """From `low` in the first step to `high` in the last of the warm-up, and back to `low` in the last step."""
    turn = warmup - 1
    return between(low, high, t / turn) if t < turn else between(high, low, (t - turn) / (steps - 1 - turn))


def learning_rate(t: int, config: Any) -> float:
    """Of step t = 0, 1, ...; the last of the warm-up has the peak, the last of all `min_lr`."""
    s, peak, steps = config.schedule, config.optimizer.lr, config.training.train_steps
    if s.type == "one_cycle":
        return one_cycle(t, s.min_lr, peak, s.warmup_steps, steps)
    if t < s.warmup_steps:
        return peak * (t + 1) / s.warmup_steps
    if s.type == "cosine":
        return between(peak, s.min_lr, (t + 1 - s.warmup_steps) / (steps - s.warmup_steps))
    return s.min_lr + (peak - s.min_lr) * min(1, (steps - 1 - t) / s.decay_steps)


def first_beta(t: int, config: Any) -> float:
    """Decay of the first moment, constant or cycled from `beta1` down to `beta1_min` and back."""
    beta, s = config.optimizer.beta1, config.schedule
    return beta if s.beta1_min is None else one_cycle(t, beta, s.beta1_min, s.warmup_steps, config.training.train_steps)


def ponder_weight(t: int, config: Any) -> float:
    """w;  w t/steps;  or w cos(2 pi t/period), times 0.6 where the cosine is negative."""
    w, training = config.model.ponder_weight, config.training
    wave = math.cos(2 * math.pi * t / training.ponder_period)
    shares = {"constant": 1, "linear": t / training.train_steps, "cyclic": wave if wave > 0 else 0.6 * wave}
    return w * shares[training.ponder_schedule]


def is_decayed(name: str, optimizer: Any) -> bool:
    """The paper's code spared the embedding alone; the standard rule norms, biases, step scales and (a field) banks."""
    if optimizer.weight_decay_rule == "paper":
        return name != "model.embed_tokens.weight"
    if re.search("(keys|values)$", name):
        return optimizer.decay_memory_banks
    return not re.search("norm|bias|step_scales", name)


class AdamW:
    """The optimizer's k-th step, k = 1, 2, ..., with the rate lr and the b1 of that step, also where b1 is cycled:

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
    x = (1 - lr decay) x - lr m/(1 - b1^k) / (sqrt(v/(1 - b2^k)) + eps)
    """

    def __init__(self, weights: Weights, config: Any) -> None:
        self.weights, self.config = weights, config
        self.m, self.v = ({name: torch.zeros_like(x) for name, x in weights.items()} for _ in range(2))

    @torch.no_grad()
    def step(self, t: int, gradients: Weights) -> float:
        """Step t = 0, 1, ...: clip gradients to a global norm, move the weights. Returns the norm before clipping."""
        o, lr, b1, k = self.config.optimizer, learning_rate(t, self.config), first_beta(t, self.config), t + 1
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        clip = min(1.0, o.gradient_clipping / norm) if o.gradient_clipping else 1.0
        for name, x in self.weights.items():
            g = clip * gradients[name]
            self.m[name] = m = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = v = o.beta2 * self.v[name] + (1 - o.beta2) * g**2
            decay = o.weight_decay if is_decayed(name, o) else 0.0
            step = m / (1 - b1**k) / ((v / (1 - o.beta2**k)).sqrt() + o.eps)
            x.copy_((1 - lr * decay) * x - lr * step)
        return norm


# ----------------------------------------------------------------------------------------------------------- the run


def predict(config: Any, weights: Weights, batches: Iterable[Tensor], held_out: Tensor) -> Iterator[Line]:
    """Train a copy of `weights`, one step a batch [B, T + 1]; yields what a log line of each step alone would hold."""
    c, tokens = config.model, 0
    weights = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
    optimizer = AdamW(weights, config)
    for t, batch in enumerate(batches):
        weight, lr, beta1 = (schedule(t, config) for schedule in (ponder_weight, learning_rate, first_beta))
        cross_entropy, cost, statistics = losses(weights, batch, c)
        loss = cross_entropy + weight * cost
        gradients = torch.autograd.grad(loss, [*weights.values()], materialize_grads=True)
        norm = optimizer.step(t, dict(zip(weights, gradients, strict=True)))
        tokens += batch[:, 1:].numel()
        line: Line = {"step": t + 1, "tokens": tokens, "lr": lr, "beta1": beta1, "skipped_steps": 0}
        line |= {"loss": loss, "cross_entropy": cross_entropy, "grad_norm": norm}
        if c.max_loops:
            scales = torch.stack([weights[f"model.layers.{i}.step_scales"] for i in range(c.num_hidden_layers)])
            line |= {"ponder_weight": weight, "ponder_cost": cost, "ponder_loss": weight * cost, **statistics}
            line |= {"step_scales": scales, "zeta": F.softplus(scales)}
        if (t + 1) % config.validation.interval_steps == 0 or t + 1 == config.training.train_steps:
            line["validation_loss"] = losses(weights, held_out, c)[0]
        yield {key: torch.as_tensor(value, dtype=torch.float64).detach().clone() for key, value in line.items()}
