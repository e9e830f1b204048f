"""The course as static pages, made from a tiny notebook; and the links of the real contents page."""

import base64
import importlib.util
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

pytest.importorskip("latex2mathml", reason="latex2mathml is not installed: pip install -e '.[dev]'")
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
spec = importlib.util.spec_from_file_location("make_pages", NOTEBOOKS / "make_pages.py")
make_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_pages)

colab = make_pages.colab

PNG = base64.b64encode(
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (1800).to_bytes(4, "big") + (600).to_bytes(4, "big")
).decode()
WIDGET = {
    "image/png": PNG + "A" * 40,
    "text/plain": "explore()",
    "application/vnd.jupyter.widget-view+json": {
        "model_id": "gone",
        "version_major": 2,
        "version_minor": 0,
    },
}
ABOUT = {"image/png": {"alt": "the 'saved' picture", "width": 900}}
ALT = "alt=\"the 'saved' picture\""


def tiny() -> nbformat.NotebookNode:
    return new_notebook(
        cells=[
            new_markdown_cell(
                "# Why *two*?\n\nSee [one](01_one.ipynb#a). Take $s^\\alpha * m_q$, not `$x$`."
            ),
            new_code_cell(colab.first_cell("me/kit")),
            new_markdown_cell("**Your guess:**"),
            new_code_cell("print(1)", outputs=[new_output("stream", text="unrepeatable 17\n")]),
            new_markdown_cell("Done.\n\n## Play\n\n$$\\tfrac12$$"),
            new_code_cell(
                "# NBVAL_IGNORE_OUTPUT\nexplore()",
                outputs=[
                    new_output("execute_result", data=WIDGET, metadata=ABOUT, execution_count=2)
                ],
            ),
            new_code_cell("def plot(): ...", metadata={"tags": ["hide-input"]}),
            new_code_cell("\n".join("x = 1" for _ in range(20))),
        ]
    )


@pytest.fixture
def folder(tmp_path):
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Why one?")]), tmp_path / "01_one.ipynb")
    nbformat.write(tiny(), tmp_path / "02_two.ipynb")
    (tmp_path / "README.md").write_text("# The course\n\n[first](01_one.ipynb)\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    return tmp_path


def test_the_site_shows_what_was_saved_and_loads_nothing(folder):
    make_pages.make_site(folder, folder / "out")
    page = (folder / "out" / "02_two.html").read_text(encoding="utf-8")
    assert "unrepeatable 17" in page and ALT in page and 'width="900"' in page
    assert '<details class="code"><summary>Code of this cell</summary>' in page
    assert page.count("<details") == 1 and "NBVAL" not in page
    assert "find_spec" not in page and "widget-view" not in page
    assert (
        page.count("<math") == 2
        and "<code>$x$</code>" in page
        and "<em>" not in page.split("Take")[1][:400]
    )
    assert re.search(r"<title>Why \*?two\*?\?</title>", page)
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page) and "<script" not in page


def broken_links(out: Path) -> list[str]:
    """Links of the pages in `out` that lead to no file there."""
    found = []
    for path in sorted(out.glob("*.html")):
        for href in re.findall(r'<a\b[^>]* href="([^"]+)"', path.read_text(encoding="utf-8")):
            file = unquote(href.split("#")[0])
            if file and not re.match(r"[a-z]+:", file) and not (out / file).is_file():
                found.append(f"{path.name}: {href}")
    return found


def test_links_of_the_site_lead_to_its_pages(folder):
    make_pages.make_site(folder, folder / "out")
    assert 'href="01_one.html"' in (folder / "out" / "index.html").read_text(encoding="utf-8")
    second = (folder / "out" / "02_two.html").read_text(encoding="utf-8")
    assert '<a href="index.html">' in second and '<a href="01_one.html">← Why one?</a>' in second
    assert broken_links(folder / "out") == []
    (folder / "out" / "01_one.html").unlink()
    assert len(broken_links(folder / "out")) == 3


