"""BEiT v2's tokenizer from a file of its layout, against a slow reference written from the published order of steps."""

import argparse
import math

import pytest
import torch

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.visual_tokenizers import load_visual_tokenizer

WIDTH, INNER, DEPTH, PATCH, SIDE, CODES, CODE_WIDTH = 128, 96, 2, 4, 3, 20, 8


def weights(final_norm="fc_norm", scaled=False, seed=0):
    """Random tensors under the names of a VQ-KD checkpoint: encoder, projection, codes, and what is passed over."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=0.2):
        return scale * torch.randn(*shape, generator=generator)

    def norm(name):
        return {f"{name}.weight": 1 + draw(WIDTH), f"{name}.bias": draw(WIDTH)}

    found = {
        "encoder.cls_token": draw(1, 1, WIDTH),
        "encoder.pos_embed": draw(1, 1 + SIDE**2, WIDTH),
        "encoder.patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH),
        "encoder.patch_embed.proj.bias": draw(WIDTH),
        "encode_task_layer.0.weight": draw(WIDTH, WIDTH),
        "encode_task_layer.0.bias": draw(WIDTH),
        "encode_task_layer.2.weight": draw(CODE_WIDTH, WIDTH),
        "encode_task_layer.2.bias": draw(CODE_WIDTH),
        "quantize.embedding.weight": torch.nn.functional.normalize(draw(CODES, CODE_WIDTH), dim=1),
        "quantize.embedding.initted": torch.ones(1),
        "quantize.embedding.cluster_size": torch.zeros(CODES),
        "quantize.embedding.embed_avg": draw(CODES, CODE_WIDTH),
        "quantize.cluster_size": torch.zeros(CODES),
        "decoder.cls_token": draw(1, 1, WIDTH),
        "decode_task_layer.0.weight": draw(WIDTH, WIDTH),
        "teacher_model.visual.proj": draw(4, 4),
        "scaling_layer.shift": draw(1, 3, 1, 1),
        **norm(f"encoder.{final_norm}"),
    }
    for layer in range(DEPTH):
        name = f"encoder.blocks.{layer}"
        found |= norm(f"{name}.norm1") | norm(f"{name}.norm2")
        found |= {
            f"{name}.attn.qkv.weight": draw(3 * WIDTH, WIDTH), f"{name}.attn.q_bias": draw(WIDTH),
            f"{name}.attn.v_bias": draw(WIDTH), f"{name}.attn.proj.weight": draw(WIDTH, WIDTH),
            f"{name}.attn.proj.bias": draw(WIDTH), f"{name}.mlp.fc1.weight": draw(INNER, WIDTH),
            f"{name}.mlp.fc1.bias": draw(INNER), f"{name}.mlp.fc2.weight": draw(WIDTH, INNER),
            f"{name}.mlp.fc2.bias": draw(WIDTH),
        }  # fmt: skip
        if scaled:
            found |= {f"{name}.gamma_1": draw(WIDTH), f"{name}.gamma_2": draw(WIDTH)}
    return found


def layer_norm(x, found, name):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return scaled * found[f"{name}.weight"] + found[f"{name}.bias"]


def linear(x, found, name):
    return x @ found[f"{name}.weight"].T + found[f"{name}.bias"]


def attention(x, found, name):
    """Head by head, query by query; the keys have no bias."""
    query, key, value = (x @ part.T for part in found[f"{name}.qkv.weight"].chunk(3))
    query, value = query + found[f"{name}.q_bias"], value + found[f"{name}.v_bias"]
    rows = []
    for position in range(len(x)):
        heads = []
        for head in range(WIDTH // 64):
            part = slice(64 * head, 64 * head + 64)
            scores = torch.stack([query[position, part] @ other / math.sqrt(64) for other in key[:, part]])
            shares = scores.exp() / scores.exp().sum()
            heads.append(sum(share * other for share, other in zip(shares, value[:, part])))
        rows.append(torch.cat(heads))
    return linear(torch.stack(rows), found, f"{name}.proj")


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def reference_ids(image, found, final_norm):
    """The ids of one image (3, S, S) in [0, 1], in double precision."""
    found = {name: value.double() for name, value in found.items()}
    pixels = image.double() * 255 / 127.5 - 1
    kernel = found["encoder.patch_embed.proj.weight"].flatten(1)
    rows = [found["encoder.cls_token"][0, 0]]
    for row in range(SIDE):
        for column in range(SIDE):
            patch = pixels[:, PATCH * row : PATCH * row + PATCH, PATCH * column : PATCH * column + PATCH]
            rows.append(kernel @ patch.reshape(-1) + found["encoder.patch_embed.proj.bias"])
    x = torch.stack(rows) + found["encoder.pos_embed"][0]
    for layer in range(DEPTH):
        name = f"encoder.blocks.{layer}"
        x = x + found.get(f"{name}.gamma_1", 1) * attention(
            layer_norm(x, found, f"{name}.norm1"), found, f"{name}.attn"
        )
        inner = gelu(linear(layer_norm(x, found, f"{name}.norm2"), found, f"{name}.mlp.fc1"))
        x = x + found.get(f"{name}.gamma_2", 1) * linear(inner, found, f"{name}.mlp.fc2")
    features = layer_norm(x[1:], found, f"encoder.{final_norm}")
    codes = linear(torch.tanh(linear(features, found, "encode_task_layer.0")), found, "encode_task_layer.2")
    codes = codes / codes.norm(dim=1, keepdim=True)
    return [
        min(range(CODES), key=lambda index: float((code - found["quantize.embedding.weight"][index]).square().sum()))
        for code in codes
    ]


def random_images(count=3):
    return torch.rand(count, 3, PATCH * SIDE, PATCH * SIDE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("key", "final_norm", "scaled"), [("model", "fc_norm", False), ("state_dict", "norm", True)]
)  # fmt: skip
def test_ids_equal_a_slow_reference(tmp_path, key, final_norm, scaled):
    found = weights(final_norm, scaled)
    torch.save({key: found, "args": argparse.Namespace(model="vqkd"), "epoch": 99}, tmp_path / "vqkd.pth")
    tokenizer = load_visual_tokenizer(tmp_path / "vqkd.pth")
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.patch_size) == ("vqkd", CODES, PATCH)
    assert tokenizer.image_size == PATCH * SIDE and tokenizer.token_shape == (SIDE, SIDE)
    images = random_images()
    ids = tokenizer.encode(images)
    assert ids.tolist() == [reference_ids(image, found, final_norm) for image in images]
    assert len(ids.unique()) > 3


def test_ids_do_not_depend_on_the_batch_and_encoding_changes_nothing(tmp_path):
    torch.save({"model": weights()}, tmp_path / "vqkd.pth")
    tokenizer = load_visual_tokenizer(tmp_path / "vqkd.pth")
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    images = random_images() * 0.5  # no value near one: theirs would scale such a batch as it scales any other
    together = tokenizer.encode(images)
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(together, alone)
    dark = torch.full((1, 3, PATCH * SIDE, PATCH * SIDE), 1 / 300)
    assert tokenizer.encode(dark).tolist() == [reference_ids(dark[0], weights(), "fc_norm")]
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_it_can_be_kept_in_a_file_of_ours(tmp_path):
    torch.save({"model": weights()}, tmp_path / "vqkd.pth")
    tokenizer = load_visual_tokenizer(tmp_path / "vqkd.pth")
    tokenizer.save(tmp_path / "ours.pt")
    again = load_visual_tokenizer(tmp_path / "ours.pt")
    assert torch.equal(again.encode(random_images()), tokenizer.encode(random_images()))
    with pytest.raises(UserError, match="does not decode to pixels"):
        again.decode(torch.zeros(1, SIDE**2, dtype=torch.long))


def test_loading_costs_no_random_draw(tmp_path):
    torch.save({"model": weights()}, tmp_path / "vqkd.pth")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_visual_tokenizer(tmp_path / "vqkd.pth")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("encoder.blocks.1.attn.q_bias"), "encoder.blocks.1.attn.q_bias"),
        (lambda found: found.pop("encoder.pos_embed"), "encoder.pos_embed"),
        (lambda found: found.update({"encoder.extra": torch.zeros(1)}), "encoder.extra"),
        (lambda found: found.update({"encode_task_layer.2.weight": torch.zeros(9, WIDTH)}), "size mismatch"),
    ],
)
def test_other_layouts_are_refused(tmp_path, change, message):
    found = weights()
    change(found)
    torch.save({"model": found}, tmp_path / "vqkd.pth")
    with pytest.raises(UserError, match=f"vqkd.pth: not the layout of BEiT v2's VQ-KD checkpoints.*{message}"):
        load_visual_tokenizer(tmp_path / "vqkd.pth")
