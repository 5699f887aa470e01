"""The page in a real browser, on the whole system with the preview engines.

`VIDGEN_TEST_SCREENSHOTS=docs/images pytest tests/integration/test_page.py -k screenshots` takes those of the README.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect
from tests.browser import PATIENCE_MS, Window, opened, running_browser
from tests.servers import finished, running_stack

from vidgen.client import AsyncClient
from vidgen.contracts import EditParams, I2VParams
from vidgen.local import Stack
from vidgen.local.stack import Service

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "examples" / "portrait.jpg"
SCREENSHOTS = os.environ.get("VIDGEN_TEST_SCREENSHOTS")
MADE = "first light"  # what the jobs were asked for that have a video, whatever other tests did before
ENDLESS = "golden hour light, endless"
PHONE = {"width": 320, "height": 740}  # the narrowest that WCAG asks for: a window of 1280 at 400 %

expect.set_options(timeout=PATIENCE_MS)
pytestmark = pytest.mark.timeout(600, func_only=True)  # not on what the system takes to start


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A system on which four jobs were done; its edit engine turns down the impossible, and ends nothing endless."""
    folder = tmp_path_factory.mktemp("stack")
    own = {"VIDGEN_ENGINE": "preview", "VIDGEN_PREVIEW_SECONDS_PER_STEP": "0.25", "VIDGEN_GPU_USD_PER_HOUR": "2.17"}
    with running_stack(folder, own, stages=("i2v",)) as stack, asyncio.Runner() as runner:
        env = {**os.environ, **own, **stack.environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        edits = Service("zoo", "tests.zoo_service", folder, env, ("edit", "Picky"))
        try:
            runner.run(edits.start())
            runner.run(use(stack))
            yield stack
        finally:
            edits.kill()


async def use(stack: Stack) -> None:
    edit = EditParams(prompt=MADE, steps=2, width=320, height=192)
    i2v = I2VParams(prompt="slow zoom in", steps=1, num_frames=9, width=320, height=192)
    async with AsyncClient(stack.gateway_url) as client:
        for job in [await client.submit(images=[PHOTO], edit=edit, i2v=i2v) for _ in range(4)]:
            assert (await finished(client, job)).status == "completed"


@pytest.fixture(scope="module")
def browser(stack: Stack) -> Iterator[Browser]:
    """After the system: Playwright holds this thread's event loop, and that needs one to start and to stop."""
    with running_browser() as browser:
        yield browser


@pytest.fixture
def window(browser: Browser, stack: Stack) -> Iterator[Window]:
    with opened(browser, stack.gateway_url) as window:
        yield window


def fill(page: Page, *, edit: str = "golden hour light", motion: str = "slow zoom in", size: str = "320x192") -> None:
    """A small job, in the form."""
    page.set_input_files("#files", PHOTO)
    page.get_by_label("What should change?").fill(edit)
    page.get_by_label("How should it move?").fill(motion)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Video size").select_option(size)
    page.get_by_label("Frames", exact=True).fill("17")


def send(page: Page) -> str:
    """Send what is in the form; the job's id."""
    page.get_by_role("button", name="Make the video").click()
    page.wait_for_url("**/#/jobs/*")
    return page.url.rsplit("/", 1)[-1]


def begin_endless(window: Window) -> str:
    """Send a job that goes on until it is cancelled; its id."""
    window.go()
    fill(window.page, edit=ENDLESS)
    window.page.get_by_role("radio", name="High").check()
    return send(window.page)


def status(page: Page, text: str) -> None:
    expect(page.locator(".state")).to_have_text(text)


def done_jobs(page: Page) -> None:
    """Go from the list to that of the jobs that are done, and wait until it is the one that is shown."""
    page.get_by_role("link", name="Done", exact=True).click()
    expect(page.get_by_role("link", name="Done", exact=True)).to_have_attribute("aria-current", "true")


def made_job(page: Page) -> Locator:
    return page.locator(".card a").filter(has_text=MADE).first


def reaches(page: Page, what: str) -> None:
    """Wait until the video is so far. `wait_for_function` would poll by `eval`, which the page's policy refuses."""
    page.locator("video").evaluate(
        f"""(video) => new Promise((there, stuck) => {{
            const look = () => video.{what} && there();
            for (const kind of ["timeupdate", "loadeddata"]) video.addEventListener(kind, look);
            setTimeout(() => stuck(new Error("the video never comes to {what}")), {PATIENCE_MS});
            look();
        }})"""
    )


def test_a_photo_becomes_a_video_that_plays(window: Window) -> None:
    page = window.page
    window.go()
    fill(page)
    expect(page.get_by_role("img", name="Photo 1: portrait.jpg")).to_be_visible()
    expect(page.locator("[data-figure=seconds]")).to_contain_text("about")
    expect(page.locator("[data-figure=cost]")).to_contain_text("about $")
    send(page)

    bars = page.get_by_role("progressbar")
    expect(bars).to_have_count(2)
    expect(page.locator(".stages li").first.locator(".pace")).to_contain_text("a step")
    expect(page.locator("video")).to_be_visible()
    reaches(page, "currentTime > 0.2")
    expect(page.locator("video")).to_have_js_property("paused", False)
    status(page, "Done")
    expect(page.get_by_role("status")).to_have_text("Done. The video is ready.")
    assert [bar.get_attribute("aria-valuenow") for bar in bars.all()] == ["4", "4"]
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the video").click()
    assert b"ftyp" in Path(download.value.path()).read_bytes()[:12]

    page.get_by_role("button", name="Photo").click()
    expect(page.locator(".screen img.photo")).to_be_visible()
    page.get_by_role("button", name="Edited frame").click()
    expect(page.locator(".screen img.frame")).to_be_visible()
    picture = page.get_by_role("link", name="Download the picture")
    expect(picture).to_have_attribute("download", re.compile("edit-0.png"))

    page.get_by_role("link", name="Use again").click()
    expect(page.get_by_label("What should change?")).to_have_value("golden hour light")
    expect(page.get_by_role("img", name="Photo 1")).to_be_visible()


def test_no_minute_has_sixty_seconds(window: Window) -> None:
    window.go()
    told = window.page.evaluate("async () => [89.6, 119.7, 599.6, 7199.7].map((await import('/web/dom.js')).duration)")
    assert [text.replace("\u00a0", " ") for text in told] == ["90 s", "2 min 0 s", "10 min", "2 h 0 min"]


LOSES_ONE_ANSWER = """() => {
    const real = window.fetch;
    window.fetch = async (path, options) => {
        if (path !== "v1/jobs" || options?.method !== "POST") return real(path, options);
        window.fetch = real;
        window.lost = (await (await real(path, options)).json()).id;
        throw new TypeError("the network is gone");
    };
}"""


@pytest.mark.parametrize("changed", [False, True])
def test_after_a_lost_answer_the_same_again_is_one_job_and_what_was_changed_is_another(
    window: Window, changed: bool
) -> None:
    """The key of the first went with the second: its job was shown, and what was asked for now was dropped."""
    page = window.page
    window.go()
    fill(page, edit="moonlight")
    page.evaluate(LOSES_ONE_ANSWER)
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator("form.create .problem")).to_contain_text("does not answer")
    if changed:
        page.get_by_label("What should change?").fill("a rainy street")
    shown = send(page)
    assert (shown != page.evaluate("window.lost")) is changed
    expect(page.get_by_role("heading", level=1)).to_have_text("a rainy street" if changed else "moonlight")
    status(page, "Done")


