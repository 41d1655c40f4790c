"""What chatterd.metadata takes out of pictures and videos, and what it leaves as it is."""

from __future__ import annotations

import resource
import shutil
import tracemalloc
from typing import TYPE_CHECKING
from zlib import crc32

import pytest
from PIL import Image, ImageOps

from chatterd import media
from chatterd.metadata import Edit, Source, Uncleanable, clean, clean_beginning, edits
from chatterd.metadata.source import WINDOW
from tests import metadata_parts as parts
from tests.metadata_corpus import (
    MEDIA_TYPES,
    PLANTED,
    TRAILER,
    decoded,
    described,
    make_pictures,
    make_videos,
    pixels,
    surplus,
)
from tests.samples import IMAGES, JPEG, MP4, PNG, VIDEOS, Sample

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 9 * 2**20


class Corpus:
    """The files of real encoders, as planted and cleaned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("pictures", "videos", "clean"):
            (folder / name).mkdir()
        self.pictures = make_pictures(folder / "pictures")
        self.videos = make_videos(folder / "videos")
        for path in self.planted:
            shutil.copy(path, self.of(path))
            clean(self.of(path), MEDIA_TYPES[path.suffix])

    @property
    def planted(self) -> list[Path]:
        return self.pictures + self.videos

    @property
    def cleaned(self) -> list[Path]:
        return [self.of(path) for path in self.planted]

    def of(self, path: Path) -> Path:
        """The cleaned file that belongs to a planted one."""
        return self.folder / "clean" / path.name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


def cleaned(data: bytes, media_type: str) -> bytes:
    return parts.applied(data, edits(Source(data), media_type))


def test_every_accepted_format_can_be_cleaned() -> None:
    kinds = [kind for kind in vars(media).values() if isinstance(kind, media.Kind)]
    assert len(kinds) == 9
    for kind in kinds:
        # Whatever is said of an empty file, the format is known.
        with pytest.raises(Uncleanable):
            edits(Source(b""), kind.media_type)


def test_exiftool_finds_what_was_planted_and_in_cleaned_files_nothing_of_it(corpus: Corpus) -> None:
    found = surplus(corpus.planted)
    for path in corpus.planted:
        assert PLANTED in str(found[path.name]), path.name
    assert sum("42 deg" in str(tags) for tags in found.values()) > 20
    assert surplus(corpus.cleaned) == {}


def test_no_planted_byte_is_left(corpus: Corpus) -> None:
    for path in corpus.cleaned:
        data = path.read_bytes().lower()
        for text in (PLANTED.encode(), TRAILER, b"+42.2800", b"lavf", b"exiftool"):
            assert text not in data, (path.name, text)


def test_every_pixel_of_a_picture_is_the_same(corpus: Corpus) -> None:
    for path in corpus.pictures:
        assert list(pixels(corpus.of(path))) == list(pixels(path)), path.name


def test_every_frame_and_sound_of_a_video_is_the_same(corpus: Corpus) -> None:
    for path in corpus.videos:
        frames = decoded(path)
        assert frames.count("\n") > 50
        assert decoded(corpus.of(path)) == frames, path.name


def test_orientation_and_colour_profile_survive(corpus: Corpus) -> None:
    turned = profiles = 0
    for path in corpus.pictures:
        with Image.open(path) as before, Image.open(corpus.of(path)) as after:
            assert after.info.get("icc_profile") == before.info.get("icc_profile"), path.name
            assert after.getexif().get(0x0112, 1) == before.getexif().get(0x0112, 1), path.name
            upright = ImageOps.exif_transpose(before)
            assert ImageOps.exif_transpose(after).tobytes() == upright.tobytes(), path.name
            turned += after.getexif().get(0x0112, 1) != 1
            profiles += "icc_profile" in after.info
    assert turned >= 7
    assert profiles >= 4
    rotations = [tags.get("QuickTime:Rotation") for tags in described(corpus.cleaned).values()]
    assert 270 in rotations


def test_a_second_cleaning_changes_nothing(corpus: Corpus) -> None:
    for path in corpus.cleaned:
        before = path.read_bytes()
        with path.open("rb") as file:
            assert edits(Source(file), MEDIA_TYPES[path.suffix]) == []
        clean(path, MEDIA_TYPES[path.suffix])
        assert path.read_bytes() == before
    assert sorted(path.name for path in (corpus.folder / "clean").iterdir()) == sorted(
        path.name for path in corpus.planted
    )


def test_what_is_found_by_its_offset_is_not_moved(corpus: Corpus) -> None:
    in_place = [path for path in corpus.planted if path.suffix in {".heic", ".mp4", ".mov"}]
    assert len(in_place) >= 9
    for path in in_place:
        assert corpus.of(path).stat().st_size == path.stat().st_size, path.name


@pytest.mark.parametrize("sample", [*IMAGES, *VIDEOS], ids=lambda sample: sample.kind)
def test_the_smallest_files_can_be_cleaned(sample: Sample) -> None:
    for media_type in sample.types:
        result = cleaned(sample.data, media_type)
        assert media.sniff(result) == media.sniff(sample.data)
        assert cleaned(result, media_type) == result


def test_cleaning_tells_whether_the_file_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (JPEG, JPEG + TRAILER, JPEG[:2] + parts.segment(0xFE, parts.SECRET) + JPEG[2:]):
        path.write_bytes(data)
        assert clean(path, "image/jpeg") is (data != JPEG)
        assert path.read_bytes() == JPEG


def test_a_beginning_loses_what_tells_of_people_before_the_rest_is_there(corpus: Corpus) -> None:
    lost = 0
    for path in corpus.planted:
        data = path.read_bytes()
        begun = clean_beginning(data[:-20], MEDIA_TYPES[path.suffix]) + data[-20:]
        assert cleaned(begun, MEDIA_TYPES[path.suffix]) == corpus.of(path).read_bytes(), path.name
        lost += len(begun) < len(data)
    assert lost > 10


def test_a_file_that_cannot_be_cleaned_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(JPEG[:-2])
    with pytest.raises(Uncleanable, match="the JPEG file has no end marker"):
        clean(path, "image/jpeg")
    assert path.read_bytes() == JPEG[:-2]
    assert list(tmp_path.iterdir()) == [path]


def test_no_copy_is_left_when_the_disk_refuses(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = JPEG[:2] + parts.segment(0xFE, parts.SECRET) + JPEG[2:-2] + bytes(2**20) + JPEG[-2:]
    path.write_bytes(data)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            clean(path, "image/jpeg")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_another_file_beside_it_is_left_alone(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "file.clean"
    path.write_bytes(JPEG[:2] + parts.segment(0xFE, parts.SECRET) + JPEG[2:])
    other.write_bytes(b"other")
    with pytest.raises(FileExistsError):
        clean(path, "image/jpeg")
    assert other.read_bytes() == b"other"


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + crc32(kind + data).to_bytes(4)


LARGE_PROFILE = parts.segment(0xE2, b"ICC_PROFILE\0\2\2" + bytes(2**15)) * (SIZE // 2**15 + 1)
LARGE_COMMENT = b"!\xfe" + (b"\xff" + bytes(255)) * (SIZE // 255) + b"\0"
LARGE_ATTACHMENT = parts.element(0x1941A469, b"x" * SIZE, width=8)
LARGE = [
    pytest.param("image/jpeg", JPEG[:-2] + bytes(SIZE) + JPEG[-2:] + TRAILER, id="jpeg"),
    pytest.param("image/jpeg", JPEG + bytes(SIZE), id="jpeg with a film"),
    pytest.param(
        "image/jpeg", JPEG[:2] + LARGE_PROFILE + JPEG[2:], id="jpeg with a large colour profile"
    ),
    pytest.param(
        "image/png", PNG[:33] + png_chunk(b"iCCP", b"ann\0" + bytes(SIZE)) + PNG[33:], id="png"
    ),
    pytest.param("image/gif", parts.gif(LARGE_COMMENT), id="gif"),
    pytest.param("image/webp", parts.riff(parts.riff_chunk(b"XMP ", bytes(SIZE))), id="webp"),
    pytest.param("video/mp4", MP4 + parts.box(b"free", b"x" * SIZE), id="mp4"),
    pytest.param(
        "video/webm",
        parts.EBML + parts.element(0x18538067, LARGE_ATTACHMENT, width=8),
        id="webm",
    ),
]


@pytest.mark.parametrize(("media_type", "data"), LARGE)
def test_a_large_file_is_cleaned_with_little_memory(
    tmp_path: Path, media_type: str, data: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    assert path.stat().st_size > SIZE
    tracemalloc.start()
    try:
        clean(path, media_type)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    with path.open("rb") as file:
        assert edits(Source(file), media_type) == []


ALMOST_A_WINDOW = WINDOW - 1
OFTEN = 100


def movie_of_metadata(*offsets_of_tracks: list[int]) -> bytes:
    """A movie whose tracks of metadata have one long sample at each of the offsets."""
    tracks = [
        parts.track(
            b"meta",
            sizes=parts.numbers(0, ALMOST_A_WINDOW, 1),
            chunks=parts.numbers(0, 1, 1, 1, 1),
            offsets=parts.box(b"stco", parts.numbers(0, len(offsets), *offsets)),
        )
        for offsets in offsets_of_tracks
    ]
    start = MP4.index(b"moov") - 4
    data = parts.box(b"mdat", b"x" * (OFTEN + ALMOST_A_WINDOW))
    size = int.from_bytes(MP4[start : start + 4])
    return MP4[:start] + data + parts.box(b"moov", MP4[start + 8 : start + size], *tracks)


@pytest.mark.parametrize(
    "offsets_of_tracks",
    [
        pytest.param([[MP4.index(b"moov") + 4] * OFTEN], id="one sample often"),
        pytest.param(
            [list(range(MP4.index(b"moov") + 4 + OFTEN, OFTEN, -1))[:OFTEN]], id="falling"
        ),
        pytest.param([[MP4.index(b"moov") + 4]] * OFTEN, id="one sample in many tracks"),
    ],
)
def test_a_small_movie_of_overlapping_samples_is_refused_with_little_memory(
    offsets_of_tracks: list[list[int]],
) -> None:
    source = Source(movie_of_metadata(*offsets_of_tracks))
    tracemalloc.start()
    try:
        with pytest.raises(Uncleanable, match="overlap"):
            edits(source, "video/mp4")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("position", [0, 4095, 4096, 4097, 4096 + 2**18 - 15, 2**19, 2**20 - 1])
def test_a_marker_is_found_wherever_it_stands(position: int) -> None:
    data = JPEG[:-2] + bytes(position) + b"\xff\xd9" + TRAILER
    assert cleaned(data, "image/jpeg") == data[: -len(TRAILER)]


def test_a_jpeg_file_keeps_its_scans_and_loses_what_lies_between_segments() -> None:
    scan = b"\xff\xda\0\2 ab\xff\0c\xff\xd0d\xff\xff\xd1e"
    table = parts.segment(0xDB, bytes(65))
    thumbnail = parts.segment(0xE1, b"Exif\0\0" + JPEG)
    data = b"\xff\xd8" + thumbnail + table + parts.SECRET + table + scan + thumbnail + scan
    assert cleaned(data + b"\xff\xd9" + JPEG, "image/jpeg") == (
        b"\xff\xd8" + table + table + scan + scan + b"\xff\xd9"
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            parts.segment(0xE0, b"JFIF\0\1\2\0\0\1\0\1\1\1abc"),
            parts.segment(0xE0, b"JFIF\0\1\2\0\0\1\0\1\0\0"),
            id="a thumbnail in JFIF",
        ),
        pytest.param(parts.segment(0xE0, b"JFXX\0\x10" + JPEG), b"", id="a thumbnail in JFXX"),
        pytest.param(
            parts.segment(0xEE, b"Adobe\0\x64\0\0\0\0\1" + parts.SECRET),
            parts.segment(0xEE, b"Adobe\0\x64\0\0\0\0\1"),
            id="a text after the mark of Adobe",
        ),
        pytest.param(
            parts.segment(0xE1, b"Exif\0\0" + parts.tiff(6, "II")),
            parts.segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
            id="an orientation, little end first",
        ),
        pytest.param(
            parts.segment(0xE1, b"Exif\0\0" + parts.tiff(1, "MM")), b"", id="no orientation"
        ),
        pytest.param(
            parts.segment(0xE1, b"Exif\0\0" + parts.tiff(9, "MM")), b"", id="no such orientation"
        ),
        pytest.param(
            parts.segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"), b"", id="Exif without end"
        ),
        pytest.param(parts.segment(0xE1, b"Exif\0"), b"", id="Exif without beginning"),
        pytest.param(parts.segment(0xE2, b"MPF\0" + bytes(80)), b"", id="several pictures"),
        pytest.param(parts.segment(0xEB, b"JP" + parts.SECRET), b"", id="JUMBF"),
        pytest.param(parts.segment(0xED, b"Photoshop 3.0\0" + parts.SECRET), b"", id="IPTC"),
        pytest.param(parts.segment(0xFE, b""), b"", id="an empty comment"),
        pytest.param(
            parts.segment(0xE2, b"ICC_PROFILE\0\1\1profile"),
            parts.segment(0xE2, b"ICC_PROFILE\0\1\1profile"),
            id="a colour profile",
        ),
    ],
)
def test_a_segment_of_a_jpeg_file_becomes(before: bytes, after: bytes) -> None:
    data = JPEG[:2] + before + JPEG[2:]
    assert cleaned(data, "image/jpeg") == JPEG[:2] + after + JPEG[2:]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            png_chunk(b"iCCP", b"ann's screen\0\0profile"),
            png_chunk(b"iCCP", b"ICC Profile\0\0profile"),
            id="the name of a colour profile",
        ),
        pytest.param(
            png_chunk(b"eXIf", parts.tiff(8, "MM")),
            png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x08\0\0\0\0\0\0"),
            id="an orientation",
        ),
        pytest.param(png_chunk(b"gAMA", parts.SECRET), b"", id="a text for a number"),
        pytest.param(png_chunk(b"caBX", parts.SECRET), b"", id="an unknown chunk"),
        pytest.param(png_chunk(b"tIME", bytes(7)), b"", id="a time"),
    ],
)
def test_a_chunk_of_a_png_file_becomes(before: bytes, after: bytes) -> None:
    start, data = PNG[:33], PNG[33:]
    assert cleaned(start + before + data, "image/png") == start + after + data


def test_a_gif_file_keeps_its_repetition_and_its_colours() -> None:
    assert cleaned(parts.tagged_gif(), "image/gif") == parts.gif(
        parts.gif_application(b"NETSCAPE2.0", b"\1\5\0"),
        parts.gif_application(b"ICCRGBG1012", b"colours"),
        b"!\xf9\x04\0\0\0\0\0",
    )


def test_a_webp_file_says_what_it_still_has() -> None:
    def webp(flags: int, *chunks: bytes) -> bytes:
        extended = parts.riff_chunk(b"VP8X", bytes([flags]) + bytes(9))
        picture = parts.riff_chunk(b"VP8L", b"picture")
        return parts.riff(extended, picture, *chunks)

    exif = b"Exif\0\0" + parts.tiff(6, "II")
    xmp = parts.riff_chunk(b"XMP ", parts.SECRET)
    turned = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    data = webp(0xFF, parts.riff_chunk(b"EXIF", exif), xmp, parts.riff_chunk(b"name", b"ann"))
    assert cleaned(data + TRAILER, "image/webp") == webp(0x3A, parts.riff_chunk(b"EXIF", turned))
    assert cleaned(webp(0x2C, xmp), "image/webp") == webp(0x20)


@pytest.mark.parametrize(
    ("media_type", "data", "kept"),
    [
        pytest.param("video/mp4", parts.tagged_movie(), b"moov", id="mp4"),
        pytest.param("video/quicktime", parts.telephone_movie(), b"vide", id="a track of metadata"),
        pytest.param("image/heic", parts.picture_with_items(), b"pixels!!", id="heic"),
        pytest.param("video/webm", parts.tagged_webm(), b"frame", id="webm"),
        pytest.param("video/webm", parts.live_webm(), b"frame", id="live webm"),
        pytest.param("video/webm", parts.vorbis_webm(), b"\x05vorbis", id="webm with vorbis"),
        pytest.param("image/gif", parts.tagged_gif(), b"colours", id="gif"),
    ],
)
def test_what_was_planted_by_hand_is_gone(media_type: str, data: bytes, kept: bytes) -> None:
    assert parts.SECRET in data
    result = cleaned(data, media_type)
    assert parts.SECRET not in result
    assert result.count(kept) == data.count(kept)


def test_the_samples_of_a_track_of_metadata_are_overwritten_and_those_of_others_are_not() -> None:
    data = parts.telephone_movie()
    result = cleaned(data, "video/quicktime")
    assert len(result) == len(data)
    assert result.count(b"trak") == data.count(b"trak") - 1
    pictures_stop = MP4.index(b"moov") - 4
    assert result[:pictures_stop] == data[:pictures_stop]


def test_edits_are_named_by_their_bytes() -> None:
    data = JPEG + TRAILER
    assert edits(Source(data), "image/jpeg") == [Edit(len(JPEG), len(data))]
