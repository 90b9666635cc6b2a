"""Whole models on several ranks: the same initial model, recomputation, precisions, states, logs."""

import pytest
import torch
import torch.distributed as dist
from language_models import small_dictionary, small_model, token_rows
from layer_cases import FIELDS, gradients_of, merge_gradients, merge_parameters
from moe_oracle import losses_of

from mhmoe_fairseq.criterions.moe_cross_entropy import MoECrossEntropyConfig, MoECrossEntropyCriterion
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.bases import training_parallelism
from mhmoe_fairseq.models.flags import moe_config
from mhmoe_fairseq.models.language_model import MHMoELanguageModel
from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.parallel import expert_parallelism, sharded_experts
from mhmoe_fairseq.training import ParallelTask


def parameters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(actual, expected, tolerance=0.0):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---------------------------------------------------------------------- the initial model


def initial_states(sizes, flags):
    return [parameters_of(small_model(parallel=expert_parallelism(size), **flags)) for size in sizes]


@pytest.mark.parametrize("flags", [{"decoder_layers": 4}, {"activation_fn": "silu", "deepnorm": True}])
def test_one_seed_gives_one_model_for_every_size(workers4, flags):
    expected, sizes = parameters_of(small_model(**flags)), (1, 2, 4)
    for size, by_rank in zip(sizes, zip(*workers4.run(initial_states, sizes, flags))):
        for first in range(0, 4, size):  # every bank of experts
            assert_same(merge_parameters(by_rank[first:], size), expected)


# ---------------------------------------------------------------------- gradients of whole models


def gradients(flags, rows, parallel=None):
    """Of the sum of the rows' losses; on a rank of its own rows' loss."""
    model = small_model(parallel=parallel, **flags).double().train()
    torch.manual_seed(1)
    rank = dist.get_rank() if parallel else None
    losses = []
    for number, tokens in enumerate(rows):
        if rank in (None, number):
            logits, extra = model(tokens)
            losses.append(logits.logsumexp(-1)[tokens.ne(1)].sum() + losses_of(extra).sum())
    (sum(losses) / (len(rows) if parallel is None else 1)).backward()
    return gradients_of(model)


def gradients_on_rank(size, flags, rows):
    return gradients(flags, rows, parallel=expert_parallelism(size))


def assert_equals_one_process(workers, size, flags, rows, **changes):
    by_rank = workers.run(gradients_on_rank, size, flags, rows)
    assert_same(merge_gradients(by_rank, size), gradients({**flags, **changes}, rows), 1e-9)


@pytest.mark.parametrize(
    "flags",
    [
        {"checkpoint_activations": True, "decoder_layers": 4},
        {"checkpoint_activations": True, "mhmoe_balance_scope": "global", "mhmoe_routing": "capacity"},
    ],
)
def test_recomputation_repeats_the_transfers(workers2, flags):
    rows = [token_rows([7, 4], 1), token_rows([3], 2)]
    if "mhmoe_balance_scope" in flags:
        rows[1] = rows[0]  # the same batch twice has the balance of one
    assert_equals_one_process(workers2, 2, flags, rows, checkpoint_activations=False)


def test_a_rank_whose_batch_is_all_padding_takes_part(workers2):
    rows = [token_rows([7, 4], 1), torch.ones(1, 3, dtype=torch.long)]
    assert_equals_one_process(workers2, 2, {}, rows)


@pytest.mark.parametrize("family", ["smoe", "xmoe", "mhmoe"])
def test_every_family_on_two_banks_of_two(workers4, family):
    flags = {"arch": f"{family}_lm_tiny", "mhmoe_shared_expert_dim": 16}
    rows = [token_rows([5, 4], seed) for seed in range(4)]
    assert_equals_one_process(workers4, 2, flags, rows)


# ---------------------------------------------------------------------- precision


