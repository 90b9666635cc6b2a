"""The slow, obvious MH-MoE layer: one sub-token and one expert at a time, plain autograd."""

import torch
import torch.nn.functional as F


class Rounded(torch.autograd.Function):
    """The second argument, with the first one's gradient."""

    @staticmethod
    def forward(ctx, x, rounded):
        return rounded

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def ternary(weight):
    """BitNet b1.58's matrix: -1, 0 or 1 times the mean of the absolute values."""
    scale = sum(abs(value) for value in weight.flatten().tolist()) / weight.numel()
    steps = [[min(max(round(value / max(scale, 1e-5)), -1), 1) for value in row] for row in weight.tolist()]
    return Rounded.apply(weight, scale * torch.tensor(steps, dtype=weight.dtype))


def eight_bits(x):
    """A vector in whole steps of a 127th of its largest number."""
    step = max(max(map(abs, x.tolist())), 1e-5) / 127
    return Rounded.apply(x, step * torch.tensor([round(value / step) for value in x.tolist()], dtype=x.dtype))


def feed_forward(weights, activation, layernorm, x, quantized):
    """A feed-forward network on one vector; ``weights`` by name, those that it has."""
    if quantized:
        matrices = ("fc1_weight", "gate_weight", "fc2_weight")
        weights = {name: ternary(weight) if name in matrices else weight for name, weight in weights.items()}
        x = eight_bits(x)
    hidden = weights["fc1_weight"] @ x + weights.get("fc1_bias", 0)
    if activation == "swiglu":
        hidden = hidden * hidden.sigmoid() * (weights["gate_weight"] @ x + weights.get("gate_bias", 0))
    elif activation == "swiglu7":
        up = (weights["gate_weight"] @ x + weights.get("gate_bias", 0)).clamp(-7, 7)
        hidden = torch.where(hidden < 7, hidden, 7)
        hidden = hidden / (1 + (-1.702 * hidden).exp()) * (up + 1)
    elif activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    else:
        hidden = torch.where(hidden > 0, hidden, 0)
    if layernorm:
        hidden = F.layer_norm(hidden, hidden.shape, weights["layernorm_weight"], weights["layernorm_bias"])
    if quantized:
        hidden = eight_bits(hidden)
    return weights["fc2_weight"] @ hidden + weights.get("fc2_bias", 0)


def expert(layer, index, x):
    """One expert on one sub-token ``(d,)``."""
    weights = {name: p[index] for name, p in layer.experts.named_parameters()}
    config = layer.config
    return feed_forward(weights, config.activation, config.expert_layernorm, x, config.quantize_experts)


def shared_expert(layer, x):
    """The shared expert on one token ``(D,)``."""
    weights = {name.replace(".", "_"): p for name, p in layer.shared_expert.named_parameters()}
    return feed_forward(weights, layer.config.activation, False, x, layer.config.quantize_experts)


def router_logits(layer, x, head):
    """The router, or the head's, on one sub-token ``(d,)``."""
    router = layer.router[head] if layer.config.num_banks > 1 else layer.router
    if layer.config.router == "linear":
        return router.weight @ x
    reduced = router.reduction.weight @ x
    if layer.config.router_normalize == "both":
        reduced = reduced / reduced.norm().clamp(min=1e-4)
    experts = router.expert_embedding / router.expert_embedding.norm(dim=1, keepdim=True)
    logits = experts @ reduced
    return logits if router.temperature is None else logits / router.temperature


def projection(modules, x):
    """Head or merge projection on one token ``(D,)``."""
    for index, linear in enumerate(modules or []):
        x = linear.weight @ (x.relu() if index else x)
        if linear.bias is not None:
            x = x + linear.bias
    return x


