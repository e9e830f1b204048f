"""The lecturers' decks: what a slide shows comes from the saved notebooks, and nothing is cut off."""

import base64
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

pytest.importorskip("latex2mathml", reason="latex2mathml is not installed: pip install -e '.[dev]'")
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
spec = importlib.util.spec_from_file_location("make_slides", NOTEBOOKS / "make_slides.py")
make_slides = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_slides)
sys.path.pop(0)

DECKS = sorted((NOTEBOOKS / "instructor" / "slides").glob("*.md"))
HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (900).to_bytes(4, "big") + (900).to_bytes(4, "big")
PNG = base64.b64encode(HEADER + bytes(40)).decode()
DECK = """# Two
Session 2

## Shown
picture: 02_two "a picture"
code: 02_two "x = 1"
output: 02_two "x = 1"
- a point with $s^2$
notes: Ask first.

## Few
code: 02_two "x = 1" 1
"""


@pytest.fixture
def folder(tmp_path):
    picture = {"image/png": {"alt": "a picture & more", "width": 450}}
    outputs = [
        new_output("stream", text="1 < 2\n"),
        new_output("display_data", data={"image/png": PNG}, metadata=picture),
    ]
    cells = [
        new_markdown_cell("# Why *two*?"),
        new_code_cell("# NBVAL_IGNORE_OUTPUT\nx = 1\nprint('1 < 2')\n\ny = 2", outputs=outputs),
        new_code_cell("\n".join(f"a{n} = {n}" for n in range(13))),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "02_two.ipynb")
    (tmp_path / "instructor" / "slides").mkdir(parents=True)
    (tmp_path / "instructor" / "slides" / "B.md").write_text(DECK, encoding="utf-8")
    (tmp_path / "out").mkdir()
    return tmp_path


def read(folder, text: str) -> dict:
    path = folder / "instructor" / "slides" / "other.md"
    path.write_text(f"# Other\n\n{text}", encoding="utf-8")
    make_slides.notebook_cells.cache_clear()
    return make_slides.read_deck(path, folder)


def test_a_slide_shows_picture_code_and_output_of_the_saved_notebook(folder):
    first, second = make_slides.read_deck(folder / "instructor/slides/B.md", folder)["slides"]
    assert first["title"] == "Shown" and first["tall"]
    assert 'alt="a picture &amp; more"' in first["shown"] and PNG in first["shown"]
    code, output = re.findall(r'<pre class="\w+">(.*?)</pre>', first["shown"], re.DOTALL)
    plain = re.sub(r"<[^>]+>", "", code).replace("&#39;", "'").replace("&lt;", "<")
    assert plain.split() == ["x", "=", "1", "print('1", "<", "2')"]  # up to the empty line
    assert output == "1 &lt; 2"
    assert "<math" in first["text"] and "<li>" in first["text"] and "Ask first." in first["notes"]
    assert "print" not in second["shown"] and not second["tall"]


def test_a_deck_takes_slides_of_another(folder):
    own, taken = read(folder, '## Mine\n- a\n\nuse: B "Shown"\n')["slides"]
    assert (own["title"], taken["title"]) == ("Mine", "Shown") and PNG in taken["shown"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('picture: 02_two "no such"', "no picture"),
        ('code: 02_two "no such"', "no code cell"),
        ('code: 02_two "a0 = 0"', "has 13 lines"),
        ('output: 02_two "a0 = 0"', "printed 0 lines"),
        ('use: B "no such"', "no slide"),
    ],
)
def test_what_is_missing_or_too_long_is_named(folder, line, problem):
    text = line if line.startswith("use") else f"## Slide\n{line}"
    with pytest.raises(ValueError, match=problem):
        read(folder, text)


def test_decks_load_reveal_from_an_address_or_from_a_copy(folder):
    (page,) = make_slides.make_slides(folder, folder / "out")
    assert f'<script src="{make_slides.REVEAL}/dist/reveal.js">' in page.read_text(encoding="utf-8")
    assert 'href="B.html"' in (folder / "out" / "index.html").read_text(encoding="utf-8")
    for part in ("dist", "plugin"):
        (folder / "mine" / part).mkdir(parents=True)
    (folder / "mine" / "dist" / "reveal.js").write_text("", encoding="utf-8")
    (page,) = make_slides.make_slides(folder, folder / "out", str(folder / "mine"))
    scripts = re.findall(r'<script[^>]* src="([^"]+)"', page.read_text(encoding="utf-8"))
    assert scripts == ["reveal.js/dist/reveal.js", "reveal.js/plugin/notes/notes.js"]
    assert (folder / "out" / scripts[0]).is_file()


def test_there_is_a_deck_for_each_session_of_the_plans():
    plans = (NOTEBOOKS / "instructor" / "README.md").read_text(encoding="utf-8")
    sessions = re.findall(r"^\*\*([BC]\d)\. ", plans, re.MULTILINE)
    assert {path.stem for path in DECKS} == {*sessions, "A"}


@pytest.mark.parametrize("path", DECKS, ids=lambda path: path.stem)
def test_every_slide_can_be_made_and_has_notes(path):
    """A title, something to see, at most 12 lines of code, and what to say."""
    for slide in make_slides.read_deck(path, NOTEBOOKS)["slides"]:
        assert slide["title"] and (slide["shown"] or slide["text"]), slide["title"]
        assert slide["notes"], slide["title"]
        for code in re.findall(r'<pre class="code">(.*?)</pre>', slide["shown"], re.DOTALL):
            assert len(code.splitlines()) <= make_slides.MAX_CODE


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MEASURE = """
const over = part => Math.max(part.scrollHeight - part.clientHeight, part.scrollWidth - part.clientWidth);
return [...document.querySelectorAll('.slide')].map(slide => ({
  title: slide.querySelector('h1, h2').textContent,
  size: [slide.clientWidth, slide.clientHeight],
  cut: over(slide),
  overlap: Math.max(...[...slide.querySelectorAll('.shown, pre')].map(over), 0),
  pictures: [...slide.querySelectorAll('img')].map(image => image.clientHeight)}))
"""


@pytest.mark.skipif(not (BROWSER and shutil.which("chromedriver")), reason="no chromium here")
def test_nothing_is_cut_off_at_1280_by_720(tmp_path):
    """In a real browser, which has no reveal.js here and so lays all slides out at once."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,900"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    (tmp_path / "out").mkdir()
    pages = make_slides.make_slides(NOTEBOOKS, tmp_path / "out", "nowhere")
    service = selenium.ChromeService(shutil.which("chromedriver"))
    driver = selenium.Chrome(options=options, service=service)
    try:
        for page in pages:
            driver.get(page.as_uri())
            for slide in driver.execute_script(MEASURE):
                assert slide["size"] == [make_slides.WIDTH, make_slides.HEIGHT], slide
                assert slide["cut"] <= 0 and slide["overlap"] <= 1, (page.stem, slide)
                assert min(slide["pictures"], default=150) >= 150, (page.stem, slide)
    finally:
        driver.quit()
