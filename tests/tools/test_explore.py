"""The page of `engram-hf explore` in a real browser: it is opened, typed into and clicked, and gives nothing away."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from extra import needs
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_hf.insight.explorer import Explorer
from engram_hf.insight.pictures import find_browser


needs("gradio", "playwright")

from playwright.sync_api import expect, sync_playwright  # noqa: E402


pytestmark = [
    pytest.mark.skipif(find_browser() is None, reason="needs Chromium or Chrome (on Debian: apt install chromium)"),
    # Of Gradio's own modules, and of its servers.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
# Where screenshots of the page go, for whoever builds it.
PICTURES = os.environ.get("ENGRAM_SCREENSHOTS")
HOSTILE = "<img src=x onerror=\"document.title='broken'\"> {{value}} ${document.title='broken'}"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def served(checkpoint):
    """The address of a page that the command has opened, its tables on disk."""
    port = free_port()
    code = "import sys; from engram_hf_command import app; app(sys.argv[1:])"
    options = ["explore", str(checkpoint), "--port", str(port), "--device-map", "cpu+disk"]
    command = [sys.executable, "-c", code, *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, server.stdout.read()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=find_browser(), args=options)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, served):
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.requests = []
    opened.on("request", lambda request: opened.requests.append(request.url))
    opened.goto(served)
    yield opened
    opened.close()


def look(page, text: str) -> None:
    page.fill("#text textarea", text)
    page.click("#look")
    expect(page.locator("#view .t").first).to_be_visible(timeout=60_000)


def test_a_visitor_pastes_a_text_clicks_a_token_and_sees_its_ngrams(page, served, checkpoint):
    text = "the end of the line"
    look(page, text)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    explorer = Explorer(model, tokenizer)
    trace = explorer.look(text).trace
    assert page.locator("#view .t").count() == len(trace.tokens)
    page.click('#view .t[data-token="4"]')
    details = page.locator("#details")
    expect(details).to_contain_text(trace.ngrams[3][4].strip(), timeout=60_000)
    for layer_id in trace.layer_ids:
        expect(details).to_contain_text(", ".join(f"{gate:.3f}" for gate in trace.gates[layer_id][4]))
        expect(details).to_contain_text(" ".join(map(str, trace.row_ids[layer_id][4])))
    for each in explorer.predictions(trace, 4):
        expect(details).to_contain_text(f"{each.with_memory:.1%}")
    assert all(url.startswith((served, served.replace("http", "ws"), "data:", "blob:")) for url in page.requests)


def test_two_continuations_stand_side_by_side(page, checkpoint):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    page.fill("#text textarea", "the end of")
    page.click("#off input")
    page.get_by_role("option", name="layer 2", exact=True).click()
    page.click("#go")
    whole, silent = Explorer(model, tokenizer).continuations("the end of", ["layer 2"])
    expect(page.locator("#with textarea")).to_have_value(whole, timeout=60_000)
    expect(page.locator("#without textarea")).to_have_value(silent)


def test_errors_are_sentences_and_no_path_of_the_server_is_shown(page, served, checkpoint):
    page.fill("#text textarea", " ")
    page.click("#look")
    expect(page.get_by_text("There is no text yet. Write or paste one.")).to_be_visible(timeout=60_000)
    page.fill("#text textarea", "word " * 20_000)
    page.click("#look")
    expect(page.get_by_text("The text is too long")).to_be_visible(timeout=60_000)
    config = urllib.request.urlopen(f"{served}/config").read().decode()
    for told in (page.content(), config):
        for path in (
            str(checkpoint),
            str(Path(checkpoint).parent),
            str(Path.cwd()),
            sys.prefix,
            str(Path.home()) + "/",
        ):
            assert path not in told, path


def test_a_text_is_shown_and_never_run(page, checkpoint):
    # This tokenizer knows few signs, and what it does not know is no part of the text for the model.
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    look(page, HOSTILE)
    page.wait_for_timeout(300)
    assert "broken" not in page.title()
    shown = page.locator("#view .line").first.evaluate(
        "line => [...line.querySelectorAll('.d')].map(d => d.remove()) && line.textContent"
    )
    assert shown == tokenizer.decode(tokenizer(HOSTILE)["input_ids"]) and "<img src=x onerror=" in shown


def test_several_visitors_at_once_see_their_own_text(browser, served):
    pages = [browser.new_page() for _ in range(3)]
    for opened in pages:
        opened.goto(served)
    for number, opened in enumerate(pages):
        opened.fill("#text textarea", f"visitor {number} ")
        opened.click("#look")
    for number, opened in enumerate(pages):
        expect(opened.locator("#view .line").first).to_contain_text(str(number), timeout=60_000)
        opened.click('#view .t[data-token="0"]')
        expect(opened.locator("#details")).to_contain_text("number 0", timeout=60_000)
        opened.close()


def test_the_page_listens_on_this_machine_alone(served):
    port = int(re.search(r":(\d+)$", served)[1])
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    hosts = {line[1].split(":")[0] for line in listening if int(line[1].split(":")[1], 16) == port and line[3] == "0A"}
    assert hosts == {"0100007F"}


def test_nobody_leaves_a_file_on_the_server(served):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\n'
        + b"a" * 5000
        + b"\r\n--x--\r\n"
    )
    sent = urllib.request.Request(
        f"{served}/gradio_api/upload", data=body, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(sent, timeout=30)
    assert "a.bin" not in refused.value.read().decode() and refused.value.code in (403, 404, 413)


def test_screenshots(page):
    """For whoever builds the page: `ENGRAM_SCREENSHOTS=folder` says where they go."""
    if PICTURES is None:
        pytest.skip("ENGRAM_SCREENSHOTS names no folder")
    look(page, "for i, line in enumerate(lines):\n    print(line)\n")
    page.click('#view .t[data-token="6"]')
    page.wait_for_timeout(1500)
    page.screenshot(path=Path(PICTURES, "page.png"), full_page=True)
