"""``pipeline("visual-question-answering", FOLDER, trust_remote_code=True)``: no longer part of transformers."""

import os
from typing import Any

from PIL import Image
from transformers import Pipeline
from transformers.image_utils import load_image


class MHMoEVisualQuestionAnsweringPipeline(Pipeline):
    """Answers to a question about an image, the most probable first: dictionaries with ``score`` and ``answer``."""

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, top_k: int | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def __call__(self, image: Any, question: str | None = None, **kwargs: Any) -> Any:
        """Answer one question, or a list of dictionaries with ``image`` and ``question``.

        Args:
            image: a file, an address or an image of Pillow's; or the list.
            top_k: how many answers.
        """
        return super().__call__(image if question is None else {"image": image, "question": question}, **kwargs)

    def preprocess(self, inputs: dict[str, Any]) -> Any:
        """Ids and pixels of one question."""
        longest = self.model.config.max_position_embeddings
        words = self.tokenizer(inputs["question"], return_tensors="pt", truncation=True, max_length=longest)
        image = inputs["image"]
        if isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
            image = Image.open(image)  # load_image would turn it as its camera says, which training did not
        elif not isinstance(image, Image.Image):
            image = load_image(image)
        return {**words, **self.image_processor(image, return_tensors="pt")}

    def _forward(self, model_inputs: Any) -> Any:
        return self.model(**model_inputs)

    def postprocess(self, model_outputs: Any, top_k: int = 5) -> list[dict[str, Any]]:
        """The best answers of one question."""
        scores = model_outputs["logits"][0].float().sigmoid()
        best = scores.topk(min(top_k, len(scores)))
        names = self.model.config.id2label
        return [{"score": score, "answer": names[label]} for score, label in zip(*map(lambda of: of.tolist(), best))]