def test_the_keyboard_alone_sends_a_photo(window: Window) -> None:
    page = window.page
    window.go()
    expect(page.locator("#style option")).not_to_have_count(1)  # what there is to choose from has come

    def focus(selector: str) -> None:
        for _ in range(60):
            if page.evaluate("(wanted) => document.activeElement.matches(wanted)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab never comes to {selector}")

    with page.expect_file_chooser() as chooser:
        focus("#skip")
        focus("#files")
        page.keyboard.press("Enter")
    chooser.value.set_files(PHOTO)
    expect(page.get_by_role("button", name="Remove photo 1")).to_be_visible()
    focus("#edit-prompt")
    page.keyboard.type("moonlight")
    focus("#style")
    page.keyboard.type("Neon")
    focus("#with-video")
    page.keyboard.press("Space")
    focus("button[type=submit]")
    page.keyboard.press("Enter")
    page.wait_for_url("**/#/jobs/*")
    expect(page.locator("h1")).to_be_focused()
    status(page, "Done")
    expect(page.get_by_role("status")).to_have_text("Done. The picture is ready.")
    page.get_by_text("Details", exact=True).click()
    expect(page.locator(".details")).to_contain_text("Neon")


def test_a_reload_in_the_middle_goes_on_and_a_cancel_ends_it(window: Window) -> None:
    page = window.page
    job = begin_endless(window)
    expect(page.locator(".where").first).to_contain_text("step")

    page.reload()
    assert page.url.endswith(f"#/jobs/{job}")
    status(page, "Working")
    expect(page.get_by_role("progressbar").first).to_have_attribute("aria-valuemax", "40")
    expect(page.locator("[data-state=running] .pace")).to_contain_text("left")

    page.get_by_role("button", name="Cancel").click()
    status(page, "Cancelled")
    expect(page.get_by_role("status")).to_have_text("It was cancelled.")
    expect(page.get_by_role("button", name="Try again")).to_be_focused()
    under_way = page.locator("[data-state=running], [data-state=queued]")
    expect(under_way).to_have_count(0)
    page.reload()
    status(page, "Cancelled")
    expect(under_way).to_have_count(0)
    expect(page.locator(".where").first).to_have_text("")

    page.get_by_role("button", name="Try again").click()
    status(page, "Working")
    page.get_by_role("button", name="Cancel").click()
    status(page, "Cancelled")


