"""Pictures: curves and dots that are named where they stand, instead of in a legend."""

import itertools
import math

TRAINING = "#0072B2"  # blue and vermillion of Okabe and Ito 2008: colour-blind readers tell them apart
VALIDATION = "#D55E00"


def plot_losses(metrics: list[dict], path: str) -> None:
    """Training and validation loss of a run, its best evaluation in a circle."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    training = [(m["iter"], m["train_loss"]) for m in metrics if m.get("train_loss") is not None]
    validation = [(m["iter"], m["val_loss"]) for m in metrics]
    draw_curves(ax, {"training": [training], "validation": [validation]}, (TRAINING, VALIDATION), "loss")
    best = min(metrics, key=lambda m: m["val_loss"])
    ax.plot(best["iter"], best["val_loss"], "o", color=VALIDATION, markersize=9, fillstyle="none")
    title = f"best validation loss {best['val_loss']:.4f} at update {best['iter']}"
    if metrics[0]["val_loss"] > ax.get_ylim()[1]:
        title += f"; {metrics[0]['val_loss']:.2f} at update {metrics[0]['iter']}, above this plot"
    ax.set_title(title, loc="left", fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def draw_curves(ax, curves: dict, colors, what: str) -> None:
    """Losses over updates, {name: [points, ...]}: each name stands at its curve's end, the steep start is cut off."""
    lines = [points for group in curves.values() for points in group]
    seen = [y for points in lines for x, y in points if x >= 0.2 * points[-1][0]]
    margin = 0.12 * (max(seen) - min(seen) or max(seen))
    ax.set(xlabel="update", ylabel=f"{what} (nats per scored token)", ylim=(min(seen) - margin, max(seen) + margin))
    ends = []
    for (name, group), color in zip(curves.items(), colors):
        for points in group:
            ax.plot(*zip(*points), color=color, marker="o", markersize=2.5, linewidth=1.4)
        ends.append((*group[0][-1], name, color))
    label_ends(ax, ends)
    ax.spines[["top", "right"]].set_visible(False)


def label_ends(ax, ends: list[tuple]) -> None:
    """Names at the right ends of lines, (x, y, name, color) each, a line's height apart, on any scale."""
    ax.get_ylim()  # settles the limits, on which the places depend
    to_height = ax.transData + ax.transAxes.inverted()  # 0 is the lower edge of the plot, 1 the upper
    place = -math.inf
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        place = max(to_height.transform((x, y))[1], place + 0.07)
        style = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "center"}
        ax.annotate(name, (x, place), (6, 0), color=color, annotation_clip=False, **style)


# --- what an adapter learned: each returns a function that paints on axes --------------------------


def paint_spectra(spectra: dict):
    """Singular values over their number, {kind of layer: [values, ...]}: a line a layer, each kind with its name."""

    def paint(ax, colors):
        ends = []
        for (name, layers), color in zip(spectra.items(), itertools.cycle(colors)):
            for values in layers:
                ax.plot(range(1, len(values) + 1), values, color=color, linewidth=1, alpha=0.6)
            last = [values[-1] for values in layers]
            ends.append((len(layers[0]), sum(last) / len(last), name, color))
        is_trained = min(values[-1] for layers in spectra.values() for values in layers) > 0
        ax.set(xlabel="direction", ylabel="singular value of the update", yscale="log" if is_trained else "linear")
        ax.xaxis.get_major_locator().set_params(integer=True)
        label_ends(ax, ends)

    return paint


def paint_stress(layers: list):
    """|U^T W0 V| for each layer, (own, the update's, random directions): a column of dots a layer, on a log scale."""

    def paint(ax, colors):
        ends = []
        for values, name, color in zip(zip(*layers), ("W0's own", "the update's", "random"), colors):
            ax.plot(range(1, len(values) + 1), values, "o", color=color, markersize=4)
            ends.append((len(values), values[-1], name, color))
        ax.set(xlabel="layer", ylabel="norm of W0 along these directions", yscale="log")
        label_ends(ax, ends)

    return paint


def paint_similarity(maps: list, rows: str, columns: str):
    """Heat maps of subspace similarity, [(title, (I, J) matrix)], side by side and on one scale from 0 to 1."""

    def paint(axes, colors):
        for ax, (title, phi) in zip(axes, maps):
            extent = (0.5, phi.shape[1] + 0.5, phi.shape[0] + 0.5, 0.5)
            picture = ax.imshow(phi, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent)
            ax.set_title(title, fontsize=9)
            ax.set(xlabel=columns)
            ax.set_xticks([1, phi.shape[1]])
            ax.set_yticks([1, phi.shape[0]])
            ax.grid(False)
        axes[0].set(ylabel=rows)
        axes[0].figure.colorbar(picture, ax=axes, shrink=0.8, ticks=[0, 0.5, 1])

    return paint


# --- what runs say about a claim -------------------------------------------------------------------


def write_rate(rate: float, digits: int = 2) -> str:
    """A learning rate in few characters: 2.5e-4."""
    number, _, power = f"{rate:.{digits - 1}e}".partition("e")
    return f"{float(number):g}e{int(power)}"


def paint_rates(lines: dict):
    """Loss over the learning rate, {name: ([(rate, loss), ...], best rate)}: the best rate, if it lies within, is
    marked and named."""

    def paint(ax, colors):
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
        ax.set(xlabel="learning rate", ylabel="validation loss (nats per scored token)", xscale="log")
        tried = sorted({rate for points, _ in lines.values() for rate, _ in points})
        shown = tried[:: -(-len(tried) // 6)]  # six at most, or their names overlap
        ax.set_xticks(shown, [write_rate(rate, digits=3) for rate in shown])
        ax.minorticks_off()
        label_ends(ax, [(x, min(y, ax.get_ylim()[1]), name, color) for x, y, name, color in ends])

    return paint


def paint_over_rank(lines: dict):
    """Loss over the rank, {name: {rank: losses of the seeds}}: each seed a dot, the means a line."""

    def paint(ax, colors):
        ranks = sorted({rank for line in lines.values() for rank in line})
        ends = []
        for (name, line), color in zip(lines.items(), colors):
            means = {rank: sum(losses) / len(losses) for rank, losses in line.items()}
            ax.plot([ranks.index(rank) for rank in line], list(means.values()), color=color, linewidth=1.4)
            dots = [(ranks.index(rank), loss) for rank, losses in line.items() for loss in losses]
            ax.plot(*zip(*dots), "o", color=color, markersize=4, alpha=0.6)
            last = list(line)[-1]
            ends.append((ranks.index(last), means[last], name, color))
        ax.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
        ax.set(xlabel="rank r", ylabel="validation loss (nats per scored token)")
        label_ends(ax, ends)

    return paint


def paint_differences(rows: list, what: str = "difference of the losses"):
    """Differences with their 95 % intervals, [(name, Estimate)], one below the other, beside a line at zero."""

    def paint(ax, colors):
        for y, (name, e) in enumerate(rows):
            ax.plot([e.low, e.high], [y, y], color=colors[0], linewidth=2)
            ax.plot(e.value, y, "o", color=colors[0])
            ax.annotate(name, (e.value, y), (0, 7), textcoords="offset points", ha="center", annotation_clip=False)
        ax.axvline(0, color=colors[1], linestyle="--", linewidth=1.2)
        ax.set(xlabel=what, ylim=(len(rows) - 0.5, -0.6))
        ax.set_yticks([])
        ax.locator_params(axis="x", nbins=5)
        ax.grid(False)
        ax.spines["left"].set_visible(False)

    return paint
