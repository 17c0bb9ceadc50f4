"""A file of new texts -> the same file with the answers in it: its own columns, in its order and format.

Only a part of the file is in memory at a time.
"""

import codecs
import collections
import contextlib
import csv
import functools
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from plumbing.data import readers
from plumbing.program.errors import UserError
from plumbing.program.files import make_folder, whole_file
from plumbing.program.terminal import reader_has_gone
from plumbing.scoring.answers import PART

ANSWER = ("predicted", "generated", "share")  # the columns that are added
KINDS = ("csv", "tsv", "jsonl", "parquet", "txt")
STDIN = "-"


def predict_file(config, folder: str, load: Callable) -> None:
    """Answers all texts of the file config.predict, into a file in `folder`; those of standard input to standard
    output, as lines of JSON.

    load: makes a ModelSampler. Data and model are loaded after a look at the file. Raises UserError.
    """
    path, text_field = config.predict, config.text_field
    target = answers_path(folder, path)
    # Where standard output is for the answers, notes go to the other one.
    with contextlib.redirect_stdout(sys.stderr) if path == STDIN else contextlib.nullcontext():
        n = None if path == STDIN else check_file(path, text_field, target)
        sampler = load()
        sampler.load_prompt()
        sampler.load_model()
    size = PART * config.batch_size  # texts in memory
    found = collections.Counter()
    began = time.monotonic()
    bar = tqdm(total=n, disable=None, unit="text", leave=path != STDIN)
    with bar, open_answers(path, text_field, target) as write:
        for rows, texts in read_parts(path, text_field, size):
            answers = sampler.predict(texts)
            found.update(a["predicted"] or ("no text" if a["text"] is None else "garbage") for a in answers)
            write(rows, [{key: answer[key] for key in ANSWER} for answer in answers])
            bar.update(len(texts))
            if path == STDIN and reader_has_gone():
                break
    if sampler.n_cut:
        print(f"note: {sampler.n_cut} texts were cut to fit the context", file=sys.stderr)
    if path != STDIN:
        counts = ", ".join(f"{name} {count}" for name, count in found.most_common(10))
        print(f"{n} texts: {counts}; {n / (time.monotonic() - began):.1f} texts/s; written: {target}")


def answers_path(folder: str, path: str) -> str:
    """Where the answers to a file's texts go: folder/reviews-predicted.csv for reviews.csv."""
    name = os.path.basename(path)
    name = name[:-3] if name.lower().endswith(".gz") else name
    kind = "jsonl" if readers.kind_of(path) == "txt" else readers.kind_of(path)  # a line of text has no columns
    return os.path.join(folder, f"{os.path.splitext(name)[0]}-predicted.{kind}")


# --- reading ---------------------------------------------------------------------------------------


def check_file(path: str, text_field: str, target: str) -> int:
    """The number of rows. Every one is looked at, so that a mistake in the last one shows before the first is
    answered. Raises UserError with the line, and where the answers to other texts, in `target`, would be lost."""
    if not os.path.isfile(path):
        raise UserError(f"predict={path}: no such file")
    if readers.kind_of(path) not in KINDS:
        raise UserError(
            f"predict={path}: only {', '.join(KINDS)} files (txt: a text a line), packed (.gz) or not, and - for "
            "standard input"
        )
    n = sum(len(texts) for _, texts in read_parts(path, text_field, 1_000))
    if readers.is_csv(path):
        columns = readers.read_format(path, (text_field,)).columns
        readers.check_columns(path, columns, columns)
    if n == 0:
        raise UserError(f"predict={path}: no text in it, it is empty")
    if os.path.exists(target):
        texts = read_bare(path, text_field)
        # Each text that was answered is in its place again, and more may follow.
        with contextlib.suppress(UserError):  # damaged, or without this column
            if all(next(texts, ...) == answered for answered in read_bare(target, text_field)):
                return n
        raise UserError(
            f"predict={path}: {target} holds the answers to other texts; move it away, or type another --out_dir"
        )
    return n


