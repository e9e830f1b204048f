"""Settings: one tree is preset, options and config.json; faults are one line; help is quick."""

import dataclasses
import inspect
import json
import subprocess
import sys
from typing import get_args

import pytest
import torch

from semidetr_lite import cli
from semidetr_lite.errors import UserError
from semidetr_lite.training import loop, settings
from semidetr_lite.training.ablate import TABLES
from semidetr_lite.training.loop import Run
from semidetr_lite.training.presets import DETECTORS, METHODS, make_detector
from semidetr_lite.training.settings import (
    PRESETS,
    DetectorKwargs,
    Role,
    Settings,
    change,
    config_json,
    differences,
    fields_with,
    new_config,
    option_name,
    read_settings,
)
from tests.test_train import small, splits  # noqa: F401  (a fixture)


class Called(Exception):
    """What a command was called with, instead of running it."""


def given(*words: str) -> dict:
    """The arguments of a command that a command line leads to."""

    def catching(command):
        def stop(*_, **arguments):
            raise Called(arguments)

        stop.__signature__ = inspect.signature(command)
        stop.__annotations__ = command.__annotations__
        stop.__doc__ = command.__doc__
        return stop

    commands = {name: catching(command) for name, command in cli.COMMANDS.items()}
    with pytest.raises(Called) as called:
        cli.run_command([str(word) for word in words], commands)
    return called.value.args[0]


def leaves(part=Settings, above=()) -> list[tuple[str, ...]]:
    """The paths of all fields."""
    paths = []
    for one in dataclasses.fields(part):
        path = (*above, one.name)
        paths += leaves(one.type, path) if dataclasses.is_dataclass(one.type) else [path]
    return paths


# ---- one list ------------------------------------------------------------------------------------


def test_the_names_of_the_options_are_those_that_there_are():
    assert set(get_args(settings.MethodName)) == set(METHODS)
    assert set(get_args(settings.DetectorName)) == set(DETECTORS)
    assert set(get_args(settings.PresetName)) == set(PRESETS)


def test_every_argument_of_a_detector_is_one_of_some_detector():
    known = {
        key
        for detector in DETECTORS.values()
        for parent in detector.__mro__
        for key in inspect.signature(parent.__init__).parameters
    }
    assert {one.name for one in dataclasses.fields(DetectorKwargs)} <= known


def test_every_field_is_an_option_and_its_help_says_what_it_is(capsys):
    with pytest.raises(SystemExit):
        cli.run_command(["train", "--help"], cli.COMMANDS)
    lines = capsys.readouterr().out.splitlines()
    for path in leaves():
        option = option_name(path)
        rows = [n for n, line in enumerate(lines) if option in line.replace(",", " ").split()]
        assert rows, f"{option} is not in the help"
        text = " ".join(lines[rows[0] : rows[0] + 3])
        assert "(default" in text.split(option, 1)[1], option
    names = [option_name(path) for path in leaves()]
    assert len(set(names)) == len(names)
    first = lines[: next(n for n, line in enumerate(lines) if "data-files options" in line)]
    assert sum(line.startswith("│ --") for line in first) <= 15, "too many options for a beginner"


def test_a_preset_gives_the_defaults_of_the_help(capsys):
    for preset, steps in (("digits", "1000"), ("coco-10pct", "120000")):
        with pytest.raises(SystemExit):
            cli.run_command(["train", "--preset", preset, "--help"], cli.COMMANDS)
        assert f"(default: {steps})" in capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_without_options_a_command_line_is_its_preset(preset):
    made = given("train", "--preset", preset, "--out", "x")["settings"]
    assert type(made) is Settings and made == PRESETS[preset]
    ablation = given("ablate", "--preset", preset)["settings"]
    assert differences(ablation, PRESETS[preset]).keys() == set()


