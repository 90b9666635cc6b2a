"""Continues prompts by exported folders in vLLM: ``python vllm_probe.py FOLDER ...``, in vLLM's own environment.

Each folder has ``prompts.json``, lists of ids, and gets ``continued.json``: for every prompt the new ids, the
log-probabilities of its own ids from the second on, and at every new position those of some ids. ``NEW`` follow each,
never ``PAD``, which fairseq's models do not read as a token.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
NEW, PAD = 8, 1


def main() -> None:
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=3, prompt_logprobs=1, detokenize=False,
        logit_bias={PAD: -100.0},
    )  # fmt: skip
    for folder in map(Path, sys.argv[1:]):
        prompts = json.loads((folder / "prompts.json").read_text())
        llm = LLM(
            str(folder), trust_remote_code=True, dtype="float32", model_impl="transformers", enforce_eager=True,
            skip_tokenizer_init=True, max_model_len=24, block_size=32, max_num_seqs=len(prompts),
        )  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        found = [
            {
                "ids": list(output.outputs[0].token_ids),
                "prompt": [row[id].logprob for id, row in zip(ids[1:], output.prompt_logprobs[1:])],
                "new": [{id: entry.logprob for id, entry in row.items()} for row in output.outputs[0].logprobs],
            }
            for ids, output in zip(prompts, outputs)
        ]
        (folder / "continued.json").write_text(json.dumps(found))
        del llm


if __name__ == "__main__":
    main()
