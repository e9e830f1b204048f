"""`make colab`: badges and install cells for Google Colab, in a fork whose address is known.

    python notebooks/colab.py [OWNER]

A clone does not know who hosts it, so the course comes without badges. This command writes them
into README.md and an install cell into every notebook; commit the change in your fork. OWNER is a
name on GitHub, or OWNER/REPOSITORY. Without it the address of the remote `origin` is taken, if it
is on github.com. Where no address is known, badges and cells are removed.
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
FIRST = (
    "import semidetr_lite  # before torch: it lets waiting threads sleep. Not installed? "
    "See notebooks/README.md"
)
INSTALL = """from importlib.util import find_spec

if not find_spec("semidetr_lite"):  # on Colab, for instance
    !git clone -q --depth 1 https://github.com/{repository} && pip install -q ./{name}
    %cd -q {name}/notebooks

{first}"""
BEGIN, END = "<!-- colab badges, written by `make colab` -->", "<!-- end of badges -->"


def find_repository(owner: str = "", folder: Path = HERE) -> str | None:
    """OWNER/REPOSITORY on GitHub: from `owner`, else from the remote `origin` of the clone.

    None if it is not known. Raises ValueError for an owner that GitHub cannot have.
    """
    if owner:
        if not re.fullmatch(r"[A-Za-z0-9-]+(/[\w.-]+)?", owner):
            raise ValueError(
                f"OWNER={owner}: not a name on GitHub; give OWNER=name or OWNER=name/repository"
            )
        return owner if "/" in owner else f"{owner}/semidetr-lite"
    words = ["git", "-C", str(folder), "remote", "get-url", "origin"]
    try:
        address = subprocess.run(words, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    known = re.fullmatch(
        r"(?:https://|ssh://git@|git@)github\.com[:/]([\w-]+/[\w.-]+?)(?:\.git)?/?", address
    )
    return known[1] if known else None


def colab_address(repository: str, notebook: str) -> str:
    """Where Colab opens a notebook of the repository."""
    return f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{notebook}"


def first_cell(repository: str | None) -> str:
    """The source of a notebook's first code cell."""
    if repository is None:
        return FIRST
    return INSTALL.format(repository=repository, name=repository.split("/")[1], first=FIRST)


def is_first_cell(source: str) -> bool:
    """Whether a cell is one that `first_cell` gives."""
    return source.endswith(FIRST) or source.startswith("from importlib.util import find_spec")


def write_addresses(folder: Path, repository: str | None) -> list[str]:
    """Put the address into the notebooks and the README of a folder, or take it out.

    Returns the changed files.
    """
    changed = []
    paths = sorted(folder.glob("*.ipynb"))
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        cell = next((cell for cell in notebook.cells if cell.cell_type == "code"), None)
        if cell is None or not is_first_cell(cell.source) or cell.source == first_cell(repository):
            continue
        cell.source = first_cell(repository)
        nbformat.write(notebook, path)
        changed.append(path.name)
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    badges = [
        f"[![{path.stem[:2]}]({BADGE})]({colab_address(repository, path.name)})"
        for path in paths
        if repository
    ]
    between = f"\n{' '.join(badges)}\n" if badges else "\n"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    fresh = pattern.sub(lambda _: BEGIN + between + END, text)
    if fresh != text:
        readme.write_text(fresh, encoding="utf-8")
        changed.append(readme.name)
    return changed


def main() -> int:
    """Write the addresses; 2 with one line if the owner cannot be."""
    try:
        repository = find_repository(*sys.argv[1:2])
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    changed = write_addresses(HERE, repository)
    where = (
        f"github.com/{repository}"
        if repository
        else "no address known (make colab OWNER=name), so no badges"
    )
    news = f"changed {len(changed)} files, to be committed" if changed else "nothing to change"
    print(f"{where}: {news}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
