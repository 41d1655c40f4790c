"""Takes the README's pictures of the web client: `python -m tests.screenshots`."""

import io
from pathlib import Path
from typing import Final

import anyio
import httpx2
from PIL import Image, ImageDraw, ImageFilter

from tests.browser import Options, open_browser, visiting
from tests.process import ROOT, Server, open_folder

FOLDER: Final = ROOT / "docs" / "img"
Colour = tuple[int, int, int]


def sky(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    column = Image.linear_gradient("L").resize(size)
    return Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), column)


def lake() -> Image.Image:
    """A red sun above mountains, and the water below them."""
    image = sky((1200, 700), (58, 76, 122), (244, 170, 120))
    draw = ImageDraw.Draw(image)
    draw.ellipse((560, 250, 700, 390), fill=(255, 226, 170))
    draw.polygon(
        [(0, 430), (230, 250), (470, 440), (720, 300), (1200, 450), (1200, 470), (0, 470)],
        (72, 70, 104),
    )
    draw.polygon([(300, 470), (620, 370), (980, 260), (1200, 380), (1200, 470)], (48, 52, 84))
    water = image.crop((0, 240, 1200, 470)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    image.paste(water.filter(ImageFilter.GaussianBlur(5)), (0, 470))
    return image


async def fill(client: httpx2.AsyncClient) -> None:
    """Post what the pictures show."""
    chatts = [
        ("Mira", "Good morning! Who is coming to the lake on Saturday?"),
        ("Jonas", "We are. The train at 9:14, second carriage.\nI bring the large blanket."),
        ("Mira", "It looked like this last night:"),
        ("שירה", "איזה יופי! גם אני באה."),
    ]
    file = io.BytesIO()
    lake().save(file, "JPEG", quality=90)
    for name, message in chatts:
        chatt = {"name": name, "message": message}
        if message.endswith(":"):
            picture = {"image": file.getvalue()}
            answer = await client.post("/v1/chatts", data=chatt, files=picture)
        else:
            answer = await client.post("/v1/chatts", json=chatt)
        answer.raise_for_status()


async def main() -> None:
    desktop: Options = {"viewport": {"width": 960, "height": 920}, "color_scheme": "light"}
    phone: Options = {"viewport": {"width": 390, "height": 760}, "color_scheme": "dark"}
    with open_folder() as folder, Server(folder) as server:
        async with httpx2.AsyncClient(base_url=server.url) as client, open_browser() as browser:
            await fill(client)
            for name, options in (("web-desktop", desktop), ("web-phone", phone)):
                async with visiting(browser, server.url, **options) as mira:
                    page = await mira.tab()
                    await page.get_by_label("Name", exact=True).fill("Mira")
                    await page.get_by_label("Message", exact=True).fill("See you on Saturday!")
                    if name == "web-desktop":
                        await page.get_by_role("button", name="Send").click()
                        await page.get_by_role("button", name="Delete").wait_for()
                    loaded = "() => document.querySelector('.picture img').naturalWidth"
                    await page.wait_for_function(loaded)
                    screenshot = await page.screenshot(animations="disabled")
                    save(screenshot, FOLDER / f"{name}.png")


def save(screenshot: bytes, path: Path) -> None:
    """Keep it small: 256 colours are enough for these pictures."""
    image = Image.open(io.BytesIO(screenshot)).convert("RGB").quantize(256)
    image.save(path, optimize=True)


if __name__ == "__main__":
    anyio.run(main)
