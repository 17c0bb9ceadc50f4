"""loss.png: a run's losses in curves with their names at their ends; and the colours of all plots."""

import math

# Okabe and Ito 2008, which colour-blind readers tell apart: on light pages and on dark ones.
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DARK = ("#56B4E9", "#E69F00", "#2FC69A", "#E39BC4", "#F0E442", "#9AD0F5")


def plot_losses(metrics: list[dict], path: str) -> None:
    """Training and validation loss of a run, its best evaluation in a circle."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    training = [(m["iter"], m["train_loss"]) for m in metrics if m.get("train_loss") is not None]
    validation = [(m["iter"], m["val_loss"]) for m in metrics]
    draw_curves(ax, LIGHT, {"training": [training], "validation": [validation]}, "loss")
    best = min(metrics, key=lambda m: m["val_loss"])
    ax.plot(best["iter"], best["val_loss"], "o", color=LIGHT[1], markersize=9, fillstyle="none")
    title = f"best validation loss {best['val_loss']:.4f} at update {best['iter']}"
    if metrics[0]["val_loss"] > ax.get_ylim()[1]:
        title += f"; {metrics[0]['val_loss']:.2f} at update {metrics[0]['iter']}, above this plot"
    ax.set_title(title, loc="left", fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def draw_curves(ax, colors, curves: dict, what: str) -> None:
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
