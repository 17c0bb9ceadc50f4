"""A file of new texts -> the same file with the answers in it: its own columns, in its order and format.

Only a part of the file is in memory at a time.
"""

import codecs
import collections
import contextlib
import csv
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from plumbing.data.readers import (
    MARKS,
    check_columns,
    is_csv,
    kind_of,
    open_bytes,
    read_batches,
    read_columns,
    read_format,
    read_lines,
    read_rows,
    to_text,
)
from plumbing.program.errors import UserError, first_line
from plumbing.program.files import make_folder, whole_file
from plumbing.program.terminal import reader_has_gone

ANSWER = ("predicted", "generated", "share")  # the columns that are added
KINDS = ("csv", "tsv", "jsonl", "parquet", "txt")
STDIN = "-"


def count_texts(path: str, text_field: str) -> int | None:
    """How many rows a file has; None for standard input, which can be read only once. Every row is looked at, so that
    a mistake in the last one shows before the first is answered. Raises UserError with the line."""
    if path == STDIN:
        return None
    if not os.path.isfile(path):
        raise UserError(f"predict={path}: no such file")
    if kind_of(path) not in KINDS:
        raise UserError(
            f"predict={path}: only {', '.join(KINDS)} files (txt: a text a line), packed (.gz) or not, and - for "
            "standard input"
        )
    if kind_of(path) == "parquet":
        n = sum(len(texts) for _, texts in read_parquet(path, text_field, 10_000))
    else:
        n = sum(1 for _ in read_texts(path, text_field))
        if is_csv(path):
            columns = read_format(path, (text_field,)).columns
            check_columns(path, columns, columns)
    if n == 0:
        raise UserError(f"predict={path}: no text in it, it is empty")
    return n


def answers_path(folder: str, path: str) -> str:
    """Where the answers to a file's texts go: folder/reviews-predicted.csv for reviews.csv."""
    name = os.path.basename(path)
    name = name[:-3] if name.lower().endswith(".gz") else name
    kind = "jsonl" if kind_of(path) == "txt" else kind_of(path)  # a line of text has no columns
    return os.path.join(folder, f"{os.path.splitext(name)[0]}-predicted.{kind}")


def predict_file(config, folder: str, load: Callable) -> None:
    """Answers all texts of the file config.predict, into a file in `folder`; those of standard input to standard
    output, as lines of JSON.

    load: makes a ModelSampler. Data and model are loaded after a look at the file. Raises UserError.
    """
    path = config.predict
    text_field = config.text_field
    target = answers_path(folder, path)
    # Where standard output is for the answers, notes go to the other one.
    with contextlib.redirect_stdout(sys.stderr) if path == STDIN else contextlib.nullcontext():
        n = count_texts(path, text_field)
        if path != STDIN:
            refuse_other_answers(target, path, text_field)
        sampler = load()
        sampler.load_prompt()
        sampler.load_model()
    size = 50 * config.batch_size  # texts in memory: sorted by length, they make 50 batches of little padding
    found = collections.Counter()
    began = time.monotonic()
    with tqdm(total=n, disable=None, unit="text", leave=path != STDIN) as bar:

        def predict(texts):
            answers = sampler.predict(texts)
            found.update(a["predicted"] or ("no text" if a["text"] is None else "garbage") for a in answers)
            bar.update(len(texts))
            return answers

        if path == STDIN:
            print_answers(path, text_field, predict, size)
        else:
            write_file(path, target, text_field, predict, size)
    if sampler.n_cut:
        print(f"note: {sampler.n_cut} texts were cut to fit the context", file=sys.stderr)
    if path != STDIN:
        counts = ", ".join(f"{name} {count}" for name, count in found.most_common(10))
        print(f"{n} texts: {counts}; {n / (time.monotonic() - began):.1f} texts/s; written: {target}")


def write_file(path, target, text_field, predict, size):
    make_folder(os.path.dirname(target))
    with whole_file(target) as f:
        if kind_of(path) == "parquet":
            write_parquet(path, f, text_field, predict, size)
            return
        write = csv_writer(path, f, text_field) if is_csv(path) else jsonl_writer(f)
        for row, answer in predict_rows(path, text_field, predict, size):
            write(row, answer)


def refuse_other_answers(target, path, text_field):
    """UserError where the answers to other texts would be overwritten: to a reviews.csv of another folder."""
    if os.path.exists(target):
        texts = bare_texts(path, text_field)
        with contextlib.suppress(UserError):
            # Every text that was answered is there again, and more may follow.
            if all(next(texts, ...) == answered for answered in bare_texts(target, text_field)):
                return
        raise UserError(
            f"predict={path}: {target} holds the answers to other texts; move it away, or type another --out_dir"
        )


