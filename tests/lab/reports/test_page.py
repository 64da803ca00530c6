"""The report page: what it says, what it refuses, and how it behaves in a browser.

The browser is Debian's (packages chromium and chromium-driver); nothing is downloaded. Where it is missing its tests
are skipped, or fail if the environment has SPECTRIM_REQUIRE_BROWSER=1, as in .ci/run.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn

import pytest

from monitor_records import record, write_records
from report_results import entry, results
from spectrim.cli import main
from spectrim.lab.config import SharedConfig, TrainConfig
from spectrim.lab.errors import LabError
from spectrim.lab.experiments.comparison import compare
from spectrim.lab.experiments.settings import CompareConfig
from spectrim.lab.reports.page.figures import cost_figures, target_figure
from spectrim.lab.reports.page.html import MARK, Note, PagePart, Section, Table, render
from spectrim.lab.reports.page.loss_figure import loss_figure
from spectrim.lab.reports.study import report
from spectrim.lab.settings import toml
from worlds import PATIENCE

INJECTED = "<script>document.title='owned'<x>"
"""A folder's name that would run if it were not escaped (a slash cannot stand in one)."""


def stored(folder: Path, summary: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


class Reader(HTMLParser):
    """Collects the elements and the texts of a page, as a browser reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def test_a_band_spans_the_seeds_and_the_table_has_every_number() -> None:
    seeds = {str(seed): {"curve": {"tokens": [100, 200], "val_loss": [5.0 + seed, 4.0 + seed]}} for seed in (0, 1, 2)}
    figure = loss_figure(results({"adamw": entry([6.0, 5.0], seeds=seeds)}), over="tokens")
    band, mean, target = figure.drawing["data"]
    assert (list(band["x"]), list(band["y"])) == ([100, 200, 200, 100], [5.0, 4.0, 6.0, 7.0])
    assert (list(mean["x"]), list(mean["y"])) == ([100, 200], [6.0, 5.0])
    assert list(target["y"]) == [5.0, 5.0]
    assert figure.numbers.rows[1:] == [("100", "6.0000 (5.0000 to 7.0000)"), ("200", "5.0000 (4.0000 to 6.0000)")]
    assert "adamw ends at 5.0000." in figure.alt


def test_recipes_of_unequal_length_have_their_own_places_in_the_table() -> None:
    figure = loss_figure(results({"adamw": entry([5.0, 4.0]), "muon": entry([5.0, 4.5, None])}), over="tokens")
    header, *_, last = figure.numbers.rows
    assert header == ("evaluation", "adamw: tokens", "adamw: loss", "muon: tokens", "muon: loss")
    assert last == ("3", "", "", "300", "diverged")


def test_a_recipe_that_never_gets_there_has_no_bar_and_says_never() -> None:
    recipes = {"adamw": entry([5.0, 4.0], tokens_to_adamw=1.0), "muon": entry([5.0, None])}
    figure = target_figure(results(recipes))
    assert [(trace["x"][0], trace["text"][0]) for trace in figure.drawing["data"]] == [(1.0, "100%"), (0, "never")]
    assert figure.numbers.rows[2] == ["muon", "never"]


def test_every_bar_of_the_cost_of_a_step_has_its_value_and_room_for_it() -> None:
    for figure in cost_figures(results({"adamw": entry([5.0, 4.0]), "muon": entry([5.0, 3.9], step_ms=1234.0)})):
        ends = [trace["text"][0] for trace in figure.drawing["data"] if trace["text"][0]]
        assert len(ends) == 2
        assert figure.drawing["layout"]["margin"]["r"] >= 8 * max(map(len, ends))


def test_a_page_names_version_commit_and_day_of_its_runs(tmp_path: Path) -> None:
    where = {"spectrim": "9.9", "commit": "abc1234", "date": "2026-01-02", "torch": "2.13", "device": "cpu"}
    folder = stored(tmp_path / "dated", {**results({"adamw": entry([5.0, 4.0])}), "environment": where})
    report([folder], folder / "report.html")
    text = "".join(read((folder / "report.html").read_text(encoding="utf-8")).texts)
    assert "spectrim 9.9 (commit abc1234), 2026-01-02, torch 2.13, cpu." in text


def test_text_from_outside_stays_text() -> None:
    wild = "</script><img src=x onerror=alert(1)>\"'&"
    items = [Table(caption=wild, rows=[[wild], [wild]]), Note(lines=[f"`{wild}` {wild}"])]
    part = PagePart(title=wild, headline=wild, summary=[wild], swatches=(), sections=[Section(title=wild, items=items)])
    page = read(render([part]))
    assert not [tag for tag, attributes in page.elements if tag == "img" or "onerror" in attributes]
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert "".join(page.texts).count(wild) >= 8
    drawn = loss_figure(results({wild: entry([5.0, 4.0])}), over="tokens").drawing["data"][0]
    assert "<" not in drawn["name"], "plotly reads markup in every text"


def test_a_page_refers_to_nothing_outside_of_it() -> None:
    part = PagePart(title="x", headline="x", summary=(), swatches=())
    for tag, attributes in read(render([part])).elements:
        for key in ("src", "href", "action", "poster"):
            assert re.match(r"(#|data:)", attributes.get(key) or "#"), (tag, attributes)


def test_plotly_is_in_a_page_once_and_compressed() -> None:
    part = PagePart(title="x", headline="x", summary=(), swatches=())
    one, two = render([part]), render([part, part])
    assert len(one) < 2_050_000
    assert len(two) - len(one) < 10_000


def test_results_of_an_earlier_version_make_a_page(tmp_path: Path) -> None:
    folder = stored(tmp_path / "old", results({"adamw": entry([5.0, 4.0]), "muon": entry([5.0, None])}))
    assert main(["report", str(folder)]) == 0
    page = read((folder / "report.html").read_text(encoding="utf-8"))
    text = "".join(page.texts)
    assert "AdamW ends at 4.0000; no other recipe ended." in text
    assert "Plan of every parameter" not in text
    assert "spectrim compare --config config.toml --name old-again" in text


def test_a_page_warns_of_uneven_times_and_tells_a_budget(tmp_path: Path) -> None:
    recipes = {"adamw": entry([5.0, 4.0]), "muon": entry([5.0, 3.9], unevenness=1.6)}
    budget = {"seconds": 12.0, "steps": {"adamw": 40, "muon": 30}}
    folder = stored(tmp_path / "timed", {**results(recipes), "budget": budget})
    report([folder], folder / "report.html")
    text = "".join(read((folder / "report.html").read_text(encoding="utf-8")).texts)
    assert "Times of muon are uneven: all steps took 1.6 times what the median step would give." in text
    assert "Every recipe had 12.0 s, by its speed when timed before: steps adamw 40, muon 30." in text


def test_several_studies_share_a_page_and_a_page_is_rebuilt(tmp_path: Path) -> None:
    folders = [stored(tmp_path / name, results({"adamw": entry([5.0, 4.0])})) for name in ("one", "two")]
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes in read(page).elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "every id stands once"
    assert page.count("<article") == 2
    report(folders[:1], tmp_path / "both.html")
    assert (tmp_path / "both.html").read_text(encoding="utf-8").count("<article") == 1


def test_what_is_no_study_or_no_page_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stored(tmp_path / "one", results({"adamw": entry([5.0, 4.0])}))
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    assert main(["report", str(folder), "--out", str(mine)]) == 2
    assert "mine.html' exists and is no page of spectrim's" in capsys.readouterr().err
    assert mine.read_text() == "<p>mine</p>"
    assert main(["report", str(folder), str(folder)]) == 2
    assert "--out is missing" in capsys.readouterr().err
    with pytest.raises(LabError, match="holds nothing of the kind"):
        report([tmp_path], tmp_path / "new.html")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(LabError, match="holds a single run"):
        report([tmp_path / "run"], tmp_path / "new.html")
    for text, message in (("{", "not JSON"), ("[]", "is not what"), ('{"recipes": {"a": {}}}', "is not what")):
        (folder / "results.json").write_text(text)
        with pytest.raises(LabError, match=message):
            report([folder], tmp_path / "new.html")
    (folder / "results.json").write_text(json.dumps({**results({"adamw": {}}), "environment": {}}))
    with pytest.raises(LabError, match="KeyError"):
        report([folder], tmp_path / "new.html")
    assert not (tmp_path / "new.html").exists()


NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", f"model.layers.1.{INJECTED}.weight"]


def monitored(step: int, recipe: int) -> dict[str, Any]:
    """A record of one of two recipes, exact at every 20th step."""
    made = record(step, [*NAMES, "lm_head.weight"], exact=NAMES if step % 20 == 0 else None, seed=recipe, clips=True)
    if "spectra" in made:
        made["spectra"]["lm_head.weight"] = {"weight": [1.0, 0.5]}
    return made


def spectrum_of(step: int, kind: str) -> list[float]:
    """Of the matrix that is shown at first, of the first recipe."""
    found: list[float] = monitored(step, 0)["spectra"][NAMES[1]][kind]
    return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs that were measured, after steps 10 to 40."""
    recipes = {"adamw": entry([5.0, 4.0]), "muon": entry([5.0, 3.9])}
    folder = stored(tmp_path_factory.mktemp("measured") / "runs", results(recipes))
    for index, recipe in enumerate(recipes):
        (folder / recipe / "seed-0").mkdir(parents=True)
        file = folder / recipe / "seed-0" / "monitor.jsonl"
        write_records(file, [monitored(step, index) for step in (10, 20, 30, 40)])
    report([folder], folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory, text_folder: Path, cache_dir: Path) -> Path:
    """A comparison with two seeds, in a folder with a wild name."""
    shared = {"steps": 4, "evaluation": {"times": 4, "batches": 1}, "model": {"preset": "tiny"}}
    data = {"sources": [str(text_folder)], "vocabulary_size": 300, "batch_size": 2, "sequence_length": 16}
    config = CompareConfig.parse({**shared, "data": data, "recipes": ["adamw", "muon"], "seeds": [0, 1]}, source="test")
    out = tmp_path_factory.mktemp("runs") / INJECTED
    compare(config, out, cache_dir=cache_dir)
    return out


def test_a_comparison_writes_its_page_with_configuration_and_plan(comparison: Path, text_folder: Path) -> None:
    text = "".join(read((comparison / "report.html").read_text(encoding="utf-8")).texts)
    assert f"Comparison {INJECTED}" in text
    assert (comparison / "config.toml").read_text().replace(str(text_folder), text_folder.name) in text
    # The plan is that of the model that was trained.
    assert "model.layers.0.self_attn.q_proj.weight" in text
    parameters = json.loads((comparison / "muon" / "seed-0" / "result.json").read_text())["parameters"]
    assert f"{parameters:,} parameters" in text
    before = (comparison / "report.html").read_bytes()
    report([comparison], comparison / "report.html")
    assert (comparison / "report.html").read_bytes() == before


def test_a_sweep_writes_its_page(small_config: TrainConfig, tmp_path: Path, cache_dir: Path) -> None:
    settings = {
        key: value for key, value in small_config.model_dump(mode="json").items() if key in SharedConfig.model_fields
    }
    (tmp_path / "shared.toml").write_text(toml(settings))
    flags = ["--config", str(tmp_path / "shared.toml"), "--runs-dir", str(tmp_path), "--cache-dir", str(cache_dir)]
    assert main(["sweep", "adamw", "--trials", "2", "--name", "tuned", *flags]) == 0
    text = "".join(read((tmp_path / "tuned" / "report.html").read_text(encoding="utf-8")).texts)
    best = json.loads((tmp_path / "tuned" / "results.json").read_text())["recipes"]["adamw"]["best"]
    assert f"adamw ends lowest, at {best['final_loss']:.4f} with learning rate" in text
    assert "model.layers.0.self_attn.q_proj.weight" in text
    assert "spectrim sweep --config config.toml --name tuned-again" in text


def test_every_figure_has_words_and_numbers_and_every_switch_a_name(comparison: Path) -> None:
    page = (comparison / "report.html").read_text(encoding="utf-8")
    elements = read(page).elements
    figures = [attributes for _, attributes in elements if attributes.get("class") == "plot"]
    # Loss twice, tokens, time, memory; of the monitor singular values, five summaries, one matrix.
    assert len(figures) == 5 + 7
    assert all(figure["role"] == "img" and len(figure["aria-label"] or "") > 40 for figure in figures)
    body = page.partition("<body>")[2].partition('<script type="application/gzip"')[0]
    # Each stands in a label, and below each figure is its table.
    switches, named = r"<input|<select", r"<label><input|<label[^>]*><span>[^<]+</span> <(?:input|select)"
    assert len(re.findall(switches, body)) == len(re.findall(named, body)) == 2 + 3 * 2 + 3 + 2
    assert body.count("<summary>The numbers</summary>") == len(figures)


def test_the_template_is_in_the_package_and_marks_its_pages() -> None:
    page = render([PagePart(title="x", headline="x", summary=(), swatches=())])
    assert MARK in page[:4096]
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def no_browser(reason: str) -> NoReturn:
    if os.environ.get("SPECTRIM_REQUIRE_BROWSER") == "1":
        pytest.fail(f"no browser: {reason}")
    pytest.skip(f"no browser: {reason}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium that records what the console says and which requests a page makes."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        no_browser("chromium and chromedriver are not installed")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    if version.returncode:
        no_browser(f"{program} does not start: {version.stderr}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Without a path selenium would look for a driver on the network.
    os.environ["SE_OFFLINE"] = "true"
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    started.set_page_load_timeout(PATIENCE)
    started.set_script_timeout(PATIENCE)
    yield started
    started.quit()


@pytest.fixture
def opened(browser: Any, comparison: Path) -> Any:
    """The page of the comparison, drawn."""
    return open_page(browser, comparison / "report.html")


def open_page(browser: Any, page: Path) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(page.as_uri())
    drawn = "return [...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.trace, .point'))"
    WebDriverWait(browser, PATIENCE).until(lambda page: page.execute_script(drawn))
    return browser


def requests(browser: Any) -> list[str]:
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    return [it["params"]["request"]["url"] for it in messages if it["method"] == "Network.requestWillBeSent"]


def press(browser: Any, selector: str) -> None:
    """Press a switch with the keyboard."""
    from selenium.webdriver.common.by import By

    browser.find_element(By.CSS_SELECTOR, selector).send_keys(" ")


def wait_for(browser: Any, script: str, expected: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, PATIENCE).until(lambda page: page.execute_script(f"return {script}") == expected)


LINES = "document.querySelectorAll('.plot')[0].querySelectorAll('.scatterlayer .trace path.js-line').length"


def test_in_a_browser_the_page_is_silent_alone_and_shows_curves(opened: Any) -> None:
    assert [line for line in opened.get_log("browser") if line["level"] != "INFO"] == []
    assert {address.partition(":")[0] for address in requests(opened)} <= {"file", "data", "blob"}
    points = "return document.querySelectorAll('.plot')[0].querySelector('path.js-line').getAttribute('d').length"
    assert opened.execute_script(points) > 20
    assert opened.title == f"Comparison {INJECTED}", "the script in its name has not run"
    assert opened.execute_script("return document.scripts.length") == 3
    assert INJECTED in opened.execute_script("return document.querySelector('h1').textContent")


def test_in_a_browser_no_request_would_be_let_through(opened: Any) -> None:
    refused = "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('sent'), () => done('refused'))"
    assert opened.execute_async_script(refused) == "refused"
    requested = "document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.1:9/x.png\">')"
    opened.execute_script(requested)
    inline = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    opened.execute_script(inline)
    assert opened.execute_script("return window.ran ?? null") is None
    said = " ".join(line["message"] for line in opened.get_log("browser"))
    assert said.count("Content Security Policy") >= 3


def test_in_a_browser_switches_hide_recipes_and_change_axes(opened: Any) -> None:
    whole = opened.execute_script(f"return {LINES}")
    press(opened, "input[data-recipe='1']")
    wait_for(opened, f"{LINES} < {whole}", True)
    bars = "[...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('.bars').length)"
    assert 1 in opened.execute_script(f"return {bars}")
    press(opened, "input[data-recipe='1']")
    wait_for(opened, LINES, whole)
    plot = "document.querySelectorAll('.plot')[0]._fullLayout"
    close = opened.execute_script(f"return {plot}.yaxis.range")
    press(opened, "input[data-scale='y']")
    wait_for(opened, f"{plot}.yaxis.type", "log")
    assert opened.execute_script(f"return 10 ** {plot}.yaxis.range[1]") == pytest.approx(close[1])
    press(opened, "input[data-scale='x']")
    wait_for(opened, f"{plot}.xaxis.type", "log")
    # Evaluations at 32 to 128 tokens.
    ticks = "[...document.querySelector('.plot').querySelectorAll('.xtick')].map(tick => tick.textContent)"
    wait_for(opened, f"{ticks}.filter(Boolean)", ["50", "100"])


FIGURE = "[...document.querySelectorAll('figure')].find(it => it.querySelector('input[type=range]'))"
ORDINATES = f"{FIGURE}.querySelector('.plot').data[0].y"


@pytest.fixture
def measured_page(browser: Any, measured: Path) -> Any:
    """The page of runs with a monitor, drawn."""
    return open_page(browser, measured / "report.html")


def test_in_a_browser_slider_and_menus_change_curves_and_numbers(measured_page: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    figure = measured_page.execute_script(f"return {FIGURE}")
    slider = figure.find_element(By.CSS_SELECTOR, "input[type=range]")
    last = spectrum_of(40, "update")
    assert measured_page.execute_script(f"return {ORDINATES}[0]") == pytest.approx(last[0], rel=1e-3)
    slider.send_keys(Keys.ARROW_LEFT)
    earlier = spectrum_of(20, "update")
    wait_for(measured_page, f"Math.abs({ORDINATES}[0] / {earlier[0]} - 1) < 1e-3", True)
    assert slider.get_attribute("aria-valuetext") == "step 20"
    row = "querySelector('tbody tr').textContent.trim()"
    assert measured_page.execute_script(f"return {FIGURE}.{row}").startswith(f"1{float(f'{earlier[0]:.3g}')}")
    matrix, kind = figure.find_elements(By.CSS_SELECTOR, "select")
    kind.send_keys("wei")
    weights = spectrum_of(20, "weight")
    wait_for(measured_page, f"Math.abs({ORDINATES}[0] / {weights[0]} - 1) < 1e-3", True)
    said = f"{FIGURE}.querySelector('.chosen').textContent"
    assert measured_page.execute_script(f"return {said}") == "layer 1 · mlp.up_proj, weight, step 20"
    matrix.send_keys("layer 0 · mlp")
    wait_for(measured_page, f"{said}.startsWith('layer 0 · mlp')", True)
    title = f"{FIGURE}.querySelector('.ytitle').textContent"
    wait_for(measured_page, title, "singular values of the weights")
    shown = f"{FIGURE}.querySelectorAll('.scatterlayer .trace').length"
    before = measured_page.execute_script(f"return {shown}")
    press(measured_page, "input[data-recipe='1']")
    wait_for(measured_page, f"{shown} < {before}", True)
    assert [line for line in measured_page.get_log("browser") if line["level"] != "INFO"] == []


def test_in_a_browser_names_of_matrices_stay_text_and_what_is_missing_says_so(measured_page: Any) -> None:
    from selenium.webdriver.common.by import By

    assert INJECTED in measured_page.execute_script(f"return {FIGURE}.querySelector('select').textContent")
    figure = measured_page.execute_script(f"return {FIGURE}")
    figure.find_elements(By.CSS_SELECTOR, "select")[0].send_keys("lm_head")
    wait_for(measured_page, f"{FIGURE}.querySelector('.chosen').textContent.endsWith(': not measured')", True)
    assert measured_page.execute_script("return document.scripts.length") == 3
    assert not measured_page.title.startswith("owned")


def test_in_a_browser_paper_has_the_last_stage_and_the_screen_its_own_again(measured_page: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    slider = measured_page.execute_script(f"return {FIGURE}").find_element(By.CSS_SELECTOR, "input[type=range]")
    slider.send_keys(Keys.HOME)
    said = f"{FIGURE}.querySelector('.chosen').textContent"
    wait_for(measured_page, f"{said}.endsWith('step 20')", True)
    on_paper = f"window.addEventListener('beforeprint', () => {{ window.said = {said} }})"
    measured_page.execute_script(on_paper)
    measured_page.execute_cdp_cmd("Page.printToPDF", {})
    assert measured_page.execute_script("return window.said").endswith("step 40")
    wait_for(measured_page, f"{said}.endsWith('step 20')", True)


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_is_wider_than_the_screen(opened: Any, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        opened.execute_script("document.querySelectorAll('details').forEach(details => { details.open = true })")
        wait_for(opened, f"document.documentElement.scrollWidth <= {width} && innerWidth == {width}", True)
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_in_a_browser_the_page_follows_light_and_dark(opened: Any) -> None:
    text = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    colours = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        ground = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        colours[scheme] = (ground, opened.execute_script(f"return {text}"))
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours["light"][0] == "rgb(255, 255, 255)"
    assert colours["light"][0] != colours["dark"][0]
    assert colours["light"][1] != colours["dark"][1]
