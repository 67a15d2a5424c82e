"""The report: everything in one file, nothing from elsewhere, every number in the JSON."""

from __future__ import annotations

import csv
import json
import re

import pytest
from typer.testing import CliRunner

from onebase.cli.main import app

pytest.importorskip("jinja2", reason="the extra 'report' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
CURVE = [{"epoch": 0, "accuracy": 0.7}, {"epoch": 1, "accuracy": 0.9}]
RESULT = {
    "method": "lora", "value": 0.91, "low": 0.88, "high": 0.94, "values": [0.91], "parameters": 1000, "share": 0.01,
    "bytes": 4000, "seconds": 3.0, "latency": 0.01, "throughput": 200.0, "slowdown": 1.2, "mergeable": True,
    "lr": 0.002, "curves": [CURVE], "total_bytes": 90, "memory": 5_000_000, "merged_latency": 0.009, "forgetting": 0.02,
    "forgetting_measure": "distance", "ece": 0.05, "calibration": [[0.9, 0.85, 40], [0.6, 0.5, 10]], "p_best": None,
    "p_full": 0.6, "fixed": 3, "broken": 1, "confusion": [[20, 5], [4, 21]],
    "examples": {"fixed": [{"text": "<b>fine</b>", "label": "good", "base": "bad", "method": "good"}], "broken": []},
}  # fmt: skip
FOUND = {
    "base": "b", "data": "<script>reviews</script>", "kind": "classification", "metric": "accuracy",
    "cut": ["no seed 2"], "labels": ["bad", "good"], "tasks": 20, "command": "onebase compare -d reviews.csv",
    "settings": {"seeds": 3, "epochs": 5}, "versions": {"torch": "2.x"}, "machine": {"cores": 2},
    "results": [RESULT, RESULT | {"method": "bitfit", "bytes": 100, "value": 0.87}],
    "advice": {"method": "lora", "runner_up": "bitfit", "reasons": ["It is better."],
               "excluded": {"prompt": "slow"},
               "front": ["lora", "bitfit"], "equal": ["lora"]},
}  # fmt: skip


def alone(page: str) -> bool:
    """Whether a page needs nothing from elsewhere."""
    found = re.search(r"https?:|//[a-z]|\bsrc=|@import|<link|<image|url\((?!#)", page)
    return not found and all(href.startswith("#") for href in re.findall(r'href="([^"]*)"', page))


def test_the_page_needs_nothing_else(tmp_path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(FOUND))
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert alone(page) and "<script" not in page and "<b>fine" not in page
    expected = ["It is better.", "no seed 2", "onebase compare -d reviews.csv", "20 tasks", "&lt;b&gt;fine", "2.x"]
    expected += ["Confusion of lora", "Calibration of lora", "Score against latency", "Score against memory"]
    for said in expected:
        assert said in page, said
    assert page.count("<svg") == 8 and "currentColor" in page and "prefers-color-scheme: dark" in page
    assert json.loads((tmp_path / "report.json").read_text()) == FOUND
    with (tmp_path / "report.csv").open() as stream:
        assert [(row["data"], row["method"]) for row in csv.DictReader(stream)][1] == (FOUND["data"], "bitfit")


def test_every_drawn_number_is_in_the_json(tmp_path) -> None:
    """What a figure draws is made of the JSON alone: another number there draws another figure."""
    from onebase.comparison.figures import figures_of

    drawn = figures_of(FOUND)
    for key, title in (("latency", "latency"), ("seconds", "training time"), ("memory", "memory in training")):
        other = FOUND | {"results": [FOUND["results"][0] | {key: 3 * FOUND["results"][0][key]}, FOUND["results"][1]]}
        changed = figures_of(json.loads(json.dumps(other)))
        assert changed[f"Score against {title}"] != drawn[f"Score against {title}"]
    assert ">20<" in drawn["Confusion of lora"] and "0.050" in drawn["Calibration of lora"]


def test_several_runs_share_a_page(tmp_path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.json").write_text(json.dumps(FOUND | {"data": f"data-{name}"}))
    places = [str(tmp_path / name) for name in ("one", "two")]
    done = CliRunner().invoke(app, ["report", *places, "--out", str(tmp_path / "both")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "both" / "report.html").read_text()
    assert alone(page) and "data-one" in page and "data-two" in page and page.count("<section>") == 2
    assert len(json.loads((tmp_path / "both" / "report.json").read_text())) == 2


def test_a_folder_without_comparison_is_named(tmp_path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "comparison.json" in done.stderr


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of a comparison, with texts that would be wide or would be markup."""
    from onebase.comparison.report import write_report

    wide = {"text": "a" * 200 + " <img src=x onerror=alert(1)>", "label": "good", "base": "bad", "method": "good"}
    examples = {"fixed": [wide], "broken": [wide]}
    return write_report(FOUND | {"results": [RESULT | {"examples": examples}, FOUND["results"][1]]},
                        tmp_path_factory.mktemp("report"))  # fmt: skip


@pytest.mark.parametrize("kind", ["light", "dark", "phone", "print"])
def test_it_reads_in_a_browser(browser, report, kind) -> None:
    size = {"width": {"phone": 390, "print": 720}.get(kind, 1280), "height": 860}  # 720: a sheet of A4 with margins
    context = browser.new_context(viewport=size, color_scheme="dark" if kind == "dark" else "light", offline=True)
    page, wrong, asked = context.new_page(), [], []
    page.on("console", lambda said: wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(report.as_uri())
        if kind == "print":
            page.emulate_media(media="print")
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert page.locator("figure svg").count() == 8
        for figure in page.locator("figure svg").all():
            box = figure.bounding_box()
            assert box is not None and 200 < box["width"] <= size["width"] and box["height"] > 100
        # text and paper differ enough to be read (WCAG 2.2, 1.4.3: 4.5 to 1), in figures too
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        for place, key in (("td, p, li", "color"), ("figure svg text:not([style*='fill'])", "fill")):
            inks = page.evaluate(
                "([place, key]) => [...document.querySelectorAll(place)].map(e => getComputedStyle(e)[key])",
                [place, key],
            )
            assert inks and all(contrast(ink, paper) >= 4.5 for ink in inks), (kind, place, inks)
        assert (luminance(paper) < 0.1) == (kind == "dark")
    finally:
        context.close()
    assert not wrong and asked == [report.as_uri()]


def luminance(colour: str) -> float:
    """Return the relative luminance of ``rgb(r, g, b)`` (WCAG 2.2)."""
    channels = [float(x) / 255 for x in re.findall(r"[\d.]+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_number_on_the_page_is_in_the_json(browser, report) -> None:
    """Numbers of the table and of the figures, as a reader sees them, are numbers of report.json in some unit."""
    found = json.loads(report.with_name("report.json").read_text())
    known = list(numbers(found))
    shown = {scale * value for value in known for scale in (1, 100, 1000, 1e-6)}
    context = browser.new_context(offline=True)
    page = context.new_page()
    try:
        page.goto(report.as_uri())
        cells = page.locator("table").first.locator("tr").all()[1:]
        for row in cells:
            for cell in row.locator("td").all_inner_texts()[1:]:
                for text in re.findall(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?", cell):
                    value, digits = float(text.replace(",", "")), len(text.partition(".")[2].partition("e")[0])
                    assert any(abs(value - one) <= 0.51 * 10**-digits for one in shown), (cell, text)
        for title in ("Confusion of lora", "Calibration of lora"):
            figure = page.locator("h2", has_text=title).locator("xpath=following-sibling::figure[1]")
            texts = " ".join(figure.locator("text").all_text_contents())
            wanted = {"Confusion of lora": ["20", "5", "4", "21"], "Calibration of lora": ["0.050"]}[title]
            assert all(text in texts.split() for text in wanted), (title, texts)
        # a point of a figure lies where its numbers say: the better method is higher, the larger one further right
        figure = page.locator("h2", has_text="Score against parameters").locator("xpath=following-sibling::figure[1]")
        names = {
            text: figure.locator("text", has_text=re.compile(f"^{text}$")).first.bounding_box()
            for text in ("lora", "bitfit")
        }
        assert names["lora"]["y"] < names["bitfit"]["y"]
    finally:
        context.close()


def numbers(value):
    """Yield every number of JSON values; lists give their lengths too."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        yield len(value)
        for inner in value:
            yield from numbers(inner)
