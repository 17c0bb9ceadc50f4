"""What an adapter learned: its update of each layer beside the weight W0 that it was trained on.

    python -m tools.anatomy out-mini                    a run's adapter, or any in PEFT's format
    python -m tools.anatomy out-mini out-other          the same, and how similar the other's directions are

Prints a table and writes anatomy.html and its pictures into the adapter's folder.
"""

import argparse
import os
import re
import sys
from functools import partial
from statistics import median

import plumbing.running.threads  # noqa: F401  (before torch, which reads these settings once)

# isort: split
from plumbing.program.errors import UserError, one_line_errors
from plumbing.program.terminal import forgiving_output
from tools.report.directions import SHARE, Adapter, Base, check_run, mean_similarity, random_similarity, study
from tools.report.page import write_page
from tools.report.paint import draw, paint_similarity, paint_spectra, paint_stress

HEAD = ["layer", "|W0|", "|D|", "D / W0", "largest singular values", "hold 90 %"]
HEAD += ["W0 along D", "along itself", "along random", "amplified"]
SIMILAR = ["layer", "A: first in 8", "A: all", "D: first in 8", "D: all", "random: first in 8", "random: all"]


def main(argv):
    with one_line_errors():
        args = parse(argv)
        adapter = Adapter(args.adapter)
        other = Adapter(args.other) if args.other else None
        base = Base(args.base or adapter.config.get("base_model_name_or_path"))
        check_run(adapter.directory, base.name)
        layers = list(study(adapter, base, other))
        page = write_anatomy(adapter, base, layers, other)
    print_table(anatomy_rows(layers))
    print(describe(layers))
    if other:
        print()
        print_table(similarity_rows(layers))
    print(f"written: {page}")


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.anatomy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", help="folder of an adapter in PEFT's format")
    parser.add_argument("other", nargs="?", help="another one, to compare its directions")
    parser.add_argument("--base", help="the base's directory or name, if the adapter's own entry is out of date")

    def refuse(message):
        raise UserError(f"{message}; python -m tools.anatomy --help")

    parser.error = refuse
    return parser.parse_args(argv)


def anatomy_rows(layers):
    rows = [HEAD]
    for x in layers:
        largest = " ".join(f"{s:.2f}" for s in x.singular_values[:4])
        row = [x.name, f"{x.w0_norm:.2f}", f"{x.norm:.3f}", f"{100 * x.norm / x.w0_norm:.1f} %", largest]
        row += [f"{x.n_directions} of {len(x.singular_values)}"]
        rows.append([*row, f"{x.stressed:.3f}", f"{x.own:.2f}", f"{x.random:.3f}", f"{x.amplification:.1f}"])
    return rows


def similarity_rows(layers):
    """phi(1, 8), the adapter's first direction among the other's first 8, and phi of all directions."""
    rows = [SIMILAR]
    for x in layers:
        if x.similarity is not None:
            by_chance = random_similarity(*x.similarity.shape, x.n_in)
            place = min(8, x.similarity.size(1)) - 1
            pairs = [(phi[0, place], phi[-1, -1]) for phi in (x.similarity_A, x.similarity, by_chance)]
            rows.append([x.name, *(f"{float(value):.2f}" for pair in pairs for value in pair)])
    return rows


def describe(layers):
    """The table in three sentences."""
    shares = [100 * x.norm / x.w0_norm for x in layers]
    counts = [x.n_directions for x in layers]
    rank = max(len(x.singular_values) for x in layers)
    over_random = median(x.stressed / x.random for x in layers)
    of_own = median(x.stressed / x.own for x in layers)
    factor = median(x.amplification for x in layers)
    return (
        f"The update D has {min(shares):.1f} to {max(shares):.1f} % of W0's norm. {min(counts)} to {max(counts)} of "
        f"its {rank} directions hold {100 * SHARE:.0f} % of it (of its square). Along D's directions W0 has "
        f"{over_random:.1f} times what it has along random ones, and {100 * of_own:.0f} % of what it has along its "
        f"own first ones; there D is {factor:.1f} times W0 (medians over {len(layers)} layers)."
    )


def print_table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print("  ".join(cells).rstrip())


def write_anatomy(adapter, base, layers, other=None):
    """anatomy.html and its pictures in the adapter's folder. Returns the page's path."""
    folder = adapter.directory
    spectra = {}  # {kind of layer, such as attn.c_attn: [singular values]}
    for x in layers:
        spectra.setdefault(re.split(r"\.\d+\.", x.name)[-1], []).append(x.singular_values)
    paint_values = partial(paint_spectra, spectra=spectra)
    paint_norms = partial(paint_stress, layers=[(x.own, x.stressed, x.random) for x in layers])
    parts = [
        ("h1", f"What the adapter in {name_of(folder)} learned"),
        ("p", f"Its base: {base.name}. {describe(layers)}"),
        ("h2", "Singular values"),
        draw(folder, "anatomy-singular-values.png", "singular values of the update, the largest first", paint_values),
        ("h2", "W0 along the update's directions"),
        draw(folder, "anatomy-stress.png", "W0 along its own, the update's and random directions", paint_norms),
    ]
    if other:
        compared = [x for x in layers if x.similarity is not None]
        if not compared:
            raise UserError(f"{other.directory} has no layer in common with {folder}")
        shape = compared[0].similarity.shape
        names = {"rows": f"first i of {shape[0]}", "columns": f"first j of {shape[1]}"}
        paint_maps = partial(paint_similarity, maps=mean_similarity(layers, *shape), **names)
        alt = "similarity of the input directions, mean over the layers"
        parts += [
            ("h2", f"Directions shared with {name_of(other.directory)}"),
            draw(folder, "anatomy-similarity.png", alt, paint_maps, panels=3, size=(8.4, 3.2)),
            ("p", "Equation 4 of Hu et al. 2021: 1 where one subspace lies within the other."),
            ("table", similarity_rows(layers)),
        ]
    parts += [
        ("h2", "Layer by layer"),
        ("p", "Frobenius norms; D is the update (alpha / r) B A. W0 along D: the norm of U^T W0 V."),
        ("table", anatomy_rows(layers)),
    ]
    path = os.path.join(folder, "anatomy.html")
    write_page(path, parts)
    return path


def name_of(folder):
    return os.path.basename(os.path.abspath(folder))


if __name__ == "__main__":
    with forgiving_output():
        main(sys.argv[1:])
