"""Transformers whose layers loop adaptively and read gated memory banks: the loop, the halting, the whole model.

Frey et al., "Adaptive Loops and Memory in Transformers: Think Harder or Know More?" (arXiv 2603.08391).

One visit of a looped layer (LoopedLayer.forward); everything between the rules is one loop (LoopedLayer.one_loop):

      x = h_0                                                R_0 = 1,  y = 0
    ------------------------------------------------------------------------------ n = 1 .. N
      h~  = h + sum over banks of gate(h) * proj(read(h))    memory, read before the block (LayerMemory)
      u   = h~ + zeta_n * attention(rms_norm(h~))            the same weights in every loop,
      h   = u  + zeta_n * feed_forward(rms_norm(u))          a learned scale zeta_n for each (Block)
      lambda_n = sigmoid(w . [h; tau_n] + b)                 halting router
      p_n = R * lambda_n    (the last loop: p_N = R)         probability of stopping after loop n
      y  += p_n * h;  R -= p_n                               the output is the expectation over stopping
    ------------------------------------------------------------------------------
      y                                                      E = sum of n * p_n: expected loops per token

Shapes: B batch, T tokens, D hidden, H query heads, K key/value heads, d head width, F feed-forward, S slots,
V vocabulary, N max_loops. Parameter and config field names are the public Hugging Face ones.

Precision: halting (lambda, R, p), zeta and the mixture y are float32 under bf16, and never narrower than the model.

A `Backend` (model/backend.py) makes the layers that are cut over devices; no process group is named in the math. The
block is in model/block.py, the memory in model/memory.py, what generation adds (cache, padding) in model/decoding.py.
Only torch, the standard library and these four are imported: the exported Hugging Face model inlines the files as text.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopmem_pretrain.model.backend import Backend, wide, without_autocast
from loopmem_pretrain.model.block import Block, RMSNorm, Rotary
from loopmem_pretrain.model.decoding import Decoding
from loopmem_pretrain.model.memory import LayerBanks, LayerMemory, SharedMemory, SharedRead

# ----------------------------------------------------------------------------------------------------- one layer


class PlainLayer(Block):
    """A layer that does not loop: the baselines. c = 1, or 1/(l+1) with `residual_scale: inverse_depth`."""

    one_loop = Block.block

    def __init__(self, config: Any, backend: Backend, index: int) -> None:
        super().__init__(config, backend, index)
        self.scale = 1.0 / (index + 1) if config.residual_scale == "inverse_depth" else 1.0

    def forward(
        self,
        hidden: Tensor,
        memory: SharedRead | None = None,
        num_loops: int | None = None,
        decoding: Decoding | None = None,
        visit: "Visit | None" = None,
    ) -> tuple[Tensor, None]:
        """[B, T, D] -> ([B, T, D], None); memory, num_loops and visit are for looped layers."""
        scale = torch.full((), self.scale, device=hidden.device, dtype=wide(hidden.dtype))  # a tensor: compiled once
        return self.run_loop(hidden, scale, self.rotary(hidden, decoding), self.at_loop(1, decoding)), None


# ------------------------------------------------------------------------------------------- looping and halting


def expected_loops(halting_probs: Tensor) -> Tensor:
    """E = sum of n p_n: [B, T, n] -> [B, T], differentiable."""
    loops = torch.arange(1, halting_probs.shape[-1] + 1, device=halting_probs.device)
    return torch.sum(halting_probs * loops, dim=-1)


class RouterWeights(NamedTuple):
    """A halting router's parameters as all loops of a visit read them: float32 or wider, copies of their own."""

    weight: Tensor
    """w, [1, D + 1]; its last entry is tau's"""
    bias: Tensor
    """b, [1]"""


def halting_lambda(router: RouterWeights, hidden: Tensor, tau: Tensor) -> Tensor:
    """lambda_n = sigmoid(w . [h_n; tau_n] + b), [B, T], float32 or wider, also under autocast."""
    weight, bias = router
    with without_autocast(hidden.device):
        logit = F.linear(hidden.to(weight.dtype), weight[:, :-1]).squeeze(-1)
    return torch.sigmoid(logit + weight[0, -1] * tau + bias)


