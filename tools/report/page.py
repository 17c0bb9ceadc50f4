"""A report: parts (kind, content) become one HTML page that fetches nothing, or Markdown; and its pictures.

h1, h2, h3, p, code: text           table: rows of cells, the first is the head           plot: (file, what it shows)
"""

import base64
import html
import io
import os

from plumbing.program.files import whole_file

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito 2008
DARK = ("#56B4E9", "#E69F00", "#2FC69A", "#E39BC4", "#F0E442", "#9AD0F5")
MIME = {".svg": "image/svg+xml", ".png": "image/png"}


# --- pictures --------------------------------------------------------------------------------------


def dark_twin(file):
    name, ending = os.path.splitext(file)
    return f"{name}-dark{ending}"


def draw(path, paint, panels=1, size=(5.4, 3.6)):
    """A picture for light pages in `path` (svg or png) and one for dark pages next to it. `paint(axes, colors)` draws
    and labels: on one matplotlib Axes or, with more panels, on a list of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    looks = ((path, COLORS, "#222222", "#ffffff"), (dark_twin(path), DARK, "#e6e6e6", "#161a1d"))
    for file, colors, ink, ground in looks:
        style = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        style |= {"figure.facecolor": ground, "axes.facecolor": ground, "font.size": 11, "svg.hashsalt": "nanolora"}
        kind = os.path.splitext(file)[1][1:]
        options = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
        picture = io.BytesIO()
        with plt.rc_context(style):
            fig, axes = plt.subplots(1, panels, figsize=size, layout="constrained")
            for ax in axes if panels > 1 else [axes]:
                ax.spines[["top", "right"]].set_visible(False)
                ax.grid(axis="y", alpha=0.2)
            paint(axes, colors)
            fig.savefig(picture, format=kind, **options)
            plt.close(fig)
        with whole_file(file) as f:
            f.write(picture.getvalue())


# --- pages -----------------------------------------------------------------------------------------

# Sections stand side by side where there is room for two. On a narrow screen a table of sentences becomes a list.
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
        lines = [[cell.replace("|", "\\|") for cell in row] for row in content]
        return "\n".join("| " + " | ".join(row) + " |" for row in [lines[0], ["---"] * len(lines[0]), *lines[1:]])
    if kind == "plot":
        return f"![{content[1]}]({content[0]})"
    texts = {"h1": f"# {content}", "h2": f"## {content}", "h3": f"### {content}", "code": f"```\n{content}\n```"}
    return texts.get(kind, content)


def as_html(kind, content, folder):
    if kind == "table":
        return table_as_html(content)
    if kind == "plot":
        file, alt = content
        data = []
        for path in (file, dark_twin(file)):
            with open(os.path.join(folder, path), "rb") as f:
                kind = MIME[os.path.splitext(path)[1]]
                data.append(f"data:{kind};base64,{base64.b64encode(f.read()).decode()}")
        dark = f'<source media="(prefers-color-scheme: dark)" srcset="{data[1]}">'
        return f'<picture>{dark}<img src="{data[0]}" alt="{html.escape(alt)}"></picture>'
    tag = "pre" if kind == "code" else kind
    return f"<{tag}>{html.escape(content)}</{tag}>"


def holds_sentences(rows):
    return any(len(cell) > 40 for row in rows for cell in row)


def table_as_html(rows):
    head = rows[0]
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows[1:]:
        cells = [f'<td data-head="{html.escape(name)}">{html.escape(cell)}</td>' for name, cell in zip(head, row)]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    kind = ' class="text"' if holds_sentences(rows) else ""
    return f"<div><table{kind}>" + "\n".join(lines) + "</table></div>"


def section_as_html(parts, folder):
    """A heading and what is below it; it takes the page's whole width if a table in it is wide."""
    tables = [content for kind, content in parts if kind == "table"]
    is_wide = any(len(rows[0]) > 5 or holds_sentences(rows) for rows in tables)
    body = "\n".join(as_html(*part, folder) for part in parts)
    return f'<section class="wide">{body}</section>' if is_wide else f"<section>{body}</section>"


def make_html(parts, folder):
    """One page. What stands before the first h2 or h3 goes over its whole width."""
    sections = [[]]
    for part in parts:
        if part[0] in ("h2", "h3"):
            sections.append([])
        sections[-1].append(part)
    title = next(content for kind, content in parts if kind == "h1")
    top = "\n".join(as_html(*part, folder) for part in sections[0])
    body = "\n".join(section_as_html(section, folder) for section in sections[1:])
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{CSS}</style>
{top}
<main>
{body}
</main>
"""


def make_markdown(parts):
    return "\n\n".join(as_markdown(*part) for part in parts) + "\n"


def write_page(path, text):
    with whole_file(path) as f:
        f.write(text.encode())
