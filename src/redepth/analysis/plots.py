"""Pictures of what depth buys."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


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
