"""Whole models on a fake CUDA device and on ``meta``: as far as a machine without a GPU can check them."""

import pytest
import torch
from fake_devices import HOST_READS, Recorder, default_dtype
from language_models import small_model
from torch._subclasses.fake_tensor import FakeTensorMode

FLAGS = {"decoder_embed_dim": 64, "decoder_ffn_embed_dim": 128, "mhmoe_heads_number": 4}


@pytest.mark.parametrize("dtype, grouped", [(torch.bfloat16, True), (torch.float16, False), (torch.float32, False)])
def test_forward_on_a_fake_cuda_device(dtype, grouped):
    with FakeTensorMode(), torch.device("cuda"), default_dtype(dtype):
        model = small_model(**FLAGS)
        tokens = torch.ones(2, 8, dtype=torch.long)
        with Recorder() as recorder:
            logits, extra = model(tokens)
    assert logits.device.type == "cuda" and logits.shape == (2, 8, 44)
    assert [stats is not None for stats in extra["moe_stats"]] == [False, True]
    assert ("aten::_grouped_mm" in recorder.names) == grouped
    assert not recorder.names & HOST_READS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_and_backward_on_meta(dtype):
    with torch.device("meta"), default_dtype(dtype):
        model = small_model(**FLAGS)
        logits, extra = model(torch.ones(2, 8, dtype=torch.long))
        (logits.float().square().sum() + extra["l_aux"][1].sum()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
