"""What holds for the project as a whole: lists of dependencies agree, imports point one way,
functions stay small.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "semidetr_lite"
ROOMS = [
    "errors",
    "files",
    "fields",
    "contracts",
    "boxes",
    "device",
    "distributed",
    "data",
    "detectors",
    "matching",
    "loss_weights",
    "normalizer_settings",
    "normalizers",
    "losses",
    "methods",
    "detection_files",
    "evaluate",
    "visualize",
    "training",
    "runs",
    "report",
    "gallery",
    "teach",
    "prediction",
    "export",
    "cli",
    "__main__",
]  # a module imports from its own room and from those before it
# the same inside training
TRAINING = [
    "settings",
    "presets",
    "checkpoint",
    "signals",
    "engine",
    "memory",
    "measure",
    "run_folder",
    "photos",
    "loop",
    "dry_run",
    "ablate",
    "demo",
]
CONDA_NAMES = {"torch": "pytorch"}  # the others have one name in both worlds
BY_PIP = {"hotcoco"}  # of the conda environment, as part of "-e .[dev]"


def project_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def modules() -> list[tuple[Path, ast.Module]]:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert paths, f"no module under {PACKAGE}"
    return [(path, ast.parse(path.read_text(encoding="utf-8"), str(path))) for path in paths]


# Dependencies


def test_the_container_installs_what_make_installs():
    """Its line is that of the Makefile, with the index of the CPU-only torch that the course names."""
    lines = (ROOT / "Containerfile").read_text(encoding="utf-8").splitlines()
    steps = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN python -m pip")]
    course = (ROOT / "notebooks/README.md").read_text(encoding="utf-8")
    (cpu_torch,) = set(re.findall(r'PIP_ARGS="(--extra-index-url [^"]+)"', course))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^\t\$\(PY\) (-m pip install .+)$", makefile, re.MULTILINE)
    assert steps == ["python " + recipe.replace("$(PIP_ARGS)", cpu_torch)]
    users = [line for line in lines if line.startswith(("USER", "CMD", "COPY"))]
    assert users[0] == "USER student" and lines[-1].startswith("CMD")
    python = re.search(r"FROM python:(\S+)-slim", "\n".join(lines))[1]
    assert f"python={python}" in (ROOT / "environment.yml").read_text(encoding="utf-8")


def test_environment_yml_is_in_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, *packages, from_pip = environment["dependencies"]
    assert pip == "pip" and from_pip == {"pip": ["-e .[dev]"]}
    version = re.fullmatch(r"python=(\d+\.\d+)", python).group(1)
    project = project_table()
    assert Requirement(f"python{project['requires-python']}").specifier.contains(version)

    wanted = {}
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"python_version": version}):
            wanted[CONDA_NAMES.get(needed.name, needed.name)] = str(needed.specifier)
    listed = {needed.name: str(needed.specifier) for needed in map(Requirement, packages)}
    assert listed.keys() == wanted.keys() - BY_PIP and BY_PIP <= wanted.keys()
    assert listed == {name: wanted[name] for name in listed}


def first_column(markdown: str, header: str) -> list[str]:
    """The names in backticks in the first column of the table whose first header is `header`."""
    lines = iter(markdown.splitlines())
    for line in lines:
        if re.match(rf"\|\s*{header}\s*\|", line, re.IGNORECASE):
            break
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(line.split("|")[1])
    return [name for cell in rows for name in re.findall(r"`([^`]+)`", cell)]


def test_first_column_reads_the_named_table_only():
    other = "| `x` | y |\n|---|---|\n| `no` | `no` |\n\n"
    markdown = (
        other + "| Dependency | why |\n|---|---|\n| `a`, `b` | `no` |\n| [`c`](u) | |\n\n| `no` |"
    )
    assert first_column(markdown, "dependency") == ["a", "b", "c"]


def test_the_docs_explain_every_dependency_and_no_other():
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    explained = first_column(page, "dependency")
    needed = [Requirement(line).name for line in project_table()["dependencies"]]
    assert sorted(map(normalised, explained)) == sorted(map(normalised, needed))


def test_the_citation_is_of_this_version_and_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = project_table()
    assert {"cff-version", "message", "authors"} <= set(citation)  # required, with the title
    for key, ours in {"title": "name", "version": "version", "license": "license"}.items():
        assert citation[key] == project[ours]
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper) and "2307.08095" in paper["url"]
    assert all(
        set(author) in ({"given-names", "family-names"}, {"name"}) for author in paper["authors"]
    )


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="README.md is not written yet")
def test_ci_runs_the_test_command_of_the_readme():
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = "\n".join(re.findall(r"^```.*?\n(.*?)^```", readme, re.DOTALL | re.MULTILINE))
    assert command.startswith("make test")
    assert command in [line.split("#")[0].strip() for line in shown.splitlines()]


# Imports


def imported_rooms(path: Path, tree: ast.Module) -> list[tuple[int, str]]:
    """(line, room) of every import from this package, wherever in the file; the room "" is the
    package's front door.
    """
    package = ("semidetr_lite", *path.relative_to(PACKAGE).parts[:-1])
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            names = (
                [f"{base}.{alias.name}" for alias in node.names]
                if base == "semidetr_lite"
                else [base]
            )
        else:
            continue
        parts = [name.split(".") for name in names]
        found += [
            (node.lineno, part[1] if len(part) > 1 else "")
            for part in parts
            if part[0] == "semidetr_lite"
        ]
    return found


def backward_imports(files: list[tuple[Path, ast.Module]]) -> list[str]:
    """Imports of a later room, as "file:line imports room". The front door counts as the last room
    that it opens.
    """
    front_door = PACKAGE / "__init__.py"
    opened = [
        ROOMS.index(room)
        for path, tree in files
        if path == front_door
        for _, room in imported_rooms(path, tree)
    ]
    place = {room: index for index, room in enumerate(ROOMS)}
    faults = []
    for path, tree in files:
        if path == front_door:
            continue
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for line, room in imported_rooms(path, tree):
            if place.get(room, max(opened, default=0)) > place[here]:
                faults.append(
                    f"{path.relative_to(PACKAGE).as_posix()}:{line} imports {room or 'semidetr_lite'}"
                )
    return faults


def test_every_module_is_in_a_room():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path, _ in modules()} - {
        "__init__"
    }
    assert rooms <= set(ROOMS), f"give these a place in ROOMS: {sorted(rooms - set(ROOMS))}"


@pytest.mark.parametrize(
    ("file", "source", "rooms"),
    [
        ("losses.py", "import torch\nfrom semidetr_lite.matching import one_to_one", ["matching"]),
        ("losses.py", "from semidetr_lite import boxes, matching", ["boxes", "matching"]),
        ("methods/soft_teacher.py", "def f():\n    from ..training.loop import fit", ["training"]),
        (
            "methods/semi_detr.py",
            "from .mean_teacher import ema\nfrom .. import visualize",
            ["methods", "visualize"],
        ),
        (
            "teach/widgets.py",
            "import semidetr_lite\nimport semidetr_lite.data.digits as d",
            ["", "data"],
        ),
    ],
)
def test_imported_rooms_reads_every_form_of_import(file, source, rooms):
    assert [room for _, room in imported_rooms(PACKAGE / file, ast.parse(source))] == rooms


def test_backward_imports_finds_a_later_room_and_the_front_door():
    sources = {
        "__init__.py": "from semidetr_lite.training.checkpoint import load_detector",
        "cli.py": "from semidetr_lite import load_detector",
        "methods/semi_detr.py": "from semidetr_lite.losses import a\ndef f():\n    import semidetr_lite.evaluate",
        "data/views.py": "from semidetr_lite import load_detector",
    }
    faults = backward_imports(
        [(PACKAGE / name, ast.parse(source)) for name, source in sources.items()]
    )
    assert faults == [
        "methods/semi_detr.py:3 imports evaluate",
        "data/views.py:1 imports load_detector",
    ]


def test_imports_point_to_earlier_rooms():
    assert backward_imports(modules()) == []


def test_imports_inside_training_point_to_earlier_modules():
    faults = []
    for path, tree in modules():
        if path.parent.name != "training" or path.stem == "__init__":
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            if node.module == "semidetr_lite.training":
                names = [alias.name for alias in node.names]
            elif node.module.startswith("semidetr_lite.training."):
                names = [node.module.rpartition(".")[2]]
            else:
                continue
            later = [name for name in names if TRAINING.index(name) >= TRAINING.index(path.stem)]
            faults += [f"{path.name}:{node.lineno} imports {name}" for name in later]
    assert faults == []


# Sizes


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, less those of the docstring."""
    length = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        length -= docstring.end_lineno - docstring.lineno + 1
    return length


