"""Opens exported folders as someone who never heard of fairseq: ``python transformers_probe.py FOLDER ...``.

Each folder has ``probe.pt``: ``ids``, ``(B, S)`` without padding. What comes of it is written to ``found.pt`` there.
"""

import copy
import inspect
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

for _name in ("mhmoe_fairseq", "fairseq", "torchscale", "fairscale", "sentencepiece"):
    sys.modules[_name] = None  # type: ignore[assignment]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

IMPOSSIBLE = {
    "mhmoe_top_k": 9, "mhmoe_heads": 5, "mhmoe_experts": 0, "mhmoe_freq": -1, "mhmoe_router": "balanced",
    "mhmoe_expert_size": 17, "num_attention_heads": 3, "hidden_act": "tanh", "hidden_size": "wide",
}  # fmt: skip


def open_folder(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


class Product(torch.nn.Module):
    """A linear map whose weight nobody can read, as in engines that put their own in place of ``nn.Linear``."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.product = (linear,)  # no child of its own

    def forward(self, x: Tensor) -> Tensor:
        return self.product[0](x)


def without_weights(model: Any) -> Any:
    """A copy whose linear maps can only be called."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Product(child))
    return model


def padded(rows: list[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """The rows, padded on the left, and their mask."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_full((width - len(row),), pad), row]) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    return ids, mask


@torch.no_grad()
def use(model: Any, folder: Path, ids: Tensor) -> dict[str, Any]:
    """Logits, and the largest differences between two ways to the same."""
    logits = model(ids).logits
    found: dict[str, Any] = {"logits": logits}
    for backend in ("eager", "batched_mm", "grouped_mm"):
        if model.config.mhmoe_freq:
            model.set_experts_implementation(backend)
        found[f"experts {backend}"] = difference(model(ids).logits, logits)
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        found[f"attention {backend}"] = difference(model(ids).logits, logits)
    found["attention without linear weights"] = difference(without_weights(model)(ids).logits, logits)

    half = ids.size(1) // 2
    for name in ("cache", "past_key_values"):
        first = model(ids[:, :half], use_cache=True)
        kept = first["cache"] if "cache" in first else first["past_key_values"]
        steps = [model(ids[:, at : at + 1], **{name: kept}).logits for at in range(half, ids.size(1))]
        found[f"steps with {name}"] = difference(torch.cat([first.logits, *steps], dim=1), logits)

    rows = [ids[0], ids[1, : half + 1]]
    together, mask = padded(rows, model.config.pad_token_id)
    for row, at, one in zip(model(together, attention_mask=mask).logits, mask, rows):
        found[f"left padding of {len(one)}"] = difference(row[at.bool()], model(one[None]).logits[0])
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = [model.generate(row[None], **greedy)[0, len(row) :] for row in rows]
    slow = [model.generate(row[None], use_cache=False, **greedy)[0, len(row) :] for row in rows]
    batch = model.generate(together, attention_mask=mask, **greedy)[:, together.size(1) :]
    found["generated without cache"] = all(torch.equal(*pair) for pair in zip(alone, slow))
    found["generated padded"] = all(torch.equal(*pair) for pair in zip(alone, batch))
    beams = {**greedy, "num_beams": 3, "num_return_sequences": 2}
    found["beams"] = torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))

    again = folder / "again"
    model.save_pretrained(again, max_shard_size="40KB")
    found["files"] = len(list(again.glob("*.safetensors")))
    reopened = open_folder(again).state_dict()
    found["saved again"] = all(torch.equal(value, reopened[name]) for name, value in model.state_dict().items())
    return found


def train(model: Any, ids: Tensor) -> dict[str, Any]:
    """Losses with labels, and the balance loss; what is said of a cache where layers are computed twice."""
    from transformers import DynamicCache

    plain = model(ids, labels=ids)
    asked = model(ids, labels=ids, output_router_logits=True)
    found = {"loss": plain.loss.item(), "with balance": asked.loss.item()}
    if asked.aux_loss is not None:
        found["balance"] = asked.aux_loss.item()
    asked.loss.backward()
    together, mask = padded([ids[0], ids[1, : ids.size(1) // 2]], model.config.pad_token_id)
    balance = model(together, attention_mask=mask, output_router_logits=True).aux_loss
    found["balance of padded"] = None if balance is None else balance.item()
    kept = ("selection_bias", "regularizer")  # not learned by gradients
    learned = [(name, value) for name, value in model.named_parameters() if not name.endswith(kept)]
    found["without gradient"] = [name for name, value in learned if value.grad is None]
    model.train().gradient_checkpointing_enable()
    try:
        model(ids, past_key_values=DynamicCache(config=model.config))
        found["cache twice"] = "taken"
    except ValueError as error:
        found["cache twice"] = str(error)
    return found


def train_with_trainer(folder: Path, ids: Tensor) -> dict[str, Any]:
    """One step of transformers' Trainer, which needs accelerate, recomputing activations."""
    from transformers import Trainer, TrainingArguments

    model = open_folder(folder, output_router_logits=True).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, max_steps=1, use_cpu=True, report_to=[], learning_rate=0.01, gradient_checkpointing=True,
            save_strategy="no", disable_tqdm=True, max_grad_norm=0,
        )  # fmt: skip
        loss = Trainer(model, arguments, train_dataset=rows).train().training_loss
    after = dict(model.named_parameters())
    return {"trained loss": loss, "moved": sum(not torch.equal(before[name], after[name]) for name in before)}


def refusals(folder: Path) -> dict[str, str]:
    """What is said of folders that someone damaged by hand: by the field of config.json, or ``shard``."""
    edited, found = folder / "edited", {}
    shutil.copytree(folder, edited, ignore=shutil.ignore_patterns("again", "*.pt"))
    config, weights = edited / "config.json", edited / "model.safetensors"
    whole = config.read_text(encoding="utf-8"), weights.read_bytes()
    for name, value in IMPOSSIBLE.items():
        config.write_text(json.dumps({**json.loads(whole[0]), name: value}), encoding="utf-8")
        found[name] = _refusal(edited)
    config.write_text(whole[0], encoding="utf-8")
    weights.write_bytes(whole[1][:-9])
    return {**found, "shard": _refusal(edited)}


def _refusal(folder: Path) -> str:
    try:
        open_folder(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        ids = torch.load(folder / "probe.pt")["ids"]
        model = open_folder(folder)
        found = {**use(model, folder, ids), **train(model, ids)}
        if (folder / "train").exists():
            found.update(train_with_trainer(folder, ids))
        if (folder / "damage").exists():
            found["refusals"] = refusals(folder)
        found["parameters"] = sum(map(Tensor.numel, model.parameters()))
        found["takes"] = list(inspect.signature(model.forward).parameters)
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main()
