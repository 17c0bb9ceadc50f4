"""One file -> its rows, each a dict of columns, with the line where it stands.

Text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark; any file may be packed (.gz).
"""

import codecs
import collections
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator

from plumbing.program.errors import UserError, first_line

SEPARATORS = (",", ";", "\t", "|")
MARKS = {  # UTF-32's first: UTF-16's is its beginning
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
csv.field_size_limit(2**31 - 1)


def read_rows(path: str, needed: tuple[str, ...] = (), read=None) -> Iterator[tuple[int, dict]]:
    """Yields (line, row) of a file in one of `KINDS`; others are read as plain text, whose paragraphs are rows with
    a `text`. Where a file has no lines, as parquet has none, the rows are counted.

    needed: the columns that are asked for, the text's first and the label's last. read: another reader than that of
    the file's kind. Raises ValueError that names file and line.
    """
    kind = kind_of(path)
    read = read or READERS.get(kind, read_txt)
    try:
        yield from read(path, needed)
    except UserError:
        raise
    except UnicodeDecodeError as e:
        raise UserError(name_encoding(path)) from e
    except (ValueError, csv.Error, OSError, EOFError, zlib.error, RecursionError) as e:
        raise UserError(f"{path} is damaged or no {kind}: {first_line(e)}") from e


def kind_of(path):
    """csv for reviews.csv, and for reviews.csv.gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1].removeprefix(".")


def check_columns(path, columns, needed):
    """Raises ValueError if a column that is asked for stands twice: which of the two is meant?"""
    counts = collections.Counter(columns)
    for column in (*needed, "split"):
        if counts[column] > 1:
            raise UserError(
                f"{path}: the column {column} stands {counts[column]} times in it; rename all of them but one"
            )


# --- bytes and text ------------------------------------------------------------------------------


def open_bytes(path):
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


@contextlib.contextmanager
def open_seekable(path):
    """For readers that jump about in a file: a packed one is unpacked into memory."""
    with open_bytes(path) as f:
        yield io.BytesIO(f.read()) if path.lower().endswith(".gz") else f


@contextlib.contextmanager
def open_text(path):
    with open_bytes(path) as f:
        head = f.peek(4)[:4]
        encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8-sig")
        if encoding == "utf-8-sig" and b"\0" in head[:2]:
            raise UserError(convert(path, 1, "utf-16be" if head[0] == 0 else "utf-16le"))
        with io.TextIOWrapper(f, encoding, newline="") as text:
            yield text


def name_encoding(path):
    """What to say of a text that is not UTF-8: where it shows, what it probably is, how to change it."""
    with open_bytes(path) as f:
        if f.peek(4)[:4].startswith(tuple(MARKS)):
            return f"{path} is damaged: it begins as UTF-16 or UTF-32, and does not go on so"
        for line, data in enumerate(f, 1):  # noqa: B007
            try:
                data.decode("utf-8")
            except UnicodeDecodeError:
                break
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return convert(path, line, "latin1")
    return convert(path, line, "cp1252")


def convert(path, line, encoding):
    unpack = ""
    name = os.path.basename(path)
    if path.lower().endswith(".gz"):
        unpack = "unpack it and "
        name = name[:-3]
    return (
        f"{path}, line {line}: no UTF-8, but probably {encoding}; {unpack}type "
        f"iconv -f {encoding} -t utf-8 {name} > utf8-{name}"
    )


# --- csv, tsv ------------------------------------------------------------------------------------


def read_csv(path, needed=(), separator=","):
    with open_text(path) as f:
        header = f.readline()
        separator = pick_separator(header, needed, separator)
        # strict: a quotation mark in a wrong place is an error. Else it swallows the rows up to the next one.
        reader = csv.reader(itertools.chain([header], f), delimiter=separator, strict=True)
        columns = [name.strip() for name in next_record(path, reader) or []]
        check_columns(path, columns, needed)
        swallowed = SwallowedRows(path, columns, needed, separator)
        line = reader.line_num
        while (fields := next_record(path, reader)) is not None:
            first = line + 1
            line = reader.line_num
            if len(fields) == len(columns):
                swallowed.see(fields, first, line)
                if "" in fields:
                    fields = [field or None for field in fields]
                yield line, dict(zip(columns, fields))
            elif len(fields) > 1 or "".join(fields).strip():  # not a blank line
                raise UserError(wrong_length(path, line, fields, columns, separator))
        swallowed.finish()


def pick_separator(header, needed, usual):
    """The separator that gives the columns that are asked for: the usual one, if it does."""
    columns = {}
    for separator in (usual, *SEPARATORS):
        with contextlib.suppress(csv.Error, StopIteration):
            columns[separator] = [name.strip() for name in next(csv.reader([header], delimiter=separator))]
            if set(needed) <= set(columns[separator]):
                return separator
    # None does: the error that follows shows the columns as they are best told apart.
    return max(columns, key=lambda separator: len(columns[separator]), default=usual)


def next_record(path, reader):
    """The next record's fields; None at the end."""
    line = reader.line_num + 1
    try:
        return next(reader, None)
    except csv.Error as e:
        if "unexpected end" in str(e):
            raise UserError(
                f"{path}, line {line}: a quotation mark opens here and does not close; take it out, or double the "
                "quotation marks inside a quoted text"
            ) from e
        raise UserError(
            f"{path}, line {reader.line_num}: a quotation mark in a wrong place ({e}); inside a quoted text each "
            'quotation mark is doubled: "He said ""no"" twice"'
        ) from e


def wrong_length(path, line, fields, columns, separator):
    names = ", ".join(columns)
    problem = f"{path}, line {line}: {len(fields)} fields, and the header has {len(columns)} ({names})"
    if len(fields) > len(columns):
        return f'{problem}; a text that holds {separator!r} must stand in quotation marks: "slow{separator}long"'
    return f"{problem}; write the row with all of them, an empty one for what is not known"


class SwallowedRows:
    """Finds a quoted field that has swallowed rows: between two stray quotation marks all is one text.

    Its lines look like rows then: each has as many separators as a row, and in the label's place a label that other
    rows have. A text of a user's can look so too, but hardly: then the message says what to do.
    """

    def __init__(self, path, columns, needed, separator):
        self.path = path
        self.n = len(columns)
        self.separator = separator
        self.place = columns.index(needed[-1]) if len(needed) > 1 and needed[-1] in columns else None
        self.labels = set()
        self.suspects = []  # (first line, last line, labels in its lines)

    def see(self, fields, first, last):
        """Looks at a row's fields, from the file's lines first to last."""
        if self.place is None:
            return
        if len(self.labels) < 1000:
            self.labels.add(fields[self.place])
        if first == last or len(self.suspects) == 1000:
            return
        for i, field in enumerate(fields):
            found = self._labels_in(i, field)
            if found:
                self.suspects.append((first, last, found))

    def _labels_in(self, i, field):
        """The cells in the label's place of the lines of column i's field; none if a line is shaped otherwise."""
        lines = field.splitlines()
        if len(lines) < 2:
            return set()
        found = set()
        for k, text in enumerate(lines):
            cells = text.split(self.separator)
            start = i if k == 0 else 0  # the first line is a row's end, the last one a row's beginning
            end = i + 1 if k == len(lines) - 1 else self.n
            if len(cells) != end - start:
                return set()
            if start <= self.place < end:
                found.add(cells[self.place - start].strip())
        return found

    def finish(self):
        labels = {label.strip() for label in self.labels} - {""}
        for first, last, found in self.suspects:
            if found <= labels:
                raise UserError(
                    f"{self.path}, lines {first} to {last}: a quoted text holds what look like rows of their own; "
                    "take out the stray quotation mark, or, if the text is meant so, write the data as jsonl"
                )


def read_tsv(path, needed=()):
    return read_csv(path, needed, "\t")


# --- JSON ----------------------------------------------------------------------------------------


def read_jsonl(path, needed=()):
    with open_text(path) as f:
        for line, text in enumerate(f, 1):
            row = parse_row(path, line, text) if text.strip() else {}
            if row:
                yield line, row


def parse_row(path, line, text):
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}, line {line}: damaged, or no {kind_of(path)} ({first_line(e)})") from e
    if not isinstance(row, dict):
        raise UserError(f'{path}, line {line}: each row is an object, such as {{"text": ..., "label": ...}}')
    return row


