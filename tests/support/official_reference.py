"""A slow reference of the official MH-MoE language model, written from its facts, one sub-token at a time.

github.com/yushuiwx/MH-MoE: names and shapes of the weights, order of the sub-tokens, gate, capacity, gated networks and
rotary positions as in its ``torchscale-private``; with ``renormalise`` the gates of its older ``torchscale-moe``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Settings as its language model stores them, reduced to a test's size.
PUBLISHED = {
    "decoder_layers": 2, "decoder_embed_dim": 32, "decoder_ffn_embed_dim": 40, "decoder_attention_heads": 4,
    "decoder_normalize_before": True, "activation_fn": "silu", "dropout": 0.1, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "no_bias": True, "rms_norm": True, "subln": False, "layernorm_embedding": False,
    "no_scale_embedding": True, "no_token_positional_embeddings": True, "decoder_learned_pos": True,
    "rotary_embed": True, "share_decoder_input_output_embed": True, "moe_freq": 2, "moe_expert_count": 4,
    "moe_top_k": 1, "moe_top1_expert": True, "moe_ffn_dim": 24, "moe_gating_use_fp32": True,
    "moe_normalize_gate_prob_before_dropping": True, "moe_eval_capacity_token_fraction": -1.0, "use_xmoe": False,
    "mhmoe_heads_number": 4, "weight_bits": 32, "input_bits": 32, "input_quant_method": "absmax_per_token",
    "moe_lora_rank": -1, "n_kv_heads": 4, "model_parallel_size": 1, "deepnorm": False, "xpos_rel_pos": False,
    "tokens_per_sample": 16, "max_target_positions": None,
}  # fmt: skip
# BitNet b1.58 in that code; the reference itself computes without.
BITNET = {
    **PUBLISHED, "weight_bits": 1, "input_bits": 8, "weight_quant_method": "absmean", "ffn_bits": -1,
    "absmean_alpha": 1.0,
}  # fmt: skip
# The older copy: TorchScale's decoder with LayerNorms, biases, GELU and learned positions.
OLDER = {
    **{name: value for name, value in PUBLISHED.items() if not name.endswith("_bits") and name != "moe_top_k"},
    "activation_fn": "gelu", "no_bias": False, "rms_norm": False, "subln": True, "no_scale_embedding": False,
    "no_token_positional_embeddings": False, "rotary_embed": False, "moe_top1_expert": False, "use_xmoe": True,
    "share_decoder_input_output_embed": False,
}  # fmt: skip


def official_state(settings: dict, vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the official names, float64."""
    generator = torch.Generator().manual_seed(seed)
    dim, bias = settings["decoder_embed_dim"], not settings["no_bias"]
    state: dict[str, Tensor] = {}

    def weight(name: str, *shape: int) -> None:
        state[name] = torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    def linear(name: str, inputs: int, outputs: int, bias: bool = bias) -> None:
        weight(f"{name}.weight", outputs, inputs)
        if bias:
            weight(f"{name}.bias", outputs)

    def norm(name: str, size: int) -> None:
        weight(f"{name}.weight", size)
        if not settings["rms_norm"]:
            weight(f"{name}.bias", size)

    def network(name: str, inputs: int, inner: int) -> None:
        linear(f"{name}.fc1", inputs, inner)
        linear(f"{name}.fc2", inner, inputs)
        if settings["activation_fn"] == "silu":
            linear(f"{name}.fc3", inputs, inner)
        if settings["subln"]:
            norm(f"{name}.ffn_layernorm", inner)

    weight("decoder.embed_tokens.weight", vocabulary, dim)
    if not settings["no_token_positional_embeddings"]:
        weight("decoder.embed_positions.weight", settings["tokens_per_sample"] + 2, dim)
    for index in range(settings["decoder_layers"]):
        layer = f"decoder.layers.{index}"
        for map_name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{layer}.self_attn.{map_name}", dim, dim)
        if settings["subln"]:
            norm(f"{layer}.self_attn.inner_attn_ln", dim)
        if settings["rotary_embed"]:
            width = dim // settings["decoder_attention_heads"]
            state[f"{layer}.self_attn.rotary_emb.inv_freq"] = 10000.0 ** (-torch.arange(0, width, 2) / width)
        norm(f"{layer}.self_attn_layer_norm", dim)
        norm(f"{layer}.final_layer_norm", dim)
        if (index + 1) % settings["moe_freq"]:
            network(f"{layer}.ffn", dim, settings["decoder_ffn_embed_dim"])
            continue
        moe, width = f"{layer}.moe_layer", dim // settings["mhmoe_heads_number"]
        if settings["use_xmoe"]:
            weight(f"{moe}.gate.wg_reduction.weight", 16, width)
            weight(f"{moe}.gate.wg", settings["moe_expert_count"], 16)
        else:
            weight(f"{moe}.gate.wg.weight", settings["moe_expert_count"], width)
        for expert in range(settings["moe_expert_count"]):
            network(f"{moe}.experts.{expert}", width, settings["moe_ffn_dim"])
        if settings["mhmoe_heads_number"] > 1:
            linear(f"{moe}.multi_heads", dim, dim, bias=True)
            linear(f"{moe}.out_proj", dim, dim, bias=True)
    norm("decoder.layer_norm", dim)
    weight("decoder.output_projection.weight", vocabulary, dim)
    if settings["share_decoder_input_output_embed"]:
        state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    return state


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def apply_linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def apply_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    if bias is None:
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def apply_network(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    hidden = apply_linear(x, state, "fc1")
    hidden = hidden * F.silu(apply_linear(x, state, "fc3")) if "fc3.weight" in state else F.gelu(hidden)
    if "ffn_layernorm.weight" in state:
        hidden = apply_norm(hidden, state, "ffn_layernorm")
    return apply_linear(hidden, state, "fc2")


def gate_probabilities(subtoken: Tensor, state: dict[str, Tensor]) -> Tensor:
    if "gate.wg" in state:
        experts = state["gate.wg"]
        reduced = state["gate.wg_reduction.weight"] @ subtoken
        return (experts / experts.norm(dim=1, keepdim=True) @ reduced).softmax(0)
    return (state["gate.wg.weight"] @ subtoken).softmax(0)


def official_moe_layer(
    x: Tensor, state: dict[str, Tensor], *, heads: int, top_k: int, capacity: int | None, renormalise: bool = False
) -> Tensor:
    """``(T, D) -> (T, D)``; ``capacity`` None drops nothing. ``state``: names below ``moe_layer.``."""
    num_experts = len({name.split(".")[1] for name in state if name.startswith("experts.")})
    tokens = apply_linear(x, state, "multi_heads") if heads > 1 else x
    width = x.size(1) // heads
    subtokens = [token[head * width : (head + 1) * width] for token in tokens for head in range(heads)]
    probabilities = [gate_probabilities(subtoken, state) for subtoken in subtokens]
    chosen = [sorted(range(num_experts), key=lambda expert: -p[expert])[:top_k] for p in probabilities]

    outputs = [torch.zeros_like(subtoken) for subtoken in subtokens]
    taken = [0] * num_experts  # all first choices queue before all second ones
    for choice in range(top_k):
        for number, subtoken in enumerate(subtokens):
            expert = chosen[number][choice]
            gate = probabilities[number][expert]
            if renormalise:
                gate = gate / sum(probabilities[number][other] for other in chosen[number])
            if capacity is None or taken[expert] < capacity:
                outputs[number] = outputs[number] + gate * apply_network(subtoken, below(state, f"experts.{expert}."))
            taken[expert] += 1

    merged = torch.stack([torch.cat(outputs[n * heads : (n + 1) * heads]) for n in range(len(x))])
    return apply_linear(merged, state, "out_proj") if heads > 1 else merged


def rotate(x: Tensor) -> Tensor:
    """``(heads, S, d)``: feature i with feature i + d/2."""
    half = x.size(-1) // 2
    angle = torch.arange(x.size(1))[:, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


def apply_attention(x: Tensor, state: dict[str, Tensor], heads: int, rotary: bool) -> Tensor:
    """``(S, D) -> (S, D)``, causal."""
    q, k, v = (
        apply_linear(x, state, name).view(len(x), heads, -1).transpose(0, 1) for name in ("q_proj", "k_proj", "v_proj")
    )
    if rotary:
        q, k = rotate(q), rotate(k)
    scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    attended = (scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1).reshape(x.shape)
    if "inner_attn_ln.weight" in state:
        attended = apply_norm(attended, state, "inner_attn_ln")
    return apply_linear(attended, state, "out_proj")


def official_logits(tokens: Tensor, state: dict[str, Tensor], settings: dict) -> Tensor:
    """``(S,) -> (S, vocabulary)``, nothing dropped."""
    x = state["decoder.embed_tokens.weight"][tokens]
    if not settings["no_scale_embedding"]:
        x = x * math.sqrt(x.size(1))
    if not settings["no_token_positional_embeddings"]:
        x = x + state["decoder.embed_positions.weight"][2 : 2 + len(tokens)]
    for index in range(settings["decoder_layers"]):
        layer = below(state, f"decoder.layers.{index}.")
        normed = apply_norm(x, layer, "self_attn_layer_norm")
        attention = below(layer, "self_attn.")
        x = x + apply_attention(normed, attention, settings["decoder_attention_heads"], settings["rotary_embed"])
        normed = apply_norm(x, layer, "final_layer_norm")
        moe = below(layer, "moe_layer.")
        if not moe:
            x = x + apply_network(normed, below(layer, "ffn."))
            continue
        published = "moe_top_k" in settings
        top_k = settings["moe_top_k"] if published else 2 - settings["moe_top1_expert"]
        heads = settings["mhmoe_heads_number"]
        x = x + official_moe_layer(
            normed, moe, heads=heads, top_k=top_k, capacity=None, renormalise=not published and top_k == 2
        )
    return apply_norm(x, state, "decoder.layer_norm") @ state["decoder.output_projection.weight"].T
