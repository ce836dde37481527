"""lm-eval's results as rows of one table, and paired differences between them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from redepth.checkpoint.cost import count_parameters
from redepth.modeling import RecurrentDepthForCausalLM

# Metrics that are a share of right answers.
SHARES = ("acc", "acc_norm", "exact_match", "math_verify", "em")


@dataclass(frozen=True)
class Score:
    """One metric of one task, of a model at one depth.

    Attributes:
        model: as the user named it.
        depth: `r=4`, the exit test by name, or `no loop`.
        metric, filter: as lm-eval names them; the filter says how an answer was read out of a text, and is `none` for
            likelihoods. Of a `task:` spec `acc`, and the split.
        standard_error: lm-eval's, None where it gives none; of a `task:` spec with problems as independent.
        answers: documents that were asked, or answers to problems.
        mean_steps: over the tokens run; 0 without a loop.
        tokens_per_answer: run for a document, every choice of a question counted as if it were asked by itself; or for
            a problem with all its questions.
        flops_per_token, flops_per_answer: forward, of the layers' matrix products (see `ParameterCount`).
        effective_parameters: of a model without a loop that would compute as much, with embedding and head.
    """

    model: str
    depth: str
    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    answers: int
    mean_steps: float
    tokens_per_answer: float
    flops_per_token: float
    flops_per_answer: float
    effective_parameters: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """A metric's change from one model and depth to another, over the documents or problems that both were asked.

    Attributes:
        standard_error: over documents or problems, paired.
    """

    task: str
    metric: str
    filter: str
    model: str
    depth: str
    model_from: str
    depth_from: str
    difference: float
    standard_error: float
    answers: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """What running a token of a model costs.

    Attributes:
        fixed, per_step: parameters of the layers that run once, and of those that run at every step.
        total: parameters with embedding and head, the core counted once.
    """

    fixed: int
    per_step: int
    total: int

    @classmethod
    def of(cls, model: Any) -> "Work":
        if isinstance(model, RecurrentDepthForCausalLM):
            count = count_parameters(model.config)
            return cls(count.prelude + count.coda, count.core, count.total)
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        outside = {
            id(parameter): parameter.numel() for end in ends if end is not None for parameter in end.parameters()
        }
        total = sum(parameter.numel() for parameter in model.parameters())
        return cls(total - sum(outside.values()), 0, total)

    def flops_per_token(self, steps: float) -> float:
        return 2.0 * (self.fixed + steps * self.per_step)

    def effective_parameters(self, steps: float) -> int:
        return round(self.total + (steps - 1) * self.per_step) if self.per_step else self.total


def leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The single tasks below a group, or the task itself."""
    below = subtasks.get(name)
    return [leaf for each in below for leaf in leaves(each, subtasks)] if below else [name]


def scores_of(results: Mapping[str, Any], costs: Mapping[str, Any], work: Work, model: str, depth: str) -> list[Score]:
    """The rows of one model at one depth.

    Args:
        results: of lm-eval's `evaluate`, with its samples.
        costs: a `harness.Cost` for each single task.
    """
    found = []
    for task, metrics in results["results"].items():
        single = leaves(task, results.get("group_subtasks", {}))
        answers = sum(results["n-samples"][leaf]["effective"] for leaf in single)
        tokens = sum(costs[leaf].tokens for leaf in single)
        steps = sum(costs[leaf].token_steps for leaf in single) / tokens if tokens else 0.0
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            found.append(
                Score(
                    model,
                    depth,
                    task,
                    metric,
                    kind,
                    float(value),
                    float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None,
                    answers,
                    steps,
                    tokens / answers,
                    work.flops_per_token(steps),
                    work.flops_per_token(steps) * tokens / answers,
                    work.effective_parameters(steps),
                )
            )
    return found


# {(task, metric, filter): {document: value}}
Samples = dict[tuple[str, str, str], dict[int, float]]


def samples_of(results: Mapping[str, Any]) -> Samples:
    """Each document's value, for metrics that are a mean over documents."""
    found: Samples = {}
    for task, documents in results["samples"].items():
        for sample in documents:
            for metric in sample["metrics"]:
                value = sample[metric]
                if isinstance(value, (bool, int, float, np.number)):
                    found.setdefault((task, metric, sample["filter"]), {})[sample["doc_id"]] = float(value)

    def is_mean(key: tuple[str, str, str]) -> bool:
        """So is accuracy, but not LAMBADA's perplexity, say, of documents' log-likelihoods."""
        task, metric, kind = key
        return math.isclose(
            sum(found[key].values()) / len(found[key]), results["results"][task].get(f"{metric},{kind}", math.nan)
        )

    return {key: values for key, values in found.items() if is_mean(key)}


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float, int]:
    """Mean of `one − other` over the documents of both, its standard error, and their number."""
    shared = sorted(one.keys() & other.keys())
    apart = torch.tensor([one[document] - other[document] for document in shared], dtype=torch.float64)
    error = apart.std().item() / len(shared) ** 0.5 if len(shared) > 1 else math.nan
    return apart.mean().item(), error, len(shared)


def differences(runs: Sequence[tuple[str, str, Samples]]) -> list[Difference]:
    """Every later run against every earlier one, for each metric that both have."""
    found = []
    for number, (model, depth, samples) in enumerate(runs):
        for model_from, depth_from, earlier in runs[:number]:
            for key in samples:
                if key in earlier and samples[key].keys() & earlier[key].keys():
                    mean, error, answers = paired(samples[key], earlier[key])
                    found.append(Difference(*key, model, depth, model_from, depth_from, mean, error, answers))
    return found


def main_scores(scores: Sequence[Score]) -> list[Score]:
    """Of each task the first metric that is a share of right answers, or else the first."""
    chosen: dict[str, tuple[str, str]] = {}
    for task in dict.fromkeys(score.task for score in scores):
        own = [score for score in scores if score.task == task]
        first = next((score for score in own if score.metric in SHARES), own[0])
        chosen[task] = (first.metric, first.filter)
    return [score for score in scores if chosen[score.task] == (score.metric, score.filter)]
