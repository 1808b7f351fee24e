"""The rating page in a real browser: two raters at once, one who comes back, a server killed and started again."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_human import write_study

import clvq_app
import clvq_core as clvq

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.book, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")]
WAIT = 120_000  # milliseconds; a kernel starts in a few seconds where nothing else runs


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def served(folder, port, *options):
    """`clvq annotate`, as a command; killed at the end with all its processes, without a word."""
    command = [sys.executable, str(Path(clvq_app.__file__)), "annotate", str(folder), "--port", str(port), *options]
    with open(folder / f"server-{time.time():.0f}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
                    break
                assert process.poll() is None, (folder / log.name).read_text()
                time.sleep(0.1)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser, address):
    """A page of a browser of its own, and all that it receives."""
    page = browser.new_context().new_page()
    page.set_default_timeout(WAIT)
    received = []

    def keep(response):
        with contextlib.suppress(Exception):
            received.append(response.text())

    page.on("response", keep)
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: received.append(str(frame))))
    page.goto(address, timeout=WAIT)
    return page, received


def begin(page):
    page.get_by_label("I am taking part", exact=False).check()
    page.get_by_role("button", name="Begin").click()
    page.get_by_text("Practice").wait_for()
    rate(page, "food", 10)


def rate(page, label, confidence, by_keyboard=False):
    """Answer what is shown, wait until it is kept, go on."""
    for name in (label, str(confidence)):
        button = page.get_by_role("button", name=name, exact=True)
        if by_keyboard:
            button.focus()
            page.keyboard.press("Enter")
        else:
            button.click()
    page.locator("button:has-text('Next'):not([disabled])").click()


def place(page):
    """Which item is shown, from 1."""
    return int(page.locator("p[role=status]").inner_text().split()[0])


def at(page, number, of=4):
    page.get_by_text(f"{number} of {of}", exact=True).wait_for()


def test_two_raters_at_once_one_closed_the_server_killed_and_every_answer_there(tmp_path, browser):
    study = write_study(tmp_path / "study", sentences=2)
    port = free_port()
    with served(study, port):
        (one, received), (two, _) = (opened(browser, f"http://localhost:{port}/") for _ in range(2))
        for page in (one, two):
            begin(page)
            at(page, 1)
        rate(one, "positive", 8)
        at(one, 2)
        rate(two, "negative", 3, by_keyboard=True)
        at(two, 2)
        rate(one, "negative", 2)
        at(one, 3)
        one.get_by_role("button", name="Back").click()
        at(one, 2)
        assert one.get_by_role("button", name="negative", exact=True).evaluate(
            "b => b.classList.contains('mod-active')"
        )
        address = one.url
        one.close()  # no goodbye

        told = "\n".join(received)
        for secret in ("CLVQ-VAE", "Ward clusters", "key.parquet", "study.json", "answers.sqlite", str(study)):
            assert secret not in told, secret
        assert "Word cloud: " in told  # what is looked through has the page's content

        one, _ = opened(browser, address)
        at(one, 3)  # the two that are answered are not asked again
        rate(one, "positive", 10)
        at(one, 4)
    kept = clvq.study_answers(study)
    assert len(kept) == 4 and kept["rater"].value_counts().to_dict() == {1: 3, 2: 1}

    with served(study, port):  # the one before was killed
        (one, _), (two, _) = (opened(browser, address) for address in (address, two.url))
        at(one, 4)
        at(two, 2)
        rate(one, "negative", 5)
        for _ in range(3):
            number = place(two)
            rate(two, "positive", number)
            if number < 4:
                at(two, number + 1)
        for page in (one, two):
            page.get_by_text("Thank you").wait_for()

    answers = clvq.study_answers(study)
    assert len(answers) == 8 and answers["rater"].value_counts().to_dict() == {1: 4, 2: 4}
    assert not answers.isna().any(axis=None) and answers["confidence"].between(1, 10).all()
    found = clvq.rater_agreement(answers, draws=50).set_index("method")
    assert (
        set(found.index) == {"CLVQ-VAE", "Ward clusters"}
        and (found["raters"] == 2).all()
        and found["aligned"].between(0, 1).all()
    )


def test_a_browser_that_comes_back_without_its_address_goes_on_as_the_same_rater(tmp_path, browser):
    study, port = write_study(tmp_path / "study", sentences=2), free_port()
    with served(study, port):
        page, _ = opened(browser, f"http://localhost:{port}/")
        begin(page)
        at(page, 1)
        rate(page, "positive", 8)
        at(page, 2)
        address = page.url
        page.goto(f"http://localhost:{port}/", timeout=WAIT)
        at(page, 2)
        page.wait_for_function("address => location.href === address", arg=address)
    assert clvq.study_answers(study)["rater"].tolist() == [1]


@contextlib.contextmanager
def welcomed(folder, browser, query=""):
    """A study and the page that greets who comes to its address with this query."""
    study, port = write_study(folder / "study", sentences=1), free_port()
    with served(study, port):
        page, _ = opened(browser, f"http://localhost:{port}/{query}")
        page.get_by_role("button", name="Begin").wait_for()
        yield study, page


def test_an_address_that_is_nobodys_shows_the_welcome_and_nothing_of_it_is_run_or_rendered(tmp_path, browser):
    with welcomed(tmp_path, browser, "?rater=%3Cimg%20src=x%20onerror=alert(1)%3E") as (study, page):
        assert not page.locator("img[src=x]").count()
        assert page.get_by_role("button", name="Begin").is_disabled()  # before consent
        assert "onerror=alert" not in page.locator("body").inner_html()
    assert clvq.study_answers(study).empty


SEND = """async ([code]) => {
    const {kernelId} = JSON.parse(document.getElementById("jupyter-config-data").textContent), received = [];
    const socket = new WebSocket(`ws://${location.host}/api/kernels/${kernelId}/channels`);
    await new Promise(resolve => socket.onopen = resolve);
    socket.onmessage = event => received.push(event.data);
    const about = {username: "", session: "a", version: "5.3", date: new Date().toISOString()};
    const send = (msg_type, content) => socket.send(JSON.stringify({
        channel: "shell", content, parent_header: {}, metadata: {}, buffers: [],
        header: {msg_id: msg_type, msg_type, ...about}}));
    const options = {silent: false, store_history: false, user_expressions: {}, allow_stdin: false,
        stop_on_error: true};
    send("execute_request", {code, ...options});
    send("kernel_info_request", {});
    for (let i = 0; i < 200 && !received.some(text => String(text).includes("kernel_info_reply")); i++)
        await new Promise(resolve => setTimeout(resolve, 100));
    await new Promise(resolve => setTimeout(resolve, 1000));
    return received.map(String);
}"""


def test_a_rater_cannot_run_code_nor_list_the_kernels_of_others(tmp_path, browser):
    with welcomed(tmp_path, browser) as (_, page):
        received = "\n".join(page.evaluate(SEND, [f"open({str(tmp_path / 'written')!r}, 'w')"]))
        assert (
            "kernel_info_reply" in received and "execute_reply" not in received and not (tmp_path / "written").exists()
        )
        for path in ("api/kernels", "api/sessions", "api/contents", "files/answers.sqlite", "voila/files/study.json"):
            status = page.evaluate("path => fetch(path).then(response => response.status)", f"/{path}")
            assert status >= 400, (path, status)


def test_visitors_beyond_the_limit_are_turned_away_kindly(tmp_path):
    study, port = write_study(tmp_path / "study", sentences=1), free_port()
    with served(study, port, "--most-visitors", "1"):
        address = f"http://localhost:{port}"
        first = urllib.request.urlopen(address, timeout=WAIT / 1000).read().decode()
        assert "jupyter-config-data" in first
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address, timeout=WAIT / 1000)
        assert refused.value.code == 503 and clvq_app.BUSY in refused.value.read().decode()
