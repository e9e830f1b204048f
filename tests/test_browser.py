"""What a real browser does: JupyterLab's Run All with a slider that redraws its picture; the report
page.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from semidetr_lite.data import digits
from semidetr_lite.report import write_report

pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("no chromium with its chromedriver on the PATH", allow_module_level=True)

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
# it would ask the network
NO_NEWS = "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"


def wait(ready, seconds: float, what: str):
    """The first true answer of `ready`, asked again and again."""
    end = time.monotonic() + seconds
    while not (answer := ready()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)
    return answer


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on a copy of notebook 01; it writes nothing outside tmp_path."""
    folder, log = tmp_path / "notebooks", tmp_path / "server.log"
    folder.mkdir()
    shutil.copy(NOTEBOOKS / "01_data.ipynb", folder)
    (tmp_path / NO_NEWS).parent.mkdir(parents=True)
    (tmp_path / NO_NEWS).write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False}), encoding="utf-8"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = (
        "JUPYTER_CONFIG",
        "JUPYTER_DATA",
        "JUPYTER_RUNTIME",
        "JUPYTERLAB_SETTINGS",
        "JUPYTERLAB_WORKSPACES",
    )
    homes = {f"{name}_DIR": str(tmp_path / name.split("_")[1].lower()) for name in names}
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--expose-app-in-browser",
    ]
    command += [
        f"--notebook-dir={folder}",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
    ]
    command += ["--IdentityProvider.token="]
    environment = (
        os.environ | homes | {"IPYTHONDIR": str(tmp_path / "ipython"), "OMP_NUM_THREADS": "1"}
    )
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def answers():
        assert server.poll() is None, log.read_text(encoding="utf-8")[-2000:]
        try:
            return urlopen(f"http://127.0.0.1:{port}/api/status").status == 200
        except URLError:
            return False

    try:
        wait(answers, 40, "JupyterLab's start")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()  # then the kernels see that they are alone, and end


@pytest.fixture
def browser(tmp_path):
    options = ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    driver = Chrome(options=options, service=ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_a_slider_redraws_its_picture_after_run_all(lab, browser):
    def lab_says(script):
        return browser.execute_script(
            f"const app = window.jupyterapp, page = app?.shell?.currentWidget; {script}"
        )

    def pictures():
        return browser.find_elements("css selector", ".jp-OutputArea .widget-html img")

    browser.get(f"{lab}/doc/tree/01_data.ipynb")
    idle = "return page?.sessionContext?.session?.kernel?.status === 'idle'"
    wait(lambda: lab_says(idle), 30, "a kernel for the notebook")
    assert not pictures()  # the saved page has the first picture, but no widget

    lab_says("app.commands.execute('notebook:run-all-cells').then(() => window.allRan = true)")
    wait(lambda: lab_says("return window.allRan"), 60, "Run All")
    cells = [
        cell
        for cell in lab_says("return page.content.model.toJSON().cells")
        if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [
        output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"
    ]

    [picture] = wait(pictures, 10, "the explorer's picture")
    before = picture.get_attribute("src")
    assert before.startswith("data:image/png;base64,") and picture.get_attribute("alt")
    handle = browser.find_element("css selector", ".jp-OutputArea .widget-slider .noUi-handle")
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", handle
    )
    handle.send_keys(Keys.ARROW_RIGHT)
    # in one script: a picture may be replaced between being found and being asked
    sources = "return [...document.querySelectorAll('.jp-OutputArea .widget-html img')].map(one => one.src)"
    wait(
        lambda: [one for one in browser.execute_script(sources) if one != before],
        10,
        "another picture",
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report on a run of Semi-DETR with the shipped weights, two recorded steps and nine dropped
    boxes.
    """
    run = tmp_path_factory.mktemp("page") / "semi-detr"
    run.mkdir()
    config = {"method": "semi-detr", "detector": "dino", "data": "digits", "percent": 10, "fold": 1}
    config |= {"seed": 0, "steps": 200, "categories": digits.CATEGORIES}
    (run / "config.json").write_text(json.dumps(config))
    shutil.copy(NOTEBOOKS / "checkpoints" / "semi_detr.safetensors", run / "teacher.safetensors")
    figures = {
        part: {"AP": ap, "AP50": ap + 0.1} for part, ap in (("teacher", 0.5), ("student", 0.4))
    }
    lines = [
        {"step": step, "seconds": 1.0 * step, "AP_teacher": 0.4, "AP_student": 0.3}
        for step in (100, 200)
    ]
    lines[-1] |= {"test": figures, "losses": {"class": 1.0}, "pseudo_per_image": 1.0}
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    boxes = [[5.0 * place, 5, 5.0 * place + 20, 30] for place in range(10)]
    line = {"image_id": 0, "boxes": boxes, "scores": [0.9] + [0.1] * 9, "labels": [3] * 10}
    line |= {"cost": [None] * 10, "kept": [True] + [False] * 9, "mined": [False] * 10}
    watched = [json.dumps({"step": step, **line}) for step in (100, 200)]
    (run / "pseudo_boxes.jsonl").write_text("\n".join(watched) + "\n")
    return write_report([run], run.parent / "out", images=3)


def seen(browser, selector: str) -> int:
    """How many of the elements take room on the page."""
    script = "return [...document.querySelectorAll(arguments[0])].filter(one => one.getClientRects().length).length"
    return browser.execute_script(script, selector)


@pytest.mark.parametrize("scripts", [True, False])
def test_the_page_shows_more_when_asked_with_and_without_scripts(page, browser, scripts):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get(page.as_uri())
    assert seen(browser, "g.dropped.more") == 0 and seen(browser, ".timeline g.dropped") == 2
    browser.find_element("css selector", "label[for=dropped-1]").click()
    assert seen(browser, "g.dropped.more") == 2
    assert seen(browser, "tr.student") == 0 and seen(browser, "tr") == 2
    browser.find_element("css selector", "label[for=students]").click()
    assert seen(browser, "tr.student") == 1
    assert seen(browser, ".timeline figure") == 2
    sliders = browser.find_elements("css selector", "input[type=range]")
    assert len(sliders) == scripts
    if scripts:
        sliders[0].send_keys(Keys.ARROW_RIGHT)
        assert seen(browser, ".timeline figure") == 1
        assert browser.find_element("css selector", ".slider output").text == "step 100"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_its_window(page, browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    script = "return [...document.querySelectorAll(arguments[0])].map(one => one.getBoundingClientRect().toJSON())"
    rows = browser.execute_script(script, ".card")
    pictures = browser.execute_script(script, ".card svg.picture")
    assert len(pictures) == 6 and all(
        box["width"] >= 140 and box["height"] >= 100 for box in pictures
    )
    right = max(box["right"] for box in rows)
    shown = browser.execute_script("return document.documentElement.clientWidth")  # no scroll bar
    assert shown - right < 0.05 * width  # the cards use the whole width
    if width == 1280:
        assert pictures[0]["bottom"] < 900  # the first row is on the first screen
    drawn = browser.execute_script(
        "return getComputedStyle(document.querySelector('.hit path:last-child')).stroke"
    )
    assert drawn == "rgb(86, 180, 233)"