def test_a_waiting_job_says_how_many_are_ahead(window: Window) -> None:
    page = window.page
    jobs = [begin_endless(window)]
    page.get_by_role("link", name="Create").click()
    jobs.append(send(page))
    expect(page.locator(".line")).to_contain_text(re.compile("at most 1 ahead of you|next in line"))
    expect(page.locator(".stages li").nth(1).locator(".pace")).to_contain_text("takes about")

    page.get_by_role("link", name="Workers").click()
    expect(page.locator(".worker .doing a").first).to_have_text(ENDLESS)
    page.go_back()

    for job in jobs:
        page.request.post(f"{window.origin}/v1/jobs/{job}/cancel")
    status(page, "Cancelled")
    page.get_by_role("link", name="Jobs").click()
    cancelled = page.get_by_label("Filter by status").get_by_role("link", name="Cancelled")
    cancelled.click()
    expect(cancelled).to_have_attribute("aria-current", "true")
    for job in jobs:
        expect(page.locator(f'.card a[href="#/jobs/{job}"]')).to_be_visible()
    expect(page.locator(".card .status").filter(has_not_text="Cancelled")).to_have_count(0)


def test_a_chosen_candidate_is_what_moves(window: Window) -> None:
    page = window.page
    window.go()
    fill(page)
    page.set_input_files("#files", PHOTO)  # another one
    page.get_by_label("Candidates").select_option("2")
    page.get_by_label("Let me see the edited frame before the video is made").check()
    send(page)
    status(page, "Your choice")
    expect(page.locator(".screen img.frame")).to_be_visible()  # the edited frame, before there is a video
    expect(page.locator(".candidates img")).to_have_count(2)
    page.get_by_role("button", name="Use number 2").click()
    status(page, "Done")
    expect(page.locator("video")).to_be_visible()
    for number in (1, 2):
        page.get_by_role("button", name=f"Edited frame {number}").click()
        expect(page.locator(".screen img.frame")).to_have_attribute("src", re.compile(f"edit-{number - 1}"))
        page.get_by_role("button", name=f"Photo {number}").click()
        expect(page.locator(".screen img.photo")).to_have_attribute("src", re.compile(f"references/{number - 1}"))


def test_what_cannot_be_sent_is_said_before_it_is_sent(window: Window, tmp_path: Path) -> None:
    page = window.page
    window.go()
    expect(page.locator("#style option")).not_to_have_count(1)
    page.get_by_role("button", name="Make the video").click()
    expect(page.get_by_role("alert")).to_have_text("Choose a photo first.")
    assert page.evaluate("document.activeElement.id") == "files"

    text = tmp_path / "notes.txt"
    text.write_text("no photo")
    broken = tmp_path / "<b>broken<b>.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    page.set_input_files("#files", [text, broken])
    expect(page.locator("#photo-error")).to_contain_text("notes.txt: this is no PNG")
    expect(page.locator("#photo-error")).to_contain_text("<b>broken<b>.png: this image cannot be read")

    page.set_input_files("#files", [PHOTO, PHOTO, PHOTO])
    expect(page.get_by_role("button", name=re.compile("Remove photo"))).to_have_count(3)
    page.get_by_role("button", name="Remove photo 2").click()
    page.get_by_role("button", name="Make the video").click()
    expect(page.get_by_label("What should change?")).to_have_accessible_description(re.compile("starts from one photo"))
    page.get_by_label("What should change?").fill("moonlight")
    expect(page.get_by_label("What should change?")).to_have_accessible_description("")

    page.get_by_text("More", exact=True).click()
    frames = page.get_by_label("Frames", exact=True)
    frames.fill("3")
    page.get_by_role("button", name="Make the video").click()
    expect(frames).to_be_focused()
    expect(frames).to_have_accessible_description(re.compile("Frames: "))
    # Nor is a price asked for of what would be refused: the browser would log that as an error (`opened` looks).
    expect(page.locator('[data-figure="cost"]')).to_have_text("–")
    frames.fill("17")
    expect(frames).to_have_accessible_description("1.1 s of video.")
    assert [url for url in window.requested if url.endswith("/v1/jobs")] == []


