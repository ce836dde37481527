"""Pictures of what the state does, each a function of arrays that gives a matplotlib figure.

matplotlib is loaded when the first picture is drawn. Colours are told apart by readers with colour-blindness: viridis for
amounts, Okabe and Ito's palette for kinds. Text and axes have the one colour `INK`, so that a page can recolour them.
"""

import re
from collections.abc import Callable, Sequence
from functools import wraps
from io import StringIO
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from redepth.errors import RedepthError

from .dynamics import DRIFTING, FIXED_POINT, ORBIT, SLIDER

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

INK = "#1f2328"
AMOUNTS = "viridis"
ENDING_COLOURS = {FIXED_POINT: "#0072b2", ORBIT: "#d55e00", SLIDER: "#009e73", DRIFTING: "#cc79a7"}
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
# A token's label is cut to so many letters, and a picture shows so many tokens.
LABEL_LETTERS = 12
MOST_TOKENS = 48
STYLE: Any = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "redepth",
}


def require_matplotlib() -> None:
    """Raises RedepthError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RedepthError("pictures need matplotlib; pip install 'redepth[plots]'") from None


def in_style(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a function under `STYLE`, whatever the user's own settings are."""

    @wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        require_matplotlib()
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


@in_style
def save_picture(figure: Any, file: str | Path) -> None:
    """As `file`.png on white, and `file`.svg."""
    figure.savefig(Path(file).with_suffix(".png"), facecolor="white")
    figure.savefig(Path(file).with_suffix(".svg"), metadata={"Date": None, "Creator": None})