def bare_texts(path, text_field):
    """The texts of a file, or of a file of answers."""
    if kind_of(path) == "parquet":
        for columns in read_columns(path, (text_field,)):
            yield from columns[0].to_pylist()
    else:
        for _, row in read_file(path, text_field):
            yield row.get(text_field)


def read_file(path, text_field):
    return read_rows(path, (text_field,), read_lines if kind_of(path) == "txt" else None)


def predict_rows(path, text_field, predict, size):
    """Yields (row, answer) in the file's order. predict: `size` texts at a time -> their answers."""
    rows = read_texts(path, text_field)
    while part := list(itertools.islice(rows, size)):
        answers = predict([text for _, text in part])
        yield from ((row, answer) for (row, _), answer in zip(part, answers))


def print_answers(path, text_field, predict, size):
    for row, answer in predict_rows(path, text_field, predict, size):
        print(to_json(row | pick(answer), sys.stdout.encoding or "utf-8"))
        if reader_has_gone():
            return


def pick(answer):
    return {key: answer[key] for key in ANSWER}


# --- reading ---------------------------------------------------------------------------------------


def read_texts(path: str, text_field: str) -> Iterator[tuple[dict, str | None]]:
    """(row, its text or None) of a file that is no parquet, or of standard input. Raises UserError with the line."""
    for where, row in read_stdin(text_field) if path == STDIN else read_file(path, text_field):
        refuse_columns(where, [key for key in ANSWER if key in row])
        yield row, to_text(row.get(text_field), "text_field", text_field, where)


def read_stdin(text_field):
    """A text a line."""
    if sys.stdin.isatty():
        print("a text a line; Ctrl-D (Windows: Ctrl-Z and Enter) ends", file=sys.stderr)
    for line, data in enumerate(sys.stdin.buffer, 1):
        where = f"standard input, line {line}"
        try:
            text = data.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{where}: no UTF-8; write the texts into a file as UTF-8") from e
        yield where, {text_field: text.rstrip("\r\n") or None}


def read_parquet(path, text_field, size):
    """(batch of rows, their texts) of a parquet file."""
    try:
        for batch in read_batches(path, size=size):
            columns = batch.schema.names
            check_columns(path, columns, (text_field,))
            refuse_columns(path, [key for key in ANSWER if key in columns])
            values = batch.column(text_field).to_pylist()
            yield batch, [to_text(value, "text_field", text_field, path) for value in values]
    except UserError:
        raise
    except (ValueError, OSError) as e:
        raise UserError(f"{path} is damaged or no parquet: {first_line(e)}") from e


def refuse_columns(where, columns):
    if columns:
        raise UserError(f"{where}: a column {columns[0]} is there already; rename it, since the answer has that name")


# --- writing ---------------------------------------------------------------------------------------


def jsonl_writer(f):
    return lambda row, answer: f.write((to_json(row | pick(answer)) + "\n").encode())


def to_json(row, encoding="utf-8"):
    """A row as one line, its letters as they are where the encoding has them all."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:  # half an emoji, or a terminal without one
        return json.dumps(row)
    return line


def csv_writer(path, f, text_field):
    """Writes rows as the file `path` has them: with its separator and line ends, Excel's first line "sep=;", and a
    byte-order mark, which Excel needs."""
    form = read_format(path, (text_field,))
    with open_bytes(path) as start:
        marked = start.read(4).startswith((codecs.BOM_UTF8, *MARKS))
    f.write((codecs.BOM_UTF8 if marked else b"") + form.before.encode())

    def write_line(fields):
        line = io.StringIO()
        # A text with either half of this line end is quoted.
        csv.writer(line, delimiter=form.separator, lineterminator="\r\n").writerow(fields)
        f.write((line.getvalue().removesuffix("\r\n") + form.line_end).encode())

    write_line([*form.columns, *ANSWER])
    return lambda row, answer: write_line([*row.values(), *pick(answer).values()])


def write_parquet(path, f, text_field, predict, size):
    """The columns go through as they are, whatever their types."""
    import pyarrow
    import pyarrow.parquet

    added = [(ANSWER[0], pyarrow.string()), (ANSWER[1], pyarrow.string()), (ANSWER[2], pyarrow.float64())]
    writer = None
    for batch, texts in read_parquet(path, text_field, size):
        answers = predict(texts)
        if writer is None:
            # What the library datasets notes there lists all columns, and these three are not in its list.
            notes = {key: note for key, note in (batch.schema.metadata or {}).items() if key != b"huggingface"}
            schema = pyarrow.schema([*batch.schema, *(pyarrow.field(*pair) for pair in added)], notes)
            writer = pyarrow.parquet.ParquetWriter(f, schema)
        columns = [pyarrow.array([answer[key] for answer in answers], kind) for key, kind in added]
        writer.write_batch(pyarrow.RecordBatch.from_arrays([*batch.columns, *columns], schema=schema))
    writer.close()