def test_a_form_that_did_not_learn_what_there_is_to_choose_from_asks_again(window: Window) -> None:
    """A photo that was chosen did not appear, and of what was dropped nothing was left, until something was sent."""
    page = window.page
    refused = {"detail": "the bus does not answer", "code": "bus_unavailable"}
    page.route("**/v1/options", lambda route: route.fulfill(status=503, json=refused), times=2)
    window.go()
    expect(page.get_by_role("alert")).to_have_text("the bus does not answer")
    page.set_input_files("#files", PHOTO)
    expect(page.get_by_role("img", name="Photo 1: portrait.jpg")).to_be_visible()
    expect(page.locator("#style option")).not_to_have_count(1)
    expect(page.get_by_role("alert")).to_be_hidden()
    window.complaints.clear()  # the browser itself reports each 503


def test_a_photo_is_known_by_what_is_in_it_whatever_it_is_called(window: Window, tmp_path: Path) -> None:
    """One without a suffix, or with that of another program, was said to be no image; the gateway takes it."""
    page = window.page
    window.go()
    expect(page.locator("#style option")).not_to_have_count(1)
    kinds = {"PNG": "png", "JPEG": "jpg_large", "WEBP": "שלום 😀", "AVIF": "avif"}
    for kind, suffix in kinds.items():
        path = tmp_path / f"photo.{suffix}" if kind != "AVIF" else tmp_path / "photo"
        picture = Image.new("RGB", (64, 48))
        picture.save(path, format=kind)
        page.set_input_files("#files", path)
        expect(page.get_by_role("img", name=f"Photo 1: {path.name}")).to_be_visible()
        page.get_by_role("button", name="Remove photo 1").click()


def test_a_photo_that_was_changed_since_it_was_chosen_is_named(window: Window, tmp_path: Path) -> None:
    """The browser sends no such file: "the gateway does not answer" was said, however often it was tried."""
    page = window.page
    photo = tmp_path / "mine.jpg"
    photo.write_bytes(PHOTO.read_bytes())
    os.utime(photo, (1_700_000_000, 1_700_000_000))  # the browser looks at the time, in seconds
    window.go()
    fill(page)
    page.get_by_role("button", name="Remove photo 1").click()
    page.set_input_files("#files", photo)
    expect(page.get_by_role("img", name="Photo 1: mine.jpg")).to_be_visible()
    photo.write_bytes(PHOTO.read_bytes() + b"edited")
    page.get_by_role("button", name="Make the video").click()
    expect(page.get_by_role("alert")).to_have_text(
        "mine.jpg: changed or moved since it was chosen. Remove it, and choose it again."
    )
    page.get_by_role("button", name="Remove photo 1").click()
    page.set_input_files("#files", photo)
    send(page)
    status(page, "Done")
    window.complaints.clear()  # the browser itself reports what it could not send


def test_a_photo_can_be_dropped_and_pasted(window: Window) -> None:
    page = window.page
    window.go()
    expect(page.locator("#style option")).not_to_have_count(1)
    give = """async (kind) => {
        const canvas = new OffscreenCanvas(64, 48);
        canvas.getContext("2d").fillRect(0, 0, 9, 9);
        const data = new DataTransfer();
        data.items.add(new File([await canvas.convertToBlob()], kind + ".png", { type: "image/png" }));
        const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
        document.querySelector(".drop").dispatchEvent(event);
    }"""
    for kind in ("drop", "paste"):
        page.evaluate(give, kind)
        expect(page.get_by_role("img", name=f"{kind}.png")).to_be_visible()


