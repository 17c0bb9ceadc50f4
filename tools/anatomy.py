"""What an adapter learned: its update of each layer beside the weight W0 that it was trained on.

    python -m tools.anatomy out-mini                    a run's adapter, or any in PEFT's format
    python -m tools.anatomy out-mini out-other          the same, and how similar the other's directions are

Frobenius norms; D is the update (alpha / r) B A, and W0 along D is the norm of U^T W0 V. Two adapters' directions are
compared by equation 4 of Hu et al. 2021: 1 where one subspace lies within the other.
"""

import sys
from statistics import median

import plumbing.running.threads  # noqa: F401  (before torch, which reads these settings once)

# isort: split
from plumbing.program.errors import UserError, one_line_errors
from plumbing.program.flags import make_parser
from plumbing.program.terminal import forgiving_output
from tools.report.directions import SHARE, Adapter, Base, check_run, random_similarity, study

HEAD = ["layer", "|W0|", "|D|", "D / W0", "largest singular values", "hold 90 %"]
HEAD += ["W0 along D", "along itself", "along random", "amplified"]
SIMILAR = ["layer", "A: first in 8", "A: all", "D: first in 8", "D: all", "random: first in 8", "random: all"]


def main(argv):
    with one_line_errors():
        parser = make_parser(__doc__)
        parser.add_argument("adapter", help="folder of an adapter in PEFT's format")
        parser.add_argument("other", nargs="?", help="another one, to compare its directions")
        parser.add_argument("--base", help="the base's directory or name, if the adapter's own entry is out of date")
        args = parser.parse_args(argv)
        adapter = Adapter(args.adapter)
        other = Adapter(args.other) if args.other else None
        base = Base(args.base or adapter.config.get("base_model_name_or_path"))
        check_run(adapter.directory, base.name)
        layers = list(study(adapter, base, other))
        if other and all(x.similarity is None for x in layers):
            raise UserError(f"{other.directory} has no layer in common with {adapter.directory}")
    print_table(anatomy_rows(layers))
    print(describe(layers))
    if other:
        print()
        print_table(similarity_rows(layers))


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


if __name__ == "__main__":
    with forgiving_output():
        main(sys.argv[1:])
