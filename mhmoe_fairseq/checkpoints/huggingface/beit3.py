"""A BEiT-3 model's settings and weights under the names of ``remote/modeling_mhmoe_beit3.py``."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...data.images.transforms import IMAGENET, INCEPTION
from ...torchscale_ext.settings import UNUSED_POSITIONS, EncoderSettings
from .mapping import describe_stack, export_weights

# Heads of fine-tuning that transformers has a kind of model for: the class in the model's code, and its loader.
HEADS = {
    "vqa": ("MHMoEBEiT3ForVisualQuestionAnswering", "AutoModelForVisualQuestionAnswering"),
    "image_classification": ("MHMoEBEiT3ForImageClassification", "AutoModelForImageClassification"),
}
_VIEWS_CROP = 0.875


def head_of(weights: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the head that is exported; None where the encoder stands alone."""
    return next((head for head in HEADS if any(name.startswith(f"heads.{head}.") for name in weights)), None)


def label_names(weights: Mapping[str, Tensor], classes: Sequence[str] | None) -> list[str]:
    """Returns the names of the exported head's classes or answers: the checkpoint's, or their numbers."""
    last = [value for name, value in weights.items() if name.startswith("head.classifier.") and name.endswith("bias")]
    return list(classes or map(str, range(len(last[-1]) if last else 0)))


def describe_encoder(
    options: Any, settings: EncoderSettings, head: str | None, labels: Sequence[str]
) -> dict[str, Any]:
    """Returns the fields of ``remote/configuration_mhmoe_beit3.py``.

    Args:
        options: those that the model was built from.
        settings: what ``encoder_settings`` made of them.
        labels: the names of the head's classes or answers.

    Raises:
        UserError: for routing that no other software has, by its name.
    """
    code = "modeling_mhmoe_beit3"
    auto = {"AutoConfig": "configuration_mhmoe_beit3.MHMoEBEiT3Config", "AutoModel": f"{code}.MHMoEBEiT3Model"}
    described = {
        "model_type": "mhmoe_beit3",
        "architectures": ["MHMoEBEiT3Model"],
        **describe_stack(options, settings, "encoder"),
        "max_position_embeddings": settings.max_text_length,
        "image_size": settings.img_size,
        "patch_size": settings.patch_size,
        "mhmoe_modality_experts": "separate" if settings.feed_forward == "separate" else "shared",
    }
    if head is None:
        return {**described, "auto_map": auto}
    name, loader = HEADS[head]
    numbers = {str(number): label for number, label in enumerate(labels)}
    auto[loader] = f"{code}.{name}"
    described |= {"id2label": numbers, "label2id": {label: int(number) for number, label in numbers.items()}}
    described |= {"architectures": [name], "auto_map": auto}
    if head != "vqa":
        return described
    impl = "pipeline_mhmoe_beit3.MHMoEVisualQuestionAnsweringPipeline"
    return {**described, "custom_pipelines": {"visual-question-answering": {"impl": impl, "pt": [loader]}}}


def describe_images(size: int, task: Mapping[str, Any]) -> dict[str, Any]:
    """Returns preprocessor_config.json: how evaluation looks at images, by the settings of the task."""
    of_imagenet = bool(task.get("imagenet_views"))
    mean, std = IMAGENET if of_imagenet else INCEPTION
    return {
        "image_processor_type": "MHMoEImageProcessor",
        "auto_map": {"AutoImageProcessor": "image_processing_mhmoe_beit3.MHMoEImageProcessor"},
        "size": size,
        "crop_fraction": _VIEWS_CROP if of_imagenet else None,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def export_encoder_weights(
    state: Mapping[str, Tensor], settings: EncoderSettings, head: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the weights of encoder and head under their names there, in float32, and what was left out."""
    prefix, left_out = f"heads.{head}.", set()
    kept, of_head = {}, {}
    for name, value in state.items():
        if head is not None and name.startswith(prefix):
            of_head[name.removeprefix(prefix)] = value.float().contiguous()
        elif name.startswith("beit3."):
            is_table = name.startswith("beit3.encoder.embed_positions.")
            kept[name] = value[UNUSED_POSITIONS:] if is_table else value
        else:
            left_out.add(".".join(name.split(".")[: 1 + name.startswith("heads.")]))
    exported = export_weights(kept, settings)
    if head is not None:
        of_head.pop("norm.num_batches", None)
        # Without a running mean nothing is taken away.
        center = of_head.pop("norm.running_mean", of_head["norm.weight"].new_zeros(of_head["norm.weight"].shape))
        exported |= {f"head.{name}": value for name, value in {"center": center, **of_head}.items()}
    return exported, sorted(left_out - {"vocabulary_fingerprint"})
