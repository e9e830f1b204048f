"""`make site` and `make slides`: the notebooks as pages that need no kernel. Nothing is run; saved
outputs are shown.

Formulas become MathML and pictures are inside, so a page of the site loads nothing from anywhere.
Slides load reveal.js when they are shown, from a public address or from a copy of yours.
"""

import argparse
import base64
import mimetypes
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter, SlidesExporter
from traitlets.config import Config

sys.path.insert(0, str(Path(__file__).parent))
import colab

HERE = Path(__file__).parent
REVEAL = "https://unpkg.com/reveal.js@4.6.1"
PRIORITY = ["text/html", "text/markdown", "image/png", "text/plain"]
SAVED = Config({"NbConvertBase": {"display_data_priority": PRIORITY}})  # no widgets
MATHS = re.compile(
    r"(?P<code>(`+).*?\2)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", re.DOTALL
)
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
WITHHELD = "instructor"  # the folder of solutions, which no page shows
LINES = 28  # that fit on a slide
SLIDE_IMAGE = (1180, 600)  # CSS pixels, the largest width and height of a picture on a slide
HIDDEN = "hide-input"  # the tag of cells whose code is folded on the site and left out on slides
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
SLIDES = """
{%- extends 'reveal/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
.reveal .slides section section { max-height: 100%; overflow-y: auto; padding: 0 24px; }
.reveal .jp-OutputArea img { width: auto; margin: 8px 0; max-width: WIDTHpx; max-height: HEIGHTpx; }
</style>
{%- endblock -%}
{%- block footer_js -%}
<script src="{{ resources.reveal.url_prefix }}/dist/reveal.js"></script>
<script src="{{ resources.reveal.url_prefix }}/plugin/notes/notes.js"></script>
<script>
Reveal.initialize({width: 1280, height: 760, margin: 0.02, center: false, hash: true, slideNumber: "c/t",
                   transition: "none", plugins: [RevealNotes]});
</script>
{%- endblock -%}
"""
for name, pixels in zip(("WIDTH", "HEIGHT"), SLIDE_IMAGE, strict=True):
    SLIDES = SLIDES.replace(f"{name}px", f"{pixels}px")


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
        cell.source = re.sub(
            r"\]\(([\w./-]+)\.ipynb(#[^)]*)?\)", r"](\1.html\2)", MATHS.sub(_mathml, cell.source)
        )
    return notebook


def _mathml(found: re.Match) -> str:
    if found["code"]:
        return found[0]
    maths = convert(
        found["block"] or found["inline"], display="block" if found["block"] else "inline"
    )
    return re.sub(
        r"(?<=>)[*_](?=<)", lambda sign: f"&#{ord(sign[0])};", maths
    )  # markdown would take them as its own


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
    exporter = HTMLExporter(config=SAVED, raw_template=SITE + PICTURE)
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
        if not target or re.match(r"[a-z]+:", target) or target in names.values():
            return found[0]
        file = Path(os.path.normpath(path.parent / unquote(target)))
        anchor = f"#{anchor}" if anchor else ""
        if found["picture"] and not file.is_file():
            return found["text"]
        if found["picture"]:
            kind = mimetypes.guess_type(file.name)[0]
            data = base64.b64encode(file.read_bytes()).decode()
            return f"![{found['text']}](data:{kind};base64,{data})"
        if file in names:
            return f"[{found['text']}]({names[file]}{anchor})"
        root = HERE.parent
        if repository and file.is_relative_to(root) and WITHHELD not in file.parts:
            inside = file.relative_to(root).as_posix()
            address = f"https://github.com/{repository}/blob/HEAD/{inside}{anchor}"
            return f"[{found['text']}]({address})"
        return found["text"]

    return LINK.sub(point, source)