def test_options_reach_their_fields():
    words = ["--learning-rate", "3e-4", "--batch-size", "4", "--unlabelled-batch-size", "6"]
    words += ["--queries", "77", "--backbone", "resnet18", "--dim", "32", "--zoom", "0.5", "2"]
    words += ["--lr-drops", "0.5", "0.75", "--l1-weight", "7", "--no-flip", "--ema-decay", "0.9"]
    words += ["--soft-teacher.score-threshold", "0.7", "--score-threshold", "0.3", "--seed", "5"]
    made = given("train", "--out", "x", *words)["settings"]
    expected = new_config(
        learning_rate=3e-4, batch_size=4, unlabelled_batch_size=6, num_queries=77, dim=32,
        backbone="resnet18", zoom=(0.5, 2.0), lr_drops=(0.5, 0.75), l1_weight=7.0, flip=False,
        ema_decay=0.9, score_threshold=0.3, seed=5,
        soft_teacher=dataclasses.replace(PRESETS["digits"].soft_teacher, score_threshold=0.7),
    )  # fmt: skip
    assert differences(made, expected) == {}


def test_the_detector_decides_which_arguments_it_gets():
    made = given("train", "--out", "x", "--detector", "fcos", "--method", "supervised")["settings"]
    assert made.detector_kwargs == settings.TINY_DETECTORS["fcos"]
    with pytest.raises(UserError, match="fcos has no num_queries: leave out --queries"):
        make_detector("fcos", 3, dataclasses.replace(made.detector_kwargs, num_queries=3))


def test_an_image_size_is_that_of_training_and_detection():
    config = new_config("coco-10pct", image_size=600)
    assert (config.views.short_sides, config.views.long_side) == ((600,), 1000)
    assert config.detector_kwargs.test_size == (600, 1000)
    assert new_config("coco-10pct").views.short_sides == tuple(range(480, 801, 32))


def test_queries_and_image_size_reach_the_detector(splits, tmp_path):
    config = small("supervised", num_queries=7, image_size=48)
    run = Run(config, tmp_path / "run", splits=splits, workers=0, quiet=True)
    student = run.method.student
    assert student.num_queries == 7 and student.test_size == (48, 80)
    images = next(iter(run._loader()))["labelled"][0]
    assert all(min(image.shape[-2:]) == 48 for image in images)
    outputs = student(images)
    assert outputs["pred_boxes"].shape == (2, 7, 4)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_is_read_as_it_was_written(preset):
    config = change(new_config(preset), categories=[{"id": 3, "name": "box"}])
    assert read_settings(json.loads(config_json(config)), "config.json") == config


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("x",), 1, "x: there is no such setting"),
        (("optimizer", "lr"), 1, "optimizer.lr: there is no such setting"),
        (("optimizer",), [1], "optimizer: "),
        (
            ("optimizer", "batch_size"),
            0,
            "optimizer.batch_size: .*greater than or equal to 1, got 0",
        ),
        (("optimizer", "batch_size"), "2", 'optimizer.batch_size: .*valid integer, got "2"'),
        (("optimizer", "batch_size"), True, "optimizer.batch_size: .*valid integer, got true"),
        (("optimizer", "learning_rate"), float("nan"), "optimizer.learning_rate: .*finite"),
        (("views", "zoom"), [1, 2, 3], "views.zoom: "),
        (("views", "short_sides"), [0], "views.short_sides: "),
        (("detector_kwargs", "dim"), 1.5, "detector_kwargs.dim: "),
        (("detector_kwargs", "num_queries"), 10**6, "detector_kwargs.num_queries: "),
        (("percent",), 101, "percent: "),
        (("seed",), -1, "seed: "),
        (("semi_detr", "mining"), "mixture", "semi_detr.mining: "),
        (("steps",), None, "steps: "),
    ],
)
def test_an_entry_that_cannot_be_is_named_with_its_file(path, value, named):
    config = json.loads(config_json(new_config()))
    *above, key = path
    owner = config[above[0]] if above else config
    owner[key] = value
    with pytest.raises(UserError, match=rf"^run/config\.json: {named}") as caught:
        read_settings(config, "run/config.json")
    assert "\n" not in str(caught.value)


def test_an_option_that_cannot_be_is_named_as_it_is_typed(tmp_path):
    for words, fault in {
        ("--batch-size", "0"): "--batch-size: .*greater than or equal to 1, got 0",
        ("--queries", "-3"): "--queries: ",
        ("--ema-decay", "2"): "--ema-decay: .*less than or equal to 1, got 2.0",
        ("--soft-teacher.ratio", "0"): None,
        ("--soft-teacher.num-jitters", "0"): "--soft-teacher.num-jitters: ",
        ("--percent", "0"): "--percent: ",
    }.items():
        command = ["train", "--out", str(tmp_path / "run"), *words]
        if fault is None:
            with pytest.raises(SystemExit) as stop:
                cli.run_command(command, cli.COMMANDS)
            assert stop.value.code == 2
        else:
            with pytest.raises(UserError, match=f"^{fault}"):
                cli.run_command(command, cli.COMMANDS)


