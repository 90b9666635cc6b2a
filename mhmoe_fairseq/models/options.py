"""The models' flags as fairseq dataclasses: what all models share, language models, BEiT-3.

A field's default None means "as the architecture says": named architectures fill what is still None, so the command
line, a YAML file and a checkpoint's stored configuration behave alike.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from ..moe.activations import BY_FLAG
from ..moe.config import choices
from ..moe.merged import MERGINGS
from ..moe.parallelism import PARALLELISMS

MODEL_NAME = "mhmoe_lm"
BEIT3_NAME = "mhmoe_beit3"

# A flag's value -> the layer's, where they differ; TorchScale's own layer has limited slots, too.
TORCHSCALE = {"torchscale": "capacity"}
DOMAIN = {"domain": "dropless"}  # routing in name, and the router of that name
SWITCH = {"on": True, "off": False}
OPPOSITE = {True: False, False: True}

_FLAG_OF = {name: given for given, name in BY_FLAG.items()}
ACTIVATION_CHOICES = ChoiceEnum([_FLAG_OF.get(name, name) for name in choices("activation")])
ON_OFF_CHOICES = ChoiceEnum([*SWITCH])
ROUTING_CHOICES = ChoiceEnum([*choices("routing"), *MERGINGS, *TORCHSCALE, *DOMAIN])
BENCHMARK_ROUTERS = {"balanced-for-benchmarks": "balanced"}  # of which no model learns anything: asked by long names
ROUTER_CHOICES = ChoiceEnum(["arch", *(name for name in choices("router") if name not in DOMAIN), *BENCHMARK_ROUTERS])
PRESET_CHOICES = ChoiceEnum(["p1"])
NORMALIZE_CHOICES = ChoiceEnum(choices("router_normalize"))
BALANCE_CHOICES = ChoiceEnum(choices("balance_assignment"))
SCORE_CHOICES = ChoiceEnum(choices("gate_score"))
GROUP_SCORE_CHOICES = ChoiceEnum(choices("group_score"))
BALANCING_CHOICES = ChoiceEnum(choices("balancing"))
SCOPE_CHOICES = ChoiceEnum(choices("balance_scope"))
POLICY_CHOICES = ChoiceEnum(choices("second_expert_policy"))
BANK_CHOICES = ChoiceEnum(choices("expert_banks"))
ROUTER_INPUT_CHOICES = ChoiceEnum(choices("router_input"))
PARALLEL_CHOICES = ChoiceEnum(PARALLELISMS)
BUDGET_CHOICES = ChoiceEnum(["none", "params", "flops"])
MODALITY_CHOICES = ChoiceEnum(["shared", "separate"])
QUANTIZED = {"none": False, "experts": True, "all": True}
QUANTIZE_CHOICES = ChoiceEnum([*QUANTIZED])
PRECISION_CHOICES = ChoiceEnum(["fp32", "bf16", "fp16", "auto"])


def option(
    text: Optional[str],
    *,
    needs: str = "",
    layer: Optional[str] = None,
    values: Optional[Mapping[Any, Any]] = None,
    stack: bool = False,
    affects: str = "function",
    default: Any = None,
) -> Any:
    """A field that is None unless given, and all that is known of its flag.

    Args:
        text: its help; None for what is no flag of ours: fairseq fills it from the task or from its own groups.
        needs: without what it has no effect: ``moe`` layers, ``capacity`` or ``lory`` routing, the ``xmoe`` router, or
            (MH-MoE's) ``heads``, which a one-head reference lacks.
        layer: the field of ``MHMoEConfig`` that it sets, to what it says or, of a switch, to whether it is given.
        values: the layer's values for the flag's, where they differ.
        stack: whether it sets the field of its own name in ``DecoderSettings`` or ``EncoderSettings``.
        affects: ``function``, what the weights stand for; ``training``, how they come about; or ``nothing`` but how it
            is computed.
        default: fairseq's interpolation, of what is no flag of ours.
    """
    known = {"needs": needs, "layer": layer, "values": values or {}, "stack": stack, "affects": affects}
    return field(default=default, metadata={"help": text, **known})


@dataclass
class MoEOptions(FairseqDataclass):
    """What all models share; the plugin's own flags start with ``--mhmoe-``.

    Others are spelled as in fairseq, TorchScale and the official MH-MoE repository.
    """

    activation_fn: Optional[ACTIVATION_CHOICES] = option(
        "activation of dense networks and experts; silu means SwiGLU, with a gate matrix, swiglu7 the clamped one of "
        "MAGI-2 and gpt-oss",
        layer="activation", values=BY_FLAG, stack=True,
    )  # fmt: skip
    dropout: Optional[float] = option(
        "dropout on the embedding, on attention's and on feed-forward networks' output",
        layer="dropout", stack=True, affects="training",
    )  # fmt: skip
    attention_dropout: Optional[float] = option("dropout on the attention weights", stack=True, affects="training")
    activation_dropout: Optional[float] = option(
        "dropout on the inner activation of feed-forward networks and experts",
        layer="activation_dropout", stack=True, affects="training",
    )  # fmt: skip
    no_bias: Optional[bool] = option(
        "no bias in any linear map: attention, dense networks, experts, projections",
        layer="expert_bias", values=OPPOSITE, stack=True,
    )  # fmt: skip
    rms_norm: Optional[bool] = option(
        "RMSNorm in place of LayerNorm; switches sub-LN off unless --subln is given", stack=True
    )
    subln: Optional[bool] = option(
        "a norm on attention's and on feed-forward networks' inner activation (TorchScale's sub-LN); on by default "
        "unless --rms-norm or --deepnorm is given; the experts' one is always a LayerNorm"
    )
    no_subln: Optional[bool] = option("no sub-LN: a plain pre-norm transformer")
    deepnorm: Optional[bool] = option(
        "post-norm with DeepNorm's residual and initial scales (switches sub-LN off)", stack=True
    )
    layernorm_embedding: Optional[bool] = option("a norm on the embedding", stack=True)
    checkpoint_activations: Optional[bool] = option(
        "recompute each layer's activations in the backward pass", stack=True, affects="nothing"
    )
    mhmoe_precision: Optional[PRECISION_CHOICES] = option(
        "compute under autocast in this type, on GPU and CPU; weights stay in float32 (default: fp32); auto: bf16 "
        "where this machine multiplies it itself (amx_bf16, avx512_bf16, GPUs of compute capability 8.0), else fp32; "
        "which it was, the checkpoint says; training in fp16 needs fairseq's loss scaling, --amp or --fp16. fairseq's "
        "own --bf16 means TPU: do not use it",
        affects="nothing",
    )
    moe_freq: Optional[int] = option("every n-th layer is an MoE layer; 0 for a dense model", stack=True)
    moe_expert_count: Optional[int] = option(
        "experts per MoE layer (of the reference, under --mhmoe-budget flops)", needs="moe", layer="num_experts"
    )
    moe_top_k: Optional[int] = option("experts per sub-token", needs="moe", layer="top_k")
    moe_top1_expert: Optional[bool] = option("the same as --moe-top-k 1", needs="moe")
    moe_ffn_dim: Optional[int] = option(
        "inner width of one expert; wins over the architecture and excludes --mhmoe-budget params and flops",
        needs="moe", layer="expert_ffn_dim",
    )  # fmt: skip
    moe_gating_use_fp32: Optional[bool] = option(
        "run the router in float32 under mixed precision", needs="moe", layer="gating_fp32"
    )
    moe_second_expert_policy: Optional[POLICY_CHOICES] = option(
        "with capacity routing and two experts per sub-token, in training only: use the second expert always, sample "
        "it, or use it at random with its probability (default: all)",
        needs="capacity", layer="second_expert_policy", affects="training",
    )  # fmt: skip
    moe_normalize_gate_prob_before_dropping: Optional[bool] = option(
        "with capacity routing: renormalise gate weights before overflowing sub-tokens are dropped",
        needs="capacity", layer="normalize_before_dropping",
    )  # fmt: skip
    moe_eval_capacity_token_fraction: Optional[float] = option(
        "with capacity routing: slots per expert in evaluation, as a fraction of the sub-tokens; negative: the "
        "training rule (default: 0.25)",
        needs="capacity", layer="eval_capacity_fraction",
    )  # fmt: skip
    use_xmoe: Optional[bool] = option("the same as --mhmoe-router xmoe", needs="moe")
    mhmoe_heads_number: Optional[int] = option(
        "MH-MoE heads: sub-tokens that each token is split into", needs="heads", layer="num_heads"
    )
    mhmoe_routing: Optional[ROUTING_CHOICES] = option(
        "dropless: every choice is computed (default); capacity: GShard's and TorchScale's limited slots; torchscale: "
        "TorchScale's own layer as a baseline (one head, top-k 1 or 2, one process); lory, smear: no choice, but one "
        "network averaged over all experts, for each segment of a text by the one before it, or (BEiT-3) for each "
        "example; expert-choice: experts choose sub-tokens, as many each (BEiT-3); relu: every expert with a positive "
        "logit, weighted by it, --moe-top-k on average in the end (ReMoE, with --moe-gate-loss-wt 1); domain: an "
        "expert for each domain of the data, or language, and no router (DEMix; smoe_*, top-k 1, as many experts as "
        "domains)",
        needs="moe", layer="routing", values={**TORCHSCALE, **DOMAIN},
    )  # fmt: skip
    mhmoe_capacity_factor: Optional[float] = option(
        "with capacity routing: slots per expert in training, as a multiple of an even share; with expert-choice what "
        "an expert takes, so, too, of the experts' FLOPs (default: 1.0)",
        needs="capacity", layer="capacity_factor",
    )  # fmt: skip
    mhmoe_router: Optional[ROUTER_CHOICES] = option(
        "linear: logits x W; xmoe: a low-dimensional projection compared with normalised expert embeddings; layernorm: "
        "LN(x) LN(W); arch: linear for smoe_*, xmoe for xmoe_* and mhmoe_*, layernorm with smear routing (default); "
        "balanced-for-benchmarks: experts by turns, whatever "
        "the input",
        needs="moe", layer="router", values=BENCHMARK_ROUTERS,
    )  # fmt: skip
    mhmoe_router_preset: Optional[PRESET_CHOICES] = option(
        "p1: the paper's appendix: router dimension 16 / heads, both sides normalised, temperature starting at 0.3",
        needs="xmoe",
    )
    mhmoe_router_dim: Optional[int] = option(
        "X-MoE router: width of the projection (default: 16)", needs="xmoe", layer="router_dim"
    )
    mhmoe_router_normalize: Optional[NORMALIZE_CHOICES] = option(
        "X-MoE router: normalise the expert embeddings only, as TorchScale does, or both sides (default: expert)",
        needs="xmoe", layer="router_normalize",
    )  # fmt: skip
    mhmoe_router_temperature: Optional[float] = option(
        "X-MoE router: initial value of a learned temperature (default: no temperature)",
        needs="xmoe", layer="router_temperature",
    )  # fmt: skip
    mhmoe_gate_score: Optional[SCORE_CHOICES] = option(
        "what experts are chosen and weighed by: the softmax of the router's logits, or each one's sigmoid; logit: "
        "weighed by the softmax, chosen by the logits and a bias of --mhmoe-balancing (default: softmax)",
        needs="moe", layer="gate_score",
    )  # fmt: skip
    mhmoe_normalize_gates: Optional[ON_OFF_CHOICES] = option(
        "renormalise the gate weights over the chosen experts if there are two or more; off: the scores as they are "
        "(default: on)",
        needs="moe", layer="normalize_gates", values=SWITCH,
    )  # fmt: skip
    mhmoe_gate_scale: Optional[float] = option(
        "what the gate weights are multiplied by in the end (default: 1; DeepSeek-V3: 2.5)",
        needs="moe", layer="gate_scale",
    )  # fmt: skip
    mhmoe_expert_groups: Optional[int] = option(
        "equal groups of consecutive experts, of which a sub-token chooses from the best --mhmoe-kept-groups only "
        "(DeepSeek-V2, V3; default: 1, no groups)",
        needs="moe", layer="expert_groups",
    )  # fmt: skip
    mhmoe_kept_groups: Optional[int] = option(
        "groups that a sub-token may choose from, of --mhmoe-expert-groups (default: 1)",
        needs="moe", layer="kept_groups",
    )  # fmt: skip
    mhmoe_group_score: Optional[GROUP_SCORE_CHOICES] = option(
        "a group's score: the largest in it (max, DeepSeek-V2; default), or the sum of its two largest (top2, V3)",
        needs="moe", layer="group_score",
    )  # fmt: skip
    mhmoe_balancing: Optional[BALANCING_CHOICES] = option(
        "balance without a loss (see --moe-gate-loss-wt 0): a bias on the scores that experts are chosen by, not "
        "weighed; after each update it moves by a fixed step (bias-sign), in proportion to what an expert lacks "
        "(bias-proportional), or to where each expert gets its share (quantile) (default: none)",
        needs="moe", layer="balancing",
    )  # fmt: skip
    mhmoe_balancing_rate: Optional[float] = option(
        "how far the bias of --mhmoe-balancing moves (default: 0.001; quantile: 1)",
        needs="moe", layer="balancing_rate", affects="training",
    )  # fmt: skip
    mhmoe_balance_assignment: Optional[BALANCE_CHOICES] = option(
        "balance loss: count first choices, as GShard does, all choices, or choices by their gate weights, as "
        "Branch-Train-MiX does (default: top1)",
        needs="moe", layer="balance_assignment", affects="training",
    )  # fmt: skip
    mhmoe_balance_scope: Optional[SCOPE_CHOICES] = option(
        "balance loss and z-loss of each process's own batch; under data parallelism global: of all processes' batches "
        "together, as one process would see them in one batch; or sequence: the mean of the sequences' own balance "
        "losses, as in DeepSeek-V3 (default: rank)",
        needs="moe", layer="balance_scope", affects="training",
    )  # fmt: skip
    mhmoe_expert_parallel_size: Optional[int] = option(
        "in training, processes that share one bank of experts; divides the experts and the processes (default: as "
        "many as possible). A checkpoint does not depend on it",
        needs="moe", affects="nothing",
    )  # fmt: skip
    mhmoe_parallel: Optional[PARALLEL_CHOICES] = option(
        "in training on several processes: experts: rows travel to the processes of the chosen experts (default); "
        "heads: with --mhmoe-expert-banks per-head each process has whole heads, and every token's slices travel "
        "before they are routed, as many whatever --moe-top-k",
        needs="heads", affects="nothing",
    )  # fmt: skip
    mhmoe_budget: Optional[BUDGET_CHOICES] = option(
        "expert width from a budget: params (paper 1: the parameters of the one-head layer with the same flags), "
        "flops (paper 2: its FLOPs and its parameters, by more and smaller experts), none: the dense networks' width "
        "or --moe-ffn-dim as it is (default: params for mhmoe_* without --moe-ffn-dim, else none)",
        needs="heads",
    )
    mhmoe_granularity: Optional[int] = option(
        "experts N times as narrow and N times as many, and for each sub-token N times --moe-top-k of them: the same "
        "products and parameters (default: 1); paper 2 takes the number of heads, one head makes it fine-grained MoE. "
        "A budget is that of the one-head layer without it",
        needs="moe",
    )
    mhmoe_latent_dim: Optional[int] = option(
        "inner width of the MoE layer, between the head projection and the merge projection (default: the model's); "
        "with one head and --mhmoe-router-input token a LatentMoE",
        needs="heads", layer="latent_dim",
    )  # fmt: skip
    mhmoe_expert_banks: Optional[BANK_CHOICES] = option(
        "shared: all heads have one router and one bank of experts (default); per-head: every head has a router and "
        "--moe-expert-count experts of its own (Multi-Head LatentMoE)",
        needs="heads", layer="expert_banks",
    )  # fmt: skip
    mhmoe_router_input: Optional[ROUTER_INPUT_CHOICES] = option(
        "what the router sees: the subtoken (default), or with one head the token before the head projection",
        needs="heads", layer="router_input",
    )  # fmt: skip
    mhmoe_subtoken_residual: Optional[bool] = option(
        "add each sub-token to its experts' sum (paper 1, equation 6)", needs="heads", layer="subtoken_residual"
    )
    mhmoe_projection_layers: Optional[int] = option(
        "layers in the head and in the merge projection, ReLU between them; 0 for no projections (default: 1)",
        needs="heads", layer="num_projection_layers",
    )  # fmt: skip
    mhmoe_head_projection: Optional[ON_OFF_CHOICES] = option(
        "the projection before the split (default: on with more than one head)",
        needs="heads", layer="head_projection", values=SWITCH,
    )  # fmt: skip
    mhmoe_merge_projection: Optional[ON_OFF_CHOICES] = option(
        "the projection after the merge (default: on with more than one head)",
        needs="heads", layer="merge_projection", values=SWITCH,
    )  # fmt: skip
    mhmoe_merge_norm: Optional[bool] = option(
        "RMSNorm between the merged sub-tokens and the merge projection (Stable LatentMoE)",
        needs="heads", layer="merge_norm",
    )  # fmt: skip
    mhmoe_projection_bias: Optional[ON_OFF_CHOICES] = option(
        "biases in the two projections; the official code has them even with --no-bias (default: off with --no-bias)",
        needs="heads", layer="projection_bias", values=SWITCH,
    )  # fmt: skip
    mhmoe_projection_gain: Optional[float] = option(
        "what the initial weights of the two projections are multiplied by; TorchScale's sub-LN multiplies attention's "
        "and the experts' by sqrt(ln(2 layers)), these are left alone (default: 1)",
        needs="heads", layer="projection_gain", affects="training",
    )  # fmt: skip
    mhmoe_no_split: Optional[bool] = option(
        "do not split tokens; experts work on whole tokens (paper 1, table 6)",
        needs="heads", layer="split", values=OPPOSITE,
    )  # fmt: skip
    mhmoe_shared_expert_dim: Optional[int] = option(
        "inner width of one more expert that every token uses (paper 2, table 2; default: 0, none)",
        needs="moe", layer="shared_expert_dim",
    )  # fmt: skip
    mhmoe_quantize: Optional[QUANTIZE_CHOICES] = option(
        "BitNet b1.58, weights of -1, 0 and 1 with one scale for each matrix and inputs of eight bits: experts, the "
        "shared one too, or all: attention and dense networks as well; never router, projections, embeddings and "
        "heads (paper 2, table 3; default: none)",
        layer="quantize_experts", values=QUANTIZED,
    )  # fmt: skip
    mhmoe_shared_experts: Optional[int] = option(
        "experts, of those there are after --mhmoe-granularity, that every token uses with weight 1, in place of as "
        "many of its choices: the same products and parameters; one head only (default: 0; deepseekmoe_*: 1)",
        needs="moe",
    )
    cpu: bool = option(None, affects="nothing", default=II("common.cpu"))
    tpu: bool = option(None, affects="nothing", default=II("common.tpu"))
    amp: bool = option(None, affects="nothing", default=II("common.amp"))
    fp16: bool = option(None, affects="nothing", default=II("common.fp16"))


@dataclass
class LanguageModelOptions(MoEOptions):
    """All options of a language model."""

    decoder_layers: Optional[int] = option("decoder layers", stack=True)
    decoder_embed_dim: Optional[int] = option("model dimension", layer="embed_dim", stack=True)
    decoder_ffn_embed_dim: Optional[int] = option(
        "inner width of the dense feed-forward networks, and of one expert of the reference MoE layer", stack=True
    )
    decoder_attention_heads: Optional[int] = option("attention heads (not MH-MoE heads)", stack=True)
    no_scale_embedding: Optional[bool] = option(
        "do not multiply the embedding by the square root of its width", stack=True
    )
    no_token_positional_embeddings: Optional[bool] = option(
        "add no positions to the embedding (default: sinusoidal ones, which have no parameters)"
    )
    decoder_learned_pos: Optional[bool] = option("add learned positions to the embedding in place of sinusoidal ones")
    rotary_embed: Optional[bool] = option("rotate queries and keys by their position", stack=True)
    xpos_rel_pos: Optional[bool] = option(
        "rotate and scale queries and keys by their position (TorchScale's xPos)", stack=True
    )
    no_share_decoder_input_output_embed: Optional[bool] = option(
        "give the output projection its own weights (default: the embedding's)"
    )
    share_decoder_input_output_embed: Optional[bool] = option(
        "use the embedding's weights as output projection; the default, accepted for the lineage's command lines",
        affects="nothing",
    )
    mhmoe_segment_length: Optional[int] = option(
        "with lory routing: tokens of a segment (default: 256)", needs="lory", layer="segment_length"
    )
    max_target_positions: Optional[int] = option(None, default=II("task.max_target_positions"))
    tokens_per_sample: int = option(None, default=II("task.tokens_per_sample"))


@dataclass
class EncoderOptions(FairseqDataclass):
    """What only BEiT-3's encoder has."""

    encoder_layers: Optional[int] = option("encoder layers", stack=True)
    encoder_embed_dim: Optional[int] = option("model dimension", layer="embed_dim", stack=True)
    encoder_ffn_embed_dim: Optional[int] = option(
        "inner width of the dense feed-forward networks, and of one expert of the reference MoE layer", stack=True
    )
    encoder_attention_heads: Optional[int] = option("attention heads (not MH-MoE heads)", stack=True)
    drop_path_rate: Optional[float] = option(
        "stochastic depth: the share of samples that leave out a block, rising to this at the last layer (default: 0)",
        stack=True, affects="training",
    )  # fmt: skip
    mhmoe_modality_experts: Optional[MODALITY_CHOICES] = option(
        "shared: images and text go to one pool of experts; separate: each has as many experts of its own "
        "(default: shared)",
        needs="moe",
    )


@dataclass
class BEiT3Options(EncoderOptions, MoEOptions):
    """All options of BEiT-3."""

    img_size: int = option(None, stack=True, default=II("task.img_size"))
    patch_size: int = option(None, stack=True, default=II("task.patch_size"))
    max_text_length: int = option(None, stack=True, default=II("task.max_text_length"))


def options_with(**known: Any) -> list[str]:
    """Returns the names of all models' options whose metadata are ``known``, as :func:`option` was told them.

    >>> options_with(needs="xmoe", layer="router_dim")
    ['mhmoe_router_dim']
    """
    kinds = (LanguageModelOptions, BEiT3Options)
    fields = {entry.name: entry.metadata for kind in kinds for entry in dataclasses.fields(kind) if entry.metadata}
    return [name for name, metadata in fields.items() if known.items() <= metadata.items()]