class HaltingRouter(nn.Module):
    """Says how likely a token stops. No nn.Linear: quantizers and adapters replace those, and it has to stay exact."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width + 1))  # w; its last entry is tau's
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, precise: torch.dtype) -> RouterWeights:
        """What the loops of a visit read, to be given to `halting_lambda`.

        Copies also where the type stays: D + 1 numbers leave the routers of a flat buffer at odd addresses, and a
        compiled loop takes those of all layers to be as aligned as the first layer's.
        """
        return RouterWeights(self.weight.to(precise, copy=True), self.bias.to(precise, copy=True))


class LoopStats(NamedTuple):
    """What one visit of a looped layer of n loops did. Only `halting_probs` carries a gradient."""

    halting_probs: Tensor
    """p_n per token, [B, T, n]; sums to 1"""
    lambdas: Tensor
    """mean router output of each loop, [n]"""
    cosine: Tensor
    """mean cosine(h_n, h_{n-1}) of each loop, [n]"""
    local_gate: Tensor | None
    """mean local gate of each loop, [n]"""
    global_gate: Tensor | None
    """mean global gate of each loop, [n]"""

    def expected_loops(self) -> Tensor:
        """E per token, [B, T]."""
        return expected_loops(self.halting_probs)


class LoopState(NamedTuple):
    """What one loop hands to the next."""

    hidden: Tensor
    """h_n, [B, T, D], model dtype"""
    norm: Tensor
    """|h_n| per token, detached, for the cosine statistic"""
    remaining: Tensor
    """R_n, [B, T], float32 or wider"""
    output: Tensor
    """y so far, [B, T, D], float32 or wider"""


class LoopReport(NamedTuple):
    """The statistics of one loop."""

    halting_prob: Tensor
    lambda_mean: Tensor
    cosine_mean: Tensor
    local_gate_mean: Tensor | None
    global_gate_mean: Tensor | None


class LoopedLayer(Block):
    """A layer that is applied up to N times and learns, per token, when to stop."""

    def __init__(self, config: Any, backend: Backend, index: int) -> None:
        super().__init__(config, backend, index)
        self.max_loops = config.max_loops
        self.step_scales = nn.Parameter(torch.empty(config.max_loops))  # raw s_n; zeta_n = softplus(s_n)
        self.halting = HaltingRouter(config.hidden_size)
        self.memory = LayerMemory(config, backend) if config.local_slots or config.global_slots else None

    def forward(
        self,
        hidden: Tensor,
        memory: SharedRead | None = None,
        num_loops: int | None = None,
        decoding: Decoding | None = None,
        visit: "Visit | None" = None,
    ) -> tuple[Tensor, Any]:
        """Visit the layer: [B, T, D] -> ([B, T, D], LoopStats).

        `num_loops` forces n loops instead of N: with n < N the last of them takes the remaining probability, with
        n > N the last step scale and tau = 1 are repeated (extrapolation beyond training). `visit` does it another way.
        """
        loops = self.max_loops if num_loops is None else num_loops
        if visit is not None:
            return visit(self, hidden, memory, loops, decoding)
        precise = wide(hidden.dtype)
        zeta, router = F.softplus(self.step_scales.to(precise)), self.halting(precise)
        rotary = self.rotary(hidden, decoding)
        banks = self.banks(memory, hidden.shape[0] * hidden.shape[1] * loops)
        state = LoopState(
            hidden,
            token_norm(hidden),
            remaining=torch.ones(hidden.shape[:2], device=hidden.device, dtype=precise),
            output=torch.zeros_like(hidden, dtype=precise),
        )
        reports: list[LoopReport] = []
        for n in range(1, loops + 1):
            is_last = torch.full((), n == loops, device=hidden.device)
            step = (*self.step(zeta, n), is_last)
            state, report = self.run_loop(state, *step, router, banks, rotary, self.at_loop(n, decoding))
            reports.append(report)
        return state.output.to(hidden.dtype), collect(reports)

    def banks(self, memory: SharedRead | None, reads: int) -> LayerBanks | None:
        """What all loops of a visit read, `reads` times in all; None without memory."""
        return self.memory.banks(memory, reads) if self.memory is not None and memory is not None else None

    def step(self, zeta: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """zeta_n and tau_n of loop n; beyond N those of loop N."""
        trained = min(n, self.max_loops)
        tau = (trained - 1) / max(1, self.max_loops - 1)
        return zeta[trained - 1], zeta.new_full((), tau)

    def one_loop(
        self,
        state: LoopState,
        zeta: Tensor,
        tau: Tensor,
        is_last: Tensor,
        router: RouterWeights,
        banks: LayerBanks | None,
        rotary: Rotary,
        decoding: Decoding | None,
    ) -> tuple[LoopState, LoopReport]:
        """Loop n: memory, block, halting, mixture (the drawing at the head of this file)."""
        injected, local_gate, global_gate = state.hidden, None, None
        if self.memory is not None and banks is not None:
            injected, local_gate, global_gate = self.memory(state.hidden, banks)
        hidden = self.block(injected, zeta, rotary, decoding)

        lam = halting_lambda(router, hidden, tau)
        # The last loop takes what is left, its own lambda is only reported. `where` keeps it in the graph: the router
        # has a gradient (zero) on every rank also with one loop, and one compiled loop serves them all.
        prob = state.remaining * torch.where(is_last, 1.0, lam)
        output = state.output + prob.unsqueeze(-1) * hidden

        norm = token_norm(hidden)
        dot = (hidden.detach() * state.hidden.detach()).sum(-1, dtype=norm.dtype)
        cosine = (dot / (norm * state.norm).clamp_min(1e-12)).mean()
        report = LoopReport(prob, lam.detach().mean(), cosine, mean_of(local_gate), mean_of(global_gate))
        return LoopState(hidden, norm, state.remaining - prob, output), report


def token_norm(hidden: Tensor) -> Tensor:
    """|h| per token without gradient, [B, T]."""
    return torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=wide(hidden.dtype))


def mean_of(gate: Tensor | None) -> Tensor | None:
    return None if gate is None else gate.detach().mean(dtype=wide(gate.dtype))


def collect(reports: list[LoopReport]) -> LoopStats:
    """The reports of all loops of one visit as one LoopStats."""

    def stack(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.stack(present) if present else None

    return LoopStats(
        halting_probs=torch.stack([report.halting_prob for report in reports], dim=-1),
        lambdas=torch.stack([report.lambda_mean for report in reports]),
        cosine=torch.stack([report.cosine_mean for report in reports]),
        local_gate=stack([report.local_gate_mean for report in reports]),
        global_gate=stack([report.global_gate_mean for report in reports]),
    )


def ponder_cost(expected_loops: Tensor, max_loops: int) -> Tensor:
    """One layer's share before the mean over layers: mean over tokens of (E - 1) / (N - 1); 0 where N = 1."""
    return (expected_loops - 1).mean() / max(1, max_loops - 1)


