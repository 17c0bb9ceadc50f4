"""A score from what was found and what is true: the table, its interval, and how both are written and printed."""

import contextlib
import json
import math
import os
from collections import Counter

from plumbing.adapters.peft_format import ADAPTER_WEIGHTS
from plumbing.program.files import whole_file, write_json

SCORED = ("init_from", "dataset", "split", "template")  # of the config: what makes two scores comparable


def tabulate(found: list, labels: list[int], label_names: list[str]) -> dict:
    """Accuracy of the labels found (ints, or None for a text without any) against the true ones.

    None is wrong and counted as garbage. Returns n, accuracy and garbage as shares, the accuracy's 95 % interval,
    each label's recall (None if it does not occur) and the confusion table: rows the true labels,
    columns those found and then garbage. Raises ValueError for no labels, or lists of unequal lengths.
    """
    if len(found) != len(labels) or len(labels) == 0:
        raise ValueError(f"{len(found)} texts for {len(labels)} labels")
    n_labels = len(label_names)
    table = [[0] * (n_labels + 1) for _ in label_names]
    for i, label in zip(found, labels):
        column = n_labels if i is None else i
        table[label][column] += 1
    n = len(labels)
    accuracy = sum(table[i][i] for i in range(n_labels)) / n
    return {
        "n": n,
        "accuracy": accuracy,
        "interval": wilson(accuracy, n),
        "garbage": sum(row[-1] for row in table) / n,
        "recall": [row[i] / sum(row) if sum(row) else None for i, row in enumerate(table)],
        "confusion": table,
        "label_names": list(label_names),
    }


def wilson(p: float, n: int) -> list[float]:
    """The 95 % interval [low, high] of a share p seen in n examples (Wilson 1927, "Probable Inference, the Law of
    Succession, and Statistical Inference")."""
    z = 1.959964
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding may put an end a little below 0 or above 1.
    return [max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))]


def write_score(folder: str, result: dict, examples, generated: list[str], found: list, names: list[str]) -> None:
    """accuracy.json, and predictions.jsonl: each text with its label, what was written and the label found in it."""
    with whole_file(os.path.join(folder, "predictions.jsonl")) as f:
        for example, text, i in zip(examples, generated, found):
            row = {"text": example.text, "label": names[example.label], "generated": text}
            row["predicted"] = None if i is None else names[i]
            f.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    write_json(os.path.join(folder, "accuracy.json"), result)


def print_score(folder: str, result: dict, examples, generated: list[str], found: list, names: list[str]) -> None:
    """The table, two examples of each kind of error, the speed, the untuned model's accuracy if it was scored in the
    folder too, and where the weights lie."""
    print_result(result)
    shown = Counter()
    for example, text, i in zip(examples, generated, found):
        true = names[example.label]
        written = "garbage" if i is None else names[i]
        if i == example.label or shown[true, written] == 2:
            continue
        if not shown:
            print("\nsome errors:")
        shown[true, written] += 1
        review = " ".join(example.text.split())
        print(f"  {true} taken for {written}: wrote {text[:30]!r} after {review[:90]!r}")
    speed = f"{result['n'] / max(result['seconds'], 0.01):.1f} examples/s"
    print(f"\n{speed}; written: {folder}/accuracy.json, {folder}/predictions.jsonl")
    if not result["tuned"]:
        return
    path = os.path.join(folder, "untuned", "accuracy.json")
    with contextlib.suppress(OSError, ValueError), open(path) as f:
        before = json.load(f)
        if all(before.get(key) == result[key] for key in SCORED):
            print(f"untuned {100 * before['accuracy']:.2f} %, tuned {100 * result['accuracy']:.2f} %")
    for name in (ADAPTER_WEIGHTS, "model.safetensors", "loss.png"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            print(f"{path} ({os.path.getsize(path) / 1e6:.2f} MB)")


def print_result(result: dict) -> None:
    """The accuracy and the confusion table."""
    print(f"accuracy {describe_accuracy(result, 'examples')}\n")
    names = [*result["label_names"], "garbage"]
    rows = [["true \\ written", *names, "recall"]]
    for name, counts, recall in zip(names, result["confusion"], result["recall"]):
        rows.append([name, *map(str, counts), "" if recall is None else f"{100 * recall:.1f} %"])
    width = max(map(len, names)) + 2
    for first, *cells in rows:
        print(first.ljust(width + 6) + "".join(cell.rjust(width) for cell in cells))


def describe_accuracy(result: dict, what: str) -> str:
    values = (result["accuracy"], *result["interval"], result["garbage"])
    accuracy, low, high, garbage = (100 * value for value in values)
    sure = f"95 % interval {low:.1f} to {high:.1f}"
    return f"{accuracy:.2f} % ({sure}) of {result['n']} {what}, garbage {garbage:.2f} %"
