"""One token under the glass: what the model would have said after every step, and how its state moved."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
import torch

from redepth.analysis.dynamics import (
    FEWEST_STEPS,
    classify_endings,
    distance_to_last,
    principal_components,
    settling_step,
)
from redepth.analysis.record import record
from redepth.analysis.watch import LOGITS, STATE
from redepth.modeling import DepthPolicy

TOP = 3  # likeliest tokens shown at every step
WIDTH, HEIGHT, MARGIN = 300, 150, 28


@dataclass(frozen=True)
class Inside:
    """What R steps made of the state that a token was chosen from.

    Attributes:
        top: `[R][TOP]`, (text, probability) of the likeliest tokens after each step.
        kl_to_last: `[R]`, in nats.
        to_last: `[R + 1]`, log10 of the distance of s_i from s_R, relative to the length of s_R.
        plane: `[R + 1, 2]`, the states in their own two principal components.
        settled: the step from which on the state stays near its last value.
        ending: what the trajectory ends in; None for too few steps to tell.
    """

    top: list[list[tuple[str, float]]]
    kl_to_last: list[float]
    to_last: list[float]
    plane: list[list[float]]
    settled: int
    ending: str | None


@torch.no_grad()
def look_inside(model: Any, tokenizer: Any, ids: Sequence[int], policy: DepthPolicy) -> Inside:
    """Run the last of `ids` to the policy's deepest step after the others ran under the policy, and read every step.

    Raises:
        ValueError: as the model's `forward`.
    """
    row = torch.tensor([list(ids)], device=model.device)
    cache = None
    if row.shape[1] > 1:
        cache = model(row[:, :-1], policy=policy, use_cache=True, logits_to_keep=1).past_key_values
    to_the_end = replace(policy, test=None, threshold=None, min_steps=1)
    with record(model, parts=(STATE, LOGITS)) as seen:
        model(row[:, -1:], past_key_values=cache, policy=to_the_end, use_cache=cache is not None)
    # Of the tokens before it nothing was recorded; NaN stands for them.
    states = seen.trajectory()[-1:].float()
    logits = torch.stack([seen.get(LOGITS, step)[-1].float() for step in range(1, policy.num_steps + 1)])
    log_p = logits.log_softmax(-1)
    best = log_p.topk(min(TOP, log_p.shape[-1]), dim=-1)
    return Inside(
        top=[
            [(tokenizer.decode([token]), float(np.exp(value))) for token, value in zip(tokens, values, strict=True)]
            for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
        kl_to_last=(log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1).clamp(min=0).tolist(),
        to_last=distance_to_last(states)[0].tolist(),
        plane=principal_components(states, 2)[0][0].tolist(),
        settled=int(settling_step(states)[0]),
        ending=str(classify_endings(states).names[0]) if states.shape[1] >= FEWEST_STEPS else None,
    )


def inside_html(inside: Inside, token: str, taken: int) -> str:
    """The look inside as a table and two small drawings.

    Args:
        token: the text of the chosen token.
        taken: after how many steps it was chosen.
    """
    rows = []
    for step, likeliest in enumerate(inside.top, 1):
        cells = "".join(
            f'<td><span class="rd-bar" style="--share:{share:.3f}">{_shown(text)}</span><small>{share:.0%}</small></td>'
            for text, share in likeliest
        )
        here = ' class="rd-here" aria-current="step"' if step == taken else ""
        rows.append(f'<tr{here}><th scope="row">{step}</th>{cells}<td>{inside.kl_to_last[step - 1]:.3f}</td></tr>')
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("likeliest", "second", "third")[: len(inside.top[0])])
    ends = f"{inside.ending}; " if inside.ending else ""
    return (
        f'<section class="rd-inside" aria-label="Inside the token"><h3>Inside {_shown(token)}</h3>'
        f"<p>It was chosen after {taken} of {len(inside.top)} steps. What the model would have said after each:</p>"
        f'<div class="rd-scroll"><table><thead><tr><th scope="col">step</th>{heads}<th scope="col">KL to the last</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<p>The state over these steps: {ends}near its last value from step {inside.settled} on.</p>"
        f'<div class="rd-drawings">{_distance(inside.to_last, taken)}{_course(inside.plane, taken)}</div></section>'
    )


def _shown(text: str) -> str:
    """A token's text with its white space to be seen."""
    return f"<code>{escape(text).replace(' ', '␣').replace(chr(10), '↵') or '∅'}</code>"


def _scaled(values: Sequence[float], low: float, high: float, start: float, end: float) -> list[float]:
    span = high - low or 1.0
    return [start + (value - low) / span * (end - start) for value in values]


def _drawing(title: str, body: str, below: str) -> str:
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{body}</svg>'
        f"<figcaption>{escape(below)}</figcaption></figure>"
    )


def _path(x: Sequence[float], y: Sequence[float], taken: int) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    dots = "".join(
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{5 if step == taken else 2.5}"'
        f"{' class=rd-here' if step == taken else ''}><title>step {step}</title></circle>"
        for step, (a, b) in enumerate(zip(x, y, strict=True))
    )
    return f'<polyline points="{points}"/>{dots}'


def _distance(to_last: Sequence[float], taken: int) -> str:
    """log10 of the distance to the last state, by step; the last one's own is left out."""
    values = list(to_last[:-1]) or [0.0]
    x = _scaled(range(len(values)), 0, max(len(values) - 1, 1), MARGIN, WIDTH - 8)
    low, high = min(values), max(values)
    y = _scaled(values, low, high, HEIGHT - MARGIN, 10)
    axis = (
        f'<text x="2" y="16">{10**high:.1g}</text><text x="2" y="{HEIGHT - MARGIN}">{10**low:.1g}</text>'
        f'<text x="{MARGIN}" y="{HEIGHT - 6}">0</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {len(values) - 1}</text>'
    )
    return _drawing(
        f"distance to the last state by step, from {10 ** values[0]:.2g} to {10 ** values[-1]:.2g}",
        axis + _path(x, y, taken),
        "Distance to the last state, relative to its length (log scale)",
    )


def _course(plane: Sequence[Sequence[float]], taken: int) -> str:
    """The trajectory in its own two principal components."""
    first, second = [point[0] for point in plane], [point[-1] if len(point) > 1 else 0.0 for point in plane]
    x = _scaled(first, min(first), max(first), 12, WIDTH - 12)
    y = _scaled(second, min(second), max(second), HEIGHT - 12, 12)
    begins = f'<text x="{x[0] + 6:.1f}" y="{y[0] + 4:.1f}">start</text>'
    return _drawing(
        f"trajectory of the state over {len(plane) - 1} steps",
        _path(x, y, taken) + begins,
        "Its course in the two directions in which it moves most",
    )