@in_style
def inline_svg(figure: Any, label: str) -> str:
    """SVG markup for a page, whose text and axes take the page's text colour.

    Args:
        label: what a screen reader says.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :].replace(INK, "currentColor")
    # Matplotlib's names are unique in a figure alone, and equal images share one; a page has several figures.
    markup = re.sub(r'(<image [^>]*?) id="[^"]*"', r"\1", markup)
    own = re.sub(r"\W+", "-", label)
    markup = re.sub(r'\bid="', f'id="{own}-', markup)
    markup = re.sub(r'(href="#|url\(#)', rf"\g<1>{own}-", markup)
    width = 96 * figure.get_size_inches()[0]
    attributes = f'<svg role="img" aria-label="{label}" style="width:{width:.0f}px" '
    return re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", attributes + markup[len("<svg ") :], count=1)


def show_tokens(tokens: Sequence[str]) -> list[str]:
    """Labels in which spaces and line ends can be seen, cut to `LABEL_LETTERS`."""
    shown = []
    for token in tokens:
        text = token.replace("\n", "⏎").replace("\t", "⇥").strip(" ") or "␣"
        text = text if len(text) <= LABEL_LETTERS else text[: LABEL_LETTERS - 1] + "…"
        shown.append(text.replace("$", r"\$"))  # no mathematics
    return shown


def _token_axis(axes: Any, tokens: Sequence[str]) -> None:
    axes.set_yticks(range(len(tokens)), show_tokens(tokens), fontsize=7.5)


def _step_axis(axes: Any, steps: Sequence[int]) -> None:
    """At most ten labels on the cells of a heat map."""
    every = max(1, -(-len(steps) // 10))
    places = list(range(0, len(steps), every))
    axes.set_xticks(places, [str(steps[place]) for place in places])


def _heat_maps(
    panels: Sequence[tuple[str, Any, Sequence[int], str]], tokens: Sequence[str], reverse: bool = False
) -> Any:
    """Tokens × steps side by side; a panel is (title, `[tokens, steps]`, steps, what the colour is)."""
    shown = min(len(tokens), MOST_TOKENS)
    figure, grid = _figure(
        1.2 + 3.6 * len(panels), max(2.4, 0.9 + 0.155 * shown), 1, len(panels), squeeze=False, sharey=True
    )
    for axes, (title, values, steps, unit) in zip(grid[0], panels, strict=True):
        drawn = axes.imshow(
            np.asarray(values)[:shown],
            aspect="auto",
            cmap=AMOUNTS + "_r" * reverse,
            interpolation="nearest",
            rasterized=True,
        )
        axes.set_title(f"{title}\n{unit}", fontsize=9)
        axes.set_xlabel("step")
        _step_axis(axes, steps)
        axes.tick_params(axis="y", length=0)
        bar = figure.colorbar(drawn, ax=axes, pad=0.02, aspect=40)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        for side in axes.spines.values():
            side.set_visible(False)
    _token_axis(grid[0, 0], tokens[:shown])
    return figure


@in_style
def plot_convergence(to_last: Any, to_next: Any, tokens: Sequence[str]) -> Any:
    """How far each token's state is from the last one and from the next.

    Args:
        to_last, to_next: as `dynamics.distance_to_last` and `distance_to_next` give them, `[tokens, R + 1]` and
            `[tokens, R]`.
        tokens: their text.
    """
    to_last, to_next = np.asarray(to_last)[:, :-1], np.asarray(to_next)
    steps = range(to_last.shape[1])
    return _heat_maps(
        [
            ("distance to the last state", to_last, steps, "log10 ‖s_i − s_R‖ / ‖s_R‖"),
            ("distance to the next state", to_next, steps, "log10 ‖s_{i+1} − s_i‖ / ‖s_{i+1}‖"),
        ],
        tokens,
    )


@in_style
def plot_trajectories(
    coordinates: Any, endings: Sequence[str], tokens: Sequence[str], columns: int = 4, share: Any = None
) -> Any:
    """Each token's course in a plane, as small multiples, coloured by what it ends in, from pale (first) to full (last).

    Args:
        coordinates: `[tokens, steps, 2]`, such as `dynamics.principal_components(states, 2, per_token=True)` gives.
        endings: of `dynamics.ENDINGS`, for each token.
        share: `[tokens]`, of each token's variance that the plane shows.
    """
    coordinates = np.asarray(coordinates)[..., :2]
    shown = min(len(tokens), 6 * columns)
    rows = -(-shown // columns)
    figure, grid = _figure(1.9 * columns, 1.75 * rows + 0.3, rows, columns, squeeze=False)
    labels = show_tokens(tokens[:shown])
    for place, axes in enumerate(grid.flat):
        axes.set_xticks([])
        axes.set_yticks([])
        if place >= shown:
            axes.set_visible(False)
            continue
        x, y = coordinates[place].T
        colour = ENDING_COLOURS.get(endings[place], INK)
        axes.plot(x, y, "-", color=colour, linewidth=0.7, alpha=0.5)
        axes.scatter(x, y, s=9, color=colour, alpha=np.linspace(0.25, 1, len(x)), linewidths=0)
        axes.plot(x[-1], y[-1], "o", color=colour, markersize=4.5)
        axes.plot(x[0], y[0], "o", markerfacecolor="none", markeredgecolor=colour, markersize=5)
        note = f"  {share[place]:.0%}" if share is not None else ""
        axes.set_title(f"{labels[place]}{note}", fontsize=8, pad=2)
        axes.margins(0.12)
        for side in axes.spines.values():
            side.set_visible(True)
            side.set_alpha(0.25)
    present = [name for name in ENDING_COLOURS if name in set(endings[:shown])]
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", linestyle="", color=ENDING_COLOURS[name], label=name) for name in present]
    handles.append(Line2D([], [], marker="o", linestyle="", markerfacecolor="none", color=INK, label="first state"))
    figure.legend(handles=handles, loc="outside lower left", ncols=5, fontsize=8.5, labelcolor=INK)
    return figure


@in_style
def plot_predictions(entropy: Any, kl_to_last: Any, flips: Any, top: Sequence[str], tokens: Sequence[str]) -> Any:
    """What coda and head would say at every step.

    Args:
        entropy, kl_to_last: `[tokens, R]`, in nats, of the next-token distribution after steps 1 … R, and its distance
            KL(p_R ‖ p_i) from the last.
        flips: `[tokens, R]`, bool, where the likeliest token is another than one step before.
        top: the likeliest token after the last step, for each token.
        tokens: their text.
    """
    entropy, flips = np.asarray(entropy), np.asarray(flips)
    steps = range(1, entropy.shape[1] + 1)
    logs = np.log10(np.maximum(np.asarray(kl_to_last), 1e-6))
    labels = [f"{before} → {after}" for before, after in zip(show_tokens(tokens), show_tokens(top), strict=True)]
    figure = _heat_maps(
        [
            ("entropy", entropy, steps, "nats"),
            ("distance to the last prediction", logs, steps, "log10 KL(p_R ‖ p_i), nats"),
        ],
        tokens,
    )
    for axes in figure.axes[:2]:
        where = np.argwhere(flips[:MOST_TOKENS])
        axes.scatter(where[:, 1], where[:, 0], s=10, marker="o", facecolors="white", edgecolors="black", linewidths=0.5)
    figure.axes[0].set_yticks(range(min(len(labels), MOST_TOKENS)), labels[:MOST_TOKENS], fontsize=7.5)
    return figure


@in_style
def plot_by_step(curves: dict[str, dict[str, Any]], first_step: int = 1) -> Any:
    """Means over all tokens by number of steps: one panel a measure, one line a checkpoint.

    Args:
        curves: by measure (the panel's title), then by checkpoint, values by step.
    """
    columns = 2 if len(curves) == 4 else len(curves)
    rows = -(-len(curves) // columns)
    figure, grid = _figure(1 + 3.4 * columns, 0.3 + 2.7 * rows, rows, columns, squeeze=False)
    for axes, (title, lines) in zip(grid.flat, curves.items(), strict=True):
        for place, (label, values) in enumerate(lines.items()):
            steps = np.arange(first_step, first_step + len(values))
            style = ("-", "--", ":")[place % 3]
            axes.plot(
                steps, values, style, color=PALETTE[place], label=label, linewidth=1.8, marker="o", markersize=2.5
            )
        axes.set_title(title)
        axes.set_xlabel("num_steps")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.2)
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda found: len(found[1]))
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), labelcolor=INK)
    return figure


@in_style
def plot_exits(exits: dict[str, Any], num_steps: int) -> Any:
    """After which step each exit test lets tokens go.

    Args:
        exits: by test, `[tokens]`, the step.
    """
    names = list(exits)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, grid = _figure(3.0 * columns, 1.9 * rows + 0.3, rows, columns, squeeze=False, sharex=True, sharey=True)
    edges = np.arange(0.5, num_steps + 1)
    grid[0, 0].xaxis.get_major_locator().set_params(integer=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(names):
            axes.set_visible(False)
            continue
        taken = np.asarray(exits[names[place]])
        weights = np.full(len(taken), 100 / max(len(taken), 1))
        axes.hist(taken, bins=edges, weights=weights, color=PALETTE[0])
        axes.axvline(taken.mean(), color=PALETTE[1], linewidth=1.2, linestyle="--")
        axes.set_title(f"{names[place]}: {taken.mean():.1f} on average")
        axes.grid(axis="y", alpha=0.2)
    for place in range(max(len(names) - columns, 0), len(names)):
        grid.flat[place].set_xlabel("left after step")
        grid.flat[place].tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("% of tokens")
    return figure


@in_style
def plot_attention(maps: Any, tokens: Sequence[str], layers: Sequence[int]) -> Any:
    """What the last token reads at every step, one panel a layer.

    Args:
        maps: `[layers, steps, tokens]`, probabilities averaged over heads.
        layers: their numbers, counted over the whole stack.
    """
    maps = np.asarray(maps)
    panels = [
        (f"layer {layer}", np.log10(np.maximum(one.T, 1e-4)), range(1, maps.shape[1] + 1), "log10 probability")
        for layer, one in zip(layers, maps, strict=True)
    ]
    return _heat_maps(panels, tokens)


@in_style
def plot_spread(spread: Any, names: Sequence[str]) -> Any:
    """Path independence: how far apart runs from different initial states are.

    Args:
        spread: by checkpoint, `[tokens, steps]`, as `dynamics.spread_over_starts` gives it.
    """
    figure, axes = _figure(5.6, 3.0)
    for place, (values, name) in enumerate(zip(spread, names, strict=True)):
        values = np.asarray(values)
        steps = np.arange(values.shape[1])
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=0)
        axes.fill_between(steps, low, high, color=PALETTE[place], alpha=0.2, linewidth=0)
        axes.plot(steps, middle, ("-", "--")[place % 2], color=PALETTE[place], label=name, linewidth=1.8)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("log10 spread / length")
    axes.set_title("runs from different initial states (median, 10–90 % of tokens)")
    axes.grid(alpha=0.2)
    if len(names) > 1:
        axes.legend(labelcolor=INK)
    return figure
