"""The accelerator path as far as a machine without one allows: shapes, dtypes, and no look at the data."""

import contextlib
import copy

import pytest
import torch
from fake_devices import HOST_READS, Recorder, default_dtype
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe import experts as experts_module
from mhmoe_fairseq.moe.gate import GATES

FIELDS = {"embed_dim": 64, "num_heads": 4, "num_experts": 4, "expert_ffn_dim": 32}
VARIANTS = [
    {}, {"activation": "swiglu"}, {"expert_layernorm": True}, {"top_k": 1},
    *({"routing": routing} for routing in GATES),
    {"quantize_experts": True, "shared_expert_dim": 32},
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward_on_a_fake_cuda_device(dtype, variant):
    with FakeTensorMode(), torch.device("cuda"), default_dtype(dtype):
        layer = MHMoELayer(MHMoEConfig(**FIELDS, **variant))
        x = torch.randn(2, 8, 64, dtype=dtype)
        mask = torch.zeros(2, 8, dtype=torch.bool)
        with Recorder() as recorder:
            out = layer(x, mask)
    assert out.hidden.device.type == "cuda" and out.hidden.dtype == dtype and out.hidden.shape == x.shape
    assert ("aten::_grouped_mm" in recorder.names) == (dtype == torch.bfloat16)
    assert not recorder.names & HOST_READS


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_and_backward_on_meta(dtype, variant):
    with torch.device("meta"):
        layer = MHMoELayer(MHMoEConfig(**FIELDS, **variant)).to(dtype)
        x = torch.randn(2, 8, 64, dtype=dtype, requires_grad=True)
        out = layer(x, torch.zeros(2, 8, dtype=torch.bool))
        (out.hidden.float().square().sum() + out.balance_loss).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["grouped", "blocked"])
def test_real_run_reads_no_value_on_the_host(backend, variant):
    """Shapes known, values not: forward and backward with every operation recorded."""
    layer = MHMoELayer(MHMoEConfig(**FIELDS, **variant), backend=backend)
    x = torch.randn(2, 8, 64, requires_grad=True)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[1, 5:] = True
    with Recorder() as recorder:
        out = layer(x, mask)
        (out.hidden.square().sum() + out.balance_loss).backward()
    assert not recorder.names & HOST_READS


class LeavingGarbage(torch.autograd.Function):
    """What an accelerator's grouped_mm leaves behind the last offset, forward and backward: anything, here NaN."""

    @staticmethod
    def forward(ctx, rows, end):
        ctx.end = end
        return torch.cat([rows[:end], torch.full_like(rows[end:], float("nan"))])

    @staticmethod
    def backward(ctx, grad):
        return torch.cat([grad[: ctx.end], torch.full_like(grad[ctx.end :], float("nan"))]), None


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_grouped_mm_leaves_unwritten_goes_nowhere(monkeypatch, variant):
    real = torch.nn.functional.grouped_mm

    def grouped_mm(x, weight, *, offs):
        end = int(offs[-1])
        return LeavingGarbage.apply(real(LeavingGarbage.apply(x, end), weight, offs=offs), end)

    torch.manual_seed(0)
    layer = MHMoELayer(MHMoEConfig(**FIELDS, **variant), backend="grouped")
    x, mask = torch.randn(2, 8, 64, requires_grad=True), torch.zeros(2, 8, dtype=torch.bool)
    mask[1, 5:] = True
    results = []
    for function in (real, grouped_mm):
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", function)
        out = layer(x, mask).hidden
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.experts.parameters()])])
    for clean, left in zip(*results):
        torch.testing.assert_close(left, clean)


def test_the_recorder_sees_a_host_read():
    with Recorder() as recorder:
        torch.ones(3).max().item()
        torch.ones(3)[torch.ones(3, dtype=torch.bool)]
    assert recorder.names & HOST_READS


