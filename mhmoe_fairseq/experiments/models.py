"""The models of all tables, by the names that runs and reports give them."""

from .spec import Model

# Every second layer is an MoE layer, top-2. At paper scale the router is as in the paper's appendix, else TorchScale's.
MOE = "--moe-freq 2 --moe-top-k 2 --moe-expert-count 8"
PAPER_ROUTER = "--mhmoe-router-preset p1"
PROJECTIONS = "--mhmoe-head-projection on --mhmoe-merge-projection on"
# The official repository's flags (github.com/yushuiwx/MH-MoE, scripts/run.sh). As published they never set the number
# of heads, whose default there is 1: a plain sparse MoE. Here it is explicit; official-h1 is what was published.
OFFICIAL = """
    --moe-expert-count 8 --moe-freq 2 --moe-top-k 1 --moe-gating-use-fp32 --moe-normalize-gate-prob-before-dropping
    --moe-eval-capacity-token-fraction -1.0 --activation-fn silu --rotary-embed --rms-norm --no-bias
    --no-token-positional-embeddings --no-scale-embedding --mhmoe-router linear --mhmoe-routing capacity
"""
EXPERTS = (16, 32, 64, 128, 256)  # 8 is a name's own
HEADS = (2, 6, 8, 12, 16)  # 4 is a name's own; the CPU scale's width is not divided by 6 and 12
TOP_K = (3, 4)  # 2 is a name's own
MHMOE_VARIANTS = {
    "": "",
    **{f"-e{experts}": f"--moe-expert-count {experts}" for experts in EXPERTS},
    **{f"-h{heads}": f"--mhmoe-heads-number {heads}" for heads in HEADS},
    **{f"-h2-k{top_k}": f"--mhmoe-heads-number 2 --moe-top-k {top_k}" for top_k in TOP_K},
    "-no-splitting": "--mhmoe-no-split",
    "-no-projections": "--mhmoe-projection-layers 0",
    "-projections-2": "--mhmoe-projection-layers 2",
    "-projections-3": "--mhmoe-projection-layers 3",
    "-static": "--mhmoe-routing capacity",
    # What may decide, one setting at a time (the experiment "causes").
    "-subtoken-residual": "--mhmoe-subtoken-residual",
    "-gain": "--mhmoe-projection-gain 1.44",  # sub-LN's own of four layers, sqrt(ln 8)
    "-p1-router": PAPER_ROUTER,
    "-weak-balance": "--moe-gate-loss-wt 0.001",
    "-kept": "--keep-interval-updates -1",  # the same model, all of its checkpoints kept
}
# X-MoE and MH-MoE (flops) with experts so many times as narrow and as many, and top-k times as many of them: the same
# products and parameters, only an expert's width against its input's is another (MH-MoE's: 14, a dense network's: 4).
# Four times is the second paper's own choice for four heads: its top-k is the sparse model's times the heads.
NARROWER = (2, 4)
# Kind and flags, experts, width of one at CPU and at paper scale.
_WIDTHS = {
    "xmoe": ("xmoe", "", 8, 512, 3072),
    "mhmoe-flops": ("mhmoe", "--mhmoe-heads-number 4 --mhmoe-budget none", 35, 448, 2688),
}
# The second paper's networks: SwiGLU, and for the rest the official flags above without limited capacity.
SWIGLU = """
    --activation-fn silu --rotary-embed --rms-norm --no-bias --no-token-positional-embeddings --no-scale-embedding
"""
# Name -> kind, experts, top-k, heads, width of an expert as a share of the dense networks'. Both shares of MH-MoE are
# what keeps the sparse model's FLOPs; its experts are the paper's, 3 % off equal parameters (41.3 and 93 by its rule).
SWIGLU_MODELS = {
    "smoe-swiglu": ("smoe", 8, 1, 1, 1.0),
    "fine-grained": ("smoe", 16, 2, 1, 1 / 2),
    "mhmoe-swiglu-h2": ("mhmoe", 40, 2, 2, 3 / 8),
    "mhmoe-swiglu-h3": ("mhmoe", 96, 3, 3, 1 / 4),
}
SWIGLU_WIDTHS = {"cpu": 512, "paper": 2048}  # of the dense networks, for models 192 and 768 wide
HEAD_LAYER, MERGE_LAYER = "--mhmoe-head-projection {}", "--mhmoe-merge-projection {}"
SWIGLU_VARIANTS = {
    "": "",
    "-shared": "--mhmoe-shared-expert-dim {width}",
    "-projections": f"{HEAD_LAYER} {MERGE_LAYER}".format("on", "on"),
    "-no-projections": f"{HEAD_LAYER} {MERGE_LAYER}".format("off", "off"),
    "-head-only": f"{HEAD_LAYER} {MERGE_LAYER}".format("on", "off"),
    "-merge-only": f"{HEAD_LAYER} {MERGE_LAYER}".format("off", "on"),
}


