"""What the tests with lm-eval share."""

import torch
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.sequence_scorer import SequenceScorer
from torch import Tensor


def direct_scores(model: GeneratorHubInterface, tokens: list[int]) -> Tensor:
    """Log-probabilities of ``tokens`` after ``</s>``, from fairseq's SequenceScorer, one text at a time: ``(S,)``."""
    source = torch.tensor([[model.src_dict.eos(), *tokens[:-1]]])
    sample = {"net_input": {"src_tokens": source, "src_lengths": None}, "target": torch.tensor([tokens])}
    return SequenceScorer(model.tgt_dict).generate(model.models, sample)[0][0]["positional_scores"].double()


def line_ids(model: GeneratorHubInterface, line: str) -> list[int]:
    """fairseq's own ids of one line, without its end."""
    return model.encode(line)[:-1].tolist()