def test_no_photo_too_many_is_taken_where_several_come_at_once(window: Window) -> None:
    """Each looked for room before it was decoded: a paste beside a drop made four, which the gateway refuses."""
    page = window.page
    window.go()
    expect(page.locator("#style option")).not_to_have_count(1)
    page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(64, 48);
            canvas.getContext("2d").fillRect(0, 0, 9, 9);
            const blob = await canvas.convertToBlob();
            const given = () => {
                const data = new DataTransfer();
                for (const name of ["a.png", "b.png"]) data.items.add(new File([blob], name, { type: "image/png" }));
                return data;
            };
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: given(), bubbles: true }));
            const drop = new DragEvent("drop", { dataTransfer: given(), bubbles: true, cancelable: true });
            document.querySelector(".drop").dispatchEvent(drop);
        }"""
    )
    expect(page.locator("#photo-error")).to_contain_text("there are 3 photos already")
    expect(page.get_by_role("button", name=re.compile("Remove photo"))).to_have_count(3)


def test_an_address_that_cannot_be_read_is_that_of_no_job(window: Window) -> None:
    """The page threw, and stood as it was: blank where it was loaded there."""
    page = window.page
    window.go("#/jobs/%")
    expect(page.locator("h1")).to_have_text("There is no such job")
    page.get_by_role("link", name="Jobs", exact=True).click()
    expect(page.locator("h1")).to_have_text("Jobs")
    assert [text for text in window.complaints if "404" not in text] == []  # Chromium's own word for the answer
    window.complaints.clear()


def test_the_workers_say_what_they_do(window: Window) -> None:
    page = window.page
    window.go("#/workers")
    expect(page.locator(".worker")).to_have_count(2)
    expect(page.locator(".worker h2")).to_have_text(["Edit", "Video"])
    expect(page.locator(".worker").first).to_contain_text("preview")
    expect(page.locator(".worker").first.locator(".doing")).to_have_text("Waits for work")


def test_the_documentation_shows_each_route_and_tries_one_with_nothing_from_elsewhere(window: Window) -> None:
    page = window.page
    page.goto(f"{window.origin}/docs")
    route = page.locator("[id$=v1_workers_get]")
    route.locator(".opblock-summary-control").click()
    route.get_by_role("button", name="Try it out").click()
    route.get_by_role("button", name="Execute").click()
    expect(route.locator(".live-responses-table .response-col_status:not(.col_header)")).to_contain_text("200")
    assert page.locator(".opblock").count() > 20


def test_a_phone_shows_it_without_scrolling_sideways(browser: Browser, stack: Stack) -> None:
    with opened(browser, stack.gateway_url, viewport=PHONE, color_scheme="dark") as window:
        page = window.page
        window.go()
        fill(page)
        look_at(page, "phone-create")
        page.get_by_role("link", name="Workers").click()
        expect(page.locator(".card").first).to_be_visible()
        look_at(page, "phone-workers")
        page.get_by_role("link", name="Jobs").click()
        done_jobs(page)
        expect(page.locator(".card").first).to_be_visible()
        look_at(page, "phone-jobs")
        page.locator(".card a").first.click()
        status(page, "Done")
        page.get_by_text("Details", exact=True).click()
        look_at(page, "phone-job")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 19, 18)"


def look_at(page: Page, name: str) -> None:
    """It must fit into the window; and a picture of it, where they are wanted."""
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"page-{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name


def heard(page: Page, where: str) -> None:
    """Nothing that axe finds wrong for people who do not see the page, or do not see it well."""
    found = Axe().run(page).response["violations"]
    told = [(one["id"], node["target"], node["failureSummary"]) for one in found for node in one["nodes"]]
    assert told == [], where


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_usable_by_ear_and_has_contrast(browser: Browser, stack: Stack, scheme: str) -> None:
    # Given the page without movement: a colour on its way to another has neither one's contrast
    given = {"color_scheme": scheme, "reduced_motion": "reduce"}
    with opened(browser, stack.gateway_url, **given) as window:
        page = window.page

        # Then the form is, empty, turned down and filled in
        window.go()
        expect(page.locator("#style option")).not_to_have_count(1)
        heard(page, "empty form")
        page.get_by_role("button", name="Make the video").click()
        expect(page.get_by_role("alert")).to_be_visible()
        heard(page, "form with an error")
        fill(page, edit="the impossible")
        expect(page.get_by_role("img", name="Photo 1")).to_be_visible()
        heard(page, "form")

        # And a job that fails, one that is done, the list and the workers
        send(page)
        status(page, "Failed")
        heard(page, "failed job")
        page.get_by_role("link", name="Jobs").click()
        expect(page.locator(".card").first).to_be_visible()
        heard(page, "list")
        done_jobs(page)
        made_job(page).click()
        expect(page.locator("video")).to_be_visible()
        page.get_by_text("Details", exact=True).click()
        heard(page, "done job")
        page.get_by_role("link", name="Workers").click()
        expect(page.locator(".worker").first).to_be_visible()
        heard(page, "workers")


def test_light_is_light_and_motion_can_be_left_out(browser: Browser, stack: Stack) -> None:
    with opened(browser, stack.gateway_url, color_scheme="light", reduced_motion="reduce") as window:
        page = window.page
        window.go("#/jobs?status=completed")
        made_job(page).click()
        reaches(page, "readyState >= 2")
        expect(page.locator("video")).to_have_js_property("paused", True)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 249, 247)"


def test_the_list_goes_page_by_page(window: Window) -> None:
    page = window.page
    page.route("**/v1/jobs?*", lambda route: route.continue_(url=re.sub(r"limit=\d+", "limit=2", route.request.url)))
    window.go("#/jobs")
    expect(page.locator(".card")).to_have_count(2)
    first = page.locator(".card a").first.get_attribute("href")
    page.get_by_role("link", name="Older jobs").click()
    expect(page.get_by_role("link", name="Newest jobs")).to_be_visible()
    expect(page.locator(".card")).to_have_count(2)
    assert page.locator(".card a").first.get_attribute("href") != first
    page.get_by_role("link", name="Newest jobs").click()
    expect(page.locator(".card a").first).to_have_attribute("href", first or "")


def test_a_job_that_is_none_is_said_to_be_none(window: Window) -> None:
    page = window.page
    window.go("#/jobs/nothing-of-the-kind")
    expect(page.locator("h1")).to_have_text("There is no such job")
    expect(page.get_by_role("alert")).to_contain_text("there is no job nothing-of-the-kind")
    window.complaints.clear()  # the browser itself reports the 404


class Away:
    """Has the gateway answer 503 to what a job's page asks of it, as long as it is away."""

    def __init__(self, page: Page, job: str) -> None:
        self.away = False
        self._told = False
        page.route(f"**/v1/jobs/{job}", self._answer)
        page.route(f"**/v1/jobs/{job}/events*", self._tell)

    def _tell(self, route: Route) -> None:
        if self._told:
            self._answer(route)
        else:  # a connection that breaks at once
            self._told = self.away = True
            route.fulfill(content_type="text/event-stream", body="retry: 20\n\n")

    def _answer(self, route: Route) -> None:
        if self.away:
            route.fulfill(status=503, json={"detail": "the bus does not answer", "code": "bus_unavailable"})
        else:
            route.continue_()


