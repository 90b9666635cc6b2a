"""MH-MoE among its relatives: successors, single-head baselines, soft merging and experts of domains, at one budget.

Every model has about the parameters and the products of ``smoe``; a report's table shows what is left. BTX's are
exactly those: its updates are shared between a dense seed, branches and their mix (:mod:`.branches`).
"""

from ..analysis.reports.tables import PaperTable
from .language_models import ENGLISH, claims
from .spec import Experiment, Stage

_NO_PAPER = PaperTable("none", "perplexity")  # nobody has published these models side by side
SINGLE_HEAD = ("smoe", "xmoe", "xmoe-g4", "olmoe", "deepseekmoe", "smoe-loss-free", "remoe", "latentmoe")
MULTI_HEAD = ("mhmoe-flops-h2", "mhmoe-flops", "mhmoe-flops-g4", "mhmoe-flops-loss-free", "mhmoe-banks")
OTHERS = ("lory", "demix", "btx")

EXPERIMENTS = (
    Experiment("family", "MH-MoE, its successors and single-head baselines, soft merging, experts of domains",
        "english_lm", (Stage(ENGLISH),), (*SINGLE_HEAD, *MULTI_HEAD, *OTHERS), reference="smoe",
        claims=claims(_NO_PAPER, *(f"{model} < smoe" for model in (*SINGLE_HEAD[2:], *MULTI_HEAD[1:], *OTHERS)),
            "mhmoe-banks < mhmoe-flops", "mhmoe-flops-g4 < deepseekmoe")),
)  # fmt: skip
