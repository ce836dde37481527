"""Pictures of what depth buys."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from redepth.data.source import TASK_PREFIX

from .scores import SHARES, Score, main_scores
from .tables import depth_name, short_names, with_unit
from .tasks import TaskAccuracy
from .texts import NO_LOOP


def plot_loss_by_depth(losses: dict[str, dict[str, dict[int, float]]], file: str | Path, title: str) -> None:
    """Draw held-out loss over the number of steps, before and after healing, as a PNG.

    Args:
        losses: for each plan's label, `before` and `after`, each loss in nats per token by number of steps.
    """
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (label, curves) in enumerate(losses.items()):
        for when, style in (("before", ":"), ("after", "-")):
            depths = list(curves[when])
            axes.plot(
                depths, list(curves[when].values()), style, marker="o", color=f"C{index}", label=f"{label}, {when}"
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.set_xlabel("num_steps (passes through the core)")
    axes.set_ylabel("held-out loss, nats per token")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(file)


def plot_healing(
    curve: Sequence[Mapping[str, Any]], losses: Mapping[str, Mapping[int, float]], file: str | Path, title: str
) -> None:
    """Draw a healing run as a PNG: the training loss by optimiser step, and the held-out loss by number of steps.

    Args:
        curve: the records of `healing-log.jsonl`; those with a `loss` are drawn, one run after another.
        losses: by label (`before`, `after`, …), held-out loss in nats per token by number of steps.
    """
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    training, held_out = figure.subplots(1, 2)
    drawn = [record["loss"] for record in curve if "loss" in record]
    training.plot(range(1, len(drawn) + 1), drawn, color="C0", linewidth=0.8)
    training.set_xlabel("optimiser step")
    training.set_ylabel("training loss, nats per token")
    for number, (label, by_depth) in enumerate(losses.items()):
        held_out.plot(list(by_depth), list(by_depth.values()), marker="o", color=f"C{number}", label=label)
    held_out.set_xscale("log", base=2)
    depths = sorted({depth for by_depth in losses.values() for depth in by_depth})
    held_out.set_xticks(depths, [str(depth) for depth in depths])
    held_out.minorticks_off()
    held_out.set_xlabel("num_steps (passes through the core)")
    held_out.set_ylabel("held-out loss, nats per token")
    held_out.legend(frameon=False, fontsize="small")
    for axes in (training, held_out):
        axes.grid(alpha=0.3)
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    figure.savefig(file)


def plot_accuracy_by_depth(
    accuracy: Sequence[Sequence[float]],
    difficulties: Sequence[int],
    num_steps: Sequence[int],
    file: str | Path,
    title: str,
    trained_most: int | None = None,
    mean_exit_steps: Sequence[float] | None = None,
    controls: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw accuracy by difficulty and number of steps as a heat map, as a PNG or SVG.

    Args:
        accuracy: `[difficulty][num_steps]`, from 0 to 1.
        trained_most: draws a line above the difficulties that training never met.
        mean_exit_steps: by difficulty, how many steps adaptive exit takes; drawn as a curve over the map.
        controls: columns beside the map, each a label and its accuracy by difficulty.
    """
    columns = [f"{steps}" for steps in num_steps]
    extra = dict(controls or {})
    width = 2.4 + 0.55 * (len(columns) + 1.6 * len(extra))
    figure = Figure(figsize=(max(5.0, width), 1.8 + 0.34 * len(difficulties)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [len(columns), *(1.2 for _ in extra)]
    panels = figure.subplots(1, len(ratios), width_ratios=ratios, sharey=True, squeeze=False)[0]
    # Lightness alone carries the order, so that the map reads without colour.
    style: dict[str, Any] = {"cmap": "cividis", "vmin": 0, "vmax": 1, "origin": "lower", "aspect": "auto"}
    for panel, label, values in [
        (panels[0], "num_steps (passes through the core)", accuracy),
        *(
            (panel, label, [[value] for value in column])
            for panel, (label, column) in zip(panels[1:], extra.items(), strict=True)
        ),
    ]:
        image = panel.imshow(values, **style)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                shade = "white" if value < 0.55 else "black"
                panel.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color=shade, fontsize="x-small")
        if trained_most is not None and trained_most in difficulties and trained_most != difficulties[-1]:
            panel.axhline(list(difficulties).index(trained_most) + 0.5, color="#d55e00", linewidth=1.5)
        if panel is panels[0]:
            panel.set_xticks(range(len(columns)), columns)
            panel.set_xlabel(label)
        else:
            panel.set_xticks([0], [label.replace(" ", "\n")], fontsize="x-small")
        panel.tick_params(length=0)
    panels[0].set_yticks(range(len(difficulties)), [str(difficulty) for difficulty in difficulties])
    panels[0].set_ylabel("difficulty (steps that the answer needs)")
    if mean_exit_steps is not None:
        at = np.interp(mean_exit_steps, num_steps, range(len(num_steps)))
        above = np.arange(len(difficulties)) + 0.33  # the numbers
        curve = panels[0].plot(at, above, "o-", color="#d55e00", markersize=3.5, linewidth=1)
        figure.legend(
            curve,
            ["mean step at which adaptive exit leaves"],
            loc="outside lower left",
            fontsize="small",
            frameon=False,
        )
    panels[0].set_title(title, loc="left", fontsize="medium")
    bar = figure.colorbar(image, ax=panels.tolist(), shrink=0.8, pad=0.02)
    bar.set_label("accuracy, per cent")
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    figure.savefig(file)


def plot_accuracy_against_flops(scores: Sequence[Score], file: str | Path) -> None:
    """Draw each task's accuracy over the forward FLOPs of an answer, ± one standard error, as a PNG or SVG.

    A model's fixed depths are joined by a line; an exit test and a model without a loop are points by themselves.
    """
    shown = main_scores(scores)
    tasks = list(dict.fromkeys(score.task for score in shown))
    models = list(dict.fromkeys(score.model for score in shown))
    columns = min(len(tasks), 3)
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 1.1 + 3.1 * lines), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat[len(tasks) :]:
        panel.set_visible(False)
    for panel, task in zip(panels.flat, tasks, strict=False):
        own = [score for score in shown if score.task == task]
        share = own[0].metric in SHARES
        scale = 100 if share else 1
        for number, model in enumerate(models):
            of_model = [score for score in own if score.model == model]
            joined = sorted(
                (score for score in of_model if score.depth.startswith("r=")), key=lambda score: score.mean_steps
            )
            for group, marker, line in (
                (joined, "o", "-"),
                *(
                    ([score], "*" if score.depth == NO_LOOP else "D", "none")
                    for score in of_model
                    if score not in joined
                ),
            ):
                if not group:
                    continue
                alone = group is not joined and group[0].depth != NO_LOOP
                panel.errorbar(
                    [score.flops_per_answer for score in group],
                    [scale * score.value for score in group],
                    [scale * (score.standard_error or 0) for score in group],
                    marker=marker,
                    linestyle=line,
                    color=f"C{number}",
                    capsize=2,
                    linewidth=1.2,
                    markersize=9 if marker == "*" else 5,
                    label=f"{Path(model).name}{f', {group[0].depth}' if alone else ''}",
                )
            for score in joined:
                panel.annotate(
                    score.depth.removeprefix("r="),
                    (score.flops_per_answer, scale * score.value),
                    textcoords="offset points",
                    xytext=(4, 5),
                    fontsize="x-small",
                    color=f"C{number}",
                )
        panel.set_xscale("log")
        flops = [score.flops_per_answer for score in own]
        ticks = np.geomspace(min(flops), max(flops), 4) if min(flops) < max(flops) else flops[:1]
        panel.set_xticks(ticks, [with_unit(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_title(f"{task} ({own[0].answers})", loc="left", fontsize="medium")
        said = own[0].metric if own[0].filter == "none" else f"{own[0].metric}, {own[0].filter}"
        panel.set_ylabel(f"{said}{', per cent' if share else ''}", fontsize="small")
        panel.set_xlabel("forward FLOPs per answer", fontsize="small")
        panel.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for panel in panels.flat[: len(tasks)]:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower left",
        ncols=min(len(handles), 3),
        fontsize="small",
        frameon=False,
    )
    figure.savefig(file)


def write_heat_maps(found: Sequence[TaskAccuracy], out: Path) -> None:
    """A heat map of each task as PNG and SVG, named after it: the first model's, the others as columns beside it."""
    for task in dict.fromkeys(one.task for one in found):
        first, *others = (one for one in found if one.task == task)
        names = short_names([one.model for one in (first, *others)])[1:]
        controls = {
            f"{name} {depth_name(steps)}": [row[place] for row in one.accuracy]
            for name, one in zip(names, others, strict=True)
            for place, steps in enumerate(one.num_steps)
        }
        stem = re.sub(r"\W+", "-", task.removeprefix(TASK_PREFIX)).strip("-")
        for kind in ("png", "svg"):
            plot_accuracy_by_depth(
                first.accuracy,
                first.difficulties,
                first.num_steps,
                out / f"{stem}.{kind}",
                f"{task}: accuracy by difficulty and steps",
                first.trained_most or None,
                first.exits.mean_steps if first.exits is not None else None,
                controls,
            )
