"""MH-MoE among its relatives: successors, single-head baselines, soft merging and experts of domains, at one budget.

An MoE layer has ``smoe``'s parameters within 6 %, and its FLOPs within 4 %, Lory's within 9 %: a report's table shows
both. BTX's are exactly those: its updates are shared between a dense seed, branches and their mix (:mod:`.branches`).
DEMix has no such budget: a token passes its domain's expert alone, half of the FLOPs, one of eleven, 11 / 8 of the
parameters. Its claim is about text whose domain it is not told: then every expert reads it.
"""

from ..analysis.reports.claims import Claim
from .language_models import ENGLISH, NO_PAPER, claims
from .spec import Experiment, Stage

SINGLE_HEAD = ("smoe", "xmoe", "xmoe-g4", "olmoe", "deepseekmoe", "smoe-loss-free", "remoe", "latentmoe")
MULTI_HEAD = ("mhmoe-flops-h2", "mhmoe-flops", "mhmoe-flops-g4", "mhmoe-flops-loss-free", "mhmoe-banks")
OTHERS = ("lory", "demix", "btx")
_RAW, *_RENORMALISED = (f"mhmoe-flops-loss-free{gates}" for gates in ("", "-chosen", "-softmax"))

EXPERIMENTS = (
    Experiment("family", "MH-MoE, its successors and single-head baselines, soft merging, experts of domains",
        "english_lm", (Stage(ENGLISH),), (*SINGLE_HEAD, *MULTI_HEAD, *OTHERS), reference="smoe",
        claims=(
            *claims(NO_PAPER, *(f"{model} < smoe" for model in (*SINGLE_HEAD[1:], *MULTI_HEAD, "lory", "btx")),
                "olmoe < xmoe-g4", "deepseekmoe < xmoe-g4", "mhmoe-flops-g4 < deepseekmoe",
                "mhmoe-banks < mhmoe-flops"),
            Claim("demix, not told the domain of a text, has a lower perplexity than smoe", "demix", "smoe",
                metric="perplexity", what="domain mixture", reference_what="perplexity"),
        )),
    Experiment("loss-free", "MH-MoE balanced without a loss: gates as they are, adding up to 1, or of a softmax",
        "english_lm", (Stage(ENGLISH),), ("mhmoe-flops", _RAW, *_RENORMALISED), reference="mhmoe-flops",
        claims=(
            *claims(NO_PAPER, f"{_RAW} < mhmoe-flops"),
            *(claim for model in _RENORMALISED for claim in (
                *claims(NO_PAPER, f"{model} < {_RAW}", f"{model} < mhmoe-flops"),
                *claims(NO_PAPER, f"{model} < {_RAW}", metric="active experts"),
            )),
        )),
)  # fmt: skip
