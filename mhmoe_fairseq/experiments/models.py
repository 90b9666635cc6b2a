"""The models of all tables, by the names that runs and reports give them."""

from dataclasses import replace

from .spec import Model

# Every second layer is an MoE layer, top-2. At paper scale the router is as in the paper's appendix, else TorchScale's.
MOE = "--moe-freq 2 --moe-top-k 2 --moe-expert-count 8"
PAPER_ROUTER = "--mhmoe-router-preset p1"
BUDGETS = ("params", "flops")
PROJECTIONS = "--mhmoe-head-projection on --mhmoe-merge-projection on"
# The official repository's flags (github.com/yushuiwx/MH-MoE, scripts/run.sh). As published they never set the number
# of heads, whose default there is 1: a plain sparse MoE. Here it is explicit; official-h1 is what was published.
OFFICIAL = """
    --moe-expert-count 8 --moe-freq 2 --moe-top-k 1 --moe-gating-use-fp32 --moe-normalize-gate-prob-before-dropping
    --moe-eval-capacity-token-fraction -1.0 --activation-fn silu --rotary-embed --rms-norm --no-bias
    --no-token-positional-embeddings --no-scale-embedding --mhmoe-router linear --mhmoe-routing capacity
"""
# A selection bias in place of the balance loss: gate weights are sigmoids as they are (arXiv 2408.15664), sigmoids
# that add up to 1 (arXiv 2412.19437), or a softmax's, whose bias moves in proportion (arXiv 2408.15664, appendix C).
_LOSS_FREE = "--moe-gate-loss-wt 0 --mhmoe-gate-score {} --mhmoe-normalize-gates {} --mhmoe-balancing {}"
LOSS_FREE = _LOSS_FREE.format("sigmoid", "off", "bias-sign")
LOSS_FREE_CHOSEN = _LOSS_FREE.format("sigmoid", "on", "bias-sign")
LOSS_FREE_SOFTMAX = _LOSS_FREE.format("softmax", "on", "bias-proportional")
EXPERTS = (16, 32, 64, 128, 256)  # 8 is a name's own
HEADS = (2, 6, 8, 12, 16)  # 4 is a name's own; the CPU scale's width is not divided by 6 and 12
TOP_K = (3, 4)  # 2 is a name's own
# Experts so many times as narrow, as many, and top-k times as many of them. 4 is the second paper's choice for four
# heads: experts are 3.5 times as wide as what they see, X-MoE's 4 times; without it MH-MoE's are 14 times as wide.
GRANULARITY = (2, 4)
# The weights of experts' second map learn at a fourth or a sixteenth of the rate (the experiment "expert-rates").
SLOWER = {f"-slower-{times}": f"--lr-factors experts.fc2_weight={1 / times}" for times in (4, 16)}
MHMOE_VARIANTS = {
    "": "",
    **SLOWER,
    **{f"-e{experts}": f"--moe-expert-count {experts}" for experts in EXPERTS},
    **{f"-h{heads}": f"--mhmoe-heads-number {heads}" for heads in HEADS},
    **{f"-h2-k{top_k}": f"--mhmoe-heads-number 2 --moe-top-k {top_k}" for top_k in TOP_K},
    **{f"-g{times}": f"--mhmoe-granularity {times}" for times in GRANULARITY},
    "-no-splitting": "--mhmoe-no-split",
    "-no-splitting-projections-3": "--mhmoe-no-split --mhmoe-projection-layers 3",
    "-no-projections": "--mhmoe-projection-layers 0",
    "-projections-2": "--mhmoe-projection-layers 2",
    "-projections-3": "--mhmoe-projection-layers 3",
    "-projections-3-slower-16": f"--mhmoe-projection-layers 3 {SLOWER['-slower-16']}",
    "-no-projections-slower-16": f"--mhmoe-projection-layers 0 {SLOWER['-slower-16']}",
    "-static": "--mhmoe-routing capacity",
    # What may decide, one setting at a time (the experiment "causes").
    "-subtoken-residual": "--mhmoe-subtoken-residual",
    "-gain": "--mhmoe-projection-gain 1.44",  # sub-LN's own of four layers, sqrt(ln 8)
    "-p1-router": PAPER_ROUTER,
    "-p1": f"{PAPER_ROUTER} --mhmoe-subtoken-residual",  # the first paper's layer: appendix's router, equation 6
    "-weak-balance": "--moe-gate-loss-wt 0.001",
    "-loss-free": LOSS_FREE,
    "-loss-free-chosen": LOSS_FREE_CHOSEN,
    "-loss-free-softmax": LOSS_FREE_SOFTMAX,
    "-kept": "--keep-interval-updates -1",  # the same model, all of its checkpoints kept
}
# The second paper's networks: SwiGLU, and for the rest the official flags above without limited capacity.
SWIGLU = """
    --activation-fn silu --rotary-embed --rms-norm --no-bias --no-token-positional-embeddings --no-scale-embedding
"""
# Name -> kind, experts, heads, granularity, width of an expert as a share of the dense networks', before granularity,
# which makes top-k the number of heads. MH-MoE's share is what keeps the sparse model's FLOPs; its experts are the
# paper's, 40 and 96 in the end, 3 % off equal parameters (41.3 and 93 by its rule).
SWIGLU_MODELS = {
    "smoe-swiglu": ("smoe", 8, 1, 1, 1.0),
    "fine-grained": ("smoe", 8, 1, 2, 1.0),
    "mhmoe-swiglu-h2": ("mhmoe", 20, 2, 2, 3 / 4),
    "mhmoe-swiglu-h3": ("mhmoe", 32, 3, 3, 3 / 4),
}
SWIGLU_WIDTHS = {"cpu": 256, "paper": 2048}  # of the dense networks, for models 96 and 768 wide
# Mixtral's proportions: every layer has experts, 3.5 times as wide as the model, of which each token uses two of eight.
MIXTRAL = f"{SWIGLU} --moe-freq 1 --moe-expert-count 8 --moe-top-k 2 --mhmoe-router linear"
BITNET = "--mhmoe-quantize all"
HEAD_LAYER, MERGE_LAYER = "--mhmoe-head-projection {}", "--mhmoe-merge-projection {}"
SWIGLU_VARIANTS = {
    "": "",
    "-shared": "--mhmoe-shared-expert-dim {width}",
    "-bitnet": BITNET,
    "-projections": f"{HEAD_LAYER} {MERGE_LAYER}".format("on", "on"),
    "-no-projections": f"{HEAD_LAYER} {MERGE_LAYER}".format("off", "off"),
    "-head-only": f"{HEAD_LAYER} {MERGE_LAYER}".format("on", "off"),
    "-merge-only": f"{HEAD_LAYER} {MERGE_LAYER}".format("off", "on"),
}


