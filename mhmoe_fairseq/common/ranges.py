"""Which numbers a flag or a field of a configuration may hold: stated here, checked by one function.

NaN compares false with everything, so that ``if value < 0`` lets it through; a training then ends much later and blames
something else. Everything that reads a number from a user asks a :class:`Range`.
"""

import ast
import math
import operator
from dataclasses import dataclass
from typing import Any

from .errors import UserError

_LARGEST_INTEGER = 2**31 - 1  # offsets of rows are 32-bit integers
_LARGEST_FLOAT = 3.4e38  # of float32


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds; an infinite one means the largest 32-bit number.

    Args:
        open_low, open_high: whether the bound itself is outside.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    integer: bool = False

    def problem(self, value: Any) -> str | None:
        """The rule that ``value`` breaks, to stand behind its name; None where it is allowed."""
        is_number = isinstance(value, int if self.integer else (int, float)) and not isinstance(value, bool)
        largest = _LARGEST_INTEGER if self.integer else _LARGEST_FLOAT
        low = -_LARGEST_FLOAT if self.low == -math.inf else self.low
        high = largest if self.high == math.inf else self.high
        is_above = operator.gt if self.open_low else operator.ge
        is_below = operator.lt if self.open_high else operator.le
        # Written so that NaN, with which no comparison is true, is refused.
        is_allowed = is_number and is_above(value, low) and is_below(value, high)
        return None if is_allowed else f"must be {self._rule()}"

    def _rule(self) -> str:
        kind = ", an integer" if self.integer else ""
        if self.high < math.inf:
            return f"in {'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}{kind}"
        if self.low == -math.inf:
            return "an integer below 2**31" if self.integer else "a finite number"
        bound = "positive" if self.open_low and self.low == 0 else f"at least {self.low}"
        return f"{bound}, an integer below 2**31" if self.integer else f"{bound} and finite"


ANY = Range()
POSITIVE = Range(low=0, open_low=True)
SHARE = Range(low=0, high=1)
BELOW_ONE = Range(low=0, high=1, open_high=True)
INSIDE = Range(low=0, high=1, open_low=True, open_high=True)
COUNT = Range(low=0, integer=True)
SIZE = Range(low=1, integer=True)
SEED = Range(low=0, high=2**32 - 1, integer=True)  # what PyTorch, NumPy, SentencePiece and random all take

# By the name of the flag, in whatever configuration it stands. A test goes through all of our configurations and the
# groups of fairseq's that our tasks read, and fails where a number is missing here.
_FLAGS_BY_RANGE = {
    BELOW_ONE: """dropout attention_dropout activation_dropout drop_path_rate label_smoothing drop_worst_ratio
        mhmoe_head_dropout adam_betas""",
    SIZE: """decoder_layers decoder_embed_dim decoder_ffn_embed_dim decoder_attention_heads encoder_layers
        encoder_embed_dim encoder_ffn_embed_dim encoder_attention_heads img_size patch_size max_target_positions
        tokens_per_sample moe_expert_count moe_top_k moe_ffn_dim mhmoe_heads_number mhmoe_granularity
        mhmoe_latent_dim mhmoe_expert_groups mhmoe_kept_groups mhmoe_router_dim mhmoe_segment_length
        mhmoe_expert_parallel_size caption_beam batch_size batch_size_valid model_parallel_size update_freq
        log_interval""",
    COUNT: """moe_freq mhmoe_projection_layers mhmoe_shared_expert_dim mhmoe_shared_experts drop_worst_after
        data_buffer_size max_epoch force_anneal""",
    # moe_eval_capacity_token_fraction: 0 or below means the training rule
    ANY: "moe_eval_capacity_token_fraction stop_min_lr warmup_init_lr min_lr lr_period_updates",
    Range(integer=True): "output_dictionary_size",
    POSITIVE: """mhmoe_balancing_rate mhmoe_capacity_factor mhmoe_gate_scale mhmoe_projection_gain
        mhmoe_router_temperature head_lr_multiplier t_mult""",
    Range(low=0): """moe_gate_loss_wt mhmoe_z_loss_wt sentencepiece_alpha lr adam_eps weight_decay clip_norm max_update
        stop_time_hours warmup_updates lr_shrink max_lr end_learning_rate power total_num_update second_lr
        second_weight_decay""",
    Range(low=0, high=100): "multilang_sampling_alpha caption_length_penalty",  # of powers that a number can hold
    INSIDE: "image_mask_prob text_mask_prob pair_text_mask_prob caption_mask_prob",
    Range(low=0, high=1, open_low=True): "layer_decay",
    SHARE: "ema_decay",
    SEED: "seed",
    Range(low=2, integer=True): "num_classes caption_max_len",  # the latter a word and the end
    Range(low=3, integer=True): "max_text_length",  # <s>, a token and </s>
}
FLAGS = {name: allowed for allowed, names in _FLAGS_BY_RANGE.items() for name in names.split()}


def flag(name: str) -> str:
    """An option as typed."""
    return "--" + name.replace("_", "-")


def check_flag(name: str, value: Any) -> None:
    """Raises ``UserError`` for a number outside the range that :data:`FLAGS` gives ``name``.

    Args:
        value: a number, several in a list or as text (``--adam-betas "(0.9, 0.98)"``); None means not given.
    """
    for number in _numbers(value):
        if problem := FLAGS[name].problem(number):
            raise UserError(f"{flag(name)} ({value}) {problem}")


def check_flags(values: Any) -> None:
    """Checks all attributes that :data:`FLAGS` knows, of a dataclass, a namespace or fairseq's configuration."""
    for name in FLAGS:
        check_flag(name, getattr(values, name, None))


def _numbers(value: Any) -> list[Any]:
    if value is None or (isinstance(value, str) and value.startswith("${")):  # another group's, not filled in
        return []
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # "(nan, 0.9)": no number
            return [value]
    return [value] if isinstance(value, (int, float)) or not hasattr(value, "__iter__") else list(value)