def test_a_gateway_that_is_away_is_said_to_be_and_what_was_shown_stays(window: Window) -> None:
    """The picture went, and stayed away when the gateway was back; before that time went on as if all were well."""
    page = window.page
    job = begin_endless(window)
    expect(page.locator(".pace").first).to_contain_text("left")

    gateway = Away(page, job)
    window.go(f"#/jobs/{job}")
    expect(page.locator(".line")).to_contain_text("There is no news from the gateway")
    expect(page.get_by_role("status")).to_contain_text("There is no news from the gateway")
    expect(page.locator(".pace").first).not_to_contain_text("left")
    expect(page.locator(".screen img.photo")).to_be_visible()
    expect(page.locator("h1")).to_have_text(ENDLESS)

    gateway.away = False
    expect(page.locator(".line")).to_have_text("Your photo is being edited.")
    expect(page.locator(".pace").first).to_contain_text("left")
    expect(page.locator(".screen img.photo")).to_be_visible()
    page.request.post(f"{window.origin}/v1/jobs/{job}/cancel")
    status(page, "Cancelled")
    window.complaints.clear()  # the browser itself reports each 503


def test_a_page_that_is_told_to_come_later_comes_later(window: Window) -> None:
    page = window.page
    window.go("#/jobs?status=completed")
    job = (made_job(page).get_attribute("href") or "").rsplit("/", 1)[-1]
    refused = {"detail": "too many requests", "code": "too_many_requests"}
    page.route(f"**/v1/jobs/{job}", lambda route: route.fulfill(status=429, json=refused), times=1)
    window.go(f"#/jobs/{job}")
    status(page, "Done")
    window.complaints.clear()  # the browser itself reports the 429