def _swiglu(kind: str, experts: int, heads: int, granularity: int, share: float, variant: str) -> Model:
    flags = f"""
        {SWIGLU} --moe-freq 2 --moe-expert-count {experts} --moe-top-k 1 --moe-gating-use-fp32
        --mhmoe-router linear {f"--mhmoe-heads-number {heads}" if heads > 1 else ""}
        {f"--mhmoe-granularity {granularity}" if granularity > 1 else ""}
    """
    cpu, paper = (
        f"--moe-ffn-dim {share * width:.0f} {variant.format(width=width)}" for width in SWIGLU_WIDTHS.values()
    )
    return Model(kind, f"{flags} {cpu}", paper)


MODELS = {
    "dense": Model("dense"),
    "smoe": Model("smoe", MOE),
    # An expert for each of the mixed corpus's eleven domains, and no router (DEMix).
    "demix": Model("smoe", "--moe-freq 2 --moe-expert-count 11 --moe-top-k 1 --mhmoe-routing domain", mixture="exact"),
    # Branch-Train-MiX: the sparse model, with experts of branches on the mixed corpus's seven largest domains, and the
    # last of the seed.
    "btx": Model("smoe", MOE, branches=("gcide", "linux", "wordnet", "brown", "python", "bible", "foldoc")),
    "smoe-loss-free": Model("smoe", f"{MOE} {LOSS_FREE}"),
    "smoe-e128-k1": Model("smoe", f"{MOE} --moe-expert-count 128 --moe-top-k 1"),
    "smoe-e256": Model("smoe", f"{MOE} --moe-expert-count 256"),
    # Single-head baselines at the budget of smoe, which but for its router is xmoe's.
    "deepseekmoe": Model("deepseekmoe", MOE),
    # MH-MoE's successors at the sparse model's FLOPs: a bank of experts for each head; one head, a quarter as wide,
    # routed by the whole token.
    "mhmoe-banks": Model(
        "mhmoe", f"{MOE} --mhmoe-heads-number 4 --mhmoe-budget flops --mhmoe-expert-banks per-head", PAPER_ROUTER
    ),
    "latentmoe": Model(
        "mhmoe",
        f"{MOE} --mhmoe-heads-number 1 --mhmoe-budget flops --mhmoe-granularity 4 --mhmoe-router-input token "
        "--mhmoe-latent-dim 32",
        f"{PAPER_ROUTER} --mhmoe-latent-dim 192",
    ),
    "olmoe": Model("olmoe", f"{MOE} --mhmoe-z-loss-wt 0.001"),
    "remoe": Model("remoe", f"{MOE} --moe-gate-loss-wt 1"),
    **{f"xmoe{name}": Model("xmoe", f"{MOE} {flags}", PAPER_ROUTER) for name, flags in {"": "", **SLOWER}.items()},
    "xmoe-g4-slower-4": Model("xmoe", f"{MOE} --mhmoe-granularity 4 {SLOWER['-slower-4']}", PAPER_ROUTER),
    **{f"xmoe-e{experts}": Model("xmoe", f"{MOE} --moe-expert-count {experts}", PAPER_ROUTER) for experts in EXPERTS},
    **{f"xmoe-k{top_k}": Model("xmoe", f"{MOE} --moe-top-k {top_k}", PAPER_ROUTER) for top_k in TOP_K},
    **{f"xmoe-g{times}": Model("xmoe", f"{MOE} --mhmoe-granularity {times}", PAPER_ROUTER) for times in GRANULARITY},
    # Lory, whose tokens pass one network, averaged over all experts for each segment: about X-MoE's FLOPs, of which
    # averaging has its part, at its parameters (8 experts of 512, two for each token; at paper scale of 3,072).
    "lory": Model(
        "smoe",
        "--moe-freq 2 --mhmoe-routing lory --mhmoe-segment-length 32 --moe-expert-count 5 --moe-ffn-dim 816",
        "--mhmoe-segment-length 256 --moe-expert-count 4 --moe-ffn-dim 6144",
    ),
    "xmoe-p1": Model("xmoe", f"{MOE} {PAPER_ROUTER}"),
    "xmoe-static": Model("xmoe", f"{MOE} --mhmoe-routing capacity", PAPER_ROUTER),
    # What MH-MoE keeps of X-MoE: its parameters (the paper's tables), or its FLOPs and parameters (the second paper).
    **{
        f"mhmoe-{budget}{name}": Model(
            "mhmoe", f"{MOE} --mhmoe-heads-number 4 --mhmoe-budget {budget} {flags}", PAPER_ROUTER
        )
        for budget in BUDGETS
        for name, flags in MHMOE_VARIANTS.items()
    },
    "mhmoe-flops-linear-router": Model(
        "mhmoe", f"{MOE} --mhmoe-heads-number 4 --mhmoe-budget flops --mhmoe-router linear"
    ),
    # The dense network between two projections: an MoE layer of one expert, which every token uses with weight 1.
    "dense-projections": Model("xmoe", f"{MOE} --moe-expert-count 1 --moe-top-k 1 {PROJECTIONS}", PAPER_ROUTER),
    "xmoe-projections": Model("xmoe", f"{MOE} {PROJECTIONS}", PAPER_ROUTER),
    **{f"official-h{heads}": Model("mhmoe", f"{OFFICIAL} --mhmoe-heads-number {heads}") for heads in (1, 2, 4)},
    "smoe-mixtral": Model("smoe", MIXTRAL),
    **{
        f"mhmoe-{budget}-mixtral-h{heads}": Model(
            "mhmoe", f"{MIXTRAL} --mhmoe-heads-number {heads} --mhmoe-budget {budget}"
        )
        for budget in BUDGETS
        for heads in (2, 4)
    },
    "dense-swiglu": Model("dense", SWIGLU),
    "dense-swiglu-bitnet": Model("dense", f"{SWIGLU} {BITNET}"),
    **{
        f"{name}{variant}": _swiglu(*parts, flags)
        for name, parts in SWIGLU_MODELS.items()
        for variant, flags in SWIGLU_VARIANTS.items()
    },
}
# The second map of experts learns the slower the more inputs it has. 64 is near the best of 32 to 1,920 for four
# models, by validation (docs/benchmarks, 2026-12-01); at paper scale X-MoE's learns at the whole rate.
_BY_WIDTH = "--lr-factors {}={}/fan_in"
_SLOWED = ("xmoe", "xmoe-e32", "xmoe-g4", *(f"mhmoe-{budget}{of}" for budget in BUDGETS for of in ("", "-h2", "-g4")))
MODELS |= {
    f"{name}-by-width": replace(
        MODELS[name],
        flags=f"{MODELS[name].flags} {_BY_WIDTH.format(weights, 64)}",
        paper_flags=f"{MODELS[name].paper_flags} {_BY_WIDTH.format(weights, 3072)}",
    )
    for weights, names in (("ffn.fc2.weight", ("dense",)), ("experts.fc2_weight", _SLOWED))
    for name in names
}