def read_json(path, needed=()):
    """An array of objects. Some tools give this name to JSON lines too."""
    with open_text(path) as f:
        start = next((text.lstrip() for text in f if text.strip()), "")
    if not start.startswith("["):
        yield from read_jsonl(path)
        return
    with open_text(path) as f:
        rows = json.load(f)
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f'{path}, row {i}: each row is an object, such as {{"text": ..., "label": ...}}')
        yield i, row


# --- tables in binary files ----------------------------------------------------------------------


def read_parquet(path, needed=()):
    import pyarrow.parquet

    with open_seekable(path) as f:
        file = pyarrow.parquet.ParquetFile(f)
        check_columns(path, file.schema_arrow.names, needed)
        yield from enumerate(itertools.chain.from_iterable(map(to_rows, file.iter_batches(10_000))), 1)


def read_arrow(path, needed=()):
    """Arrow's own files, as `datasets` keeps them, and feather."""
    with open_seekable(path) as f:
        table = open_arrow(f)
        check_columns(path, table.schema.names, needed)
        yield from enumerate(itertools.chain.from_iterable(map(to_rows, arrow_batches(table))), 1)


def open_arrow(f):
    """pyarrow's reader of either kind of Arrow file: with a table of contents at its end, or without."""
    import pyarrow

    try:
        return pyarrow.ipc.open_file(f)
    except pyarrow.ArrowInvalid:
        f.seek(0)
        return pyarrow.ipc.open_stream(f)