def forward(layer, x, padding_mask=None):
    """``(hidden, balance_loss, z_loss)`` of a layer without capacities in evaluation; x is ``(T, D)``."""
    config = layer.config
    heads, dim = config.subtokens_per_token, config.subtoken_dim
    outputs, z_terms, banks = [], [], config.num_banks
    all_probs, all_chosen = [[] for _ in range(banks)], [[] for _ in range(banks)]
    for t in range(x.size(0)):
        padded = padding_mask is not None and bool(padding_mask[t])
        token = torch.zeros_like(x[t]) if padded else x[t]
        projected = projection(layer.head_projection, token)
        merged = []
        for h in range(heads):
            sub = projected[h * dim : (h + 1) * dim]
            total = sub if config.subtoken_residual else torch.zeros_like(sub)
            if not padded:
                logits = router_logits(layer, token if config.router_input == "token" else sub, h)
                probs, chosen, weights = choose(layer, logits)
                for weight, e in zip(weights, chosen):
                    index = e if banks == 1 else h * config.num_experts + e
                    total = total + config.gate_scale * weight * expert(layer, index, sub)
                all_probs[h % banks].append(probs)
                all_chosen[h % banks].append({e: config.gate_scale * weight for weight, e in zip(weights, chosen)})
                z_terms.append(logits.logsumexp(0) ** 2)
            merged.append(total)
        whole = torch.cat(merged)
        if config.merge_norm:
            whole = layer.merge_norm.weight * whole / (whole.square().mean() + 1e-5).sqrt()
        y = projection(layer.merge_projection, whole)
        if layer.shared_expert is not None:
            y = y + shared_expert(layer, token)
        outputs.append(y)
    losses = [balance(layer, *of_bank) for of_bank in zip(all_probs, all_chosen)]
    return torch.stack(outputs), sum(losses) / banks, sum(z_terms) / max(len(z_terms), 1)


def choose(layer, logits):
    """What a balance loss is of, the experts chosen by one sub-token's logits ``(E,)``, and their weights."""
    config = layer.config
    if config.routing == "relu":
        chosen = [e for e in range(config.num_experts) if logits[e] > 0]
        return torch.where(logits > 0, logits, 0), chosen, [logits[e] for e in chosen]
    scores = logits.sigmoid() if config.gate_score == "sigmoid" else logits.softmax(0)
    biased = logits if config.gate_score == "logit" else scores
    by = logits if config.balancing == "none" else biased + layer.gate.balancing.bias[0]
    chosen = sorted(range(config.num_experts), key=lambda e: (-by[e].item(), e))[: config.top_k]
    weights = torch.stack([scores[e] for e in chosen])
    if config.top_k > 1 and config.normalize_gates:
        weights = weights / weights.sum()
    return scores / scores.sum(), chosen, weights


def balance(layer, all_probs, all_chosen):
    """P1 equation 10, or ReMoE's 8 to 11, counted by hand."""
    config, is_relu = layer.config, layer.config.routing == "relu"
    counted = 1 if config.balance_assignment == "top1" and not is_relu else config.top_k
    total = 0.0
    for e in range(config.num_experts):
        if config.balance_assignment == "gates" and not is_relu:  # arXiv 2403.07816
            times = counted * sum(chosen.get(e, 0.0) for chosen in all_chosen)
        else:
            times = sum(([*chosen] if is_relu else [*chosen][:counted]).count(e) for chosen in all_chosen)
        total = total + times / (len(all_chosen) * counted) * sum(probs[e] for probs in all_probs) / len(all_probs)
    return config.num_experts * total * (layer.gate.adaptive.weight if is_relu else 1)


def relative_error(a, b):
    """max|a-b| / max|b| (0 where both vanish)."""
    a, b = a.detach(), b.detach()
    scale = b.abs().max()
    return float((a - b).abs().max() / scale) if scale > 0 else float((a - b).abs().max())


def losses_of(extra):
    """The auxiliary losses of a model's MoE layers, balance and z, ``(layers, 2)``; one row of zeros without any."""
    losses = [torch.stack([output.balance_loss, output.z_loss]) for output in extra["moe"] if output is not None]
    return torch.stack(losses) if losses else torch.zeros(1, 2)
