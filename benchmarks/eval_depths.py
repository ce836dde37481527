"""Likelihoods at several depths from one pass: their price beside the deepest depth alone, and plain lm-eval's answers.

    OMP_NUM_THREADS=1 python benchmarks/eval_depths.py ./smollm2-recurrent EVAL_FOLDER

Processor seconds of lm-eval's requests, the shorter of two turns that alternate, of one batch of requests of one task. EVAL_FOLDER
holds arc_easy.jsonl in its hub schema. Then the same requests through `lm_eval --model hf` at each depth: how many of its
log-likelihoods differ in any digit.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import redepth
from redepth.evaluation.answers import Answers
from redepth.evaluation.asking import flat, set_examples
from redepth.evaluation.quiet import quiet
from redepth.evaluation.stock_tasks import load_tasks
from redepth.modeling import DepthPolicy


def responses(lm: Any, tasks: Any, limit: int) -> list[Any]:
    from lm_eval.evaluator import evaluate

    for task in tasks["tasks"].values():
        set_examples(task, None)
    with quiet():
        results: Any = evaluate(lm, tasks, limit=limit, bootstrap_iters=0)
    return [sample["resps"] for samples in results["samples"].values() for sample in samples]


def seconds(lm: Any, tasks: Any, limit: int, policies: list[DepthPolicy]) -> float:
    lm.policies, lm.policy, lm.answers = policies, policies[-1], Answers()
    start = time.process_time()
    responses(lm, tasks, limit)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="folder of NAME.jsonl files")
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--limit", type=int, default=2, help="documents")
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from redepth.evaluation.harness import RedepthLM

    model, tokenizer = redepth.load(options.checkpoint), AutoTokenizer.from_pretrained(options.checkpoint)
    tasks = flat(load_tasks([options.task], options.data))
    lm: Any = RedepthLM(model, tokenizer=tokenizer, batch_size=options.batch_size)
    policies = [DepthPolicy.resolve(model.config, num_steps=depth) for depth in options.depths]
    seconds(lm, tasks, 1, policies[:1])  # warm up
    alone, together = [], []
    for _ in range(2):
        alone.append(seconds(lm, tasks, options.limit, policies[-1:]))
        together.append(seconds(lm, tasks, options.limit, policies))
    print(
        f"r = {options.depths[-1]} alone {min(alone):.2f} s, {len(policies)} depths {min(together):.2f} s: "
        f"{min(together) / min(alone):.2f} times; {torch.get_num_threads()} threads"
    )
    for policy in policies:
        lm.policy = policy
        own = responses(lm, tasks, options.limit)
        plain = AutoModelForCausalLM.from_pretrained(options.checkpoint, num_steps=policy.num_steps)
        other: Any = HFLM(plain, tokenizer=tokenizer, batch_size=options.batch_size)
        pairs = list(zip(own, responses(other, tasks, options.limit), strict=True))
        print(f"r = {policy.num_steps}: {sum(one != two for one, two in pairs)} of {len(pairs)} documents differ")


if __name__ == "__main__":
    main()
