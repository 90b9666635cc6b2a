"""What ``--mhmoe-precision auto`` stands for on this and on other machines, and who says so."""

import logging

import pytest
import torch
import torch.distributed as dist
from beit3_models import small_beit3
from language_models import small_model, token_rows

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.models import precision as precision_module
from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.precision import fast_bf16, require_one_precision, resolve


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine another one: instructions of its processor, oneDNN, compute capability of its GPU."""

    def make(*instructions, onednn=True, capability=None, early_release=False):
        found = {"architecture": "some", **dict.fromkeys(instructions, True)}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        if early_release:
            monkeypatch.delattr(torch.cpu, "get_capabilities")
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: found.get("amx_bf16", False))
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: found.get("avx512_bf16", False))
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return make


@pytest.mark.parametrize(
    "instructions, others, device_type, expected",
    [
        ((), {}, "cpu", None),
        (("avx512_f", "amx_tile", "amx_int8"), {}, "cpu", None),
        (("avx512_bf16", "amx_bf16"), {}, "cpu", "amx_bf16"),
        (("avx512_bf16",), {}, "cpu", "avx512_bf16"),
        (("avx512_bf16",), {"early_release": True}, "cpu", "avx512_bf16"),
        ((), {"early_release": True}, "cpu", None),
        (("bf16",), {}, "cpu", "bf16"),
        (("bf16",), {"onednn": False}, "cpu", None),
        (("amx_bf16",), {"capability": (7, 5)}, "cuda", None),
        ((), {"capability": (8, 0)}, "cuda", "compute capability 8.0"),
        ((), {"capability": (8, 0)}, "cpu", None),
        (("amx_bf16",), {}, "cuda", None),
    ],
)
def test_the_rule(machine, instructions, others, device_type, expected):
    machine(*instructions, **others)
    assert fast_bf16(device_type) == expected
    assert resolve("auto", device_type) == ("fp32" if expected is None else "bf16")
    assert [resolve(given, device_type) for given in (None, "fp32", "bf16", "fp16")] == ["fp32", "fp32", "bf16", "fp16"]


@pytest.mark.parametrize("arch", ["mhmoe_lm_tiny", "dense_beit3_tiny"])
def test_the_configuration_says_what_auto_came_to(machine, arch):
    machine("avx512_bf16", capability=(7, 0))
    for cpu, expected in ((True, "bf16"), (False, "fp32")):  # the GPU, unless --cpu is given
        assert architecture_options(arch, mhmoe_precision="auto", cpu=cpu).mhmoe_precision == expected
    assert architecture_options(arch).mhmoe_precision is None
    machine()
    assert architecture_options(arch, mhmoe_precision="bf16").mhmoe_precision == "bf16"


@pytest.mark.parametrize("build, arch", [(small_model, "dense_lm_tiny"), (small_beit3, "dense_beit3_tiny")])
def test_a_build_logs_what_it_computes_in_and_warns_of_slow_bf16(machine, caplog, build, arch):
    caplog.set_level(logging.INFO, logger="mhmoe_fairseq.models.precision")

    def told(precision):
        caplog.clear()
        precision_module._tell.cache_clear()  # each is told once in a process
        build(arch, mhmoe_precision=precision)
        return [(record.levelname, record.message) for record in caplog.records]

    machine("avx512_bf16")
    assert told("auto") == told("bf16") == [("INFO", "computing in bf16 (avx512_bf16)")]
    machine()
    assert told("auto") == told("fp32") == [("INFO", "computing in fp32")]
    [(level, message)] = told("bf16")
    build(arch, mhmoe_precision="bf16")
    with torch.device("meta"):
        precision_module._tell.cache_clear()
        build(arch, mhmoe_precision="bf16")
    assert len(caplog.records) == 1
    assert level == "WARNING" and "--mhmoe-precision bf16" in message and "slower than float32" in message


def test_processes_of_different_machines_are_told_apart(monkeypatch):
    others = ["bf16", "bf16"]

    def gather(found, own):
        found[:] = [*others, own]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    require_one_precision("bf16")
    with pytest.raises(UserError, match=r"--mhmoe-precision .* \(bf16 on rank 0, fp32 on rank 2\): give fp32 or bf16"):
        require_one_precision(None)


@pytest.mark.parametrize(
    "arch, flags",
    [
        ("dense_lm_tiny", {"subln": True}),
        ("dense_lm_tiny", {"activation_fn": "silu", "rms_norm": True, "rotary_embed": True}),
        ("dense_lm_tiny", {"share_decoder_input_output_embed": False}),
        ("smoe_lm_tiny", {"moe_expert_count": 4}),
        ("xmoe_lm_tiny", {"moe_expert_count": 4, "mhmoe_routing": "torchscale"}),
        ("mhmoe_lm_tiny", {"mhmoe_shared_expert_dim": 16, "activation_fn": "silu"}),
        ("mhmoe_lm_tiny", {"mhmoe_heads_number": 2}),
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_weights_rounded_once_give_what_they_give_rounded_in_every_step(arch, flags, precision):
    """Bit for bit, and losses alike; embedding, norms and routers keep float32, TorchScale's own layer everything."""
    rows = token_rows([30, 30, 7])
    model = small_model(arch, mhmoe_precision=precision, **flags).eval()
    with torch.no_grad():
        expected = [model(rows)[0], model(rows, targets=rows)[0]]
        model.make_generation_fast_()
        found = [model(rows)[0], model(rows, targets=rows)[0]]
    assert all(map(torch.equal, found, expected))
    kept = ("embed", "norm", "_ln", "router", *(["moe_layer"] if "mhmoe_routing" in flags else []))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            assert parameter.dtype == (torch.float32 if any(part in name for part in kept) else half), name


@pytest.mark.parametrize("arch", ["dense_beit3_tiny", "mhmoe_beit3_tiny"])
def test_encoders_are_rounded_alike(arch):
    model = small_beit3(arch, mhmoe_precision="bf16").eval()
    rows = token_rows([12, 9])
    with torch.no_grad():
        expected = model.text_logits(model(rows)[0])
        model.make_generation_fast_()
        found = model.text_logits(model(rows)[0])
    assert torch.equal(found, expected) and model.text_head.weight.dtype == torch.bfloat16


def test_steps_of_decoding_read_rounded_weights():
    """Whose experts otherwise compute with float32 weights: not the same bits, but as near to float32's."""
    rows = token_rows([12, 12])
    model = small_model("mhmoe_lm_tiny", mhmoe_precision="bf16", mhmoe_heads_number=2).eval()

    def last():
        state = {"is_first_step": True}
        with torch.no_grad():
            model(rows[:, :-1], incremental_state=state)
            return model(rows, incremental_state={**state, "is_first_step": False})[0][:, -1].float()

    with torch.no_grad():
        exact = small_model("mhmoe_lm_tiny", mhmoe_heads_number=2).eval()(rows)[0][:, -1]
    for _ in range(2):
        torch.testing.assert_close(last(), exact, rtol=0, atol=0.02 * exact.abs().max().item())
        model.make_generation_fast_()