def half_layers(size, dtypes):
    """The layer in low precision, by parameters of that type and by autocast: hidden, largest gradient, row bytes."""
    parallel = expert_parallelism(size) if size > 1 else None
    results = []
    for dtype in dtypes:
        for autocast in (False, True):
            torch.manual_seed(0)
            # Without projections all see the same logits, so the same experts.
            layer = MHMoELayer(MHMoEConfig(**FIELDS, num_projection_layers=0, router="linear"), parallel=parallel)
            layer = layer if autocast else layer.to(dtype)
            x = torch.randn(40, 24).to(dtype).to(torch.float32 if autocast else dtype)
            with torch.autocast("cpu", dtype, enabled=autocast):
                output = layer(x)
                output.hidden.float().square().sum().backward()
            gradient = {"experts.fc1_weight": layer.experts.fc1_weight.grad.float()}
            traffic = output.traffic and output.traffic.bytes / (output.traffic.rows - own_rows(layer, output))
            results.append((output.hidden.float().detach(), gradient, traffic))
    return results


def assert_near(actual, expected, share):
    torch.testing.assert_close(actual, expected, rtol=share, atol=share * float(expected.abs().max()))


def own_rows(layer, output):
    experts = layer.experts.local_experts
    return int(output.stats.expert_load[experts.start : experts.stop].sum())


def test_half_precision_rows_travel_in_half_precision(workers2):
    dtypes = [torch.bfloat16, torch.float16]
    for one, *ranks in zip(half_layers(1, dtypes), *workers2.run(half_layers, 2, dtypes)):
        want_hidden, want_gradient, _ = one
        for hidden, _, row_bytes in ranks:
            assert_near(hidden, want_hidden, 0.02)
            assert row_bytes == 24 // 4 * 2
        # Both ranks have the same rows, so the mean over ranks is the one process's gradient.
        gradient = merge_gradients([gradient for _, gradient, _ in ranks], 2)
        assert_near(gradient["experts.fc1_weight"], want_gradient["experts.fc1_weight"], 0.05)


# ---------------------------------------------------------------------- flags


def built_on_rank(sizes):
    return [built_with(size) for size in sizes]


def built_with(size):
    class Task(ParallelTask):
        source_dictionary = target_dictionary = small_dictionary()
        is_training = True

    options = architecture_options("mhmoe_lm_tiny", decoder_layers=2, mhmoe_expert_parallel_size=size)
    model = MHMoELanguageModel.build_model(options, Task(None))
    Task.is_training = False
    whole = MHMoELanguageModel.build_model(options, Task(None))
    shares = {item.name.split(".")[-1]: len(item.parameter) for item in sharded_experts(model)}
    marked = [name for name, p in model.named_parameters() if hasattr(p, "expert")]
    parallel = training_parallelism(moe_config(options), size)
    groups = [dist.get_process_group_ranks(group) for group in (parallel.groups.experts, parallel.groups.replicas)]
    return shares, len(marked), len(sharded_experts(whole)), groups


def test_the_task_decides_whether_experts_are_spread_and_the_flag_how_far(workers4):
    default, two, one = zip(*workers4.run(built_on_rank, (None, 2, 1)))
    assert [shares["fc1_weight"] for shares, *_ in default] == [2, 2, 2, 2]
    assert {tuple(result[1:3]) for result in default} == {(6, 0)}  # weight and bias of fc1, fc2 and LayerNorm
    assert [shares["fc1_weight"] for shares, *_ in two] == [4, 4, 4, 4]
    assert [groups for *_, groups in two] == [[[0, 1], [0, 2]], [[0, 1], [1, 3]], [[2, 3], [0, 2]], [[2, 3], [1, 3]]]
    assert [result[:3] for result in one] == [({}, 0, 0)] * 4


# ---------------------------------------------------------------------- states


