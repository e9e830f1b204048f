"""The pages: links lead somewhere, pictures are described, commands in code blocks can be typed."""

import contextlib
import functools
import io
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

from semidetr_lite import cli

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "notebooks", "benchmarks", "data_scripts", "tests")
PAGES = sorted(ROOT.glob("*.md")) + sorted(
    page
    for folder in FOLDERS
    for page in (ROOT / folder).rglob("*.md")
    if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
)
FENCE = re.compile(r"^( *)```[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(`+)((?:(?!\n\n).)+?)\1", re.DOTALL)
LINK = re.compile(
    r"\[[^\]]*\]\(\s*<?([^)\s>]+)[^)]*\)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=\"([^\"]+)\"",
    re.MULTILINE,
)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)|<img\b([^>]*)>")
SCRIPT = re.compile(r"(?:benchmarks|data_scripts|docs|notebooks)/\w+\.py")
ENDS = {"&&", "||", "|", ";", ">", ">>", "#"}


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request) -> Path:
    return request.param


def prose(text: str) -> str:
    """A page without its code."""
    return INLINE.sub("", FENCE.sub("", text))


def blocks(text: str) -> str:
    """The code blocks of a page that are no Python."""
    return "\n".join(found[2] for found in FENCE.finditer(text) if "```python" not in found[0])


def anchors(text: str) -> set[str]:
    """What a # link can name: headings as GitHub spells them, and ids given by hand."""
    found: set[str] = set(re.findall(r"\b(?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", FENCE.sub("", text), re.MULTILINE):
        plain = (
            re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
            .replace("`", "")
            .replace("*", "")
            .lower()
        )
        slug = "".join(letter for letter in plain if letter.isalnum() or letter in " -_").replace(
            " ", "-"
        )
        count = sum(bool(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known)) for known in found)
        found.add(f"{slug}-{count}" if count else slug)
    return found


def broken_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    faults = []
    for link in (
        "".join(groups) for groups in LINK.findall(prose(page.read_text(encoding="utf-8")))
    ):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):  # another site
            continue
        name, _, anchor = unquote(link).partition("#")
        target = page.parent / name if name else page
        if not target.exists() or ROOT not in target.resolve().parents:
            faults.append(link)
        elif (
            anchor
            and target.suffix == ".md"
            and anchor not in anchors(target.read_text(encoding="utf-8"))
        ):
            faults.append(link)
    return faults


def commands(text: str, *starts: str) -> list[list[str]]:
    """The words after each of `starts` in lines of code; shell substitutions are left out."""
    text = re.sub(r"\$\([^)]*\)", "", text.replace("\\\n", " "))
    found = []
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # not a line for a shell
            continue
        for place, word in enumerate(words):
            if word in starts:
                rest = words[place + 1 :]
                end = next((n for n, other in enumerate(rest) if other in ENDS), len(rest))
                found.append([other for other in rest[:end] if other != "..."])
    return found


def parse(words: list[str]) -> None:
    """Read a command line of `semidetr` and run nothing; SystemExit 2 if it cannot be read."""

    def silent(command):
        return functools.wraps(command)(lambda *_, **__: None)

    read = {name: silent(command) for name, command in cli.COMMANDS.items()}
    cli.run_command(words, read)


@functools.cache
def options(command: str) -> frozenset[str]:
    """The options that the help of a command names."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        parse([command, "--help"])
    return frozenset(re.findall(r"(?<![\w-])--[a-z0-9-]+", said.getvalue()))


def script_options(script: Path) -> str:
    """The source in which a script's options stand, with the modules its folder shares."""
    return "".join(
        file.read_text(encoding="utf-8") for file in (script, *script.parent.glob("_*.py"))
    )


# What the checks themselves do


def test_broken_links_finds_files_anchors_and_reference_links(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text(
        "# Two words, `code`\n\n## Two words code\n", encoding="utf-8"
    )
    good = "[a](other.md) ![b](other.md#two-words-code) [c](https://x.y/z) `[d](no)`\n"
    good += "[e](#here)\n# Here\n"
    (tmp_path / "page.md").write_text(
        good + "```\n[f](no)\n```\n[g](other.md#two-words-code-1)", encoding="utf-8"
    )
    assert broken_links(tmp_path / "page.md") == []
    bad = '[a](gone.md) ![b](other.md#gone) <img src="gone.png" alt="x">\n\n'
    bad += "[c]: gone.txt\n[d](#gone)\n[e](../page.md)\n"
    (tmp_path / "page.md").write_text(bad, encoding="utf-8")
    found = broken_links(tmp_path / "page.md")
    assert sorted(found) == [
        "#gone",
        "../page.md",
        "gone.md",
        "gone.png",
        "gone.txt",
        "other.md#gone",
    ]


def test_commands_joins_lines_and_leaves_comments_and_the_shell_out():
    text = "semidetr a --b \\\n  C $(x y) # not this\n"
    text += 'run -m semidetr_lite d ... && semidetr e "f g" > h\n'
    assert commands(text, "semidetr", "semidetr_lite") == [["a", "--b", "C"], ["d"], ["e", "f g"]]


def test_parse_reads_and_runs_nothing(tmp_path, capsys):
    parse(["train", "--out", str(tmp_path / "run"), "--percent", "5"])
    assert not (tmp_path / "run").exists()
    for wrong in (["train", "--out", "x", "--percents", "5"], ["train"], ["tain"]):
        with pytest.raises(SystemExit) as stopped:
            parse(wrong)
        assert stopped.value.code == 2


def test_options_are_those_of_the_help():
    assert {"--out", "--percent", "--no-flip"} <= options("train") and "--percents" not in options(
        "train"
    )


# What holds for every page


def test_relative_links_and_pictures_are_there(page):
    assert broken_links(page) == []


def test_pictures_are_described(page):
    for text, target, attributes in PICTURE.findall(prose(page.read_text(encoding="utf-8"))):
        described = text if target else "".join(re.findall(r"alt=\"([^\"]+)\"", attributes))
        assert described.strip(), target or attributes


def test_commands_in_code_blocks_can_be_read(page, capsys):
    for words in commands(blocks(page.read_text(encoding="utf-8")), "semidetr", "semidetr_lite"):
        try:
            parse(words)
        except SystemExit as stopped:
            assert not stopped.code, f"semidetr {' '.join(words)}\n{capsys.readouterr().err}"


def test_options_named_in_the_text_exist(page):
    spans = [span for _, span in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))]
    for span in spans:
        words = span.split()
        if words[0] == "semidetr" and len(words) > 1 and words[1] in cli.COMMANDS:
            assert set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span)) <= options(words[1]), span


def test_scripts_and_their_options_exist(page):
    text = page.read_text(encoding="utf-8")
    lines = blocks(text) + "\n" + "\n".join(span for _, span in INLINE.findall(FENCE.sub("", text)))
    for words in commands(lines, "python"):
        if words and SCRIPT.fullmatch(words[0]):
            assert (ROOT / words[0]).is_file(), words
            known = script_options(ROOT / words[0])
            for option in [word.split("=")[0] for word in words if word.startswith("--")]:
                assert f'"{option}"' in known, (words[0], option)


def test_make_targets_in_code_blocks_exist(page):
    targets = set(
        re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    for words in commands(blocks(page.read_text(encoding="utf-8")), "make"):
        assert {word for word in words if re.fullmatch(r"[a-z]+", word)} <= targets, words
