"""Configuration of MH-MoE language models for transformers 5.10 and later; needs no other package.

Every number of experts has a name of its own: under ``num_experts`` serving engines would look for experts as wide as
the model and replace ours, which are as wide as a sub-token.
"""

from typing import Any

from transformers import PreTrainedConfig

_CHOICES = {
    "hidden_act": ("gelu", "relu", "silu", "swiglu7"),
    "absolute_positions": ("sinusoidal", "learned", "none"),
    "relative_positions": ("rotary", "xpos", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "mhmoe_router": ("xmoe", "linear"),
    "mhmoe_router_input": ("subtoken", "token"),
    "mhmoe_expert_banks": ("shared", "per-head"),
    "mhmoe_gate_score": ("softmax", "sigmoid", "logit", "relu"),
    "mhmoe_group_score": ("max", "top2"),
    "mhmoe_balance": ("top1", "topk", "gates"),
    "mhmoe_balance_scope": ("batch", "sequence"),
}
_AT_LEAST_ONE = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
_OF_EXPERTS = (
    "mhmoe_experts mhmoe_top_k mhmoe_heads mhmoe_expert_size mhmoe_router_dim mhmoe_expert_groups mhmoe_kept_groups "
    "inner_size"
)
_AT_LEAST_ZERO = "mhmoe_freq mhmoe_shared_size mhmoe_head_projections mhmoe_merge_projections"


class MHMoEConfig(PreTrainedConfig):
    """What decides the function of an ``mhmoe_lm`` model, and what it was trained with.

    Args:
        hidden_act: of dense networks and experts; ``silu`` means SwiGLU, with a gate matrix, and ``swiglu7`` the
            clamped one.
        absolute_positions, relative_positions: added to the embedding; rotating queries and keys.
        post_norm: normalise behind the residual connection, whose other branch is multiplied by ``residual_scale``.
        sub_norm: a norm on attention's and dense networks' inner activation; the experts' is ``mhmoe_expert_norm``,
            whose scale and shift are part of ``down_proj``.
        mhmoe_freq: every n-th layer has experts; 0 for none.
        mhmoe_heads: sub-tokens that each token is split into.
        mhmoe_head_projections, mhmoe_merge_projections: linear maps before the split and after the merge.
        mhmoe_merge_norm: RMSNorm in front of the latter.
        mhmoe_latent_size: width between them, which is split; None for ``hidden_size``.
        mhmoe_router_input: what the router sees: the sub-token, or the whole token before the head projection.
        mhmoe_expert_banks: one router and ``mhmoe_experts`` experts for all heads, or of each head its own.
        mhmoe_gate_score: what experts are chosen and weighed by: a softmax of the logits, or sigmoids; ``logit``: the
            softmax, and a selection bias is added to the logits; or ``relu``: all with a positive logit, weighed by it,
            ``mhmoe_top_k`` on average (ReMoE).
        mhmoe_normalize_gates, mhmoe_gate_scale: what becomes of two or more chosen scores, and then of all.
        mhmoe_expert_groups, mhmoe_kept_groups: equal groups of experts, of which a sub-token chooses from the best, by
            their largest score or (``mhmoe_group_score``) the sum of their two largest.
        mhmoe_selection_bias: whether a bias of each expert is added to the scores that choose, not to those that weigh.
        mhmoe_balance_weight: of the balance loss in the loss, when ``output_router_logits`` asks for it.
        fairseq: settings of the fairseq model and task, for the way back.

    Raises:
        ValueError: naming the field, its value and the rule.
    """

    model_type = "mhmoe_lm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    hidden_act: str = "gelu"
    absolute_positions: str = "sinusoidal"
    relative_positions: str = "none"
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    sub_norm: bool = True
    post_norm: bool = False
    residual_scale: float = 1.0
    use_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    mhmoe_freq: int = 2
    mhmoe_experts: int = 8
    mhmoe_top_k: int = 2
    mhmoe_heads: int = 1
    mhmoe_expert_size: int = 3072
    mhmoe_expert_norm: bool = True
    mhmoe_shared_size: int = 0
    mhmoe_head_projections: int = 0
    mhmoe_merge_projections: int = 0
    mhmoe_latent_size: int | None = None
    mhmoe_projection_bias: bool = True
    mhmoe_merge_norm: bool = False
    mhmoe_subtoken_residual: bool = False
    mhmoe_router: str = "xmoe"
    mhmoe_router_dim: int = 16
    mhmoe_router_cosine: bool = False
    mhmoe_router_temperature: float | None = None
    mhmoe_router_fp32: bool = True
    mhmoe_router_input: str = "subtoken"
    mhmoe_expert_banks: str = "shared"
    mhmoe_gate_score: str = "softmax"
    mhmoe_normalize_gates: bool = True
    mhmoe_gate_scale: float = 1.0
    mhmoe_expert_groups: int = 1
    mhmoe_kept_groups: int = 1
    mhmoe_group_score: str = "max"
    mhmoe_selection_bias: bool = False
    mhmoe_balance: str = "top1"
    mhmoe_balance_scope: str = "batch"
    mhmoe_balance_weight: float = 0.01
    output_router_logits: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 1
    tie_word_embeddings: bool = True
    fairseq: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields."""
        for name, allowed in _CHOICES.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for least, names in enumerate((_AT_LEAST_ZERO, f"{_AT_LEAST_ONE} {_OF_EXPERTS}")):
            for name in names.split():
                value = getattr(self, name)
                self._require(name, type(value) is int and value >= least, f"an integer of at least {least}")
        heads, parts = self.num_attention_heads, self.mhmoe_heads
        self._require("num_attention_heads", self.hidden_size % heads == 0, f"a divisor of {self.hidden_size}")
        self._require("mhmoe_heads", self.inner_size % parts == 0, f"a divisor of {self.inner_size}")
        experts, groups = self.mhmoe_experts, self.mhmoe_expert_groups
        self._require("mhmoe_expert_groups", experts % groups == 0, f"a divisor of {experts}")
        self._require("mhmoe_kept_groups", self.mhmoe_kept_groups <= groups, f"at most {groups}")
        most = experts // groups * self.mhmoe_kept_groups
        self._require("mhmoe_top_k", self.mhmoe_top_k <= most, f"at most {most}")
        sees_part = self.mhmoe_router_input == "subtoken" or parts == 1
        self._require("mhmoe_router_input", sees_part, f"subtoken where tokens have {parts}")
        self._require("mhmoe_freq", self.mhmoe_freq <= self.num_hidden_layers, f"at most {self.num_hidden_layers}")
        super().__post_init__(**kwargs)

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"config.json: {name} ({getattr(self, name)!r}) must be {rule}")

    @property
    def inner_size(self) -> int:
        """Width between the projections."""
        return self.hidden_size if self.mhmoe_latent_size is None else self.mhmoe_latent_size

    @property
    def subtoken_size(self) -> int:
        """Width of what an expert sees."""
        return self.inner_size // self.mhmoe_heads

    @property
    def banks(self) -> int:
        """Banks of experts, each with a router."""
        return self.mhmoe_heads if self.mhmoe_expert_banks == "per-head" else 1

    @property
    def expert_bias(self) -> bool:
        """Whether experts have biases: with a norm inside them always, since its shift is one of them."""
        return self.use_bias or self.mhmoe_expert_norm