def test_backend_by_device_and_dtype():
    layer = MHMoELayer(MHMoEConfig(**FIELDS))
    assert layer.experts._backend_for(torch.empty(1, 16)) == "loop"
    assert layer.experts._backend_for(torch.empty(1, 16, device="meta", dtype=torch.bfloat16)) == "grouped"
    assert layer.experts._backend_for(torch.empty(1, 16, device="meta")) == "blocked"
    assert layer.experts._backend_for(torch.empty(0, 16, device="meta", dtype=torch.bfloat16)) == "blocked"
    narrow = experts_module.grouped_mm_supports(torch.device("meta"), torch.bfloat16, (12, 32), 4)
    assert not narrow  # rows of 24 bytes
    many = experts_module.grouped_mm_supports(torch.device("meta"), torch.bfloat16, (16, 32), 1024)
    assert not many and experts_module.grouped_mm_supports(torch.device("meta"), torch.bfloat16, (16, 32), 1023)


@pytest.mark.parametrize("major, backend", [(8, "blocked"), (9, "grouped"), (10, "grouped"), (12, "blocked")])
def test_grouped_mm_is_taken_where_it_does_not_read_offsets_on_the_host(monkeypatch, major, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    with FakeTensorMode():
        layer = MHMoELayer(MHMoEConfig(**FIELDS))
        assert layer.experts._backend_for(torch.empty(1, 16, device="cuda", dtype=torch.bfloat16)) == backend


class AddsOneByOne(TorchDispatchMode):
    """While open, ``index_add`` adds as a CUDA device does: row after row, each sum rounded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name != "aten::index_add":
            return func(*args, **(kwargs or {}))
        total, _, index, rows = args
        total = total.clone()
        for target, row in zip(index.tolist(), rows):
            total[target] += row
        return total


@pytest.mark.parametrize("backend", ["grouped", "blocked"])
@pytest.mark.parametrize("fields", [{"expert_layernorm": True}, {"activation": "swiglu"}], ids=str)
def test_gradients_of_an_experts_vectors_are_exact_for_many_rows(backend, fields):
    torch.manual_seed(0)
    layer = MHMoELayer(MHMoEConfig(**{**FIELDS, "num_experts": 2, "num_heads": 1}, **fields), backend=backend)
    x, names = torch.randn(1500, 64), [name for name, _ in layer.experts.named_parameters()]
    found = []
    for dtype, mode in ((torch.float64, contextlib.nullcontext()), (torch.bfloat16, AddsOneByOne())):
        one = copy.deepcopy(layer).to(dtype)
        one.experts.backend = "blocked" if dtype == torch.float64 else backend
        with mode:
            gradients = torch.autograd.grad(one(x.to(dtype)).hidden.sum(), list(one.experts.parameters()))
        found.append([gradient.double() for gradient in gradients])
    errors = {name: float((got - want).norm() / want.norm()) for name, want, got in zip(names, *found)}
    assert max(errors.values()) < 0.05, errors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["loop", "blocked"])  # what "auto" takes without rows
def test_no_rows_give_zero_gradients(backend, variant):
    layer = MHMoELayer(MHMoEConfig(**FIELDS, **variant), backend=backend)
    x = torch.empty(2, 0, 64, requires_grad=True)
    out = layer(x, torch.empty(2, 0, dtype=torch.bool))
    (out.hidden.sum() + out.balance_loss + out.z_loss).backward()
    assert out.hidden.shape == x.shape and (out.balance_loss, out.z_loss) == (0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("backend", ["loop", "grouped", "blocked"])
def test_bfloat16_is_close_to_float32(backend):
    torch.manual_seed(0)
    # Without projections and with the weights rounded alike both see the same logits, so the same experts.
    layer = MHMoELayer(MHMoEConfig(**FIELDS, num_projection_layers=0), backend=backend).bfloat16()
    x = torch.randn(40, 64).bfloat16()
    got = layer(x).hidden.float()
    want = layer.float()(x.float()).hidden
    assert (got - want).abs().max() < 0.05 * want.abs().max()