def test_why_a_job_failed_again_is_not_what_hindered_its_retry(window: Window) -> None:
    page = window.page
    window.go()
    fill(page, edit="the impossible")
    send(page)
    status(page, "Failed")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The edit failed")
    page.route("**/retry", lambda route: route.abort(), times=1)
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_have_text("The gateway does not answer. Is the network there?")
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("The edit failed")
    status(page, "Failed")
    window.complaints.clear()  # the browser itself reports what was cut off


def test_a_retry_that_another_tab_was_first_with_is_followed(window: Window) -> None:
    page = window.page
    job = begin_endless(window)
    page.get_by_role("button", name="Cancel").click()
    status(page, "Cancelled")
    page.request.post(f"{window.origin}/v1/jobs/{job}/retry")
    page.get_by_role("button", name="Try again").click()
    status(page, "Working")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.get_by_role("button", name="Cancel").click()
    status(page, "Cancelled")
    window.complaints.clear()  # the browser itself reports the 409


def test_a_job_whose_log_has_had_its_time_is_shown_by_its_record(window: Window) -> None:
    """A review may wait for longer than the log is kept: its edit was shown as waiting, without its picture."""
    page = window.page
    window.go()
    fill(page)
    page.get_by_text("Let me see the edited frame").check()
    job = send(page)
    status(page, "Your choice")
    at = "2026-11-01T00:00:00Z"
    told = json.dumps({"type": "approved", "job_id": job, "run": 1, "at": at, "candidate": 0})
    body = f"retry: 600000\n\nid: 9\nevent: approved\ndata: {told}\n\n"
    page.route("**/events*", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    window.go(f"#/jobs/{job}")
    status(page, "Working")
    expect(page.locator(".stages li").first).to_have_attribute("data-state", "completed")
    expect(page.locator(".screen img.frame")).to_be_visible()
    page.request.post(f"{window.origin}/v1/jobs/{job}/cancel")


def test_used_again_without_its_photo_a_job_says_so_and_takes_no_other_ones(window: Window) -> None:
    """What was said went at once, and the photo of before stayed in the form, under this job's prompts."""
    page = window.page
    window.go("#/jobs?status=completed")
    made_job(page).click()
    again = page.get_by_role("link", name="Use again")
    expect(again).to_be_visible()
    page.get_by_role("link", name="Create").click()
    page.set_input_files("#files", PHOTO)
    expect(page.get_by_role("img", name="Photo 1: portrait.jpg")).to_be_visible()
    page.go_back()
    gone = {"detail": "gone", "code": "artifact_gone"}
    page.route("**/references/*", lambda route: route.fulfill(status=404, json=gone))
    again.click()
    expect(page.get_by_role("alert")).to_contain_text("no longer in the store")
    expect(page.get_by_label("What should change?")).to_have_value(MADE)
    expect(page.get_by_role("img", name="Photo 1")).to_have_count(0)
    page.set_input_files("#files", PHOTO)
    expect(page.get_by_role("alert")).to_be_hidden()
    window.complaints.clear()  # the browser itself reports each 404


def test_a_prompt_runs_in_its_own_direction(window: Window) -> None:
    page = window.page
    window.go()
    fill(page, edit="שלום עולם!")
    send(page)
    status(page, "Done")
    lefts = page.locator("h1").evaluate(
        """(title) => [0, title.textContent.length - 1].map((at) => {
            const letter = document.createRange();
            letter.setStart(title.firstChild, at);
            letter.setEnd(title.firstChild, at + 1);
            return letter.getBoundingClientRect().left;
        })"""
    )
    assert lefts[1] < lefts[0], "the exclamation mark is to the right of what it ends"


def test_a_failing_job_shows_why_and_markup_in_a_prompt_stays_text(window: Window) -> None:
    page = window.page
    window.go()
    evil = "the impossible <img src=x onerror=\"document.title='got you'\"><script>alert(1)</script>"
    fill(page, edit=evil)
    send(page)
    status(page, "Failed")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The edit failed")
    expect(alert).to_contain_text("the image cannot be read: send a PNG or a JPEG")
    expect(page.get_by_role("status")).to_contain_text("the image cannot be read")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    expect(page.get_by_role("link", name="Use again")).to_have_class("primary")  # the same again would fail again
    expect(page.locator("h1")).to_have_text(evil)
    page.get_by_role("link", name="Jobs").click()
    expect(page.locator(".card h2").first).to_have_text(evil)
    expect(page).to_have_title("Jobs · vidgen")


def test_what_is_not_known_is_said_to_be_not_known(window: Window) -> None:
    page = window.page
    nothing = {"steps": 4, "basis": "unknown", "workers": 0, "ahead": 0}
    told = {
        "stages": [nothing | {"stage": "edit"}],
        "wait_s": None,
        "seconds": None,
        "gpu_seconds": None,
        "cost_usd": None,
    }
    page.route("**/v1/estimate", lambda route: route.fulfill(json=told))
    window.go()
    expect(page.locator("[data-figure=seconds]")).to_have_text("not known yet")
    expect(page.locator("[data-figure=cost]")).to_have_text("not known yet")
    expect(page.locator("#estimate-note")).to_have_text("No worker for edits is there now: the job would wait for one.")


@pytest.mark.skipif(SCREENSHOTS is None, reason="VIDGEN_TEST_SCREENSHOTS names no folder for them")
def test_screenshots(browser: Browser, stack: Stack) -> None:
    folder = Path(SCREENSHOTS or "")

    def shoot(page: Page, name: str) -> None:
        page.mouse.move(0, 0)
        page.screenshot(path=folder / f"page-{name}.jpg", type="jpeg", quality=85)

    with opened(browser, stack.gateway_url, viewport={"width": 1200, "height": 760}) as window:
        page = window.page
        window.go()
        fill(page, edit="golden hour light, warm and cinematic", motion="slow zoom in, a little hand-held", size="")
        page.get_by_text("More", exact=True).click()
        expect(page.locator("[data-figure=seconds]")).to_contain_text("about")
        shoot(page, "create")
        send(page)
        expect(page.locator(".screen img.frame")).to_be_visible()
        expect(page.locator(".stages li").nth(1).locator(".where")).to_contain_text("step 2")
        shoot(page, "job")


def test_a_page_of_a_gateway_that_asks_for_keys_signs_in_and_out(
    browser: Browser, stack: Stack, tmp_path: Path
) -> None:
    # Given a second gateway on the same system, which asks for keys, and one key
    environment = {name: value for name, value in stack.environment().items() if name != "VIDGEN_GATEWAY_URL"}
    own = {"VIDGEN_AUTH": "on", "VIDGEN_HTTP_PORT": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env = {**os.environ, **environment, **own}
    gateway = Service("gateway-with-keys", "gateway.main", tmp_path, env)
    made = subprocess.run(
        [sys.executable, "-m", "vidgen.cli", "keys", "create", "--admin"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    gateway.launch()
    try:
        with ThreadPoolExecutor() as elsewhere:  # Playwright holds this thread's event loop
            elsewhere.submit(lambda: asyncio.run(gateway.until_ready())).result()
        with opened(browser, gateway.url) as window:
            page = window.page
            page.goto(f"{gateway.url}/#/jobs")
            # When a wrong key is given, and then the right one
            page.get_by_label("API key").fill("vg_wrong")
            page.get_by_role("button", name="Sign in").click()
            expect(page.get_by_role("alert")).to_contain_text("not known")
            page.get_by_label("API key").fill(made)
            page.get_by_role("button", name="Sign in").click()
            # Then the jobs are there, with their pictures, and no script sees the key
            expect(page.locator(".card")).not_to_have_count(0)
            expect(page.get_by_text("Operator")).to_be_visible()
            picture = page.locator(".card img").first
            expect(picture).to_have_js_property("complete", True)
            assert picture.evaluate("(image) => image.naturalWidth") > 0
            assert page.evaluate("() => document.cookie + JSON.stringify(localStorage)") == "{}"
            # And after signing out nothing is
            page.get_by_role("button", name="Sign out").click()
            expect(page.get_by_label("API key")).to_be_visible()
            expect(page.locator(".card")).to_have_count(0)
            window.complaints.clear()  # the browser names each 401
    finally:
        gateway.kill()
