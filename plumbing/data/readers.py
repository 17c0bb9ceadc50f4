"""One file -> its rows: as Arrow columns of text, or one by one with the line where each stands.

Text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark; any file may be packed (.gz).
"""

import codecs
import collections
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator

from plumbing.program.errors import UserError, first_line

KEYS = ("text_field", "label_field", "film")  # what names the columns that are asked for; rt_reviews has a third
SEPARATORS = (",", ";", "\t", "|")
MARKS = {  # UTF-32's first: UTF-16's is its beginning
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ROW = 'each row is an object, such as {"text": ..., "label": ...}'
BREAK = r"\r\n|\r|\n"
BATCH = 10_000  # rows in memory at once
csv.field_size_limit(2**31 - 1)


def read_columns(path: str, needed: tuple[str, ...]) -> Iterator[list]:
    """Yields the rows of a file in one of `KINDS` as pyarrow arrays of text, some thousands at once: one array for
    each column in `needed` (the text's, then the label's), and that of a column named split, in any capitals, or
    None. What is missing is null. Raises ValueError that names file and line."""
    if is_csv(path):
        batches = refuse_swallowed_rows(path, needed)
    elif reader_of(path) is None:
        batches = read_batches(path, needed)
    else:
        batches = batch_rows(read_rows(path, needed), needed)
    with name_damage(path):
        yield from pick_columns(batches, needed, functools.partial(place_of, path, needed))


def read_rows(path: str, needed: tuple[str, ...] = (), read=None) -> Iterator[tuple[str, dict]]:
    """Yields (where it stands, row) of a file that is no table of parquet's or Arrow's, values as they are; a kind
    that is not known is read as plain text, whose paragraphs are rows with a `text`. Where a file has no lines, as
    json, its rows are counted. read: another reader than that of the kind. Each row has the columns that are asked
    for, but where nothing is in it. Raises ValueError that names file and line."""
    unit = "line" if kind_of(path) in ("csv", "tsv", "jsonl", "txt") else "row"
    columns = None
    with name_damage(path):
        for number, row in (read or reader_of(path))(path, needed):
            where = f"{path}, {unit} {number}"
            if not isinstance(row, dict):
                raise UserError(f"{where}: {ROW}")
            if row and row.keys() != columns:
                columns = row.keys()
                check_columns(where, [*columns], needed)
            yield where, row


@contextlib.contextmanager
def name_damage(path):
    """Errors of reading as one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, csv.Error, OSError, EOFError, zlib.error, RecursionError) as e:
        if isinstance(e, UnicodeDecodeError) and reader_of(path):  # what Arrow reads is no text
            raise UserError(name_encoding(path)) from e
        raise UserError(f"{path} is damaged or no {kind_of(path)}: {first_line(e)}") from e


def kind_of(path):
    """csv for reviews.csv, and for reviews.csv.gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1].removeprefix(".")


def reader_of(path):
    """What reads a file's rows; None: Arrow does, by batches."""
    return READERS.get(kind_of(path), read_txt)


def is_csv(path):
    return kind_of(path) in ("csv", "tsv")


def place_of(path, needed, row):
    """Where a row (0, 1, ...) of a file stands, for messages: it is read again for that."""
    if reader_of(path) is None:
        return f"{path}, row {row + 1}"
    where, _ = next(itertools.islice(read_rows(path, needed), row, None))
    return where


# --- columns and their values --------------------------------------------------------------------


def check_columns(where, columns, needed):
    """Raises ValueError if a column that is asked for is missing, or stands twice: which of the two is meant?"""
    for key, column in zip(KEYS, needed):
        if column not in columns:
            raise UserError(f"{key}={column}: no such column in {where}; it has {', '.join(map(str, columns))}")
    counts = {name: columns.count(name) for name in needed}
    if len(needed) > 1:  # new texts have no splits
        counts["split"] = sum(map(is_split, columns))
    for column, n in counts.items():
        if n > 1:
            name = column or "without a name"
            raise UserError(f"{where}: the column {name} stands {n} times in it; rename all of them but one")


