"""A report as a list of parts (kind, content) becomes Markdown, or one HTML page that fetches nothing.

h1, h2, h3, p, code: text           table: rows of cells, the first is the head           plot: (file, what it shows)
"""

import base64
import html
import os

from plumbing.program.files import whole_file
from tools.report.paint import dark_twin

# On a wide screen two sections are side by side. On a narrow screen a table of sentences becomes a list.
CSS = """
:root { color-scheme: light dark; --ink: #222; --ground: #fff; --line: #ccc; --soft: #666; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --ground: #161a1d; --line: #444; --soft: #a0a0a0; } }
body { max-width: 76rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }
body { color: var(--ink); background: var(--ground); }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 2.5rem; }
section { min-width: 0; } .wide { grid-column: 1 / -1; }
h2 { margin: 1.6rem 0 .5rem; } h3 { margin: 1.4rem 0 .3rem; } p { margin: .5rem 0; max-width: 46rem; }
div { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; } .text td { white-space: normal; }
.text td:first-child { min-width: 13rem; } .text td:last-child { min-width: 8rem; }
img { width: 100%; max-width: 36rem; height: auto; }
pre { padding: .7rem; border: 1px solid var(--line); white-space: pre-wrap; }
@media (max-width: 45rem) {
  .text tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  .text td { display: block; padding: .1rem 0; border: 0; } .text tr:first-child { display: none; }
  .text td::before { content: attr(data-head) ": "; color: var(--soft); }
}
"""


def as_markdown(kind, content):
    if kind == "table":
        head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in content]
        return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
    if kind == "plot":
        return f"![{content[1]}]({content[0]})"
    texts = {"h1": f"# {content}", "h2": f"## {content}", "h3": f"### {content}", "code": f"```\n{content}\n```"}
    return texts.get(kind, content)


def make_markdown(parts: list[tuple]) -> str:
    return "\n\n".join(as_markdown(*part) for part in parts) + "\n"


def as_html(kind, content, folder):
    if kind == "table":
        return table_as_html(content)
    if kind == "plot":
        file, alt = content
        light, dark = (data_url(os.path.join(folder, name)) for name in (file, dark_twin(file)))
        source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        return f'<picture>{source}<img src="{light}" alt="{html.escape(alt)}"></picture>'
    tag = "pre" if kind == "code" else kind
    return f"<{tag}>{html.escape(content)}</{tag}>"


def data_url(path):
    with open(path, "rb") as f:
        return f"data:image/svg+xml;base64,{base64.b64encode(f.read()).decode()}"


def table_as_html(rows):
    head, *rest = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for row in rest:
        lines.append("<tr>" + "".join(f'<td data-head="{x}">{cell}</td>' for x, cell in zip(head, row)) + "</tr>")
    kind = ' class="text"' if holds_sentences(rows) else ""
    return f"<div><table{kind}>" + "\n".join(lines) + "</table></div>"


def holds_sentences(rows):
    return any(len(cell) > 40 for row in rows for cell in row)


def make_html(parts: list[tuple], folder: str) -> str:
    """One page, with the pictures of `folder` in it. What comes before the first h2 or h3 takes its whole width, as
    does a section with a wide table."""
    sections = [[]]
    for part in parts:
        if part[0] in ("h2", "h3"):
            sections.append([])
        sections[-1].append(part)
    title = next(content for kind, content in parts if kind == "h1")
    top, *rest = ("\n".join(as_html(*part, folder) for part in section) for section in sections)
    body = []
    for section, inside in zip(sections[1:], rest):
        tables = [content for kind, content in section if kind == "table"]
        is_wide = any(len(rows[0]) > 5 or holds_sentences(rows) for rows in tables)
        body.append(f'<section class="wide">{inside}</section>' if is_wide else f"<section>{inside}</section>")
    body = "\n".join(body)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{CSS}</style>
{top}
<main>
{body}
</main>
"""


def write_page(path: str, parts: list[tuple]) -> None:
    """Markdown or HTML, by the path's ending. Pictures are in the same folder."""
    text = make_markdown(parts) if path.endswith(".md") else make_html(parts, os.path.dirname(path))
    with whole_file(path) as f:
        f.write(text.encode())
