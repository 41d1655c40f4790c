"""Pictures are described rightly, and a hostile one harms nothing but the worker."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import struct
import subprocess
import sys
import zlib
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import pillow_heif
import psutil
import pytest
from PIL import Image, ImageCms, ImageOps

from chatterd import pictures
from chatterd.errors import Problem
from chatterd.pictures import PictureReader
from tests import samples
from tests.process import DEADLINE_SECONDS, environment, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Describe: TypeAlias = Callable[[bytes], "asyncio.Task[Picture]"]

pillow_heif.register_heif_opener()


class Picture(NamedTuple):
    width: int
    height: int
    thumbnail: bytes


async def described(reader: PictureReader, path: Path) -> Picture:
    """All that is to be known of a picture."""
    thumbnail = await reader.thumbnail(path)
    return Picture(*await reader.measure(path), thumbnail)


MAX_PIXELS = 50_000_000
QUEUE_LIMIT = 64
CORNERS = RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 160, 30), (30, 30, 220), (220, 220, 30)
# What a lossy format may change of a channel.
TOLERANCE = 12


@pytest.fixture(scope="module")
async def reader() -> PictureReader:
    """One for all tests, in one event loop: a worker is not started for each."""
    return PictureReader(MAX_PIXELS)


@pytest.fixture
def describe(reader: PictureReader, tmp_path: Path) -> Describe:
    """Have these bytes described, from a file."""

    def start(data: bytes) -> asyncio.Task[Picture]:
        path = tmp_path / "picture"
        path.write_bytes(data)
        return asyncio.create_task(described(reader, path))

    return start


def quarters(size: int = 64) -> Image.Image:
    """Red and green above blue and yellow."""
    image = Image.new("RGB", (2, 2))
    for place, colour in zip([(0, 0), (1, 0), (0, 1), (1, 1)], CORNERS, strict=True):
        image.putpixel(place, colour)
    return image.resize((size, size), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(picture: Picture) -> Image.Image:
    """The thumbnail, which is WebP with nothing in it but pixels."""
    image = Image.open(BytesIO(picture.thumbnail))
    assert image.format == "WEBP"
    assert not {"exif", "icc_profile", "xmp"} & set(image.info)
    return image


def assert_colours(image: Image.Image, *colours: tuple[int, ...]) -> None:
    """Check the middle of each quarter: above left, above right, below left, below right."""
    width, height = image.size
    places = [(x, y) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
    found = [image.getpixel(place) for place in places]
    for pixel, colour in zip(found, colours, strict=True):
        assert isinstance(pixel, tuple), found
        assert len(pixel) == len(colour), found
        assert all(abs(a - b) <= TOLERANCE for a, b in zip(pixel, colour, strict=True)), found


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(  # noqa: PLR0913 - the fields of its header
    width: int, height: int, depth: int, colour: int, data: bytes, *, interlaced: bool = False
) -> bytes:
    """A PNG of any header, with this compressed data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def zeros(size: int) -> bytes:
    """As many zeros, compressed: a thousandth of it."""
    compressor = zlib.compressobj(1)
    block = bytes(2**20)
    parts = [compressor.compress(block) for _ in range(size // len(block))]
    return b"".join([*parts, compressor.compress(bytes(size % len(block))), compressor.flush()])


@cache
def slow_png() -> bytes:
    """49 million pixels in seven passes, which take a second at least."""
    return png(7000, 7000, 16, 6, zeros(7000 * 7000 * 8 + 20_000), interlaced=True)


def workers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children()
        if process.status() != psutil.STATUS_ZOMBIE and "anyio.to_process" in process.cmdline()
    ]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does, while the event loop runs on."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110 - a process sets no event
            await asyncio.sleep(0.005)


async def busy() -> psutil.Process:
    """The worker, as soon as it decodes: its memory grows by more than all else takes."""
    await until(lambda: bool(workers()) and workers()[0].memory_info().rss > 120 * 2**20)
    return workers()[0]


async def assert_refused(describing: asyncio.Task[Picture], code: str, *words: str) -> None:
    with pytest.raises(Problem) as refused:
        await describing
    assert refused.value.code == code
    for word in words:
        assert word in refused.value.detail


# Sizes


@pytest.mark.parametrize(
    ("size", "small"),
    [
        ((1, 1), (1, 1)),
        ((3, 2), (3, 2)),
        ((512, 511), (512, 511)),
        ((513, 513), (512, 512)),
        ((4000, 100), (512, 13)),
        ((100, 4000), (13, 512)),
        ((1, 10000), (1, 512)),
        ((2000, 1500), (512, 384)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
async def test_the_longest_side_of_a_thumbnail_is_512_pixels_and_nothing_is_enlarged(
    describe: Describe, kind: str, size: tuple[int, int], small: tuple[int, int]
) -> None:
    picture = await describe(encoded(Image.new("RGB", size, RED), kind))
    assert (picture.width, picture.height) == size
    assert opened(picture).size == small
    assert_colours(opened(picture), RED, RED, RED, RED)


@pytest.mark.parametrize("sample", samples.IMAGES, ids=[each.kind for each in samples.IMAGES])
async def test_the_smallest_file_of_each_kind_has_a_thumbnail(
    describe: Describe, sample: samples.Sample
) -> None:
    picture = await describe(sample.data)
    assert opened(picture).size == (picture.width, picture.height)


@pytest.mark.parametrize("data", samples.NEITHER.values(), ids=samples.NEITHER)
async def test_what_is_no_picture_is_refused(describe: Describe, data: bytes) -> None:
    await assert_refused(describe(data), "image-undecodable")


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO"])
async def test_a_picture_of_a_kind_that_is_not_accepted_is_refused(
    describe: Describe, kind: str
) -> None:
    await assert_refused(describe(encoded(quarters(), kind)), "image-undecodable")


# Right way up

# Red, green, blue and yellow, as a viewer shows the four corners for each Exif orientation.
UPRIGHT = {
    1: (RED, GREEN, BLUE, YELLOW),
    2: (GREEN, RED, YELLOW, BLUE),
    3: (YELLOW, BLUE, GREEN, RED),
    4: (BLUE, YELLOW, RED, GREEN),
    5: (RED, BLUE, GREEN, YELLOW),
    6: (BLUE, RED, YELLOW, GREEN),
    7: (YELLOW, GREEN, BLUE, RED),
    8: (GREEN, YELLOW, RED, BLUE),
}


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
async def test_a_picture_is_shown_right_way_up(
    describe: Describe, orientation: int, kind: str
) -> None:
    image = quarters(640).resize((640, 320))
    picture = await describe(encoded(image, kind, exif=exif(orientation)))
    lies = orientation < 5
    assert (picture.width, picture.height) == ((640, 320) if lies else (320, 640))
    assert opened(picture).size == ((512, 256) if lies else (256, 512))
    assert_colours(opened(picture), *UPRIGHT[orientation])


@pytest.mark.parametrize("orientation", UPRIGHT)
async def test_a_heic_is_turned_once(describe: Describe, orientation: int) -> None:
    image = quarters(640).resize((640, 320))
    # The encoder writes down how to turn it, as cameras do, besides what stands in Exif.
    data = encoded(image, "HEIF", exif=exif(orientation).tobytes(), quality=90)
    assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    picture = await describe(data)
    lies = orientation < 5
    assert (picture.width, picture.height) == ((640, 320) if lies else (320, 640))
    assert_colours(opened(picture), *UPRIGHT[orientation])


async def test_exif_alone_does_not_turn_a_heic(describe: Describe) -> None:
    data = encoded(quarters(), "HEIF", exif=exif(6), quality=90)
    assert b"Exif" in data
    assert b"irot" not in data
    assert_colours(opened(await describe(data)), *CORNERS)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
async def test_an_orientation_that_there_is_not_turns_nothing(
    describe: Describe, orientation: int
) -> None:
    picture = await describe(encoded(quarters(), "JPEG", exif=exif(orientation)))
    assert_colours(opened(picture), *CORNERS)


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0junk"])
async def test_a_broken_exif_block_turns_nothing(describe: Describe, block: bytes) -> None:
    picture = await describe(encoded(quarters(), "JPEG", exif=block))
    assert_colours(opened(picture), *CORNERS)


# Right colours


def swapping_profile() -> bytes:
    """A profile in which the channel red means blue and the other way round."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for at in range(132, 132 + 12 * int.from_bytes(profile[128:132]), 12):
        name = bytes(profile[at : at + 4])
        if name in {b"rXYZ", b"bXYZ"}:
            profile[at : at + 4] = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}[name]
    return bytes(profile)


SWAPPED = tuple((blue, green, red) for red, green, blue in CORNERS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "HEIF"])
async def test_the_colours_are_those_of_the_embedded_profile(describe: Describe, kind: str) -> None:
    data = encoded(quarters(), kind, icc_profile=swapping_profile(), quality=90)
    assert_colours(opened(await describe(data)), *SWAPPED)


async def test_a_profile_counts_with_a_palette_and_with_transparency(describe: Describe) -> None:
    image = quarters().quantize(4)
    data = encoded(image, "PNG", icc_profile=swapping_profile())
    assert_colours(opened(await describe(data)), *SWAPPED)
    image = quarters()
    image.putalpha(100)
    data = encoded(image, "PNG", icc_profile=swapping_profile())
    assert_colours(opened(await describe(data)), *[(*colour, 100) for colour in SWAPPED])


@pytest.mark.parametrize(
    "profile", [b"junk", swapping_profile()[:200], swapping_profile().replace(b"RGB ", b"CMYK")]
)
async def test_a_broken_profile_is_ignored(describe: Describe, profile: bytes) -> None:
    data = encoded(quarters(), "PNG", icc_profile=profile)
    assert_colours(opened(await describe(data)), *CORNERS)


async def test_a_cmyk_jpeg_has_its_colours(describe: Describe) -> None:
    data = encoded(quarters().convert("CMYK"), "JPEG", quality=95)
    assert_colours(opened(await describe(data)), *CORNERS)


async def test_a_ycck_jpeg_has_its_colours(describe: Describe) -> None:
    # The YCbCr of the inks, written as if it were CMYK, which Pillow inverts, and then marked.
    *inks, black = quarters().convert("CMYK").split()
    parts = Image.merge("RGB", inks).convert("YCbCr").split()
    image = Image.merge("CMYK", (*map(ImageOps.invert, parts), black))
    data = encoded(image, "JPEG", quality=95)
    assert data.count(b"Adobe\0d\0\0\0\0\0") == 1
    data = data.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2")
    assert_colours(opened(await describe(data)), *CORNERS)


GREYS = (20, 90, 160, 240)


def grey_quarters() -> Image.Image:
    image = Image.frombytes("L", (2, 2), bytes(GREYS))
    return image.resize((64, 64), Image.Resampling.NEAREST)


async def test_grey_of_8_and_16_bits_is_as_bright_as_it_was(describe: Describe) -> None:
    wanted = [(grey, grey, grey) for grey in GREYS]
    assert_colours(opened(await describe(encoded(grey_quarters(), "JPEG"))), *wanted)
    rows = [
        bytes(byte for grey in pair for byte in [grey, 7] * 32) for pair in (GREYS[:2], GREYS[2:])
    ]
    data = zlib.compress(b"".join(b"\0" + row for row in rows for _ in range(32)))
    assert_colours(opened(await describe(png(64, 64, 16, 0, data))), *wanted)


async def test_a_picture_of_16_bits_has_its_colours(describe: Describe) -> None:
    row = b"\0" + b"".join(bytes(byte for part in RED for byte in (part, 200)) for _ in range(64))
    assert_colours(opened(await describe(png(64, 64, 16, 2, zlib.compress(row * 64)))), *[RED] * 4)


async def test_black_and_white_stay_so(describe: Describe) -> None:
    image = Image.new("1", (64, 64))
    image.paste(1, (32, 0, 64, 64))
    wanted = [(0, 0, 0), (255, 255, 255)] * 2
    assert_colours(opened(await describe(encoded(image, "PNG"))), *wanted)
    picture = await describe(encoded(image, "PNG", transparency=0))
    assert opened(picture).getchannel("A").getextrema() == (0, 255)


async def test_transparency_is_kept(describe: Describe) -> None:
    image = quarters(640)
    image.putalpha(grey_quarters().resize((640, 640), Image.Resampling.NEAREST))
    wanted = [(*colour, alpha) for colour, alpha in zip(CORNERS, GREYS, strict=True)]
    for kind in ("PNG", "WEBP"):
        data = encoded(image, kind, quality=95)
        assert_colours(opened(await describe(data)), *wanted)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
async def test_a_palette_with_transparency_keeps_both(describe: Describe, kind: str) -> None:
    image = quarters().quantize(4)
    clear = image.getpixel((48, 48))
    thumbnail = opened(await describe(encoded(image, kind, transparency=clear)))
    assert_colours(thumbnail.convert("RGB").crop((0, 0, 64, 32)), RED, GREEN, RED, GREEN)
    assert_colours(Image.merge("LA", [thumbnail.getchannel("A")] * 2), *[(255, 255)] * 3, (0, 0))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
async def test_an_animation_is_shown_by_its_first_frame(describe: Describe, kind: str) -> None:
    later = [Image.new("RGB", (64, 64), BLUE), Image.new("RGB", (64, 64), RED)]
    data = encoded(quarters(), kind, save_all=True, append_images=later, quality=95)
    thumbnail = opened(await describe(data))
    assert not getattr(thumbnail, "is_animated", False)
    assert_colours(thumbnail.convert("RGB"), *CORNERS)


# Too many pixels


def gif_of(width: int, height: int) -> bytes:
    return samples.GIF[:6] + struct.pack("<HH", width, height) + samples.GIF[10:]


@pytest.mark.parametrize(
    "data",
    [
        png(50_001, 1000, 8, 2, zlib.compress(b"")),
        gif_of(50_001, 1000),
        # The frame is larger than the picture that it belongs to.
        samples.GIF.replace(b",\0\0\0\0\2\0\2\0", b",\0\0\0\0" + struct.pack("<HH", 50_001, 1000)),
        samples.WEBP[:21] + struct.pack("<I", 16_129 | 3099 << 14) + samples.WEBP[25:],
        samples.JPEG.replace(b"\x11\x08\0\2\0\2", struct.pack(">HHH", 0x1108, 1000, 50_001)),
    ],
    ids=["png", "gif", "gif-frame", "webp", "jpeg"],
)
async def test_a_header_of_too_many_pixels_is_enough_to_refuse_a_picture(
    describe: Describe, data: bytes
) -> None:
    # None of them has the pixels: to decode them first would end in another refusal.
    pixels = "50003000" if data.startswith(b"RIFF") else "50001000"
    await assert_refused(describe(data), "image-too-many-pixels", pixels, str(MAX_PIXELS))


async def test_a_heic_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encoded(quarters(), "HEIF"))
    refusing = asyncio.create_task(described(PictureReader(64 * 64 - 1), path))
    await assert_refused(refusing, "image-too-many-pixels", "4096 pixels", "4095")
    assert (await described(PictureReader(64 * 64), path))[:2] == (64, 64)


# Broken files


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "HEIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
async def test_a_picture_that_is_cut_off_is_refused(
    describe: Describe, kind: str, share: float
) -> None:
    noise = Image.frombytes("RGB", (100, 100), random.Random(1).randbytes(30_000))  # noqa: S311
    data = encoded(noise, kind)
    await assert_refused(describe(data[: int(len(data) * share)]), "image-undecodable")


async def test_a_png_whose_compressed_data_are_broken_is_refused(describe: Describe) -> None:
    data = zlib.compress(bytes(64 * 193))
    broken = data[:20] + b"\xff\xff" + data[22:]
    await assert_refused(describe(png(64, 64, 8, 2, broken)), "image-undecodable")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
async def test_a_picture_is_measured_without_being_decoded(
    reader: PictureReader, tmp_path: Path, kind: str, orientation: int
) -> None:
    data = encoded(Image.new("RGB", (300, 200), RED), kind, exif=exif(orientation))
    if kind == "PNG":  # its Exif block, behind the pixels
        start = data.index(b"eXIf") - 4
        stop = start + 12 + int.from_bytes(data[start : start + 4])
        data = data[:start] + data[stop:-12] + data[start:stop] + data[-12:]
    path = tmp_path / "picture"
    path.write_bytes(data)
    wanted = (200, 300) if orientation >= 5 else (300, 200)
    assert await reader.measure(path) == wanted
    if kind == "JPEG":
        path.write_bytes(data[:-100])
        assert await reader.measure(path) == wanted


async def test_a_file_that_is_not_there_is_no_fault_of_a_picture(
    reader: PictureReader, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        await described(reader, tmp_path / "picture")


async def test_mutated_pictures_meet_nothing_but_a_problem(describe: Describe) -> None:
    chance = random.Random(12)  # noqa: S311 - the same in every run
    refused = 0
    for number in range(300):
        data = bytearray(samples.IMAGES[number % len(samples.IMAGES)].data)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        try:
            await describe(bytes(data))
        except Problem as problem:
            assert problem.code in {"image-undecodable", "image-too-many-pixels"}  # noqa: PT017 - either may be
            refused += 1
    assert 50 < refused < 300


# The worker


async def test_a_picture_for_which_memory_runs_out_is_refused_and_the_next_is_not(
    reader: PictureReader, tmp_path: Path
) -> None:
    quick, large = tmp_path / "quick", tmp_path / "large"
    quick.write_bytes(samples.PNG)
    # A decoder of HEIC reads the whole file.
    large.write_bytes(samples.HEIC)
    os.truncate(large, 2**32)
    await described(reader, quick)
    [worker] = workers()
    assert worker.rlimit(psutil.RLIMIT_AS)[0] < 1500 * 2**20
    assert worker.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    await assert_refused(asyncio.create_task(described(reader, large)), "image-undecodable")
    assert (await described(reader, quick)).width == 2
    # What is left of a worker without memory is not used.
    assert workers() != [worker]


async def test_the_largest_pictures_do_not_make_the_server_larger(describe: Describe) -> None:
    await describe(samples.PNG)
    before = psutil.Process().memory_info().rss
    data = png(7000, 7000, 16, 6, zeros(7000 * 56_001))
    picture = await describe(data)
    assert (picture.width, picture.height) == (7000, 7000)
    assert (await describe(samples.PNG)).width == 2
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


async def test_a_picture_whose_worker_is_killed_is_read_by_another(describe: Describe) -> None:
    describing = describe(slow_png())
    (await busy()).kill()
    assert (await describing).width == 7000


async def test_a_picture_whose_worker_dies_twice_is_refused_and_the_next_is_not(
    describe: Describe,
) -> None:
    describing = describe(slow_png())
    first = await busy()
    first.kill()
    await until(lambda: first not in workers())
    (await busy()).kill()
    await assert_refused(describing, "image-undecodable")
    assert (await describe(samples.PNG)).width == 2


async def test_a_worker_that_is_killed_while_idle_takes_no_picture_with_it(
    describe: Describe,
) -> None:
    await describe(samples.PNG)
    [worker] = workers()
    worker.kill()
    assert (await describe(samples.PNG)).width == 2
    assert workers() != [worker]


@pytest.mark.parametrize(
    ("limit", "code", "logged"),
    [
        ("processor_seconds", "image-undecodable", "A picture took more than 0.25 s to decode"),
        ("deadline_seconds", "too-many-uploads", "did not get a processor in time"),
    ],
)
async def test_a_picture_that_takes_too_long_is_refused_and_the_next_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: str, code: str, logged: str
) -> None:
    reader = PictureReader(MAX_PIXELS, **{limit: 0.25})
    slow, quick = tmp_path / "slow", tmp_path / "quick"
    slow.write_bytes(slow_png())
    quick.write_bytes(samples.PNG)
    await assert_refused(asyncio.create_task(described(reader, slow)), code)
    # Once: it is not tried again, as it is when a worker was killed. Not asyncio's: SEEN_ELSEWHERE.
    (message,) = (line for name, _, line in caplog.record_tuples if name == "chatterd.pictures")
    assert logged in message
    assert workers() == []
    reader = PictureReader(MAX_PIXELS)
    assert (await described(reader, quick)).width == 2


async def test_a_worker_that_does_not_get_to_its_next_picture_is_replaced(
    describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    await describe(samples.PNG)
    [worker] = workers()
    worker.suspend()
    monkeypatch.setattr(pictures, "_START_SECONDS", 0.25)
    await assert_refused(describe(samples.PNG), "too-many-uploads")
    monkeypatch.undo()
    assert (await describe(samples.PNG)).width == 2
    assert workers() != [worker]


async def test_only_time_on_a_processor_makes_a_picture_one_that_takes_too_long(
    tmp_path: Path,
) -> None:
    seconds = 4.0
    reader = PictureReader(MAX_PIXELS, processor_seconds=seconds)
    slow = tmp_path / "slow"
    slow.write_bytes(slow_png())
    describing = asyncio.create_task(described(reader, slow))
    worker = await busy()
    worker.suspend()
    await asyncio.wait([describing], timeout=seconds)
    assert not describing.done()
    worker.resume()
    assert (await describing).width == 7000


async def test_who_leaves_ends_the_work_on_the_picture(describe: Describe) -> None:
    describing = describe(slow_png())
    worker = await busy()
    describing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await describing
    assert not worker.is_running()
    assert (await describe(samples.PNG)).width == 2


async def test_who_leaves_while_the_worker_starts_leaves_no_second_one(describe: Describe) -> None:
    for process in workers():
        process.kill()
        await until(lambda process=process: not process.is_running())  # type: ignore[misc] # bound at once
    describing = describe(samples.PNG)
    # It runs, and has not yet said so.
    await until(lambda: bool(workers()) and workers()[0].memory_info().rss > 10 * 2**20)
    describing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await describing
    assert (await describe(samples.PNG)).width == 2
    assert len(workers()) == 1


async def test_as_many_pictures_wait_as_may_and_one_more_is_refused(
    reader: PictureReader, describe: Describe, tmp_path: Path
) -> None:
    describing = describe(slow_png())
    await busy()
    quick = tmp_path / "quick"
    quick.write_bytes(samples.PNG)
    waiting = [asyncio.create_task(described(reader, quick)) for _ in range(QUEUE_LIMIT)]
    await asyncio.wait(waiting, timeout=0)
    with pytest.raises(Problem) as refused:
        await described(reader, quick)
    assert (refused.value.status, refused.value.code) == (503, "too-many-uploads")
    assert refused.value.headers == {"Retry-After": "1"}
    assert (await describing).width == 7000
    assert {picture.width for picture in await asyncio.gather(*waiting)} == {2}


async def test_signals_for_the_server_do_not_stop_the_worker(describe: Describe) -> None:
    await describe(samples.PNG)
    [worker] = workers()
    describing = describe(slow_png())
    await busy()
    worker.send_signal(signal.SIGINT)
    worker.send_signal(signal.SIGTERM)
    assert (await describing).width == 7000
    assert workers() == [worker]


PROGRAM = """
import asyncio, signal, sys, uvloop
from pathlib import Path
from chatterd.pictures import PictureReader

async def main(path):
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    reader = PictureReader(50_000_000)
    reducing = asyncio.create_task(reader.thumbnail(path))
    if sys.argv[3] == "idle":
        print((await reducing)[:4], "PIL" in sys.modules, flush=True)
    await stopping.wait()

if __name__ == "__main__":
    factory = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}[sys.argv[1]]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main(Path(sys.argv[2])))
"""


@pytest.fixture(params=["uvloop", "asyncio"])
def program(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a program that describes a picture on this event loop, until it is stopped."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "picture").write_bytes(samples.PNG)
    (tmp_path / "slow").write_bytes(slow_png())
    started: list[subprocess.Popen[str]] = []

    def start(picture: str, until: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "program.py", request.param, picture, until],
            cwd=tmp_path,
            env=environment(tmp_path, PYTHONWARNINGS="error"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# What asyncio's thread that waits for a child says when asyncio's own `close` saw it end first.
# uvloop, which `chatterd serve` runs on, has no such thread.
SEEN_ELSEWHERE = re.compile(r"(Unknown )?child process pid \d+.* will report returncode 255\n")


async def test_a_program_ends_with_its_worker_and_prints_only_its_own(
    program: Callable[..., subprocess.Popen[str]],
) -> None:
    process = program("picture", "idle")
    assert process.stdout is not None
    # And it has not loaded Pillow.
    assert process.stdout.readline() == "b'RIFF' False\n"
    [worker] = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=DEADLINE_SECONDS)
    assert (stdout, SEEN_ELSEWHERE.sub("", stderr)) == ("", "")
    assert process.returncode == 0
    wait_until(lambda: not worker.is_running())


@pytest.mark.parametrize("doing", ["idle", "busy"])
async def test_a_worker_does_not_outlive_a_program_that_is_killed(
    program: Callable[..., subprocess.Popen[str]], doing: str
) -> None:
    process = program("picture" if doing == "idle" else "slow", doing)
    assert process.stdout is not None
    if doing == "idle":
        process.stdout.readline()
    wait_until(lambda: bool(psutil.Process(process.pid).children()))
    [worker] = psutil.Process(process.pid).children()
    if doing == "busy":
        wait_until(lambda: worker.memory_info().rss > 120 * 2**20)
    process.kill()
    wait_until(lambda: not worker.is_running())
