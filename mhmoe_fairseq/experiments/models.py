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
MHMOE_VARIANTS = {
    "": "",
    **{f"-e{experts}": f"--moe-expert-count {experts}" for experts in EXPERTS},
    **{f"-h{heads}": f"--mhmoe-heads-number {heads}" for heads in HEADS},
    "-no-splitting": "--mhmoe-no-split",
    "-no-projections": "--mhmoe-projection-layers 0",
    "-projections-2": "--mhmoe-projection-layers 2",
    "-projections-3": "--mhmoe-projection-layers 3",
    "-kept": "--keep-interval-updates -1",  # the same model, all of its checkpoints kept
}

MODELS = {
    "dense": Model("dense"),
    "smoe": Model("smoe", MOE),
    "xmoe": Model("xmoe", MOE, PAPER_ROUTER),
    **{f"xmoe-e{experts}": Model("xmoe", f"{MOE} --moe-expert-count {experts}", PAPER_ROUTER) for experts in EXPERTS},
    # What MH-MoE keeps of X-MoE: its parameters (the paper's tables), or its FLOPs and parameters (the second paper).
    **{
        f"mhmoe-{budget}{name}": Model(
            "mhmoe", f"{MOE} --mhmoe-heads-number 4 --mhmoe-budget {budget} {flags}", PAPER_ROUTER
        )
        for budget in ("params", "flops")
        for name, flags in MHMOE_VARIANTS.items()
    },
    # The dense network between two projections: an MoE layer of one expert, which every token uses with weight 1.
    "dense-projections": Model("xmoe", f"{MOE} --moe-expert-count 1 --moe-top-k 1 {PROJECTIONS}", PAPER_ROUTER),
    "xmoe-projections": Model("xmoe", f"{MOE} {PROJECTIONS}", PAPER_ROUTER),
    **{f"official-h{heads}": Model("mhmoe", f"{OFFICIAL} --mhmoe-heads-number {heads}") for heads in (1, 2, 4)},
}
