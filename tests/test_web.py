"""The web client, in a real browser."""

from __future__ import annotations

import io
import random
import re
import subprocess
from contextlib import suppress
from functools import cache, partial
from importlib.resources import files
from typing import TYPE_CHECKING, Literal, TypedDict

import anyio
import pytest
from PIL import Image
from playwright.async_api import TimeoutError, expect  # noqa: A004

from tests import samples
from tests.browser import open_browser, visiting
from tests.conftest import StartServer, client_of
from tests.multipart import problem
from tests.process import DEADLINE_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx2
    from playwright.async_api import Browser, CDPSession, FilePayload, Locator, Page, Route

    from tests.multipart import Connection
    from tests.process import Server


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with open_browser() as browser:
        yield browser


# What a reader does. ------------------------------------------------------------------------------


async def post(
    page: Page, message: str = "", name: str = "ann", *, image: bytes = b"", video: bytes = b""
) -> None:
    """Fill in the form and send it."""
    await page.get_by_label("Name", exact=True).fill(name)
    await page.get_by_label("Message", exact=True).fill(message)
    if image:
        await page.get_by_label("Add picture").set_input_files(upload("a.jpg", "image/jpeg", image))
    if video:
        await page.get_by_label("Add video").set_input_files(upload("a.mp4", "video/mp4", video))
    await page.get_by_role("button", name="Send").click()


def upload(name: str, media_type: str, data: bytes) -> FilePayload:
    return {"name": name, "mimeType": media_type, "buffer": data}


async def shown(page: Page) -> list[str]:
    """The messages in the feed, from top to bottom."""
    return await page.locator(".message").all_text_contents()


async def expect_shown(page: Page, *messages: str) -> None:
    """Wait until these are the messages in the feed, looking more often than `expect` does."""
    same = """messages => {
      const shown = [...document.querySelectorAll(".message")];
      return shown.map((message) => message.textContent).join("\\0") === messages.join("\\0");
    }"""
    with suppress(TimeoutError):
        await page.wait_for_function(same, arg=messages)
    assert await shown(page) == list(messages)


@cache
def photo(width: int = 600, height: int = 400) -> bytes:
    """A photo that does not get smaller by compression."""
    noise = random.Random(1).randbytes(width * height * 3)  # noqa: S311  the same each time
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), noise).save(file, "JPEG", quality=95)
    return file.getvalue()


@cache
def movie() -> bytes:
    """A second of H.264, as a phone records it."""
    source = "-v error -nostdin -f lavfi -i testsrc=duration=1:size=320x240:rate=10"
    target = "-c:v libx264 -pix_fmt yuv420p -movflags frag_keyframe+empty_moov -f mp4 -"
    done = subprocess.run(
        ["ffmpeg", *source.split(), *target.split()],  # noqa: S607  Debian's
        stdout=subprocess.PIPE,
        timeout=DEADLINE_SECONDS,
        check=True,
    )
    return done.stdout


async def insert_chatts(database: Connection, count: int) -> None:
    """Store chatts "0", "1", and so on, a minute apart, of which the last is a minute old."""
    await database.execute(
        "INSERT INTO chatts (name, message, time)"
        " SELECT 'ann', n::text, now() - make_interval(mins => $1 - n)"
        " FROM generate_series(0, $1 - 1) AS n",
        count,
    )


# Reading and writing. -----------------------------------------------------------------------------