def make_slides(folder: Path, out: Path, reveal: str = REVEAL) -> None:
    """reveal.js slides of each notebook, and index.html with their titles; a copy of reveal.js is
    taken along.
    """
    if Path(reveal, "dist").is_dir():
        for part in ("dist", "plugin"):
            shutil.copytree(Path(reveal, part), out / "reveal.js" / part, dirs_exist_ok=True)
        reveal = "reveal.js"
    exporter = SlidesExporter(config=SAVED, raw_template=SLIDES + PICTURE, reveal_url_prefix=reveal)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    rows = ["# Slides", ""]
    for path in sorted(folder.glob("*.ipynb")):
        notebook = read(path)
        leave_out_hidden_code(notebook)
        add_slide_types(notebook)
        write(exporter, notebook, out / f"{path.stem}.html")
        rows.append(f"* {path.stem[:2]} [{notebook.metadata.title}]({path.stem}.html)")
    index = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n".join(rows))])
    index.metadata.update(title="Slides", links=[])
    write(HTMLExporter(raw_template=SITE + PICTURE), index, out / "index.html")


def leave_out_hidden_code(notebook: nbformat.NotebookNode) -> None:
    """Leave the code of cells with the tag HIDDEN out, and cells of which nothing is left."""
    for cell in notebook.cells:
        if HIDDEN in cell.metadata.get("tags", []):
            cell.source = ""
            cell.metadata.transient = {"remove_source": True}
    notebook.cells = [cell for cell in notebook.cells if cell.source or cell.get("outputs")]


def add_slide_types(notebook: nbformat.NotebookNode) -> None:
    """For cells without one: a heading begins a slide; below it begins what would not fit, and what
    answers a guess.

    A cell with a heading further down is cut there.
    """
    cells, filled, guess = notebook.cells, 0.0, False
    notebook.cells = [part for cell in cells for part in _parts(cell)]
    for cell in notebook.cells:
        lines = _lines(cell)
        if cell.cell_type == "markdown" and re.match("##? ", cell.source):
            kind = "slide"
        else:
            kind = (
                "subslide"
                if guess or filled + lines > LINES or cell.source.startswith("###")
                else "-"
            )
        kind = cell.metadata.setdefault("slideshow", {}).setdefault("slide_type", kind)
        if kind not in ("skip", "notes"):
            filled = lines if kind in ("slide", "subslide") else filled + lines
            guess = "**Your guess" in cell.source


def _parts(cell) -> list:
    if cell.cell_type != "markdown" or "slideshow" in cell.metadata:
        return [cell]
    texts = filter(str.strip, re.split(r"^(?=##? )", cell.source, flags=re.MULTILINE))
    return [nbformat.v4.new_markdown_cell(text, metadata=cell.metadata.copy()) for text in texts]


def _lines(cell) -> float:
    """About how many lines a cell takes on a slide."""
    lines = 1 + _wrapped(cell.source)
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            header = base64.b64decode(data["image/png"][:64])
            width, height = (int.from_bytes(header[start : start + 4], "big") for start in (16, 20))
            lines += min(SLIDE_IMAGE[1], SLIDE_IMAGE[0] * height / width) / 21
        else:
            lines += _wrapped(output.get("text") or data.get("text/plain", ""))
    return lines


def _wrapped(text: str) -> int:
    return sum(1 + len(line) // 110 for line in text.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["site", "slides"])
    parser.add_argument("out", type=Path, help="folder for the pages")
    copy = "address of reveal.js 4, or the folder of a copy of yours (%(default)s)"
    parser.add_argument("--reveal-prefix", default=REVEAL, help=copy)
    parser.add_argument(
        "--owner", default="", help="who hosts the repository on GitHub, for links to Colab"
    )
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.what == "site":
        make_site(HERE, chosen.out, colab.find_repository(chosen.owner))
    else:
        make_slides(HERE, chosen.out, chosen.reveal_prefix)
    print(f"wrote {chosen.out / 'index.html'}")


if __name__ == "__main__":
    main()
