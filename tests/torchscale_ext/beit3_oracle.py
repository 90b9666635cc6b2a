"""The slow, obvious BEiT-3: one position, one head and one expert at a time, plain autograd, in evaluation."""

import math

import moe_oracle
import torch

from mhmoe_fairseq.torchscale_ext.feed_forward import SeparateExperts

PAD = 1


def encode(model, text_tokens=None, images=None, masked_patches=None, attention="full"):
    """Features by row and position (None where padded), and each MoE layer's ``(balance, z)``."""
    rows = len(images) if text_tokens is None else len(text_tokens)
    split = 0 if images is None else 1 + model.vision_embed.num_patches
    states, padded = [], []
    for row in range(rows):
        vectors = [] if images is None else image_vectors(model, images[row], masked_patches, row)
        tokens = [] if text_tokens is None else text_tokens[row].tolist()
        positions = model.encoder.embed_positions.B.weight
        vectors += [model.text_embed.weight[token] + positions[2 + place] for place, token in enumerate(tokens)]
        states.append(vectors)
        padded.append([False] * split + [token == PAD for token in tokens])
    losses = []
    for layer in model.encoder.layers:
        for row, vectors in enumerate(states):
            states[row] = attend(layer, vectors, padded[row], split, attention)
        losses += feed_forward(layer, states, padded, split)
    norm = model.encoder.layer_norm
    return [
        [None if pad else side(norm, place, split)(x) for place, (x, pad) in enumerate(zip(vectors, row_padded))]
        for vectors, row_padded in zip(states, padded)
    ], losses


def image_vectors(model, image, masked_patches, row):
    vision, positions = model.vision_embed, model.encoder.embed_positions.A.weight
    size = vision.patch_size[0]
    vectors = [vision.cls_token[0, 0]]
    for top in range(0, image.size(1), size):
        for left in range(0, image.size(2), size):
            pixels = image[:, top : top + size, left : left + size].reshape(-1)
            is_masked = masked_patches is not None and bool(masked_patches[row][len(vectors) - 1])
            patch = vision.proj.weight.flatten(1) @ pixels + vision.proj.bias
            vectors.append(vision.mask_token[0, 0] if is_masked else patch)
    return [vector + positions[2 + place] for place, vector in enumerate(vectors)]


def side(multiway, place, split):
    """The module of a position's modality."""
    return multiway.A if place < split else multiway.B


def sees(attention, query, key, split):
    if attention == "full" or key < split:
        return True
    return query >= split and key <= query


def attend(layer, vectors, padded, split, attention):
    """The attention block on one row, pre-norm."""
    module = layer.self_attn
    normed = [side(layer.self_attn_layer_norm, place, split)(x) for place, x in enumerate(vectors)]
    q, k, v = (
        [side(projection, place, split)(x) for place, x in enumerate(normed)]
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    width, result = module.head_dim, []
    for query in range(len(vectors)):
        if padded[query]:
            result.append(vectors[query])
            continue
        keys = [key for key in range(len(vectors)) if not padded[key] and sees(attention, query, key, split)]
        heads = []
        for head in range(module.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = torch.stack([q[query][part] @ k[key][part] / math.sqrt(width) for key in keys])
            heads.append(sum(weight * v[key][part] for weight, key in zip(scores.softmax(0), keys)))
        attended = torch.cat(heads)
        if module.inner_attn_ln is not None:
            attended = side(module.inner_attn_ln, query, split)(attended)
        result.append(vectors[query] + side(module.out_proj, query, split)(attended))
    return result


def feed_forward(layer, states, padded, split):
    """The feed-forward block on all rows, in place; the losses of an MoE layer, in a list."""
    places = [(row, place) for row, flags in enumerate(padded) for place, pad in enumerate(flags) if not pad]
    normed = {at: side(layer.final_layer_norm, at[1], split)(states[at[0]][at[1]]) for at in places}
    losses = []
    if not layer.is_moe_layer:
        outputs = {at: side(layer.ffn, at[1], split)(x) for at, x in normed.items()}
    elif isinstance(layer.moe_layer, SeparateExperts):
        image = [at for at in places if at[1] < split]
        text = [at for at in places if at[1] >= split]
        outputs, total = {}, 0
        for pool, chosen in ((layer.moe_layer.A, image), (layer.moe_layer.B, text)):
            if chosen:
                results, pool_losses = route(pool, normed, chosen)
                outputs.update(results)
                total = total + pool_losses * len(chosen) / len(places)
        losses.append(total)
    else:
        outputs, pool_losses = route(layer.moe_layer, normed, places)
        losses.append(pool_losses)
    for (row, place), y in outputs.items():
        states[row][place] = states[row][place] + y
    return losses


def route(pool, normed, places):
    hidden, balance, z = moe_oracle.forward(pool, torch.stack([normed[at] for at in places]))
    return dict(zip(places, hidden)), torch.stack([balance, z])
