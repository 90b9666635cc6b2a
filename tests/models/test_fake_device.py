"""Whole models on a fake CUDA device and on ``meta``: as far as a machine without a GPU can check them."""

import pytest
import torch
from beit3_models import small_beit3
from fake_devices import HOST_READS, Recorder, default_dtype
from language_models import small_model
from moe_oracle import losses_of
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
    assert [output is not None for output in extra["moe"]] == [False, True]
    assert ("aten::_grouped_mm" in recorder.names) == grouped
    assert not recorder.names & HOST_READS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_and_backward_on_meta(dtype):
    with torch.device("meta"), default_dtype(dtype):
        model = small_model(**FLAGS)
        logits, extra = model(torch.ones(2, 8, dtype=torch.long))
        (logits.float().square().sum() + losses_of(extra).sum()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without


BEIT3_FLAGS = {"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128}


@pytest.mark.parametrize("experts", ["shared", "separate"])
@pytest.mark.parametrize("kind", ["image", "text", "pair"])
def test_images_and_texts_on_a_fake_cuda_device(kind, experts):
    with FakeTensorMode(), torch.device("cuda"), default_dtype(torch.bfloat16):
        model = small_beit3(mhmoe_modality_experts=experts, **BEIT3_FLAGS)
        tokens = None if kind == "image" else torch.ones(2, 8, dtype=torch.long)
        images = None if kind == "text" else torch.randn(2, 3, 8, 8)
        masked = None if kind == "text" else torch.zeros(2, 4, dtype=torch.bool)
        for attention in ("full", "caption"):
            with Recorder() as recorder:
                features, extra = model(tokens, images, masked, attention)
            assert features.device.type == "cuda" and features.dtype == torch.bfloat16
            assert not recorder.names & HOST_READS
            assert "aten::_grouped_mm" in recorder.names
    assert losses_of(extra).shape == (1, 2)


def test_captions_on_a_fake_cuda_device():
    with FakeTensorMode(), torch.device("cuda"), default_dtype(torch.bfloat16):
        model = small_beit3(**BEIT3_FLAGS).eval()
        with Recorder() as recorder:
            state = model.start_captions(torch.randn(2, 3, 8, 8))
            for _ in range(3):
                logits = model.next_token_logits(state, torch.zeros(2, dtype=torch.long))
            state.reorder(torch.tensor([1, 0, 0]))
    assert logits.device.type == "cuda" and logits.shape == (2, len(model.dictionary))
    assert not recorder.names & HOST_READS
