"""BEiT-3 on several ranks: ranks with other modalities take part, and all ranks together are one process."""

import torch
import torch.distributed as dist
from beit3_models import IMAGES, SMALL, beit3_batch, beit3_dictionary, small_beit3
from layer_cases import gradients_of, merge_gradients, merge_parameters
from moe_oracle import losses_of

from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.beit3 import MHMoEBEiT3
from mhmoe_fairseq.parallel import expert_parallelism, sharded_experts
from mhmoe_fairseq.training import ParallelTask


def gradients(flags, batches, parallel=None):
    """Of the mean of the ranks' losses; on a rank of its own."""
    model = small_beit3(parallel=parallel, **flags).double().train()
    rank = dist.get_rank() if parallel else None
    losses = []
    for number, calls in enumerate(batches):
        if rank in (None, number):
            for batch in calls:
                features, extra = model(**batch)
                mask = extra["padding_mask"]
                real = features if mask is None else features[~mask]
                losses.append(model.text_logits(real).logsumexp(-1).sum() + losses_of(extra).sum())
    (sum(losses) / (len(batches) if parallel is None else 1)).backward()
    return gradients_of(model)


def gradients_on_rank(cases):
    return [gradients(flags, batches, parallel=expert_parallelism(2)) for flags, batches in cases]


BATCHES = {
    "the same kinds": [
        [beit3_batch("image", [1], 1), beit3_batch("text", [5, 3], 2), beit3_batch("pair", [4], 3)],
        [beit3_batch("image", [1, 1], 4), beit3_batch("text", [2], 5), beit3_batch("pair", [3, 1], 6)],
    ],
    "other kinds": [
        [beit3_batch("image", [1, 1], 1), beit3_batch("pair", [2], 3)],
        [beit3_batch("text", [5, 3], 2), beit3_batch("image", [1], 4)],
    ],
}


def test_two_ranks_equal_one_process(workers2):
    cases = [
        ({"mhmoe_modality_experts": experts, "checkpoint_activations": kinds == "other kinds"}, batches)
        for kinds, batches in BATCHES.items()
        for experts in ("shared", "separate")
    ]
    for (flags, batches), *by_rank in zip(cases, *workers2.run(gradients_on_rank, cases)):
        expected = gradients({**flags, "checkpoint_activations": False}, batches)
        actual = merge_gradients(by_rank, 2)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def global_losses(batches):
    parallel = expert_parallelism(2) if dist.is_initialized() else None
    model = small_beit3(mhmoe_modality_experts="separate", mhmoe_balance_scope="global", parallel=parallel).double()
    with torch.no_grad():
        return losses_of(model(**batches[dist.get_rank() if parallel else 0])[1])


def test_the_global_scope_of_two_pools_is_that_of_one_larger_batch(workers2):
    whole = beit3_batch("pair", [4, 4, 4, 4], 1)
    halves = [{name: value[part] for name, value in whole.items()} for part in (slice(0, 1), slice(1, 4))]
    expected = global_losses([whole])
    for losses in workers2.run(global_losses, halves):
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)


def built_on_rank(full):
    class Task(ParallelTask):
        source_dictionary, num_visual_tokens, is_training = beit3_dictionary(), 6, True

    flags = {**SMALL, **IMAGES, "mhmoe_budget": "none", "dropout": 0.0, "mhmoe_modality_experts": "separate"}
    options = architecture_options("mhmoe_beit3_tiny", **flags)
    model = MHMoEBEiT3.build_model(options, Task(None))
    model.load_state_dict(full)
    names = [shard.name for shard in sharded_experts(model)]
    loaded = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Task.is_training = False
    return names, len(sharded_experts(MHMoEBEiT3.build_model(options, Task(None)))), loaded


def test_the_task_decides_and_a_rank_loads_its_experts(workers2):
    full = small_beit3(seed=5, mhmoe_modality_experts="separate").state_dict()
    (names, unspread, _), *_ = results = workers2.run(built_on_rank, full)
    prefix = "beit3.encoder.layers.1.moe_layer."
    assert {f"{prefix}A.experts.fc1_weight", f"{prefix}B.experts.fc2_bias"} <= set(names) and unspread == 0
    merged = merge_parameters([loaded for *_, loaded in results], 2)
    assert all(torch.equal(value, full[name]) for name, value in merged.items())
