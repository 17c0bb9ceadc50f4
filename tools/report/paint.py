"""Pictures of a report, each for light and for dark pages. paint_...(axes, colors, data) draws and labels one."""

import io
import os
from collections.abc import Callable
from statistics import mean

from plumbing.program.files import whole_file
from plumbing.scoring.loss_plot import DARK, LIGHT, label_ends

LOSS = "validation loss (nats per scored token)"


def draw(folder: str, name: str, alt: str, paint: Callable, panels: int = 1, size: tuple = (5.4, 3.6)) -> tuple:
    """Draws a picture (svg), for light pages and a twin for dark ones. `paint(axes, colors)` gets
    one matplotlib Axes or, with more panels, a list of them. size: inches. Returns the part of a page."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    looks = ((name, LIGHT, "#222222", "#ffffff"), (dark_twin(name), DARK, "#e6e6e6", "#161a1d"))
    for file, colors, ink, ground in looks:
        style = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        style |= {"figure.facecolor": ground, "axes.facecolor": ground, "font.size": 11, "svg.hashsalt": "nanolora"}
        picture = io.BytesIO()
        with rc_context(style):
            fig = Figure(size, layout="constrained")
            axes = fig.subplots(1, panels)
            for ax in axes if panels > 1 else [axes]:
                ax.spines[["top", "right"]].set_visible(False)
                ax.grid(axis="y", alpha=0.2)
            paint(axes, colors)
            fig.savefig(picture, format="svg", metadata={"Date": None})
        with whole_file(os.path.join(folder, file)) as f:
            f.write(picture.getvalue())
    return "plot", (name, alt)


def dark_twin(path: str) -> str:
    name, ending = os.path.splitext(path)
    return f"{name}-dark{ending}"


def paint_stress(ax, colors, layers: list):
    """|U^T W0 V| of each layer, (own, the update's, random directions): a column of dots a layer, on a log scale."""
    ends = []
    for values, name, color in zip(zip(*layers), ("W0's own", "the update's", "random"), colors):
        ax.plot(range(1, len(values) + 1), values, "o", color=color, markersize=4)
        ends.append((len(values), values[-1], name, color))
    ax.set(xlabel="layer", ylabel="norm of W0 along these directions", yscale="log")
    label_ends(ax, ends)


def paint_similarity(axes, colors, maps: list, rows: str, columns: str):
    """Heat maps of subspace similarity, [(title, (I, J) matrix)], side by side and on one scale from 0 to 1."""
    for ax, (title, phi) in zip(axes, maps):
        extent = (0.5, phi.shape[1] + 0.5, phi.shape[0] + 0.5, 0.5)
        picture = ax.imshow(phi, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent)
        ax.set_title(title, fontsize=9)
        ax.set(xlabel=columns, xticks=[1, phi.shape[1]], yticks=[1, phi.shape[0]])
        ax.grid(False)
    axes[0].set(ylabel=rows)
    axes[0].figure.colorbar(picture, ax=axes, shrink=0.8, ticks=[0, 0.5, 1])


def write_rate(rate: float, digits: int = 2) -> str:
    """A learning rate in few characters: 2.5e-4."""
    number, _, power = f"{rate:.{digits - 1}e}".partition("e")
    return f"{float(number):g}e{int(power)}"


def paint_rates(ax, colors, lines: dict):
    """Loss over the learning rate, {name: ([(rate, loss), ...], best rate)}: the best rate, if it lies within, is
    marked and named."""
    ends = []
    for (name, (points, best)), color in zip(lines.items(), colors):
        ax.plot(*zip(*points), "o-", color=color, markersize=4, linewidth=1.4)
        ends.append((*points[-1], name, color))
        if points[0][0] < best < points[-1][0]:
            place = 0.93 + 0.08 * len(ends)  # of the rate: above the plot, where no line's name is
            ax.axvline(best, ymax=place, color=color, linestyle=":", linewidth=1.2, clip_on=False)
            style = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 9}
            ax.annotate(write_rate(best), (best, place), (3, 0), color=color, annotation_clip=False, **style)
    # A rate that is much too high must not flatten the rest.
    losses = sorted(loss for points, _ in lines.values() for _, loss in points)
    middle = losses[len(losses) // 2]
    ax.set_ylim(losses[0] - 0.1 * (middle - losses[0]), min(losses[-1], middle + 3 * (middle - losses[0])) * 1.01)
    ax.set(xlabel="learning rate", ylabel=LOSS, xscale="log")
    tried = sorted({rate for points, _ in lines.values() for rate, _ in points})
    shown = tried[:: -(-len(tried) // 6)]  # six at most, or their names overlap
    ax.set_xticks(shown, [write_rate(rate, digits=3) for rate in shown])
    ax.minorticks_off()
    label_ends(ax, [(x, min(y, ax.get_ylim()[1]), name, color) for x, y, name, color in ends])


def paint_over_rank(ax, colors, lines: dict, levels: dict, what: str):
    """`what` over the rank, {name: {rank: one a seed}}: each seed a dot, the means a line. Levels {name: value}
    are dashed. One far below the rest, such as the accuracy (%) of a base that names no label, is only named."""
    ranks = sorted({rank for line in lines.values() for rank in line})
    right = len(ranks) - 0.7
    ends = []
    for (name, line), color in zip(lines.items(), colors):
        places = [ranks.index(rank) for rank in line]
        means = [mean(values) for values in line.values()]
        dots = [(place, value) for place, values in zip(places, line.values()) for value in values]
        ax.plot(places, means, color=color, linewidth=1.4)
        ax.plot(*zip(*dots), "o", color=color, markersize=4, alpha=0.6)
        ends.append((right, means[-1], name, color))
    lowest = min(value for line in lines.values() for values in line.values() for value in values)
    near = {name: level for name, level in levels.items() if level > lowest - 10}
    for (name, level), color in zip(near.items(), colors[len(lines) :]):
        ax.axhline(level, color=color, linestyle="--", linewidth=1.2)
        ends.append((right, level, name, color))
    if far := [f"{name} {level:.1f}" for name, level in levels.items() if name not in near]:
        ax.set_title("below this plot: " + ", ".join(far), loc="right", fontsize=9)
    ax.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    ax.set(xlabel="rank r", ylabel=what, xlim=(-0.3, right))
    label_ends(ax, ends)


def paint_differences(ax, colors, rows: list, what: str):
    """Differences with their intervals, [(name, value, low, high)], one below the other, beside a line at zero."""
    for y, (name, value, low, high) in enumerate(rows):
        ax.plot([low, high], [y, y], color=colors[0], linewidth=2)
        ax.plot(value, y, "o", color=colors[0])
        ax.annotate(name, (value, y), (0, 7), textcoords="offset points", ha="center", annotation_clip=False)
    ax.axvline(0, color=colors[1], linestyle="--", linewidth=1.2)
    ax.set(xlabel=what, ylim=(len(rows) - 0.5, -0.6), yticks=[])
    ax.locator_params(axis="x", nbins=5)
    ax.grid(False)
    ax.spines["left"].set_visible(False)