def test_code_lines_leaves_the_docstring_out():
    function = ast.parse(
        '@cache\ndef f():\n    """One.\n\n    Two."""\n    # why\n    x = 1\n\n    return x'
    ).body[0]
    assert code_lines(function) == 5


def test_a_function_fits_a_screen():
    too_long = [
        f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {node.name}: {code_lines(node)} lines"
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) > 60
    ]
    assert too_long == []


# What is committed


HOME_PATH = re.compile(r"(?<![\w.~}-])/(work|root|home|Users)/")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("File " + "/".join(["", "home", "jane", "x.py"]), True),
        ('"' + "/".join(["", "work", "main"]) + '"', True),
        ("../home/main, ~/home/main, $HOME/work, https://example.org/home/page, a/root/b", False),
    ],
)
def test_home_path_tells_machine_paths_from_others(text, found):
    assert bool(HOME_PATH.search(text)) == found


def test_no_committed_file_names_a_path_of_one_machine():
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if listing.returncode or not listing.stdout:
        pytest.skip("git tracks no file here")
    faults = []
    for name in filter(None, listing.stdout.split("\0")):
        try:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, OSError):  # a picture; a file just deleted
            continue
        faults += [
            f"{name}:{number}" for number, line in enumerate(lines, 1) if HOME_PATH.search(line)
        ]
    assert faults == []