def states_on_rank(full):
    parallel = expert_parallelism(2)
    model = small_model(seed=5, parallel=parallel)
    problems = []
    try:
        model.state_dict()
    except RuntimeError as error:
        problems.append(str(error))
    model.load_state_dict(full)
    loaded = {name: value.clone() for name, value in parameters_of(model).items()}
    for item in sharded_experts(model):
        item.provide(full[item.name])
    saved = model.state_dict()
    try:
        model.state_dict()  # what was gathered is used up
    except RuntimeError as error:
        problems.append(str(error))
    key = "decoder.layers.1.moe_layer.experts.fc1_weight"
    for wrong in (full[key][:4], torch.cat([full[key]] * 2)):
        try:
            model.load_state_dict({**full, key: wrong})
        except RuntimeError as error:
            problems.append(str(error))
    return loaded, saved, problems


def test_states_are_those_of_one_process(workers2):
    full = small_model().state_dict()
    results = workers2.run(states_on_rank, full)
    loaded = merge_parameters([loaded for loaded, *_ in results], 2)
    assert_same(loaded, {name: full[name] for name in loaded})
    for _, saved, problems in results:
        assert_same(dict(saved), dict(full))
        assert [type(value) for value in saved.values()] == [type(value) for value in full.values()]
        assert len(problems) == 4
        assert all("fc1_weight is spread over 2 processes and has not been gathered" in text for text in problems[:2])
        assert "fc1_weight: 4 experts in the checkpoint, 8 in the model" in problems[2]
        assert "fc1_weight: 16 experts in the checkpoint, 8 in the model" in problems[3]


# ---------------------------------------------------------------------- logs


def criterion_on_rank(rows, scope, training):
    class Task:
        target_dictionary = small_dictionary()

    flags = {"decoder_layers": 4, "mhmoe_balance_scope": scope, "moe_eval_capacity_token_fraction": None}
    parallel = expert_parallelism(2) if dist.is_initialized() else None
    model = small_model(parallel=parallel, **flags).double().train(training)
    logs = []
    for tokens in rows if parallel is None else [rows[dist.get_rank()]]:
        sample = {"net_input": {"src_tokens": tokens[:, :-1]}, "target": tokens[:, 1:]}
        sample["ntokens"] = int(sample["target"].ne(1).sum())
        criterion = MoECrossEntropyCriterion(Task(), MoECrossEntropyConfig(mhmoe_z_loss_wt=0.01, sentence_avg=False))
        logs.append(criterion(model, sample)[2])
    return logs, None if parallel is None else parallel.counter


@pytest.mark.parametrize("training", [True, False])
def test_logs_add_up_to_those_of_one_process(workers2, training):
    rows = [token_rows([9, 5], 1), token_rows([8], 2)]
    alone, _ = criterion_on_rank(rows, "rank", training)
    ranks = workers2.run(criterion_on_rank, rows, "rank", training)
    for rank, ((log,), counter) in enumerate(ranks):
        assert set(log) - set(alone[rank]) == {"a2a_rows", "a2a_bytes"}
        for key, value in alone[rank].items():
            torch.testing.assert_close(torch.as_tensor(log[key]), torch.as_tensor(value), rtol=1e-6, atol=1e-6)
        assert log["a2a_rows"].tolist() == log["moe_load"].sum(1).tolist()
        away = log["moe_load"][:, 4:].sum(1) if rank == 0 else log["moe_load"][:, :4].sum(1)
        assert log["a2a_bytes"].tolist() == (away * 8 * 8).tolist()  # 32 / 4 features of 8 bytes
        assert counter.count_bytes == 2 * 4 * 8  # two layers, four experts over there


def test_global_scope_has_the_losses_of_one_larger_batch(workers2):
    rows = [token_rows([9, 5], 1), token_rows([9, 4], 2)]
    (alone,), _ = criterion_on_rank([torch.cat(rows)], "rank", True)
    ranks = [log for (log,), _ in workers2.run(criterion_on_rank, rows, "global", True)]
    for key in ("gate_loss", "z_loss"):
        total = sum(log[key] for log in ranks)
        torch.testing.assert_close(total, alone[key], rtol=1e-9, atol=0)
