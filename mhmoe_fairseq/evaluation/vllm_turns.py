"""Times greedy continuations in vLLM, several models by turns; run by the interpreter of an environment that has vLLM.

``python vllm_turns.py REQUEST RESULT``: two JSON files. It imports nothing of this package, which is not there.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SPACE = 1  # GiB of keys and values for each model
_BLOCK = 32  # tokens; on a CPU a multiple of 32


def time_turns(
    folders: Sequence[str], workloads: Sequence[Mapping[str, Any]], dtype: str, rounds: int
) -> dict[str, Any]:
    """Returns vLLM's ``version`` and, for each workload and model, the ``seconds`` of every timed round.

    Args:
        folders: of exported models.
        workloads: each with ``prompts``, lists of ids, and ``new``, how many tokens follow every prompt.
        dtype: what vLLM computes in.
        rounds: that are timed, after one that is not; every other one starts with the last model.
    """
    from vllm import LLM, SamplingParams, __version__

    length = max(len(load["prompts"][0]) + load["new"] for load in workloads)
    engines = [
        LLM(
            folder, trust_remote_code=True, dtype=dtype, model_impl="transformers", enforce_eager=True,
            skip_tokenizer_init=True, max_model_len=length, block_size=_BLOCK, enable_prefix_caching=False,
            max_num_seqs=max(len(load["prompts"]) for load in workloads),
        )
        for folder in folders
    ]  # fmt: skip
    seconds: list[list[list[float]]] = []
    for load in workloads:
        prompts = [{"prompt_token_ids": ids} for ids in load["prompts"]]
        sampling = SamplingParams(temperature=0.0, max_tokens=load["new"], ignore_eos=True, detokenize=False)
        seconds.append([[] for _ in engines])
        for turn in range(-1, rounds):
            for which in range(len(engines))[:: -1 if turn % 2 else 1]:
                start = time.perf_counter()
                outputs = engines[which].generate(prompts, sampling, use_tqdm=False)
                if turn >= 0:
                    seconds[-1][which].append(time.perf_counter() - start)
                assert all(len(output.outputs[0].token_ids) == load["new"] for output in outputs)
    return {"version": __version__, "seconds": seconds}


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_SPACE))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    request, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(time_turns(**json.loads(request.read_text()))))
