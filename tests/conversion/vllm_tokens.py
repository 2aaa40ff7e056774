"""Run by the interpreter that has vLLM: greedy tokens and the prompt's log probabilities of a folder.

python vllm_tokens.py FOLDER CASE.json OUTPUT.json
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Load the folder as it is, in float32, and answer the prompt."""
    from vllm import LLM, SamplingParams

    folder, case_path, output_path = sys.argv[1:]
    case = json.loads(Path(case_path).read_text(encoding="utf-8"))
    model = LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_num_batched_tokens=4096,
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=case["num_new_tokens"],
        prompt_logprobs=0,
        ignore_eos=True,
        detokenize=False,
    )
    (answer,) = model.generate([{"prompt_token_ids": case["prompt"]}], sampling)
    logprobs = [
        found[token].logprob
        for token, found in zip(case["prompt"][1:], answer.prompt_logprobs[1:], strict=True)
    ]
    result = {
        "max_model_len": model.llm_engine.model_config.max_model_len,
        "tokens": list(answer.outputs[0].token_ids),
        "logprobs": logprobs,
    }
    Path(output_path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