def test_other_texts_become_pages_with_their_pictures_inside(tmp_path):
    folder, docs, out = (tmp_path / name for name in ("notebooks", "docs", "out"))
    for one in (folder / "instructor", docs / "pictures", out):
        one.mkdir(parents=True)
    links = "[page](handout.md) [word](../docs/words.md#q) [answers](instructor/README.md) [x](#y)"
    (folder / "README.md").write_text(f"# Course\n\n{links}", encoding="utf-8")
    (folder / "handout.md").write_text("# Handout\n\n[`code`](../pack.py)", encoding="utf-8")
    (folder / "instructor/README.md").write_text("# Answers", encoding="utf-8")
    (docs / "words.md").write_text("# Words\n\n![a cat](pictures/cat.png)", encoding="utf-8")
    (docs / "pictures/cat.png").write_bytes(b"\x89PNG")
    make_pages.make_site(folder, out)
    assert {page.name for page in out.iterdir()} == {
        "index.html",
        "handout.html",
        "docs_words.html",
    }
    index = (out / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<a href="([^"]*)">', index) == ["handout.html", "docs_words.html#q", "#y"]
    assert "answers" in index and broken_links(out) == []
    assert "<code>code</code>" in (out / "handout.html").read_text(encoding="utf-8")
    inside = base64.b64encode(b"\x89PNG").decode()
    words = (out / "docs_words.html").read_text(encoding="utf-8")
    assert f'src="data:image/png;base64,{inside}"' in words


def test_links_to_code_lead_to_github_where_it_is_known():
    source = "[a](../README.md) [b](instructor/README.md) ![c](none.png)"
    path = NOTEBOOKS / "handout.md"
    assert make_pages.point_links(source, path, {}, None) == "a b c"
    known = make_pages.point_links(source, path, {}, "me/kit")
    assert known == "[a](https://github.com/me/kit/blob/HEAD/README.md) b c"


def test_addresses_of_colab_come_and_go(folder):
    readme = folder / "README.md"
    readme.write_text(f"# The course\n\n{colab.BEGIN}\n{colab.END}\n", encoding="utf-8")
    nbformat.write(
        new_notebook(cells=[new_code_cell(colab.first_cell(None))]), folder / "02_two.ipynb"
    )
    before = readme.read_text(), (folder / "02_two.ipynb").read_text()
    assert sorted(colab.write_addresses(folder, "me/kit")) == ["02_two.ipynb", "README.md"]
    assert "github/me/kit/blob/main/notebooks/02_two.ipynb" in readme.read_text()
    (cell,) = nbformat.read(folder / "02_two.ipynb", as_version=4).cells
    assert (
        "https://github.com/me/kit && pip install -q ./kit" in cell.source
        and cell.source.endswith(colab.FIRST)
    )
    assert colab.write_addresses(folder, "me/kit") == []
    colab.write_addresses(folder, None)
    assert (readme.read_text(), (folder / "02_two.ipynb").read_text()) == before


@pytest.mark.parametrize(
    ("remote", "known"),
    [
        ("https://github.com/me/kit.git", "me/kit"),
        ("git@github.com:me/kit.git", "me/kit"),
        ("https://gitlab.com/me/kit.git", None),
        ("https://github.com.evil.org/me/kit", None),
        ("/somewhere/kit", None),
        (None, None),
    ],
)
def test_the_address_is_that_of_a_remote_on_github_and_no_other(tmp_path, remote, known):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    if remote:
        subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", remote], check=True)
    assert colab.find_repository("", tmp_path) == known
    assert colab.find_repository("you", tmp_path) == "you/semidetr-lite"
    assert colab.find_repository("you/fork", tmp_path) == "you/fork"
    with pytest.raises(ValueError, match="not a name on GitHub"):
        colab.find_repository("you and me", tmp_path)


def test_the_site_links_to_colab_only_where_the_address_is_known(folder):
    make_pages.make_site(folder, folder / "out")
    assert "colab" not in (folder / "out" / "02_two.html").read_text(encoding="utf-8").lower()
    make_pages.make_site(folder, folder / "out", "me/kit")
    page = (folder / "out" / "02_two.html").read_text(encoding="utf-8")
    assert (
        "https://colab.research.google.com/github/me/kit/blob/main/notebooks/02_two.ipynb" in page
    )


def test_no_placeholder_stands_in_the_course():
    for path in [*NOTEBOOKS.glob("*.ipynb"), NOTEBOOKS / "README.md"]:
        assert "OWNER/" not in path.read_text(encoding="utf-8"), path


def test_a_page_of_several_sections_begins_with_links_to_them(folder):
    sections = [new_markdown_cell(f"## {n}. What `x{n}` is\n\ntext") for n in (1, 2, 3)]
    cells = [new_markdown_cell("# Why three?"), *sections]
    nbformat.write(new_notebook(cells=cells), folder / "03_three.ipynb")
    make_pages.make_site(folder, folder / "out")
    page = (folder / "out" / "03_three.html").read_text(encoding="utf-8")
    contents = page.split('aria-label="On this page"')[1].split("</nav>")[0]
    targets = re.findall(r'href="#([^"]+)"', contents)
    assert len(targets) == 3 and all(f'id="{target}"' in page for target in targets)
    assert "On this page" not in (folder / "out" / "02_two.html").read_text(encoding="utf-8")