def is_split(column):
    return str(column).strip().lower() == "split"


def to_text(value, key, column, where):
    """A value as text; None where there is none: null, or the nan of pandas and JSON, which alone differs from
    itself. Raises ValueError for lists and the like: what of them is meant?"""
    if isinstance(value, (list, tuple, dict, bytes)):
        remedy = f"write a word or a number, or type --{key}=COLUMN for another column"
        raise UserError(f"{where}: the column {column} holds {str(value)[:40]}; {remedy}")
    return None if value is None or value != value else str(value)


def batch_rows(rows, needed):
    """(where, row) pairs as pyarrow batches of the columns that are asked for and, if any row has one, of split."""
    import pyarrow

    while part := list(itertools.islice(rows, BATCH)):
        columns = {}
        for key, column in zip(KEYS, needed):
            columns[column] = text_array([to_text(row.get(column), key, column, where) for where, row in part])
        splits = {name for name in set().union(*(row for _, row in part)) if is_split(name)}.difference(needed)
        if splits:
            words = (next((row[name] or "" for name in splits if name in row), "train") for _, row in part)
            columns["split"] = text_array(words)
        yield pyarrow.RecordBatch.from_pydict(columns)


def text_array(values):
    import pyarrow

    # A lone surrogate, half of an emoji, becomes "?".
    values = [value if value is None else str(value).encode("utf-8", "replace") for value in values]
    return pyarrow.array(values, pyarrow.binary()).cast(pyarrow.string())


def pick_columns(batches, needed, place):
    """`read_columns` of pyarrow batches. place(row): where a row stands."""
    n = 0  # rows so far
    for batch in batches:
        names = batch.schema.names
        if not {*needed} <= {*names}:
            check_columns(place(n), names, needed)
        columns = [as_text(batch[column], key, column, place, n) for key, column in zip(KEYS, needed)]
        split = next((name for name in names if is_split(name) and name not in needed), None)
        yield [*columns, split and as_text(batch[split], "split", split, place, n)]
        n += batch.num_rows