def test_settings_of_before_normalizer_groups_are_read_as_what_they_were():
    config = json.loads(config_json(new_config("coco-10pct")))
    assert config.pop("normalizers") == {
        "normalizer_groups": 8,
        "normalizer_bound": 8.0,
        "pseudo_normalizer": "pseudo_boxes",
    }
    for group, name in (("views", "released_shear"), ("optimizer", "sampling_lr_factor")):
        del config[group][name]
    read = read_settings(config, "config.json")
    assert read.normalizers == settings.NormalizerSettings(1, 1.0, "pseudo_boxes")
    assert not read.views.released_shear and read.optimizer.sampling_lr_factor == 1


# ---- roles ---------------------------------------------------------------------------------------


def test_roles_are_those_of_the_record_and_of_a_resume():
    names = {path[-1] for path in fields_with(Role.RUNTIME)}
    speed = {"accumulate", "precision", "checkpointing", "channels_last", "compile"}
    assert names == speed | {"pad_to_multiple_of", "skip_unreadable"}
    identity = {"method", "detector", "preset", "data", "percent", "fold", "seed", "steps"}
    assert set(settings.RUN_IDENTITY) == identity


def test_a_resume_starts_from_the_settings_of_the_run(splits, tmp_path, monkeypatch):
    """So that only what is typed and differs is refused: not what differs from the preset."""
    config = small("supervised", steps=2, learning_rate=5e-4, watch_every=3)
    Run(config, tmp_path / "run", splits=splits, workers=0, quiet=True).run()
    monkeypatch.setattr(loop.presets, "load_splits", lambda *_: splits)
    command = ["train", "--out", str(tmp_path / "run"), "--resume", "--workers", "0"]
    cli.run_command([*command, "--learning-rate", "5e-4", "--checkpointing"], cli.COMMANDS)
    digits_rate = str(PRESETS["digits"].optimizer.learning_rate)
    fault = f"--learning-rate {digits_rate} does not go with --resume: the run there has 0.0005"
    with pytest.raises(UserError, match=fault):
        cli.run_command([*command, "--learning-rate", digits_rate], cli.COMMANDS)


# ---- start-up ------------------------------------------------------------------------------------

SPY = """
import runpy, sys, time
sys.argv = ["semidetr", *sys.argv[1:]]
try:
    runpy.run_module("semidetr_lite", run_name="__main__")
except SystemExit as stop:
    status = stop.code
heavy = {"torch", "torchvision", "sklearn", "scipy", "matplotlib", "pycocotools"}
print("\\n" + repr((status, sorted(heavy & set(sys.modules)), time.process_time())))
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--preset", "coco-10pct", "--help"], 0),
        (["ablate", "--help"], 0),
        (["trian"], 2),
        (["train", "--out", "x", "--learning-rat", "1"], 2),
        (["train", "--out", "x", "--batch-size", "0"], 2),
        (["train", "--out", "x", "--method", "soft-teacher"], 2),
        (["evaluate", "nowhere"], 2),
        (["compare", "nowhere", "--out", "x"], 2),
        (["predict", "nowhere", "x.png", "--out", "x"], 2),
    ],
)
def test_help_and_mistakes_import_nothing_heavy(words, status):
    done = subprocess.run([sys.executable, "-c", SPY, *words], capture_output=True, text=True)
    found_status, heavy, seconds = eval(done.stdout.splitlines()[-1])
    assert (found_status, heavy) == (status, [])
    assert seconds < 3  # 0.4 to 0.8 on two cores


def test_an_ablation_names_its_tables(tmp_path):
    for table in TABLES:
        assert given("ablate", "--tables", table)["tables"] == (table,)
    with pytest.raises(UserError, match="no table called 'best': choose from main"):
        cli.run_command(["ablate", "--tables", "best", "--out", str(tmp_path)], cli.COMMANDS)


def test_a_config_says_where_it_comes_from():
    config = new_config()
    assert torch.__version__.split("+")[0] in config.machine and config.command