def total_loss(
    cross_entropy: Tensor, expected: Sequence[Tensor], config: Any, share: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """(cross-entropy + ponder_weight * ponder cost, ponder cost); `expected` is E per token, of each layer.

    `share`: of the tokens over which the cross-entropy is a mean, where these are a part of them.
    """
    costs = [ponder_cost(loops, config.max_loops).to(cross_entropy.device) for loops in expected]
    ponder = share * torch.stack(costs).mean() if costs else torch.zeros_like(cross_entropy)
    return cross_entropy + config.ponder_weight * ponder, ponder


Visit = Callable[[LoopedLayer, Tensor, SharedRead | None, int, Decoding | None], tuple[Tensor, Any]]
"""Another way to visit a layer, early exit's. It is called by the layer's forward, so that hooks of the layer run."""


# --------------------------------------------------------------------------------------------------- whole model


def make_layer(config: Any, backend: Backend, index: int) -> PlainLayer | LoopedLayer:
    """Layer `index` of the model: looped where max_loops > 0."""
    return LoopedLayer(config, backend, index) if config.max_loops else PlainLayer(config, backend, index)


NumLoops = int | Sequence[int] | None
"""Forced loops: of every layer, one number a layer, or None for max_loops."""


def loops_of_layers(num_loops: NumLoops, layers: int) -> list[int | None]:
    """One entry a layer."""
    return [*num_loops] if isinstance(num_loops, Sequence) else [num_loops] * layers


class LoopMemBody(nn.Module):
    """Embedding, layers, shared memory and final norm."""

    def __init__(self, config: Any, backend: Backend) -> None:
        super().__init__()
        self.embed_tokens = backend.embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make_layer(config, backend, index) for index in range(config.num_hidden_layers))
        self.memory = SharedMemory(config, backend) if config.local_slots or config.global_slots else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        num_loops: NumLoops = None,
        decoding: Decoding | None = None,
        visit: Visit | None = None,
        on_layer: Callable[[Tensor], object] | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """[B, T] -> (hidden [B, T, D] after the final norm, one LoopStats, or what `visit` returns, a looped layer).

        Embeddings [B, T, D] may stand for token ids; `on_layer` is told what each layer is given.
        """
        hidden = input_ids if input_ids.is_floating_point() else self.embed_tokens(input_ids)
        memory = self.memory() if self.memory is not None else None
        all_stats: list[Any] = []
        for layer, loops in zip(self.layers, loops_of_layers(num_loops, len(self.layers)), strict=True):
            if on_layer is not None:
                on_layer(hidden)
            hidden, stats = layer(hidden, memory, loops, decoding, visit)
            all_stats += [] if stats is None else [stats]
        return self.norm(hidden), all_stats


class LoopMemOutput(NamedTuple):
    """What LoopMemLM returns; the losses are None without labels."""

    logits: Tensor
    stats: list[LoopStats]
    loss: Tensor | None
    cross_entropy: Tensor | None
    ponder_cost: Tensor | None


class LoopMemLM(nn.Module):
    """The language model: LoopMemBody and a head, with loss = cross-entropy + ponder_weight * ponder cost."""

    def __init__(self, config: Any, backend: Backend) -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.model = LoopMemBody(config, backend)
        self.lm_head = backend.lm_head(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_loops: NumLoops = None,
        decoding: Decoding | None = None,
    ) -> LoopMemOutput:
        """`input_ids` and `labels` [B, T]; labels are the next tokens, already shifted."""
        hidden, stats = self.model(input_ids, num_loops, decoding)
        logits = self.lm_head(hidden)
        if labels is None:
            return LoopMemOutput(logits, stats, None, None, None)
        cross_entropy = self.backend.cross_entropy(logits, labels)
        loss, ponder = total_loss(cross_entropy, [layer.expected_loops() for layer in stats], self.config)
        return LoopMemOutput(logits, stats, loss, cross_entropy, ponder)
