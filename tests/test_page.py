"""The page in a real Chromium, by clicks and typing, against a real server.

Chromium is the one of the system (Debian: chromium). axe-core is a file that AXE_CORE names, or one that npm has
installed here, or installs for the test. ONEBASE_TEST_URL names a server that runs already; otherwise one is started on
adapters that are trained here.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from onebase.demo.run import REVIEWS
from onebase.serve.web import HEADERS, PAGE, page_files

TEXT = "The product is okay but the delivery was catastrophic."
VIEWS = ("try", "adapters", "table", "load", "train")


def test_page_names_only_its_own_files() -> None:
    files = page_files()
    for path, file in files.items():
        text = file.read_text(encoding="utf-8")
        foreign = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}  # a namespace, never fetched
        assert not foreign, (path, foreign)
        for name in re.findall(r'from "\./([\w.]+)"', text):
            assert (PAGE / name).is_file(), (path, name)
        for name in re.findall(r'(?:href|src)="(/page/[\w.]+)"', text):
            assert name in files, (path, name)
    assert "default-src 'none'" in HEADERS["Content-Security-Policy"]


def test_page_is_served_and_nothing_else() -> None:
    fastapi = pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    from onebase.serve.web import add_page

    app = fastapi.FastAPI()
    add_page(app)
    client = TestClient(app)
    for path, file in page_files().items():
        answer = client.get(path)
        assert (answer.status_code, answer.content) == (200, file.read_bytes())
        assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
    assert client.get("/page/../web.py").status_code == 404
    assert client.get("/page/%2e%2e/web.py").status_code == 404


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a server with two adapters on the embedded base, one of them in two versions."""
    if given := os.environ.get("ONEBASE_TEST_URL"):
        yield given.rstrip("/")
        return
    import onebase as ob
    from onebase.cli.main import COMMANDS
    from onebase.store import Store

    if "serve" not in COMMANDS:
        pytest.skip("the command serve is not there")
    home = tmp_path_factory.mktemp("home")
    store = Store(home)
    with ob.load_base("minilm") as base:
        for name, method in (("reviews", "bitfit"), ("reviews", "bitfit"), ("tone", "prompt(length=2)")):
            ob.train(
                base, REVIEWS / "validation.csv", method, name=name, store=store, epochs=1, batch_size=8, limit=24,
                text="text", label="label",
            )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "onebase", "serve", "--base", "minilm", "--port", str(port)],
        env={**os.environ, "ONEBASE_HOME": str(home)},
        stderr=subprocess.PIPE,
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, process.communicate()[1].decode()
                time.sleep(0.5)
        else:
            raise AssertionError("the server did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.fixture(params=["light", "dark", "phone"])
def page(request, browser, address):
    size = {"width": 390, "height": 800} if request.param == "phone" else {"width": 1280, "height": 860}
    scheme = "dark" if request.param == "dark" else "light"
    context = browser.new_context(viewport=size, color_scheme=scheme, base_url=address, accept_downloads=True)
    page, wrong = context.new_page(), []
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    context.close()
    assert not wrong


def shoot(page, folder: Path, name: str) -> None:
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    width = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert width <= 0, f"{name} is {width} pixels wider than the window"


def test_try_by_typing_and_keyboard(page, tmp_path) -> None:
    page.goto("/#/try")
    page.get_by_label("Text", exact=True).fill(TEXT)
    page.keyboard.press("Control+Enter")
    page.locator(".verdict").first.wait_for()
    boxes = page.get_by_role("checkbox")
    readers = [box.get_attribute("value") for box in boxes.all() if box.is_checked()]
    cards = page.locator("article.answer")
    assert cards.count() == len(readers)
    for card in cards.all():
        chances = [float(text.split()[0]) for text in card.locator(".bar .num").all_inner_texts()]
        if chances:
            assert abs(sum(chances) - 100) < 0.3
    assert "models=" in page.url and "catastrophic" in page.url
    shoot(page, tmp_path, "try")
    verdicts = page.locator(".verdict").all_inner_texts()
    page.reload()  # the address holds all of it
    page.locator(".verdict").first.wait_for()
    assert page.locator(".verdict").all_inner_texts() == verdicts
    for kind, word in (("Python", "ob.load_base"), ("Command line", "onebase predict"), ("curl", "/v1/classify")):
        page.get_by_role("button", name=kind, exact=True).click()
        assert word in page.locator(".code code").inner_text()


def test_table_of_a_file(page, tmp_path) -> None:
    file = tmp_path / "some.csv"
    with (REVIEWS / "test.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))[:20]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    page.goto("/#/table")
    page.locator("#file").set_input_files(file)
    page.get_by_role("button", name="Fill the table").click()
    save = page.get_by_role("button", name="Download CSV")
    save.wait_for()
    shoot(page, tmp_path, "table")
    with page.expect_download() as download:
        save.click()
    download.value.save_as(tmp_path / "answers.csv")
    with (tmp_path / "answers.csv").open(encoding="utf-8", newline="") as stream:
        answers = list(csv.DictReader(stream))
    assert [row["text"] for row in answers] == [row["text"] for row in rows]
    name = next(column.removesuffix(".label") for column in answers[0] if column.endswith(".label"))
    right = sum(row[f"{name}.label"] == row["label"] for row in answers) / len(answers)
    assert f"{100 * right:.1f} %" in page.locator(".tile", has_text=f"{name}, right").inner_text()
    marked = sum(row.get("disagree") == "yes" for row in answers)
    assert page.locator("tr.differs").count() == marked
    page.get_by_label("only disagreements").check()
    assert page.locator("tbody tr").count() == marked


def test_adapters_and_load(page, tmp_path) -> None:
    page.goto("/#/adapters")
    page.get_by_role("link", name=re.compile("@1")).first.wait_for()
    rows = page.locator("tbody tr").count()
    page.get_by_label("Filter").fill("no such adapter")
    assert page.locator("tbody tr").count() == 0 < rows
    assert "filter=no" in page.url
    page.get_by_label("Filter").fill("")
    shoot(page, tmp_path, "adapters")
    page.get_by_role("link", name="Load", exact=True).click()
    page.locator(".chart").nth(3).wait_for()
    shoot(page, tmp_path, "load")


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str:
    """The script of axe-core, which checks pages for people who cannot see, hear or point well."""
    inside = Path("node_modules/axe-core/axe.min.js")
    if "AXE_CORE" in os.environ:
        return Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8")
    if inside.is_file():
        return inside.read_text(encoding="utf-8")
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("axe")
    if npm is None:
        pytest.skip("axe-core is not there: install npm, or name axe.min.js in AXE_CORE")
    words = [npm, "install", "--no-save", "--no-audit", "--no-fund", "--prefix", str(folder), "axe-core"]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm does not answer")
    if done.returncode or not (folder / inside).is_file():
        pytest.skip(f"npm cannot install axe-core: {done.stderr.decode()[-300:]}")
    return (folder / inside).read_text(encoding="utf-8")


def test_axe_finds_nothing(page, axe) -> None:
    for view in VIEWS:
        page.goto(f"/?{view}#/{view}")
        page.locator("h1").wait_for()
        page.wait_for_timeout(700)
        page.evaluate(axe)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        wrong = [(one["id"], one["impact"], [node["html"][:200] for node in one["nodes"]]) for one in found]
        assert not wrong, (view, wrong)
