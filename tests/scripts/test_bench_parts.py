"""The parts that the benchmarks' numbers rest on: work, memory and time are counted rightly."""

import mmap
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from _bench import contenders, static_xmoe, sweep, verify
from _bench.gemm_bound import equal_shares
from _bench.memory import in_fresh_process, tensor_peak
from _bench.plain_loop import PlainLoop
from _bench.setting import Setting
from _bench.timing import Pairs, time_pairs

TINY = Setting(tokens=24, num_experts=4, embed_dim=32, num_heads=2, top_k=2, ffn_dim=48)


def router_flops(setting: Setting) -> int:
    """Forward and backward of the two maps of the X-MoE router; the benchmark's FLOPs leave them out."""
    dim = setting.config().router_dim
    return 3 * 2 * setting.num_subtokens * dim * (setting.sub_dim + setting.num_experts)


def counted_flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_bound_does_the_products_it_claims():
    assert counted_flops(contenders.build("gemm", TINY)) == TINY.flops()


def test_plain_loop_does_the_bounds_work_and_the_routers():
    assert counted_flops(contenders.build("loop", TINY)) == TINY.flops() + router_flops(TINY)


def test_mixtral_gets_equal_flops():
    pytest.importorskip("transformers", reason="an optional rival of the benchmark")
    gate = 3 * 2 * TINY.num_subtokens * TINY.sub_dim * TINY.num_experts
    assert counted_flops(contenders.build("mixtral-eager", TINY)) == TINY.flops() + gate


def test_equal_shares_lose_no_row():
    assert equal_shares(11, 4) == [3, 3, 3, 2]


@pytest.mark.parametrize("setting", [TINY, Setting(7, 5, embed_dim=12, num_heads=3, top_k=3, ffn_dim=8)])
def test_our_layer_equals_the_plain_loop(setting):
    errors = verify.loop_errors(setting)
    assert len(errors) == 13
    assert verify.check(errors, "tiny") <= 1e-5


def test_a_different_function_stops_the_benchmark(monkeypatch):
    def copy_wrongly(self, ours):
        copy_from(self, ours)
        with torch.no_grad():
            self.fc2[1].weight[0, 0] += 0.1

    copy_from = PlainLoop.copy_from
    monkeypatch.setattr(PlainLoop, "copy_from", copy_wrongly)
    with pytest.raises(RuntimeError, match="relative error of .* the limit is 1e-05"):
        verify.check(verify.loop_errors(TINY), "tiny")


def test_not_a_number_stops_the_benchmark():
    with pytest.raises(RuntimeError, match="nan"):
        verify.check({"output": float("nan")}, "tiny")


def test_mixtral_equals_our_swiglu_layer():
    pytest.importorskip("transformers", reason="an optional rival of the benchmark")
    assert verify.check(verify.mixtral_errors(TINY), "tiny") <= 1e-5


def test_torchscale_runs_and_leaves_torch_as_it_was():
    pytest.importorskip("torchscale")
    histc = torch.histc
    step = contenders.build("torchscale", TINY)
    hidden, balance = step()
    assert hidden.shape == (TINY.tokens, TINY.embed_dim) and balance > 0
    assert all(parameter.grad is not None for parameter in step.parameters)
    with pytest.raises(ValueError, match="inside"), static_xmoe.float_histc():
        raise ValueError("inside")
    assert torch.histc is histc
    torch.distributed.destroy_process_group()


def test_torchscale_is_not_asked_for_other_than_two_experts():
    with pytest.raises(ValueError, match=r"top_k \(3\) must be 2"):
        static_xmoe.build_static_xmoe(Setting(8, 4, embed_dim=32, num_heads=2, top_k=3, ffn_dim=48))


def test_peak_counts_what_lives_at_once():
    x = torch.ones(1000)

    def call():
        y = x * 2
        z = y + 1
        del y
        return z.mul_(3) * 2

    assert tensor_peak(call, [x]) == 2 * 4000


def test_peak_counts_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)

    def call():
        x.exp().exp().exp().sum().backward()

    # Three results kept for the backward; then one gradient at least beside them. Scalars are a few bytes.
    assert 4 * 4000 <= tensor_peak(call, [x]) <= 5 * 4000 + 64


def test_peak_counts_pages_from_elsewhere_and_not_what_existed():
    existing = torch.ones(500)

    def call():
        pages = torch.frombuffer(mmap.mmap(-1, 8192), dtype=torch.float32)
        pages[:500].copy_(existing)

    assert tensor_peak(call, [existing]) == 8192


def test_pairs_alternate_and_medians_are_taken_per_pair():
    calls = []
    time_pairs(lambda: calls.append("a"), lambda: calls.append("b"), pairs=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    pairs = Pairs((1.0, 4.0, 3.0), (1.0, 2.0, 2.0))
    assert (pairs.ratio, pairs.first_median, pairs.second_median, pairs.spread) == (1.5, 3.0, 2.0, (1.0, 2.0))


def test_plan_spares_torchscale_long_batches():
    plan = sweep.full_plan([Setting(4096, 8), Setting(8192, 8), Setting(8192, 32)], ["gemm", "torchscale"])
    assert [duel.setting.tokens for duel in plan.duels if duel.second == "torchscale"] == [4096]
    assert sorted((s.tokens, name) for s, name in plan.memory) == [
        (4096, "mhmoe"),
        (4096, "torchscale"),
        (8192, "mhmoe"),
    ]


def test_fresh_process_reports_its_last_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('noise'); print('{\"tensors\": 3}'); sys.exit(len(sys.argv) - 1)")
    assert in_fresh_process(str(script), []) == {"tensors": 3}
    with pytest.raises(RuntimeError, match="status 1"):
        in_fresh_process(str(script), ["fail"])