def read_bare(path, text_field):
    """The texts of a file, or of a file of answers."""
    for _, texts in read_parts(path, text_field, 1_000, columns=(text_field,)):
        yield from texts


def read_parts(path: str, text_field: str, size: int, columns: tuple[str, ...] = ()) -> Iterator[tuple]:
    """Yields (rows, their texts), `size` rows at a time: dicts, or an Arrow batch of a parquet file. Raises UserError
    with the line for what cannot be answered. columns: the only ones to be looked at, where all need not be."""
    if readers.kind_of(path) == "parquet":
        with readers.name_damage(path):
            for batch in readers.read_batches(path, columns, size):
                if not columns:
                    readers.check_columns(path, batch.schema.names, (text_field,))
                    refuse_answers(batch.schema.names, path)
                values = batch.column(text_field).to_pylist()
                yield batch, [readers.to_text(value, "text_field", text_field, path) for value in values]
        return
    read = readers.read_lines if readers.kind_of(path) == "txt" else None
    # Of answers to jsonl some may have no text: those to an empty row.
    needed = () if columns and readers.kind_of(path) == "jsonl" else (text_field,)
    rows = read_stdin(text_field) if path == STDIN else readers.read_rows(path, needed, read)
    while part := list(itertools.islice(rows, size)):
        texts = []
        for where, row in part:
            if not columns:
                refuse_answers(row, where)
            texts.append(readers.to_text(row.get(text_field), "text_field", text_field, where))
        yield [row for _, row in part], texts


def refuse_answers(columns, where):
    for name in ANSWER:
        if name in columns:
            raise UserError(f"{where}: a column {name} is there already; rename it, since the answer has that name")


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


# --- writing ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_answers(path, text_field, target):
    """write(rows, answers), which adds a part of a file and its answers to `target`, in the file's own format."""
    if path == STDIN:
        yield functools.partial(write_rows, lambda row: print(to_json(row, sys.stdout.encoding or "utf-8")))
        return
    make_folder(os.path.dirname(target))
    with whole_file(target) as f:
        if readers.kind_of(path) == "parquet":
            with parquet_writer(path, f) as write:
                yield write
        elif readers.is_csv(path):
            yield functools.partial(write_rows, csv_writer(path, f, text_field))
        else:
            yield functools.partial(write_rows, lambda row: f.write(f"{to_json(row)}\n".encode()))


def write_rows(write, rows, answers):
    for row, answer in zip(rows, answers):
        write(row | answer)


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
    form = readers.read_format(path, (text_field,))
    with readers.open_bytes(path) as start:
        marked = start.read(4).startswith((codecs.BOM_UTF8, *readers.MARKS))
    f.write((codecs.BOM_UTF8 if marked else b"") + form.before.encode())

    def write(row):
        line = io.StringIO()
        # A text with either half of this line end is quoted.
        csv.writer(line, delimiter=form.separator, lineterminator="\r\n").writerow(row.values())
        f.write((line.getvalue().removesuffix("\r\n") + form.line_end).encode())

    write({name: name for name in (*form.columns, *ANSWER)})
    return write


@contextlib.contextmanager
def parquet_writer(path, f):
    """The columns go through as they are, whatever their types."""
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.string()
    added = pyarrow.schema(list(zip(ANSWER, (text, text, pyarrow.float64()))))
    before = next(readers.read_batches(path, size=1)).schema
    # What the library datasets notes there lists all columns, and these three are not in its list.
    notes = {key: note for key, note in (before.metadata or {}).items() if key != b"huggingface"}
    schema = pyarrow.schema([*before, *added], notes)
    with pyarrow.parquet.ParquetWriter(f, schema) as writer:

        def write(batch, answers):
            columns = [*batch.columns, *pyarrow.RecordBatch.from_pylist(answers, added).columns]
            writer.write_batch(pyarrow.RecordBatch.from_arrays(columns, schema=schema))

        yield write
