"""`make site`: the notebooks as pages that need no kernel. Nothing is run; saved outputs are shown.

Formulas become MathML and pictures are inside, so a page loads nothing from anywhere.
"""

import argparse
import base64
import mimetypes
import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from traitlets.config import Config

sys.path.insert(0, str(Path(__file__).parent))
import colab

HERE = Path(__file__).parent
PRIORITY = ["text/html", "text/markdown", "image/png", "text/plain"]
SAVED = Config({"NbConvertBase": {"display_data_priority": PRIORITY}})  # no widgets
MATHS = re.compile(
    r"(?P<code>(`+).*?\2)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.DOTALL
)
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
WITHHELD = "instructor"  # the folder of solutions, which no page shows
IGNORE = re.compile(r"^# NBVAL_IGNORE_OUTPUT\n", re.MULTILINE)
# nbconvert's own block has no alt text
PICTURE = """
{%- block data_png scoped -%}
{%- set about = output.metadata.get('image/png', {}) -%}
<div class="jp-RenderedImage jp-OutputArea-output">
<img src="data:image/png;base64,{{ output.data['image/png'] | replace('\n', '') }}"
{%- if about.width %} width="{{ about.width }}"{% endif %} alt="{{ about.alt | default('') | e }}">
</div>
{%- endblock data_png -%}
"""
SITE = """
{%- extends 'lab/index.html.j2' -%}
{%- block input -%}
{%- if 'hide-input' in cell.metadata.get('tags', []) -%}
<details class="code"><summary>Code of this cell</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock input -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
main { max-width: 1100px; margin: auto; padding: 0 16px 64px; }
nav { display: flex; justify-content: space-between; gap: 16px; padding: 12px 24px; }
main, nav { font-family: var(--jp-content-font-family); }
nav a { color: var(--jp-content-link-color); text-decoration: none; }
details { margin-bottom: 1em; }
.jp-RenderedHTMLCommon table { margin-left: 0; }
.jp-RenderedHTMLCommon img, .jp-RenderedImage img { max-width: 100%; height: auto; }
details.code > summary { color: var(--jp-content-link-color); cursor: pointer; }
.jp-RenderedHTMLCommon .highlight { margin: 1em 0; }
.jp-InputArea-editor { overflow-x: auto; }
math { font-size: 1.1em; }
nav.contents { display: block; max-width: 1100px; margin: auto; padding: 0 16px 0 80px; }
nav.contents ul { columns: 2 20em; margin: 0.4em 0; padding-left: 1.2em; }
@media (max-width: 700px) {
  .jp-InputPrompt, .jp-OutputPrompt { display: none; }
  main { padding: 0 8px 48px; }
  nav { flex-wrap: wrap; }
  nav.contents { padding: 0 16px; }
  .jp-RenderedHTMLCommon table { display: block; overflow-x: auto; }
}
@media (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --jp-layout-color0: #14171c; --jp-layout-color1: #14171c; --jp-layout-color2: #262b33;
    --jp-content-font-color0: #f2f2f2; --jp-content-font-color1: #dcdfe4;
    --jp-content-font-color2: #a5abb5; --jp-content-font-color3: #8a909b;
    --jp-ui-font-color0: #f2f2f2; --jp-ui-font-color1: #dcdfe4; --jp-ui-font-color2: #a5abb5;
    --jp-content-link-color: #7ab8ff; --jp-rendermime-table-row-background: #1c2027;
    --jp-cell-editor-background: #1c2027; --jp-cell-editor-border-color: #333a44;
    --jp-border-color0: #444b57; --jp-border-color1: #444b57; --jp-border-color2: #333a44;
    --jp-mirror-editor-variable-color: #dcdfe4; --jp-mirror-editor-keyword-color: #6fc28b;
    --jp-mirror-editor-builtin-color: #6fc28b; --jp-mirror-editor-string-color: #f2a58e;
    --jp-mirror-editor-number-color: #9bd17c; --jp-mirror-editor-comment-color: #86aebb;
    --jp-mirror-editor-operator-color: #cfa0ff; --jp-mirror-editor-def-color: #8fb8ff;
    --jp-mirror-editor-meta-color: #cfa0ff; --jp-mirror-editor-property-color: #8fc7e8;
    --jp-mirror-editor-punctuation-color: #9fc3e6;
  }
  body { background: var(--jp-layout-color0); }
  .jp-RenderedImage img { border-radius: 6px; }
}
</style>
{%- endblock -%}
{%- block body_header -%}{{ super() }}
<nav>{% for text, href in nb.metadata.links %}<a href="{{ href }}">{{ text | e }}</a>{% endfor %}</nav>
{%- endblock -%}
"""


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook, or a markdown file as a notebook of one cell, ready for a page; its title is the
    first heading.
    """
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    else:
        notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not colab.is_first_cell(cell.source)]
    for cell in notebook.cells:
        cell.source = IGNORE.sub("", cell.source)
    texts = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    headings = re.findall(r"^# (.+)$", "\n".join(cell.source for cell in texts), re.MULTILINE)
    notebook.metadata.title = headings[0] if headings else path.stem
    for cell in texts:
        cell.source = MATHS.sub(to_mathml, cell.source)
    return notebook


def to_mathml(found: re.Match) -> str:
    if found["code"]:
        return found[0]
    maths = convert(
        found["block"] or found["inline"], display="block" if found["block"] else "inline"
    )
    return re.sub(
        r"(?<=>)[*_](?=<)", lambda sign: f"&#{ord(sign[0])};", maths
    )  # markdown would take them as its own


def site_exporter() -> HTMLExporter:
    return HTMLExporter(config=SAVED, raw_template=SITE + PICTURE)


def write(exporter: HTMLExporter, notebook: nbformat.NotebookNode, path: Path) -> None:
    path.write_text(exporter.from_notebook_node(notebook)[0], encoding="utf-8")


def add_contents(page: Path) -> None:
    """Put links to the sections of a page, if it has several, above its text."""
    html = page.read_text(encoding="utf-8")
    sections = re.findall(r'<h2 id="([^"]+)">(.*?)<a class="anchor-link"', html, re.DOTALL)
    if len(sections) > 2:
        rows = "".join(f'<li><a href="#{anchor}">{title}</a></li>' for anchor, title in sections)
        contents = f'<nav class="contents" aria-label="On this page"><ul>{rows}</ul></nav>'
        page.write_text(html.replace("</nav>", f"</nav>\n{contents}", 1), encoding="utf-8")


def make_site(folder: Path, out: Path, repository: str | None = None) -> None:
    """A page for each notebook, index.html from README.md, and a page for each other text.

    These are the markdown files of the folder, of its folder of records and of docs beside it, but
    for what instructors withhold. Where the repository is known, notebooks have links to Colab.
    """
    exporter = site_exporter()
    notebooks = sorted(folder.glob("*.ipynb"))
    names = {folder / "README.md": "index.html"}
    names |= {path: f"{path.stem}.html" for path in notebooks}
    for path in _texts(folder):
        place = "" if path.parent == folder else f"{path.parent.name}_"
        names.setdefault(path, f"{place}{path.stem}.html")
    pages = {path: read(path) for path in names}
    for path, page in pages.items():
        for cell in page.cells:
            if cell.cell_type == "markdown":
                cell.source = point_links(cell.source, path, names, repository)
        page.metadata.links = [] if names[path] == "index.html" else [("Contents", "index.html")]
    for place, path in enumerate(notebooks):
        links = pages[path].metadata.links
        for arrow, other in (("← {}", place - 1), ("{} →", place + 1)):
            if 0 <= other < len(notebooks):
                neighbour = notebooks[other]
                links.append((arrow.format(pages[neighbour].metadata.title), names[neighbour]))
        if repository:
            links.append(("Open in Colab", colab.colab_address(repository, path.name)))
    for path, page in pages.items():
        write(exporter, page, out / names[path])
        if names[path] != "index.html":
            add_contents(out / names[path])


def _texts(folder: Path) -> list[Path]:
    """The markdown files that become pages."""
    folders = (folder, folder / "recorded", folder.parent / "docs")
    return [path for one in folders for path in sorted(one.glob("*.md"))]


def point_links(source: str, path: Path, names: dict[Path, str], repository: str | None) -> str:
    """Markdown of the file `path` whose links and pictures hold on the site.

    A link to a file that is a page leads to it. One to any other file of the repository leads to
    GitHub if the repository is known there, and is text alone otherwise. Pictures are put inside.

    Args:
        source: the markdown.
        path: the file it is from.
        names: the name of the page of each file that has one.
        repository: OWNER/REPOSITORY on GitHub, or None.
    """

    def point(found: re.Match) -> str:
        target, _, anchor = found["target"].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return found[0]
        file = Path(os.path.normpath(path.parent / unquote(target)))
        anchor = f"#{anchor}" if anchor else ""
        if found["picture"] and not file.is_file():
            return found["text"]
        if found["picture"]:
            return f"![{found['text']}]({data_address(file)})"
        if file in names:
            return f"[{found['text']}]({names[file]}{anchor})"
        root = HERE.parent
        if repository and file.is_relative_to(root) and WITHHELD not in file.parts:
            inside = file.relative_to(root).as_posix()
            address = f"https://github.com/{repository}/blob/HEAD/{inside}{anchor}"
            return f"[{found['text']}]({address})"
        return found["text"]

    return LINK.sub(point, source)


def data_address(file: Path) -> str:
    """A file as an address that a page needs no network for."""
    kind = mimetypes.guess_type(file.name)[0]
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the pages")
    parser.add_argument(
        "--owner", default="", help="who hosts the repository on GitHub, for links to Colab"
    )
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    make_site(HERE, chosen.out, colab.find_repository(chosen.owner))
    print(f"wrote {chosen.out / 'index.html'}")


if __name__ == "__main__":
    main()
