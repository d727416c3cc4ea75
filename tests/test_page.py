# SPDX-License-Identifier: Apache-2.0
"""The built-in page, used as a person would in a headless Chromium.

FASTSERVE_SCREENSHOTS=FOLDER keeps pictures of it, and FASTSERVE_PAGE_MODEL=FOLDER asks a real model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from chromium import Chromium, find_chromium
from serving import RunningServer
from tiny_models import make_tiny_checkpoint

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium is installed (Debian: apt-get install chromium-headless-shell)"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    model = os.environ.get("FASTSERVE_PAGE_MODEL") or make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    with RunningServer(Path(model), {"num_blocks": 64, "max_model_len": 512}, served_model_name=["tiny"]) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert PROGRAM is not None
    with Chromium(PROGRAM, tmp_path_factory.mktemp("profile")) as running:
        yield running


def picture(browser: Chromium, name: str) -> None:
    folder = os.environ.get("FASTSERVE_SCREENSHOTS")
    if folder:
        browser.screenshot(Path(folder) / f"{name}.png")


ANSWER = "document.querySelector('#log .assistant:last-of-type').lastChild.data"


def test_a_message_is_answered_as_a_stream_and_the_live_view_moves(server: RunningServer, browser: Chromium) -> None:
    may_go_on = threading.Semaphore(0)
    real = server.engine._runner.run
    num_steps = 0

    def gated(plan: object) -> object:  # the first steps at once, the others when the half-written answer was seen
        nonlocal num_steps
        num_steps += 1
        if num_steps > 12:
            may_go_on.acquire()
        return real(plan)

    server.engine._runner.run = gated
    try:
        browser.open(server.url)
        browser.wait_until("document.querySelector('#model').textContent.startsWith('tiny, context of 512')")
        browser.wait_until("document.querySelector('#health').textContent === 'Healthy.'")
        picture(browser, "before")
        browser.evaluate("document.querySelector('#limit').value = 48")
        browser.click("#text")
        browser.type("Name three birds and say why they sing.")
        browser.click("#send")
        browser.wait_until(f"document.querySelector('#log .assistant') && {ANSWER}.length > 3")
        half = browser.evaluate(ANSWER)
        assert browser.evaluate("document.querySelector('#send').disabled")
        assert not browser.evaluate("document.querySelector('#stop').disabled")
        browser.wait_until("document.querySelector('#running').textContent === '1'")
        browser.wait_until("!document.querySelector('#blocks').textContent.startsWith('0 ')")
        browser.wait_until("points.length > 2")
        picture(browser, "streaming")
        before = browser.evaluate("before.now.num_steps_total")
    finally:
        may_go_on.release(100_000)
        server.engine._runner.run = real
    browser.wait_until("document.querySelector('#status').textContent.startsWith('Answer complete')")
    whole = browser.evaluate(ANSWER)
    assert whole.startswith(half)
    assert len(whole) > len(half)
    browser.wait_until(f"before.now.num_steps_total > {before}")
    browser.wait_until("document.querySelector('#running').textContent === '0'")
    assert browser.evaluate("document.querySelector('#ttft').textContent") != "-"
    assert browser.evaluate("points.some(([decode]) => decode > 0) && points.some(([_, prefill]) => prefill > 0)")
    assert browser.evaluate(
        "[...document.querySelector('#chart').getContext('2d').getImageData(0, 20, 600, 140).data].some((x) => x)"
    )
    picture(browser, "complete")
    assert browser.complaints == []


def test_the_answer_can_be_stopped_and_the_engine_stops_too(server: RunningServer, browser: Chromium) -> None:
    go = threading.Semaphore(0)
    real = server.engine._runner.run
    server.engine._runner.run = lambda plan: (go.acquire(), real(plan))[1]
    try:
        browser.evaluate("document.querySelector('#text').focus()")
        browser.type("Tell me more.")
        browser.click("#send")
        server.wait_until(lambda: server.engine.num_running == 1)
        browser.click("#stop")
        browser.wait_until("document.querySelector('#status').textContent === 'Stopped.'")
    finally:
        go.release(100_000)
        server.engine._runner.run = real
    server.wait_until_empty()
    browser.click("#clear")
    assert browser.evaluate("document.querySelector('#log').childElementCount") == 0
    browser.wait_until("!document.querySelector('#send').disabled")


def test_an_error_is_shown_and_the_message_is_not_lost(server: RunningServer, browser: Chromium) -> None:
    browser.open(server.url)
    browser.evaluate("document.querySelector('#limit').value = 9999")
    browser.evaluate("document.querySelector('#text').focus()")
    browser.type("Hello")
    browser.click("#send")
    browser.wait_until("document.querySelector('#status').textContent.startsWith('Error: This model')")
    assert browser.evaluate("document.querySelector('#text').value") == "Hello"
    browser.complaints.clear()  # the console has the 400


def test_a_phone_shows_it_in_one_column_without_sideways_scrolling(server: RunningServer, browser: Chromium) -> None:
    browser.open(server.url, 360, 740, mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    assert browser.evaluate(
        "document.querySelector('#live-title').getBoundingClientRect().top >"
        " document.querySelector('#send').getBoundingClientRect().bottom"
    )
    small = browser.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter((e) => e.getBoundingClientRect().height < 40)"
        ".map((e) => e.id)"
    )
    assert small == []  # a finger can hit them
    picture(browser, "phone")


def test_a_screen_reader_meets_names_for_everything(server: RunningServer, browser: Chromium) -> None:
    browser.open(server.url)
    browser.wait_until("document.querySelector('#running').textContent !== '-'")
    names = browser.accessible_names()
    for role in ("textbox", "spinbutton", "button", "log", "image", "table"):
        found = [name for other, name in names if other.lower() == role]
        assert found, role
        assert all(found), f"a {role} has no name"
    assert {"Send", "Stop", "Clear"} <= {name for role, name in names if role == "button"}
    assert "Your message" in {name for role, name in names if role == "textbox"}