def arrow_batches(table):
    batches = table
    if hasattr(table, "num_record_batches"):
        batches = (table.get_batch(i) for i in range(table.num_record_batches))
    for batch in batches:
        for start in range(0, batch.num_rows, 10_000):
            yield batch.slice(start, 10_000)


def to_rows(batch):
    return batch.to_pylist()


def read_xlsx(path, needed=()):
    """The sheet of an Excel file; its first row names the columns."""
    try:
        import openpyxl
    except ImportError as e:
        raise UserError(f"{path}: Excel files need one more package: pip install openpyxl; or save it as csv") from e
    with open_seekable(path) as f:
        try:
            book = openpyxl.load_workbook(f, read_only=True, data_only=True)
            sheets = {sheet.title: list(sheet.iter_rows(values_only=True)) for sheet in book.worksheets}
        except Exception as e:  # zipfile's, xml's and openpyxl's own kinds
            raise UserError(f"{path} is damaged or no xlsx: {first_line(e)}") from e
    sheets = {title: rows for title, rows in sheets.items() if any(map(any, rows))}
    if len(sheets) > 1:
        raise UserError(f"{path} has the sheets {', '.join(sheets)}: save the one that you mean as a file of its own")
    rows = iter(*sheets.values()) if sheets else iter(())
    columns = ["" if name is None else str(name).strip() for name in next(rows, ())]
    check_columns(path, columns, needed)
    for line, fields in enumerate(rows, 2):
        if any(field is not None for field in fields):  # Excel keeps rows that were emptied
            yield line, dict(itertools.zip_longest(columns, fields[: len(columns)]))


def read_class_names(path):
    """The words of the labels that the library `datasets` notes in parquet and Arrow files: {column: [word, ...]}."""
    if kind_of(path) not in ("parquet", "arrow", "feather"):
        return {}
    import pyarrow.parquet

    try:
        with open_seekable(path) as f:
            is_parquet = kind_of(path) == "parquet"
            schema = pyarrow.parquet.ParquetFile(f).schema_arrow if is_parquet else open_arrow(f).schema
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {column: feature["names"] for column, feature in features.items() if "names" in feature}
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zlib.error):
        return {}  # read_rows says what is wrong


# --- plain text ----------------------------------------------------------------------------------


def read_txt(path, needed=()):
    """Paragraphs, between blank lines."""
    with open_text(path) as f:
        for blank, lines in itertools.groupby(enumerate(f, 1), lambda pair: not pair[1].strip()):
            if not blank:
                pairs = list(lines)
                yield pairs[0][0], {"text": "".join(text for _, text in pairs).rstrip("\r\n")}


def read_lines(path, needed=("text",)):
    """A text a line, in the column that is asked for."""
    with open_text(path) as f:
        for line, text in enumerate(f, 1):
            yield line, {needed[0]: text.rstrip("\r\n") or None}


READERS = {
    "csv": read_csv,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "tsv": read_tsv,
    "json": read_json,
    "arrow": read_arrow,
    "feather": read_arrow,
    "xlsx": read_xlsx,
    "txt": read_txt,
}
KINDS = tuple(READERS)
HAVE_LINES = ("csv", "tsv", "jsonl", "txt")