def as_text(values, key, column, place, n):
    """A pyarrow array as text, each value written as Python writes it. place(n): where its first row stands."""
    import pyarrow
    from pyarrow import types

    kind = values.type
    if types.is_null(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return values.cast(pyarrow.string())
    if types.is_nested(kind):  # an error, unless none of them is there
        return text_array(to_text(value.as_py(), key, column, place(n + i)) for i, value in enumerate(values))
    coded = values if types.is_dictionary(kind) else values.dictionary_encode()
    words = text_array([to_text(value, key, column, place(n)) for value in coded.dictionary.to_pylist()])
    return words.take(coded.indices)


# --- bytes and text ------------------------------------------------------------------------------


def open_bytes(path):
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


@contextlib.contextmanager
def open_text(path):
    with open_bytes(path) as f:
        head = f.peek(4)[:4]
        encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8-sig")
        if encoding == "utf-8-sig" and b"\0" in head[:2]:
            raise UserError(name_encoding(path))
        with io.TextIOWrapper(f, encoding, newline="") as text:
            yield text


def name_encoding(path):
    """What to say of a text that is not UTF-8: where it shows, what it probably is, how to change it."""
    with open_bytes(path) as f:
        head = f.peek(4)[:4]
        if head.startswith(tuple(MARKS)):
            return f"{path} is damaged: it begins as UTF-16 or UTF-32, and does not go on so"
        if b"\0" in head[:2]:
            line, encoding = 1, "utf-16be" if head[0] == 0 else "utf-16le"
        else:
            line, data = next(pair for pair in enumerate(f, 1) if pair[1].decode(errors="ignore").encode() != pair[1])
            encoding = "latin1" if re.search(rb"[\x81\x8d\x8f\x90\x9d]", data) else "cp1252"
    name = os.path.basename(path)
    unpack = "unpack it and " if name.lower().endswith(".gz") else ""
    name = name[:-3] if unpack else name
    return (
        f"{path}, line {line}: no UTF-8, but probably {encoding}; {unpack}type "
        f"iconv -f {encoding} -t utf-8 {name} > utf8-{name}"
    )


# --- csv, tsv ------------------------------------------------------------------------------------


# before: Excel's own first line, such as "sep=;", or "".
CsvFormat = collections.namedtuple("CsvFormat", "columns separator before line_end")


def read_format(path, needed=()):
    """How a csv or tsv file is written."""
    with open_text(path) as f:
        header = f.readline()
        marked = re.fullmatch(r'"?sep=(.)"?\s*', header, re.IGNORECASE)
        before = header if marked else ""
        header = f.readline() if marked else header
    found = {}
    for separator in (marked[1],) if marked else ("\t" if kind_of(path) == "tsv" else ",", *SEPARATORS):
        fields = next(csv.reader([header], delimiter=separator), []) if header.strip() else []
        found.setdefault(separator, [name.strip() for name in fields])
    # The first that gives the columns that are asked for. If none does, an error shows those best told apart.
    fitting = [separator for separator, columns in found.items() if set(needed) <= set(columns)]
    separator = fitting[0] if fitting else max(found, key=lambda separator: len(found[separator]))
    columns = found[separator]
    check_columns(path, columns, [name for name in needed if name in columns])  # a missing one: where a row stands
    return CsvFormat(columns, separator, before, "\r\n" if header.endswith("\r\n") else "\n")


def read_csv_batches(path, needed):
    """The rows of a csv file as pyarrow batches: by Arrow and, from the first row on that Arrow cannot read, or where
    it might overlook a mistake, by Python's strict reader, which says what is wrong."""
    import pyarrow.csv as arrow
    from pyarrow import ArrowInvalid, RecordBatch, string

    form = read_format(path, needed)
    n = 0
    if form.columns and quotes_are_plain(path, form.separator):
        names = [str(i) for i in range(len(form.columns))]
        read = arrow.ReadOptions(column_names=names, skip_rows_after_names=1 + bool(form.before))
        parse = arrow.ParseOptions(delimiter=form.separator, newlines_in_values=True)
        types = dict.fromkeys(names, string())
        convert = arrow.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
        with open_bytes(path) as f, contextlib.suppress(ArrowInvalid):
            for batch in arrow.open_csv(f, read, parse, convert):
                n += batch.num_rows
                batch = batch.rename_columns(form.columns)
                yield from (batch.slice(i, BATCH) for i in range(0, batch.num_rows, BATCH))
            return
    rows = itertools.islice(read_csv(path, needed), n, None)
    while part := [row for _, row in itertools.islice(rows, BATCH)]:
        columns = [text_array([row[name] for row in part]) for name in form.columns]
        yield RecordBatch.from_arrays(columns, names=form.columns)


def quotes_are_plain(path, separator):
    """Whether each quotation mark of a file opens a field, closes one, or is doubled inside one. Then Arrow, which
    lets others pass, reads what Python's strict reader reads."""
    import numpy as np

    edges = np.frombuffer(f'{separator}\r\n"'.encode(), np.uint8)
    inside = False  # a quoted field
    before = b"\n"
    with open_bytes(path) as f:
        f.read(3 if f.peek(3).startswith(codecs.BOM_UTF8) else 0)
        chunk = f.read(1 << 20)
        while chunk:
            following = f.read(1 << 20)
            data = np.frombuffer(before + chunk + (following[:1] or b"\n"), np.uint8)
            marks = np.flatnonzero(data[1:-1] == ord('"')) + 1
            opening, closing = marks[inside::2], marks[not inside :: 2]
            if not (np.isin(data[opening - 1], edges).all() and np.isin(data[closing + 1], edges).all()):
                return False
            inside ^= len(marks) % 2 == 1
            before, chunk = chunk[-1:], following
    return not inside


def read_csv(path, needed=()):
    form = read_format(path, needed)
    n = len(form.columns)
    n_skipped = 1 + bool(form.before)
    with open_text(path) as f:
        # strict: a quotation mark in a wrong place is an error. Else it swallows the rows up to the next one.
        reader = csv.reader(f, delimiter=form.separator, strict=True)
        rows = itertools.islice(reader, n_skipped, None)
        begin = 1 + n_skipped
        try:
            for fields in rows:
                begin = reader.line_num + 1
                if fields and len(fields) == n:  # without a header n is 0, as a blank line's fields are
                    yield reader.line_num, dict(zip(form.columns, (field or None for field in fields)))
                elif len(fields) > 1 or "".join(fields).strip():  # not a blank line
                    remedy = "write the row with all of them, an empty one for what is not known"
                    if len(fields) > n:
                        sep = form.separator
                        remedy = f'a text that holds {sep!r} must stand in quotation marks: "slow{sep}long"'
                    problem = f"{len(fields)} fields, and the header has {n} ({', '.join(form.columns)})"
                    raise UserError(f"{path}, line {reader.line_num}: {problem}; {remedy}")
        except csv.Error as e:
            line, problem = reader.line_num, f"a quotation mark in a wrong place ({e})"
            if "unexpected end" in str(e):
                line, problem = begin, "a quotation mark opens here and does not close"
            remedy = 'inside a quoted text each quotation mark is doubled: "He said ""no"" twice"'
            raise UserError(f"{path}, line {line}: {problem}; {remedy}") from e


def refuse_swallowed_rows(path, needed):
    """The batches of a csv file; ValueError at the end if a quoted field has swallowed rows: between two stray
    quotation marks all is one text.

    Its lines look like rows then: each has as many separators as a row, and in the label's place a label that other
    rows have. A text of a user's can look so too, but hardly: then the message says what to do.
    """
    from pyarrow import compute

    separator = read_format(path, needed).separator
    labels = set()
    suspects = []  # (row, the labels in its lines)
    n = 0
    for batch in read_csv_batches(path, needed):
        width = batch.num_columns
        for place in [batch.schema.names.index(name) for name in needed[1:] if name in batch.schema.names]:
            labels.update(str(label).strip() for label in batch.column(place)[:1000].unique().to_pylist())
            for i, column in enumerate(batch.columns):
                rows = compute.indices_nonzero(compute.match_substring_regex(column, "[\r\n]"))
                texts = column.take(rows)
                n_expected = compute.multiply(compute.count_substring_regex(texts, BREAK), width - 1)
                fits = compute.equal(compute.count_substring(texts, separator), n_expected)
                for row, text in zip(rows.filter(fits).to_pylist(), texts.filter(fits).to_pylist()):
                    # The field begins within its first line's row, and ends within its last line's.
                    lines = re.split(BREAK, separator * i + text + separator * (width - 1 - i))
                    cells = [line.split(separator) for line in lines]
                    found = set()
                    if all(len(fields) == width for fields in cells):
                        found = {fields[place].strip() for fields in cells} - {""}
                    if found and len(suspects) < 1000:
                        suspects.append((n + row, found))
        n += batch.num_rows
        yield batch
    for row, found in suspects:
        if found <= labels:
            line, fields = next(itertools.islice(read_csv(path, needed), row, None))
            first = line - sum(len(re.findall(BREAK, field or "")) for field in fields.values())
            raise UserError(
                f"{path}, lines {first} to {line}: a quoted text holds what look like rows of their own; take out "
                "the stray quotation mark, or, if the text is meant so, write the data as jsonl"
            )


# --- JSON ----------------------------------------------------------------------------------------


def read_jsonl(path, needed=()):
    with open_text(path) as f:
        for line, text in enumerate(f, 1):
            if text.strip():
                try:
                    row = JSON.decode(text)
                    if not isinstance(row, dict):
                        raise ValueError(ROW)
                except (ValueError, RecursionError) as e:
                    raise UserError(f"{path}, line {line}: damaged, or no {kind_of(path)} ({first_line(e)})") from e
                yield line, row


def read_json(path, needed=()):
    """An array of objects. Some tools give this name to JSON lines too."""
    with open_text(path) as f:
        start = next((text.lstrip() for text in f if text.strip()), "")
    if not start.startswith("["):
        yield from read_jsonl(path)
        return
    with open_text(path) as f:
        yield from enumerate(JSON.decode(f.read()), 1)


def make_object(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"one name stands twice among {', '.join(name for name, _ in pairs)}")
    return row


JSON = json.JSONDecoder(object_pairs_hook=make_object)


# --- tables in binary files ----------------------------------------------------------------------


@contextlib.contextmanager
def open_table(path):
    """(schema, batches) of a parquet file, or of either kind of Arrow file: with a table of contents at its end, or
    without. batches(size, columns) yields pyarrow's: of parquet, such as are asked for."""
    import pyarrow.parquet

    with open_bytes(path) as f:
        if path.lower().endswith(".gz"):
            f = io.BytesIO(f.read())  # the readers jump about in it
        if kind_of(path) == "parquet":
            table = pyarrow.parquet.ParquetFile(f)
            yield table.schema_arrow, table.iter_batches
            return
        try:
            table = pyarrow.ipc.open_file(f)
            parts = map(table.get_batch, range(table.num_record_batches))
        except pyarrow.ArrowInvalid:
            f.seek(0)
            parts = table = pyarrow.ipc.open_stream(f)
        yield table.schema, lambda size, columns: parts


def read_batches(path, needed=(), size=BATCH):
    """The pyarrow batches of a parquet, Arrow or feather file, with the columns that are asked for, or all."""
    with open_table(path) as (schema, batches):
        check_columns(path, schema.names, needed or schema.names)
        wanted = [name for name in schema.names if name in needed or is_split(name)]
        for batch in batches(size, columns=wanted if needed else None):
            yield from (batch.slice(i, size) for i in range(0, batch.num_rows, size))


def read_class_names(path):
    """The words of the labels that the library `datasets` notes in parquet and Arrow files: {column: [word, ...]}."""
    if reader_of(path):
        return {}
    with contextlib.suppress(ValueError, OSError, EOFError, TypeError, AttributeError, zlib.error):
        with open_table(path) as (schema, _):
            notes = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = notes.get("info", {}).get("features", {})
        return {column: feature["names"] for column, feature in features.items() if "names" in feature}
    return {}  # damaged: whoever reads its rows says so


def read_xlsx(path, needed=()):
    """The sheet of an Excel file; its first row names the columns."""
    try:
        import openpyxl
    except ImportError as e:
        raise UserError(f"{path}: Excel files need one more package: pip install openpyxl; or save it as csv") from e
    with open_bytes(path) as f:
        data = io.BytesIO(f.read())
    sheets = {}
    try:
        for sheet in openpyxl.load_workbook(data, read_only=True, data_only=True).worksheets:
            sheet.reset_dimensions()  # what the file says of its size may be wrong
            rows = enumerate(sheet.iter_rows(values_only=True), 1)
            sheets[sheet.title] = [(line, row) for line, row in rows if any(value is not None for value in row)]
    except Exception as e:  # zipfile's, xml's and openpyxl's own kinds
        raise UserError(f"{path} is damaged or no xlsx: {first_line(e)}") from e
    filled = [title for title, rows in sheets.items() if rows]
    if len(filled) > 1:
        raise UserError(f"{path} has the sheets {', '.join(filled)}: save the one that you mean as a file of its own")
    rows = sheets[filled[0]] if filled else []
    columns = ["" if name is None else str(name).strip() for _, header in rows[:1] for name in header]
    check_columns(path, columns, [name for name in needed if name in columns])
    for line, row in rows[1:]:
        yield line, dict(itertools.zip_longest(columns, row[: len(columns)]))


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


READERS = {"csv": read_csv, "jsonl": read_jsonl, "parquet": None, "tsv": read_csv, "json": read_json}
READERS |= {"arrow": None, "feather": None, "xlsx": read_xlsx, "txt": read_txt}  # None: by Arrow alone
KINDS = tuple(READERS)
