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
    """Names at the right ends of lines, (x, y, name, color) each, a line's height apart."""
    low, high = ax.get_ylim()
    place = -math.inf
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        place = max(y, place + 0.07 * (high - low))
        style = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
        ax.annotate(name, (x, place), (6, 0), color=color, **style)


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
        ax.set(xlabel="direction", ylabel="singular value of the update")
        ax.set_ylim(bottom=0)
        label_ends(ax, ends)

    return paint


def paint_stress(layers: list):
    """|U^T W0 V| for each layer, (own, the update's, random directions): a column of dots a layer, on a log scale."""

    def paint(ax, colors):
        for values, name, color in zip(zip(*layers), ("W0's own", "the update's", "random"), colors):
            ax.plot(range(1, len(values) + 1), values, "o", color=color, markersize=4)
            ax.annotate(name, (len(values) + 1, values[-1]), color=color, va="center", annotation_clip=False)
        ax.set(xlabel="layer", ylabel="norm of W0 along these directions", yscale="log")

    return paint


def paint_similarity(maps: list, rows: str, columns: str):
    """Heat maps of subspace similarity, [(title, (I, J) matrix)], side by side and on one scale from 0 to 1."""

    def paint(axes, colors):
        for ax, (title, phi) in zip(axes, maps):
            extent = (0.5, phi.shape[1] + 0.5, phi.shape[0] + 0.5, 0.5)
            picture = ax.imshow(phi, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent)
            ax.set_title(title, fontsize=11)
            ax.set(xlabel=columns)
            ax.grid(False)
        axes[0].set(ylabel=rows)
        axes[0].figure.colorbar(picture, ax=axes, shrink=0.8)

    return paint
