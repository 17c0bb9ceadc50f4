"""Curves of losses, each named at its end instead of in a legend."""

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