def _swiglu(kind: str, experts: int, top_k: int, heads: int, share: float, variant: str) -> Model:
    flags = f"""
        {SWIGLU} --moe-freq 2 --moe-expert-count {experts} --moe-top-k {top_k} --moe-gating-use-fp32
        --mhmoe-router linear {f"--mhmoe-heads-number {heads}" if heads > 1 else ""}
    """
    cpu, paper = (
        f"--moe-ffn-dim {share * width:.0f} {variant.format(width=width)}" for width in SWIGLU_WIDTHS.values()
    )
    return Model(kind, f"{flags} {cpu}", paper)


MODELS = {
    "dense": Model("dense"),
    "smoe": Model("smoe", MOE),
    "smoe-e128-k1": Model("smoe", f"{MOE} --moe-expert-count 128 --moe-top-k 1"),
    "smoe-e256": Model("smoe", f"{MOE} --moe-expert-count 256"),
    "xmoe": Model("xmoe", MOE, PAPER_ROUTER),
    **{f"xmoe-e{experts}": Model("xmoe", f"{MOE} --moe-expert-count {experts}", PAPER_ROUTER) for experts in EXPERTS},
    **{f"xmoe-k{top_k}": Model("xmoe", f"{MOE} --moe-top-k {top_k}", PAPER_ROUTER) for top_k in TOP_K},
    "xmoe-static": Model("xmoe", f"{MOE} --mhmoe-routing capacity", PAPER_ROUTER),
    # What MH-MoE keeps of X-MoE: its parameters (the paper's tables), or its FLOPs and parameters (the second paper).
    **{
        f"mhmoe-{budget}{name}": Model(
            "mhmoe", f"{MOE} --mhmoe-heads-number 4 --mhmoe-budget {budget} {flags}", PAPER_ROUTER
        )
        for budget in ("params", "flops")
        for name, flags in MHMOE_VARIANTS.items()
    },
    "mhmoe-flops-linear-router": Model(
        "mhmoe", f"{MOE} --mhmoe-heads-number 4 --mhmoe-budget flops --mhmoe-router linear"
    ),
    **{
        f"{name}-narrower-{times}": Model(
            kind,
            f"{MOE} {flags} --moe-expert-count {experts * times} --moe-top-k {2 * times} --moe-ffn-dim {cpu // times}",
            f"{PAPER_ROUTER} --moe-ffn-dim {paper // times}",
        )
        for name, (kind, flags, experts, cpu, paper) in _WIDTHS.items()
        for times in NARROWER
    },
    # The dense network between two projections: an MoE layer of one expert, which every token uses with weight 1.
    "dense-projections": Model("xmoe", f"{MOE} --moe-expert-count 1 --moe-top-k 1 {PROJECTIONS}", PAPER_ROUTER),
    "xmoe-projections": Model("xmoe", f"{MOE} {PROJECTIONS}", PAPER_ROUTER),
    **{f"official-h{heads}": Model("mhmoe", f"{OFFICIAL} --mhmoe-heads-number {heads}") for heads in (1, 2, 4)},
    "dense-swiglu": Model("dense", SWIGLU),
    **{
        f"{name}{variant}": _swiglu(*parts, flags)
        for name, parts in SWIGLU_MODELS.items()
        for variant, flags in SWIGLU_VARIANTS.items()
    },
}
