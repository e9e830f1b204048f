"""`make slides`: reveal.js decks for lecturers, from the texts in instructor/slides and the
notebooks' saved pictures, code and outputs. Nothing is run.

A deck is a markdown file. "# " is its title, the line below says when it is used, each "## " begins
a slide. On a slide

    picture: 04_matching "Hungarian has"    shows the picture whose alt text begins so
    picture: ../docs/a.svg "One step"       shows a file; its alt text
    code: 04_matching "cost = torch"        shows a cell from the line with this text to the next
                                            empty line; a number behind it: so many lines
    output: 04_matching "cost = torch"      shows what the cell with this text printed
    use: B1 "The cost of a pair"            takes a slide of another deck
    notes: Ask for hands first.             is for the speaker, up to the next "## "

and all else is markdown. Without a network and without a copy of reveal.js a deck shows its slides
one below the other, with the notes.
"""

import argparse
import base64
import re
import shutil
from functools import cache
from html import escape
from pathlib import Path

import jinja2
import make_pages
import nbformat
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

HERE = Path(__file__).parent
REVEAL = "https://unpkg.com/reveal.js@4.6.1"
DIRECTIVE = re.compile(r'(picture|code|output): ([\w./-]+) "(.+)"(?: (\d+))?')
USE = re.compile(r'use: (\w+) "(.+)"')
MAX_CODE, MAX_OUTPUT = 12, 14  # lines on a slide
WIDE = 80  # characters in a line of output that is set smaller
WIDTH, HEIGHT = 1280, 720  # CSS pixels of a slide
TALL = 1.25  # a picture that is less wide than this times its height has the text beside it
DECK = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<link rel="stylesheet" href="{{ reveal }}/dist/reveal.css">
<style>
body { margin: 0; background: #fff; color: #222; font-family: "Helvetica Neue", Arial, sans-serif; }
.slides section { margin: 0 auto; padding: 0 !important; width: WIDTHpx; text-align: left; }
.slide { box-sizing: border-box; width: WIDTHpx; height: HEIGHTpx; padding: 32px 56px 28px; display: flex;
         flex-direction: column; gap: 16px; overflow: hidden; background: #fff; }
.slide h2, .slide h1 { margin: 0; font-size: 40px; line-height: 1.15; color: #0b3d63; }
.slide h1 { font-size: 60px; margin-top: 200px; }
.body { flex: 1; min-height: 0; display: flex; flex-direction: column; gap: 16px; }
.body.beside { flex-direction: row; gap: 40px; align-items: center; }
.shown { flex: 1; min-height: 0; min-width: 0; display: flex; flex-direction: column; gap: 14px; }
.beside .shown { flex: 0 0 60%; height: 100%; }
.picture { flex: 1; min-height: 0; }
.picture img { width: 100%; height: 100%; object-fit: contain; object-position: left top; display: block; }
pre { margin: 0; font: 19px/1.32 "DejaVu Sans Mono", Consolas, monospace; }
.code, .output { padding: 12px 16px; border-radius: 6px; }
.code { background: #f4f6f8; }
.output { border-left: 5px solid #9cc3e0; padding: 4px 16px; white-space: pre-wrap; }
.plain .shown { flex: none; }
.plain .output:not(.wide) { font-size: 22px; }
.text { font-size: 27px; line-height: 1.35; }
.text ul, .text ol, .text p { margin: 0; padding-left: 0; }
.text li { margin: 0 0 6px 28px; }
.text p + ul, .text ul + p { margin-top: 12px; }
.text math { font-size: 1.1em; }
.text table { border-collapse: collapse; font-size: 23px; }
.text table { margin-bottom: 16px; }
.text td, .text th { padding: 4px 20px 4px 0; border-bottom: 1px solid #ccc; text-align: left; }
aside.notes { display: none; }
html:not(.reveal-full-page) section { border: 1px solid #ccc; margin-bottom: 32px; }
html:not(.reveal-full-page) aside.notes { display: block; padding: 12px 56px; font-size: 18px; background: #fbf7e8; }
</style></head>
<body><div class="reveal"><div class="slides">
<section><div class="slide"><h1>{{ title }}</h1><div class="text">{{ lead }}</div></div></section>
{% for slide in slides -%}
<section><div class="slide"><h2>{{ slide.title }}</h2>
<div class="body{{ ' beside' if slide.tall and slide.text }}{{ ' plain' if '<img' not in slide.shown }}">
{%- if slide.shown %}<div class="shown">{{ slide.shown }}</div>{% endif %}
{%- if slide.text %}<div class="text">{{ slide.text }}</div>{% endif %}
</div></div>{% if slide.notes %}<aside class="notes">{{ slide.notes }}</aside>{% endif %}</section>
{% endfor -%}
</div></div>
<script src="{{ reveal }}/dist/reveal.js"></script>
<script src="{{ reveal }}/plugin/notes/notes.js"></script>
<script>
if (window.Reveal) Reveal.initialize({width: WIDTH, height: HEIGHT, margin: 0.02, center: false, hash: true,
  slideNumber: "c/t", transition: "none", plugins: [RevealNotes]});
</script></body></html>
"""
DECK = DECK.replace("WIDTH", str(WIDTH)).replace("HEIGHT", str(HEIGHT))


@cache
def notebook_cells(path: Path) -> list:
    return make_pages.read(path).cells


def find_cell(path: Path, text: str):
    """The first code cell that contains a text.

    Raises:
        ValueError: there is none.
    """
    for cell in notebook_cells(path):
        if cell.cell_type == "code" and text in cell.source:
            return cell
    raise ValueError(f'{path.name} has no code cell with "{text}"')


def find_code(path: Path, text: str, count: int | None) -> str:
    """The lines from the one with a text to the next empty line, or `count` of them."""
    lines = find_cell(path, text).source.splitlines()
    first = next(number for number, line in enumerate(lines) if text in line)
    chosen = lines[first:]
    last = count or next((n for n, line in enumerate(chosen) if not line.strip()), len(chosen))
    if last > MAX_CODE:
        raise ValueError(f'{path.name}: the code at "{text}" has {last} lines')
    return "\n".join(chosen[:last])


def find_output(path: Path, text: str, count: int | None) -> str:
    """What the cell with a text printed, or the first `count` lines of it."""
    outputs = find_cell(path, text).outputs
    printed = "".join(output.get("text", "") for output in outputs).rstrip().splitlines()[:count]
    if not 0 < len(printed) <= MAX_OUTPUT:
        raise ValueError(f'{path.name}: the cell with "{text}" printed {len(printed)} lines')
    return "\n".join(printed)


def find_picture(path: Path, text: str) -> tuple[str, str]:
    """A saved picture, as (PNG in base64, alt text).

    Raises:
        ValueError: no picture of the notebook has an alt text that begins so.
    """
    for cell in notebook_cells(path):
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            if alt.startswith(text):
                return output.data["image/png"].replace("\n", ""), alt
    raise ValueError(f'{path.name} has no picture whose alt text begins with "{text}"')


def show(kind: str, name: str, text: str, lines: str | None, folder: Path) -> tuple[str, bool]:
    """What a picture, code or output line shows: HTML, and whether it is a tall picture."""
    path, count = folder / f"{name}.ipynb", int(lines) if lines else None
    if kind == "code":
        code = find_code(path, text, count)
        colored = highlight(code, PythonLexer(), HtmlFormatter(nowrap=True, noclasses=True))
        return f'<pre class="code">{colored}</pre>', False
    if kind == "output":
        printed = find_output(path, text, count)
        wide = " wide" if max(map(len, printed.splitlines())) > WIDE else ""
        return f'<pre class="output{wide}">{escape(printed)}</pre>', False
    tall = False
    if Path(name).suffix:
        address = make_pages.data_address(folder / name)
    else:
        data, text = find_picture(path, text)
        header = base64.b64decode(data[:64])
        width, height = (int.from_bytes(header[start : start + 4], "big") for start in (16, 20))
        address, tall = f"data:image/png;base64,{data}", width < TALL * height
    return f'<div class="picture"><img src="{address}" alt="{escape(text)}"></div>', tall


def read_deck(path: Path, folder: Path) -> dict:
    """{"title", "lead", "slides": [{"title", "shown", "text", "notes", "tall"}]} of a deck.

    Args:
        path: the markdown file.
        folder: of the notebooks.
    """
    head, *parts = re.split(r"^(?=## |use: )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    title, _, lead = head.strip().partition("\n")
    slides = [read_slide(part.strip(), path, folder) for part in parts]
    return {"title": title.removeprefix("# "), "lead": to_html(lead), "slides": slides}


def read_slide(part: str, path: Path, folder: Path) -> dict:
    """A slide of a deck, from its lines."""
    if used := USE.fullmatch(part):
        return find_slide(path.with_name(f"{used[1]}.md"), used[2], folder)
    title, _, body = part.removeprefix("## ").partition("\n")
    body, _, notes = body.partition("notes: ")
    shown, text, tall = "", [], False
    for line in body.splitlines():
        if found := DIRECTIVE.fullmatch(line):
            html, is_tall = show(*found.groups(), folder)
            shown, tall = shown + html, tall or is_tall
        else:
            text.append(line)
    text = to_html("\n".join(text))
    return {"title": title, "shown": shown, "text": text, "notes": to_html(notes), "tall": tall}


def find_slide(path: Path, title: str, folder: Path) -> dict:
    for slide in read_deck(path, folder)["slides"]:
        if slide["title"] == title:
            return slide
    raise ValueError(f'{path.name} has no slide "{title}"')


def to_html(text: str) -> str:
    maths = make_pages.MATHS.sub(make_pages.to_mathml, text.strip())
    return markdown2html_mistune(maths).strip() if maths else ""


def make_slides(folder: Path, out: Path, reveal: str = REVEAL) -> list[Path]:
    """A page per deck, and index.html with their titles; a copy of reveal.js is taken along."""
    if Path(reveal, "dist").is_dir():
        for part in ("dist", "plugin"):
            shutil.copytree(Path(reveal, part), out / "reveal.js" / part, dirs_exist_ok=True)
        reveal = "reveal.js"
    page = jinja2.Template(DECK, autoescape=False)
    rows, written = ["# Slides", ""], []
    for path in sorted((folder / make_pages.WITHHELD / "slides").glob("*.md")):
        deck = read_deck(path, folder)
        written.append(out / f"{path.stem}.html")
        written[-1].write_text(page.render(**deck, reveal=reveal), encoding="utf-8")
        rows.append(f"* {path.stem} [{deck['title']}]({path.stem}.html)")
    index = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n".join(rows))])
    index.metadata.update(title="Slides", links=[])
    make_pages.write(make_pages.site_exporter(), index, out / "index.html")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the pages")
    copy = "address of reveal.js 4, or the folder of a copy of yours (%(default)s)"
    parser.add_argument("--reveal-prefix", default=REVEAL, help=copy)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    make_slides(HERE, chosen.out, chosen.reveal_prefix)
    print(f"wrote {chosen.out / 'index.html'}")


if __name__ == "__main__":
    main()