async def test_a_chatt_that_is_posted_in_one_tab_appears_in_another_without_a_reload(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    async with visiting(browser, server.url) as ann, visiting(browser, server.url) as bob:
        mine, theirs = await ann.tab(), await bob.tab()
        await expect(mine.get_by_text("Nobody has written anything yet.")).to_be_visible()
        await post(mine, "Hello!\nA second line", name="ann")
        await expect_shown(theirs, "Hello!\nA second line")
        await expect_shown(mine, "Hello!\nA second line")
        await expect(theirs.get_by_role("heading", name="ann")).to_be_visible()
        await expect(theirs.get_by_text("Nobody has written")).to_be_hidden()
        await post(theirs, "Hi", name="bob")
        await expect_shown(mine, "Hello!\nA second line", "Hi")
        await expect(mine.get_by_label("Message", exact=True)).to_be_empty()
    rows = (await client.get("/getchatts")).json()
    assert [row[:2] for row in rows] == [["ann", "Hello!\nA second line"], ["bob", "Hi"]]


async def test_a_picture_is_shown_small_and_large(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    async with visiting(browser, server.url) as ann, visiting(browser, server.url) as bob:
        mine, theirs = await ann.tab(), await bob.tab()
        await post(mine, "Look", image=photo(1200, 800))
        small = theirs.get_by_role("img", name="Picture from \u2068ann\u2069: Look")
        await small.scroll_into_view_if_needed()
        await wait_for_width(small, 512)  # the thumbnail
        await small.click()
        large = theirs.get_by_role("dialog").get_by_role("img")
        await wait_for_width(large, 1200)
        original = theirs.get_by_role("link", name="Open the original file")
        address = await original.get_attribute("href")
        assert address is not None
        assert (await client.get(address)).headers["content-type"] == "image/jpeg"
        await theirs.keyboard.press("Escape")
        await expect(theirs.get_by_role("dialog")).to_be_hidden()
        await expect(theirs.locator(".picture")).to_be_focused()


async def wait_for_width(locator: Locator, width: int) -> None:
    await expect(locator).to_have_js_property("naturalWidth", width)


@pytest.mark.parametrize("kind", ["mp4", "webm"])
async def test_a_video_is_posted_and_plays(
    browser: Browser, server: Server, client: httpx2.AsyncClient, kind: str
) -> None:
    data, width = (movie(), 320) if kind == "mp4" else (samples.WEBM, 16)
    async with visiting(browser, server.url) as ann:
        page = await ann.tab()
        await post(page, "Watch", video=data)
        video = page.get_by_label("Video from \u2068ann\u2069: Watch")
        await expect(video).to_have_js_property("videoWidth", width)
        await video.evaluate(
            "video => new Promise((ended) => { video.onended = ended; video.muted = true;"
            " video.play().catch(() => {}) })"  # the end of a short one interrupts this
        )
    assert (await client.get("/getimages")).json()[0][5].endswith(f".{kind}")


async def test_a_heic_that_the_browser_cannot_show_is_shown_small_with_a_link(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    await client.post(
        "/v1/chatts", data={"name": "ann", "message": ""}, files={"image": samples.HEIC}
    )
    async with visiting(browser, server.url) as ann:
        page = await ann.tab()
        await page.locator(".picture").click()
        await expect(page.get_by_text("Your browser cannot show the full picture")).to_be_visible()
        await wait_for_width(page.get_by_role("dialog").get_by_role("img"), 8)
        link = page.get_by_role("link", name="Open the original file")
        assert re.search(r"\.hei[cf]$", str(await link.get_attribute("href")))


async def test_markup_in_a_chatt_is_shown_as_it_was_typed(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    script = "<script>document.title = 'owned'</script>"
    picture = "<img src=x onerror=\"document.title = 'owned'\">&amp;<b>"
    async with visiting(browser, server.url) as ann, visiting(browser, server.url) as bob:
        mine, theirs = await ann.tab(), await bob.tab()
        await post(mine, script, name=picture)
        await post(mine, picture, name=script)
        for page in (mine, theirs):
            await expect(page.locator(".message")).to_have_count(2)
            assert await shown(page) == [script, picture]
            names = await page.locator(".chatt h2").all_text_contents()
            assert names == [picture, script]
            assert await page.title() == "Chatter"
            assert await page.locator("#feed :is(script, img, b)").count() == 0
    assert len((await client.get("/getchatts")).json()) == 2


async def test_the_name_is_remembered_and_the_time_is_the_readers(
    browser: Browser, server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    await database.execute(
        "INSERT INTO chatts (name, message, time) VALUES ('ann', 'hi', '2024-02-29T20:15:00Z')"
    )
    async with visiting(browser, server.url, timezone_id="Asia/Tokyo") as ann:
        page = await ann.tab()
        time = page.locator("time")
        assert await time.get_attribute("datetime") == "2024-02-29T20:15:00.000000Z"
        assert await time.text_content() == "1 Mar 2024, 05:15"
        assert "Friday" in str(await time.get_attribute("title"))
        await post(page, "Remember me", name="Zoë")
        await expect_shown(page, "hi", "Remember me")
        await page.reload()
        await expect(page.get_by_label("Name", exact=True)).to_have_value("Zoë")
    assert len((await client.get("/getchatts")).json()) == 2


# Sending. -----------------------------------------------------------------------------------------


UNLIMITED = -1


async def limit_uploads(session: CDPSession, bytes_per_second: int) -> None:
    """Limit what the page of this session sends."""
    conditions = {"offline": False, "latency": 0, "downloadThroughput": UNLIMITED}
    await session.send(
        "Network.emulateNetworkConditions", conditions | {"uploadThroughput": bytes_per_second}
    )


async def test_the_progress_of_an_upload_is_shown_and_the_chatt_comes_once(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    async with visiting(browser, server.url) as ann:
        page = await ann.tab()
        session = await ann.context.new_cdp_session(page)
        await limit_uploads(session, 200_000)
        await post(page, "Slowly", image=photo(1500, 1000))
        bar = page.get_by_role("progressbar", name="Upload")
        await expect(bar).to_be_visible()
        moved = "percent => document.querySelector('progress').value > percent"
        await page.wait_for_function(moved, arg=5)
        early = await bar.evaluate("bar => bar.value")
        await page.wait_for_function(moved, arg=early + 10)
        await expect(page.get_by_role("button", name="Sending…")).to_be_disabled()
        await limit_uploads(session, UNLIMITED)
        await expect_shown(page, "Slowly")
        await expect(bar).to_be_hidden()
    assert len((await client.get("/getchatts")).json()) == 1


async def test_a_chatt_whose_answer_was_lost_is_sent_again_and_stored_once(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    keys = []
    is_told = anyio.Event()

    async def lose_first_answer(route: Route) -> None:
        if route.request.method != "POST":
            await route.continue_()
            return
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            await is_told.wait()
            await route.continue_()
            return
        await route.fetch()
        await route.abort("connectionreset")

    async with visiting(browser, server.url, may_fail=True) as ann:
        page = await ann.tab()
        await page.route("**/v1/chatts", lose_first_answer)
        await post(page, "Once")
        await expect(
            page.get_by_text("The server cannot be reached. Trying again…")
        ).to_be_visible()
        is_told.set()
        await expect(page.get_by_label("Message", exact=True)).to_be_empty()
        await expect_shown(page, "Once")
        await post(page, "Once")  # what is written again is another chatt
        await expect_shown(page, "Once", "Once")
    assert keys[0] == keys[1] != keys[2]
    assert len((await client.get("/getchatts")).json()) == 2


async def test_an_upload_can_be_stopped_and_sent_after_all(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    async with visiting(browser, server.url, may_fail=True) as ann:
        page = await ann.tab()
        session = await ann.context.new_cdp_session(page)
        await limit_uploads(session, 50_000)
        await post(page, "Later", image=photo())
        await page.get_by_role("button", name="Stop").click()
        await expect(page.get_by_text("Stopped.")).to_be_visible()
        await limit_uploads(session, UNLIMITED)
        await page.get_by_role("button", name="Send").click()
        await expect_shown(page, "Later")
    assert len((await client.get("/getchatts")).json()) == 1


async def test_what_the_server_refuses_is_said_in_a_sentence_and_stays_in_the_form(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    async with visiting(browser, server.url, may_fail=True) as ann:
        page = await ann.tab()
        await post(page, "Look", image=samples.NEITHER["html"])
        refused = await client.post(
            "/v1/chatts",
            data={"name": "ann", "message": "Look"},
            files={"image": samples.NEITHER["html"]},
        )
        await expect(page.get_by_role("alert")).to_have_text(problem(refused, 415))
        await expect(page.get_by_label("Message", exact=True)).to_have_value("Look")
        await page.get_by_role("button", name="Remove the picture").click()
        await page.get_by_role("button", name="Send").click()
        await expect_shown(page, "Look")
        await expect(page.get_by_role("alert")).to_have_count(0)


async def test_what_cannot_be_sent_is_said_before_it_is_sent(
    browser: Browser, start_server: StartServer, client: httpx2.AsyncClient
) -> None:
    server = start_server(NAME_MAX_LENGTH="5", MESSAGE_MAX_LENGTH="8", MEDIA_MAX_SIZE="2000")
    async with visiting(browser, server.url) as ann:
        page = await ann.tab()
        alert = page.get_by_role("alert")
        await page.get_by_label("Message", exact=True).fill("8 of 8 !")
        await expect(page.get_by_text("0 characters left")).to_be_visible()  # it knows the limits
        await post(page, "hi", name=" ")
        await expect(alert).to_have_text("Please enter your name.")
        await expect(page.get_by_label("Name", exact=True)).to_be_focused()
        await post(page, "hi", name="sixsix")
        await expect(alert).to_have_text("The name is too long: it may have 5 characters.")
        await post(page, " ")
        await expect(alert).to_have_text("Please write a message.")
        await expect(page.get_by_label("Message", exact=True)).to_be_focused()
        # Characters count, not UTF-16's halves of them.
        await post(page, "😀" * 9)
        await expect(alert).to_have_text("The message has 9 characters; it may have 8.")
        await expect(page.get_by_text("-1 characters left")).to_be_visible()
        # The server counts as the page does, also the two characters of a line's end in a form.
        await post(page, "😀" * 8)
        await expect_shown(page, "😀" * 8)
        await post(page, "1234567\n", image=samples.PNG)
        await expect(alert).to_have_text("The message has 9 characters; it may have 8.")
        await page.get_by_label("Message", exact=True).fill("123456\n")
        await page.get_by_role("button", name="Send").click()
        await expect_shown(page, "😀" * 8, "123456\n")
        movie = upload("a.mp4", "video/mp4", bytes(2001))
        await page.get_by_label("Add video").set_input_files(movie)
        await expect(alert).to_contain_text("This file is too large")
    assert len((await client.get("/getchatts")).json()) == 2


# Deleting. ----------------------------------------------------------------------------------------


async def test_ones_own_chatt_is_deleted_in_all_tabs_and_nobody_elses(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    await client.post("/postchatt", json={"name": "bob", "message": "stays"})
    async with visiting(browser, server.url) as ann, visiting(browser, server.url) as bob:
        mine, also_mine, theirs = await ann.tab(), await ann.tab(), await bob.tab()
        await post(mine, "goes")
        for page in (mine, also_mine, theirs):
            await expect_shown(page, "stays", "goes")
        await expect(mine.get_by_role("button", name="Delete")).to_have_count(1)
        await expect(theirs.get_by_role("button", name="Delete")).to_have_count(0)
        await also_mine.reload()  # the tab knows it from what is kept in the browser
        await also_mine.get_by_role("button", name="Delete").click()
        await also_mine.get_by_role("button", name="Keep it").click()
        await expect_shown(also_mine, "stays", "goes")
        await also_mine.get_by_role("button", name="Delete").click()
        await also_mine.get_by_role("button", name="Delete it").click()
        for page in (mine, also_mine, theirs):
            await expect_shown(page, "stays")
    assert [row[1] for row in (await client.get("/getchatts")).json()] == ["stays"]


async def test_a_browser_that_keeps_nothing_posts_and_deletes_as_well(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    async with visiting(browser, server.url) as ann:
        await ann.context.add_init_script(
            "Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied') }})"
        )
        page = await ann.tab()
        await post(page, "goes")
        await page.get_by_role("button", name="Delete").click()
        await page.get_by_role("button", name="Delete it").click()
        await expect(page.locator(".chatt")).to_have_count(0)
    assert (await client.get("/getchatts")).json() == []


# Connections that drop. ---------------------------------------------------------------------------


async def test_somebody_who_was_offline_is_told_so_and_misses_nothing(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    async with visiting(browser, server.url, may_fail=True) as ann:
        page = await ann.tab()
        await post(page, "before")
        await expect_shown(page, "before")
        await go_offline(page)
        await expect(page.get_by_role("status")).to_have_text("Connection lost. Trying again…")
        for message in ("first", "second"):
            await client.post("/postchatt", json={"name": "bob", "message": message})
        await ann.context.set_offline(offline=False)
        await expect_shown(page, "before", "first", "second")
        await expect(page.get_by_role("status")).to_have_text("Live")


async def go_offline(page: Page) -> None:
    """Take the network away, as far as the browser's emulation of that goes.

    It leaves connections that are open alone, and the page may hear of it before new ones fail: so
    the page is told once more when they do.
    """
    await page.context.set_offline(offline=True)
    await page.wait_for_function("() => fetch('livez').then(() => false, () => true)")
    await page.evaluate("dispatchEvent(new Event('offline'))")


async def test_a_server_that_stops_and_starts_again_is_found_again_and_nothing_is_missed(
    browser: Browser, start_server: StartServer, own_database: str, psql: Connection
) -> None:
    server = start_server(DATABASE_URL=own_database)
    async with visiting(browser, server.url, may_fail=True) as ann:
        page = await ann.tab()
        await post(page, "before")
        await expect_shown(page, "before")
        await anyio.to_thread.run_sync(server.stop)
        await expect(page.get_by_role("status")).to_contain_text("Trying again…")
        await post(page, "written meanwhile")
        await expect(page.get_by_role("alert")).to_contain_text("Trying again…")
        await psql.execute("INSERT INTO chatts (name, message) VALUES ('bob', 'missed?')")
        await start_again(start_server, server, own_database)
        await expect_shown(page, "before", "missed?", "written meanwhile")
        await expect(page.get_by_role("status")).to_have_text("Live")


async def test_what_is_posted_between_the_list_and_the_stream_is_not_missed(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    async def post_before(route: Route) -> None:
        await client.post("/postchatt", json={"name": "bob", "message": "between"})
        await route.continue_()

    async with visiting(browser, server.url) as ann:
        await ann.context.route("**/v1/stream*", post_before)
        await expect_shown(await ann.tab(), "between")


async def test_a_feed_whose_past_is_another_one_is_shown_anew(
    browser: Browser, server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    await client.post("/postchatt", json={"name": "bob", "message": "gone"})
    async with visiting(browser, server.url) as ann:
        page = await ann.tab()
        await expect_shown(page, "gone")
        async with database.transaction():
            await database.execute("TRUNCATE chatts")
            await database.execute("INSERT INTO chatts (name, message) VALUES ('bob', 'restored')")
        await expect_shown(page, "restored")
        await client.post("/postchatt", json={"name": "bob", "message": "and on"})
        await expect_shown(page, "restored", "and on")


async def start_again(start_server: StartServer, former: Server, database_url: str) -> None:
    """Start a server where another one was."""
    port = former.url.rpartition(":")[2]
    start = partial(start_server, "--port", port, DATABASE_URL=database_url)
    await anyio.to_thread.run_sync(start)


# Long feeds. --------------------------------------------------------------------------------------


async def test_older_chatts_come_as_one_scrolls_and_what_is_read_stays_in_its_place(
    browser: Browser, server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    await insert_chatts(database, 120)
    async with visiting(browser, server.url) as ann:
        page = await ann.tab()
        await expect(page.get_by_text("119", exact=True)).to_be_in_viewport()
        assert (await shown(page))[-50:] == [str(n) for n in range(70, 120)]
        read = page.get_by_text("75", exact=True)
        place = await read.evaluate(  # before the page can have noticed
            """text => {
              text.scrollIntoView({block: 'start'});
              const {x, y, width, height} = text.getBoundingClientRect();
              return {x, y, width, height};
            }"""
        )
        await expect(page.locator(".chatt")).to_have_count(100)
        assert await read.bounding_box() == place
        await page.locator("#scroller").press("Home")
        await expect(page.locator(".chatt")).to_have_count(120)
        assert await shown(page) == [str(n) for n in range(120)]
        await page.locator("#scroller").press("Home")
        await expect(page.get_by_text("0", exact=True)).to_be_in_viewport()
        # A key scrolls smoothly: the oldest is in sight before the page has come to rest.
        await expect(page.locator("#scroller")).to_have_js_property("scrollTop", 0)

        # What is new does not take the reader away, but says that it is there.
        place = await page.get_by_text("2", exact=True).bounding_box()
        await client.post("/postchatt", json={"name": "bob", "message": "new"})
        await expect(page.get_by_role("button", name="Show the new chatt")).to_be_visible()
        assert await page.get_by_text("2", exact=True).bounding_box() == place
        await page.get_by_role("button", name="Show the new chatt").click()
        await expect(page.get_by_text("new", exact=True)).to_be_in_viewport()
        await expect(page.get_by_role("button", name="Show the new chatt")).to_be_hidden()


async def test_a_page_that_is_open_for_long_does_not_grow_for_ever(
    browser: Browser, server: Server, client: httpx2.AsyncClient, database: Connection
) -> None:
    async with visiting(browser, server.url) as ann:
        page = await ann.tab()
        await insert_chatts(database, 600)
        await client.post("/postchatt", json={"name": "bob", "message": "last"})
        await expect(page.get_by_text("last", exact=True)).to_be_in_viewport()
        await expect(page.locator(".chatt")).to_have_count(500)
        assert await shown(page) == [*(str(n) for n in range(101, 600)), "last"]
        # What went is still there to be scrolled to.
        await page.locator("#scroller").press("Home")
        await expect(page.get_by_text("100", exact=True)).to_be_attached()


# For everybody. -----------------------------------------------------------------------------------


SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


class AxeNode(TypedDict):
    html: str


class AxeViolation(TypedDict):
    id: str
    impact: str
    nodes: list[AxeNode]


async def faults_for_axe(page: Page) -> list[str]:
    """What axe-core finds that is serious or critical."""
    faults = []
    for scheme in SCHEMES:
        await page.emulate_media(color_scheme=scheme)
        found: list[AxeViolation] = await page.evaluate("axe.run().then(found => found.violations)")
        faults += [
            f"{scheme}: {fault['id']}: {[node['html'] for node in fault['nodes']]}"
            for fault in found
            if fault["impact"] in {"serious", "critical"}
        ]
    return faults


async def crowd(client: httpx2.AsyncClient) -> None:
    """Post what is hard to show."""
    chatts = [
        {"name": "ann", "message": "Hello!"},
        {"name": "W" * 255, "message": "W" * 4096},
        {"name": "שלום", "message": "مرحبا بالعالم ABC"},
        {"name": "a\u202eb", "message": "\n" * 100 + "end"},
        {"name": "Z" + "\u0301" * 60, "message": "Z" + "\u0301" * 400},
    ]
    for chatt in chatts:
        assert (await client.post("/v1/chatts", json=chatt)).status_code == 201
    for image in (photo(2000, 20), photo(20, 2000), photo()):
        uploads = {"image": image, "video": samples.WEBM}
        answer = await client.post(
            "/v1/chatts", data={"name": "bob", "message": "Look"}, files=uploads
        )
        assert answer.status_code == 201, answer.text


async def test_axe_finds_nothing_serious_in_light_and_dark(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    await crowd(client)
    async with visiting(
        browser,
        server.url,
        may_fail=True,
        bypass_csp=True,  # for axe, which is no part of the page
        reduced_motion="reduce",  # nothing is faded in while its colours are looked at
    ) as ann:
        page = await ann.tab()
        await page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text())
        await post(page, "Mine", image=samples.NEITHER["text"])
        await expect(page.get_by_role("alert")).to_contain_text("picture")
        assert await faults_for_axe(page) == []
        await page.get_by_role("button", name="Remove the picture").click()
        await page.get_by_role("button", name="Send").click()
        await page.get_by_role("button", name="Delete").click()
        assert await faults_for_axe(page) == []
        await page.get_by_role("button", name="Keep it").click()
        await page.locator(".picture").last.click()
        assert await faults_for_axe(page) == []


async def test_nothing_is_wider_than_a_narrow_phone(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    await crowd(client)
    async with visiting(browser, server.url, viewport={"width": 320, "height": 568}) as ann:
        page = await ann.tab()
        await post(page, "Mine", name="ann")
        await page.get_by_role("button", name="Delete").wait_for()
        await page.get_by_label("Add picture").set_input_files(
            upload("x" * 200, "image/jpeg", photo())
        )
        await page.get_by_label("Message", exact=True).fill("y" * 4000)
        more = page.get_by_role("button", name="Show all")
        while await more.count():
            await more.first.click()
        wide = await page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter((element) => {
              const box = element.getBoundingClientRect();
              const isCut = element.clientWidth && element.scrollWidth > element.clientWidth;
              const isOut = box.width && (box.right > 320 || box.left < 0);
              return isOut || (isCut && !element.matches(".unseen"));
            }).map((element) => element.outerHTML.slice(0, 200))"""
        )
        assert wide == []
        scrolls = "[document.documentElement, document.querySelector('#scroller')]"
        assert await page.evaluate(f"{scrolls}.every(e => e.scrollWidth <= e.clientWidth)")
        # The feed keeps a part of the screen.
        assert await page.locator("#scroller").evaluate("e => e.clientHeight") > 100


async def test_a_keyboard_is_enough(
    browser: Browser, server: Server, client: httpx2.AsyncClient
) -> None:
    async with visiting(browser, server.url, reduced_motion="reduce") as ann:
        page = await ann.tab()
        keyboard = page.keyboard
        await keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Write a chatt")).to_be_focused()
        await keyboard.press("Enter")
        await expect(page.get_by_label("Message", exact=True)).to_be_focused()
        await keyboard.press("Shift+Tab")
        await keyboard.type("ann")
        await keyboard.press("Tab")
        await keyboard.type("one")
        await keyboard.press("Control+Enter")
        await expect_shown(page, "one")
        await expect(page.get_by_label("Message", exact=True)).to_be_focused()
        await keyboard.type("two")
        for name in ("Add picture", "Add video"):
            await keyboard.press("Tab")
            await expect(page.get_by_label(name)).to_be_focused()
        await keyboard.press("Tab")
        await expect(page.get_by_role("button", name="Send")).to_be_focused()
        await keyboard.press("Enter")
        await expect_shown(page, "one", "two")
        await page.get_by_role("button", name="Delete").last.focus()
        await keyboard.press("Enter")
        await expect(page.get_by_role("button", name="Keep it")).to_be_focused()
        await keyboard.press("Escape")
        await expect(page.get_by_role("button", name="Delete").last).to_be_focused()
        await keyboard.press("Enter")
        await keyboard.press("Tab")
        await keyboard.press("Enter")
        await expect_shown(page, "one")
        await expect(page.get_by_role("log")).to_be_focused()
        motion = "getComputedStyle(document.querySelector('.chatt')).animationName"
        assert await page.evaluate(motion) == "none"
    assert len((await client.get("/getchatts")).json()) == 1


# How it is served. --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/web/app.js", "text/javascript; charset=utf-8"),
        ("/web/app.css", "text/css; charset=utf-8"),
        ("/web/icon.svg", "image/svg+xml"),
    ],
)
async def test_each_file_of_the_page_is_checked_for_changes_and_holds_to_the_policy(
    client: httpx2.AsyncClient, path: str, media_type: str
) -> None:
    answer = await client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; media-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    head = await client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == answer.headers["content-length"]
    again = await client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == answer.headers["etag"]
    other = await client.get(path, headers={"If-None-Match": '"other"'})
    assert other.content == answer.content
    assert other.headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize("path", ["/", "/web/app.js", "/docs", "/openapi.json"])
async def test_what_stays_the_same_comes_compressed_to_those_who_accept_it(
    client: httpx2.AsyncClient, path: str
) -> None:
    gzipped = await client.get(path, headers={"Accept-Encoding": "gzip"})
    plain = await client.get(path, headers={"Accept-Encoding": "identity"})
    assert gzipped.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert gzipped.content == plain.content
    assert int(gzipped.headers["content-length"]) < int(plain.headers["content-length"]) / 2
    assert gzipped.headers["etag"] != plain.headers["etag"]
    for answer in (gzipped, plain):
        assert answer.headers["vary"] == "Accept-Encoding"
        # Whose bytes they are, the tag tells: that of the other form is not this form's.
        for other in (gzipped, plain):
            again = await client.get(
                path,
                headers={
                    "Accept-Encoding": answer.request.headers["accept-encoding"],
                    "If-None-Match": other.headers["etag"],
                },
            )
            assert again.status_code == (304 if answer is other else 200)


@pytest.mark.parametrize("name", ["app.py", "..%2Fviews.py", "%2e%2e/views.py", "x" * 300, "INDEX"])
async def test_there_are_no_other_files(client: httpx2.AsyncClient, name: str) -> None:
    problem(await client.get(f"/web/{name}"), 404)


async def test_pictures_under_the_public_address_are_let_through(
    start_server: StartServer,
) -> None:
    server = start_server(PUBLIC_URL="https://bücher.example:8443/chatter")
    async with client_of(server) as client:
        policy = (await client.get("/")).headers["content-security-policy"]
    for source in ("img-src", "media-src"):
        assert f"{source} 'self' https://xn--bcher-kva.example:8443;" in policy
