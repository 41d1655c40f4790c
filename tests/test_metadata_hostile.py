"""Files that no encoder makes: chatterd.metadata cleans them or refuses them, and soon."""

from __future__ import annotations

import io
import random
from functools import cache
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatterd.metadata import Source, Uncleanable, clean_beginning, edits
from tests import metadata_parts as parts
from tests.metadata_corpus import PROFILE, exif, picture
from tests.samples import GIF, HEIC, JPEG, MP4, PNG, QUICKTIME, WEBM, WEBP

WALKERS: Final = (
    "image/jpeg",
    "image/png",
    "image/gif",
    "image/webp",
    "image/heic",
    "video/mp4",
    "video/webm",
)
DRAWN: Final = 1_000
MUTATED: Final = 9_000
BEGUN: Final = 3_000
# What headers and lengths are made of.
TELLING: Final = (
    *(b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xe1"),
    *(bytes(4), bytes(8), b"\0\0\0\1", b"\0\0\0\7", b"\x7f\xff\xff\xff", b"\xff" * 4, b"\xff" * 8),
    *(b"\x80" + bytes(7), b"\x01" + b"\xff" * 7, b"free", b"trak", b"moov", b"meta", b"hvc1"),
    *(b"Exif", b"EXIF", b"iCCP", b"eXIf", b"IEND", b"ANMF", b"VP8X", b"!\xff", b"!\xf9\x04"),
    *(b"\x1f\x43\xb6\x75", b"\x1a\x45\xdf\xa3", b"\xec", b"soun", b"mdat", b"stsd"),
)
# What follows a segment that goes lies in no scan, though it would without that segment.
COMMENTED_SCAN: Final = JPEG[:-2] + parts.segment(0xFE, b"ann") + parts.SECRET * 9 + JPEG[-2:]


@cache
def seeds(media_type: str) -> tuple[bytes, ...]:
    """Small files to begin from, with as many kinds of parts as a format has."""
    more = {"save_all": True, "append_images": [picture((8, 8), number=1)]}
    return {
        "image/jpeg": (
            JPEG,
            _encoded("JPEG", exif=exif(6), icc_profile=PROFILE, progressive=True),
            COMMENTED_SCAN,
        ),
        "image/png": (PNG, _encoded("PNG", exif=exif(6), icc_profile=PROFILE, **more)),
        "image/gif": (GIF, parts.tagged_gif()),
        "image/webp": (WEBP, _encoded("WEBP", exif=exif(6), xmp=parts.SECRET, **more)),
        "image/heic": (HEIC, parts.picture_with_items()),
        "video/mp4": (MP4, QUICKTIME, parts.tagged_movie(), parts.telephone_movie()),
        "video/webm": (WEBM, parts.tagged_webm(), parts.live_webm(), parts.vorbis_webm()),
    }[media_type]


def _encoded(name: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture((8, 8)).save(file, name, **options)
    return file.getvalue()


def result(data: bytes, media_type: str) -> bytes | None:
    """The cleaned file; None when it is refused."""
    try:
        return parts.applied(data, edits(Source(data), media_type))
    except Uncleanable:
        return None


def is_cleaned(data: bytes, media_type: str) -> bool:
    """Clean the file, and check that it is clean then; False when it is refused."""
    clean = result(data, media_type)
    assert clean is None or edits(Source(clean), media_type) == []
    return clean is not None


def changed(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for position, count, replacement in changes:
        start = position % (len(data) + 1)
        data = data[:start] + replacement + data[start + count :]
    return data


def mutated(media_type: str, numbers: random.Random) -> bytes:
    seed = numbers.choice(seeds(media_type))
    changes = [
        (
            numbers.randrange(len(seed)),
            numbers.choice((0, 1, 1, 1, 2, 4, 8, len(seed))),
            numbers.choice(TELLING) if numbers.random() < 0.5 else numbers.randbytes(1),
        )
        for _ in range(numbers.choice((1, 1, 2, 4)))
    ]
    return changed(seed, changes)


@pytest.mark.parametrize("media_type", WALKERS)
@settings(
    max_examples=DRAWN,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # other tests may keep the machine busy
)
@given(data=st.data())
def test_a_drawn_file_is_cleaned_or_refused(media_type: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(seeds(media_type)))
    replacement = st.sampled_from(TELLING) | st.binary(max_size=8)
    change = st.tuples(st.integers(0, len(seed)), st.integers(0, 8), replacement)
    is_cleaned(changed(seed, data.draw(st.lists(change, max_size=4))), media_type)


@pytest.mark.parametrize("media_type", WALKERS)
def test_a_mutated_file_is_cleaned_or_refused(media_type: str) -> None:
    numbers = random.Random(media_type)  # noqa: S311 - the same files in every run
    cleaned = 0
    for _ in range(MUTATED):
        cleaned += is_cleaned(mutated(media_type, numbers), media_type)
    # Neither is everything refused nor does everything pass.
    assert MUTATED // 20 < cleaned < MUTATED * 19 // 20


@pytest.mark.parametrize("media_type", WALKERS)
def test_a_mutated_file_whose_beginning_was_cleaned_becomes_what_the_whole_becomes(
    media_type: str,
) -> None:
    numbers = random.Random(media_type)  # noqa: S311 - the same files in every run
    for _ in range(BEGUN):
        data = mutated(media_type, numbers)
        cut = numbers.randrange(len(data) + 1)
        begun = clean_beginning(data[:cut], media_type) + data[cut:]
        assert result(begun, media_type) == result(data, media_type)


def test_a_jpeg_file_cut_behind_a_comment_loses_all_that_the_whole_loses() -> None:
    for cut in range(len(COMMENTED_SCAN) + 1):
        begun = clean_beginning(COMMENTED_SCAN[:cut], "image/jpeg") + COMMENTED_SCAN[cut:]
        assert result(begun, "image/jpeg") == JPEG


def test_a_beginning_of_very_many_parts_is_cleaned_up_to_one_of_them() -> None:
    comment = parts.segment(0xFE, b"ann") + parts.SECRET * 20
    data = JPEG[:-2] + comment * 12_000 + JPEG[-2:]
    begun = clean_beginning(data[:-60], "image/jpeg") + data[-60:]
    assert 0 < begun.count(comment) < 12_000
    assert result(begun, "image/jpeg") == JPEG


@pytest.mark.parametrize("media_type", WALKERS)
def test_a_file_cut_off_anywhere_is_cleaned_or_refused(media_type: str) -> None:
    for seed in seeds(media_type):
        for length in range(0, len(seed), 1 + len(seed) // 500):
            is_cleaned(seed[:length], media_type)


def movie(*more: bytes) -> bytes:
    return MP4 + b"".join(more)


def movie_with(*parts_of_it: bytes) -> bytes:
    return movie(parts.box(b"moov", *parts_of_it))


_TRACK_START: Final = MP4.index(b"trak") - 4
_TRACK_SIZE: Final = int.from_bytes(MP4[_TRACK_START : _TRACK_START + 4])
PICTURE_TRACK: Final = MP4[_TRACK_START : _TRACK_START + _TRACK_SIZE]


def metadata_track(sizes: bytes, offsets: bytes) -> bytes:
    """A movie of a track of pictures, and of one of metadata with one sample in each chunk."""
    runs = parts.numbers(0, 1, 1, 1, 1)
    track = parts.track(b"meta", sizes=sizes, chunks=runs, offsets=parts.box(b"stco", offsets))
    return MP4[:28] + parts.box(b"mdat", bytes(64)) + parts.box(b"moov", PICTURE_TRACK, track)


def pictures(places: bytes, *, data: bytes = bytes(64)) -> bytes:
    entries = parts.items((1, b"hvc1", b"\0"), (2, b"Exif", b"\0"))
    return parts.list_of_pictures(entries, places, parts.box(b"idat", bytes(16))) + parts.box(
        b"mdat", data
    )


TWO_PLACES: Final = pictures(parts.places((1, 0, 0, 0), (2, 0, 0, 0)), data=b"")
IDAT_AT: Final = TWO_PLACES.index(b"idat") + 4
DATA_AT: Final = len(TWO_PLACES)


# What cameras write among the data of pictures: dash cameras between them, AVCHD cameras in them.
PLACES_IN_DATA: Final = (
    b"freeGPS \x4c\0\0\0",
    bytes.fromhex("17ee8c60f84d11d98cd60800200c9a66") + b"MDPM\x08",
)


@pytest.mark.parametrize("place", PLACES_IN_DATA)
@pytest.mark.parametrize("before", [0, 4090, 4096 + 2**18 - 19])
def test_a_movie_with_a_place_among_its_pictures_is_refused(place: bytes, before: int) -> None:
    data = parts.box(b"mdat", bytes(before), place, bytes(40))
    for wide in (data, parts.wide_box(b"mdat", data[8:]), b"\0\0\0\0" + data[4:]):
        with pytest.raises(Uncleanable, match="a place among its pictures"):
            edits(Source(movie(wide)), "video/mp4")


@pytest.mark.parametrize("place", PLACES_IN_DATA)
def test_a_place_beside_the_data_of_pictures_is_taken_out(place: bytes) -> None:
    # A mark that only begins in the data is none, and what lies behind them is cleared.
    data = movie(
        parts.box(b"mdat", place[:7]), parts.box(b"free", place), parts.box(b"zzzz", place)
    )
    clean = result(data, "video/mp4")
    assert clean is not None
    assert place not in clean


def webm(*contents: bytes) -> bytes:
    return parts.EBML + parts.element(0x18538067, *contents, width=8)


def movie_of(kind: bytes, old: bytes = b"mp4v") -> bytes:
    """The smallest movie, of another codec."""
    assert MP4.count(old) == 1
    return MP4.replace(old, kind)


def movie_of_sound(entry: bytes) -> bytes:
    """A movie with a track of sound that is described so."""
    table = parts.box(b"stbl", parts.box(b"stsd", parts.numbers(0, 1), entry))
    media = parts.box(
        b"mdia", parts.box(b"hdlr", bytes(8), b"soun", bytes(12)), parts.box(b"minf", table)
    )
    return movie(parts.box(b"moov", parts.box(b"trak", media)))


def sound_entry(kind: bytes, *described: bytes, version: int = 0) -> bytes:
    """A description of sound, as ISO's or as QuickTime's newer version."""
    head = bytes(8) + version.to_bytes(2) + bytes(18) + bytes(16 * version)
    return parts.box(kind, head, *described)


def esds(object_type: int, flags: int = 0) -> bytes:
    """What names a codec of MPEG-4."""
    decoder = b"\x04\x80\x80\x80\x0d" + bytes([object_type]) + bytes(12)
    return parts.box(b"esds", bytes(4), b"\x03\x15\0\1", bytes([flags]), decoder)


ESDS_TYPE: Final = b"\x04\x80\x80\x80\x41\x20"
CODECS_REFUSED: Final = [
    ("video/mp4", movie_of(b"jpeg"), "the codec 'jpeg'"),
    ("video/mp4", movie_of(b"png "), "the codec 'png '"),
    ("video/mp4", movie_of(b"encv"), "the codec 'encv'"),
    ("video/mp4", movie_of(b"\x04\x80\x80\x80\x41\x6c", ESDS_TYPE), "'mp4v' of a kind"),
    ("video/mp4", movie_of(b"esdz", b"esds"), "'mp4v' of a kind"),
    ("video/mp4", movie_of_sound(sound_entry(b"fLaC")), "the codec 'fLaC'"),
    ("video/mp4", movie_of_sound(sound_entry(b"msVo")), "the codec 'msVo'"),
    ("video/mp4", movie_of_sound(sound_entry(b"mp4a")), "'mp4a' of a kind"),
    ("video/mp4", movie_of_sound(sound_entry(b"mp4a", esds(0xDD))), "'mp4a' of a kind"),
    ("video/mp4", movie_of_sound(sound_entry(b"mp4a", esds(0x40, 0x80))), "'mp4a' of a kind"),
    (
        "video/mp4",
        movie_of_sound(sound_entry(b"mp4a", esds(0x40), esds(0xDD))),
        "'mp4a' of a kind",
    ),
    (
        "video/mp4",
        movie_of_sound(sound_entry(b"mp4a", parts.box(b"wave", esds(0xDD)), version=1)),
        "'mp4a' of a kind",
    ),
]


@pytest.mark.parametrize(("media_type", "data", "reason"), CODECS_REFUSED)
def test_a_codec_that_has_metadata_of_its_own_is_refused(
    media_type: str, data: bytes, reason: str
) -> None:
    with pytest.raises(Uncleanable, match=reason):
        edits(Source(data), media_type)


def webm_of(*codecs: bytes) -> bytes:
    names = [parts.element(0x86, codec) for codec in codecs]
    track = parts.element(0xAE, parts.element(0x83, b"\1"), *names)
    return webm(parts.element(0x1654AE6B, track))


@pytest.mark.parametrize(
    "codecs", [(), (b"V_MJPEG",), (b"A_FLAC",), (b"V_VP8", b"V_MJPEG"), (b"V_UNCOMPRESSED\0",)]
)
def test_a_webm_file_of_another_codec_is_refused(codecs: tuple[bytes, ...]) -> None:
    with pytest.raises(Uncleanable, match="codec that WebM does not have"):
        edits(Source(webm_of(*codecs)), "video/webm")


@pytest.mark.parametrize(
    ("media_type", "data"),
    [
        *[("video/mp4", movie_of(kind)) for kind in (b"avc1", b"hvc1", b"hev1", b"dvh1", b"apch")],
        *[
            ("video/mp4", movie_of_sound(sound_entry(kind)))
            for kind in (b"alac", b"samr", b"sowt", b"lpcm", b"raw ", b"apac", b"Opus")
        ],
        *[
            ("video/mp4", movie_of_sound(sound_entry(b"mp4a", esds(kind))))
            for kind in (0x40, 0x67, 0x69, 0x6B)
        ],
        (
            "video/quicktime",
            movie_of_sound(
                sound_entry(
                    b"mp4a",
                    parts.box(
                        b"wave", parts.box(b"frma", b"mp4a"), esds(0x40), parts.box(bytes(4))
                    ),
                    version=1,
                )
            ),
        ),
        ("video/webm", webm_of(b"V_VP8")),
        ("video/webm", webm_of(b"V_AV1\0\0")),
    ],
)
def test_a_codec_that_cameras_write_is_accepted(media_type: str, data: bytes) -> None:
    assert is_cleaned(data, media_type)


REFUSED: Final = [
    ("image/jpeg", b"\xff\xd9", "does not begin"),
    ("image/jpeg", b"\xff\xd8\xff\xe1", "too early"),
    ("image/jpeg", JPEG[:-2], "no end"),
    ("image/jpeg", b"\xff\xd8" + parts.segment(0xE1, b"", 0), "wrong length"),
    ("image/jpeg", b"\xff\xd8" + parts.segment(0xE1, b"", 1), "wrong length"),
    ("image/jpeg", b"\xff\xd8" + parts.segment(0xE1, b"\xff\xd9", 0xFFFF), "wrong length"),
    ("image/jpeg", JPEG[:-2] + parts.segment(0xDC, b"\0") + JPEG[-2:], "number of lines"),
    ("image/jpeg", JPEG[:-2] + parts.segment(0xDC, b"\0\2a") + JPEG[-2:], "number of lines"),
    ("image/jpeg", b"\xff\xd8" + parts.segment(0xF0, b"") + b"\xff\xd9", "unknown marker 0xFFF0"),
    ("image/jpeg", b"\xff\xd8" + parts.segment(0xE1, b"") * 20_000 + b"\xff\xd9", "too many"),
    ("image/png", b"\x89PNG\r\n\x1a\r" + PNG[8:], "does not begin"),
    ("image/png", PNG[:-12], "too early"),
    ("image/png", PNG[:8] + b"\xff\xff\xff\xfftEXt", "within a chunk"),
    ("image/png", PNG[:8] + b"\x7f\xff\xff\xfftEXt" + PNG[8:], "within a chunk"),
    ("image/png", PNG[:8] + b"\0\0\0\0CgBIcccc" + PNG[8:], "no decoder knows"),
    ("image/png", PNG[:8] + b"\0\0\0\0a-bIcccc" + PNG[8:], "no decoder knows"),
    ("image/png", PNG[:8] + b"\0\0\0\3iCCPanncccc" + PNG[8:], "no name"),
    ("image/png", PNG[:8] + b"\0\0\0\0tEXtcccc" * 20_000 + PNG[8:], "too many"),
    ("image/gif", b"GIF88a" + GIF[6:], "does not begin"),
    ("image/gif", GIF[:-1], "too early"),
    ("image/gif", GIF[:-3], "within a block"),
    ("image/gif", GIF[:10] + b"\x87" + GIF[11:], "within a block|too early|unknown"),
    ("image/gif", parts.gif(b"!\xf9\5" + bytes(6)), "wrong length"),
    ("image/gif", parts.gif(b"?"), "unknown block"),
    ("image/gif", parts.gif(b"!\xfe\0" * 20_000), "too many"),
    ("image/webp", b"RIFX" + WEBP[4:], "does not begin"),
    ("image/webp", WEBP[:-1], "shorter"),
    ("image/webp", parts.riff(b"XMP \xff\xff\xff\xff"), "longer than"),
    ("image/webp", parts.riff(b"XMP \0\0\0"), "longer than|too early"),
    ("image/webp", parts.riff(parts.riff_chunk(b"VP8X", bytes(12))), "wrong length"),
    ("image/webp", parts.riff(parts.riff_chunk(b"ANIM", bytes(8))), "wrong length"),
    (
        "image/webp",
        parts.riff(parts.riff_chunk(b"ANMF", bytes(16) + parts.riff_chunk(b"name", b"ann"))),
        "unknown part",
    ),
    ("image/webp", parts.riff(parts.riff_chunk(b"ANMF", b"")), "frame"),
    ("image/webp", parts.riff(*[parts.riff_chunk(b"XMP ", b"")] * 20_000), "too many"),
    ("video/mp4", MP4[: MP4.index(b"moov") - 4], "no movie"),
    ("video/mp4", movie(b"\0\0\0\7free"), "too short"),
    ("video/mp4", movie(b"\0\0\0\x09free"), "longer"),
    ("video/mp4", movie(b"\0\0\0\0\0\1"), "in no box"),
    ("video/mp4", movie(parts.wide_box(b"free", b"", 2**63)), "longer"),
    ("video/mp4", movie(parts.wide_box(b"free", b"", 2**64 - 1)), "longer"),
    ("video/mp4", movie(parts.wide_box(b"free", b"", 15)), "too short"),
    ("video/mp4", movie(b"\0\0\0\1free\0\0\0"), "too early|longer"),
    ("video/mp4", movie(parts.box(b"free") * 20_000), "too many"),
    ("video/mp4", movie(parts.box(b"moov")), "neither picture nor sound"),
    ("video/mp4", movie_with(parts.box(b"trak")), "0 boxes 'mdia'"),
    ("video/mp4", movie_with(parts.box(b"trak", *[parts.box(b"mdia")] * 2)), "2 boxes 'mdia'"),
    ("video/mp4", MP4.replace(b"url \0\0\0\1", b"url \0\0\0\0"), "another file"),
    ("video/mp4", metadata_track(bytes(12), parts.numbers(0, 2**32 - 1)), "too many samples"),
    ("video/mp4", metadata_track(parts.numbers(0, 0, 2**32 - 1), bytes(8)), "too many samples"),
    ("video/mp4", metadata_track(parts.numbers(0, 2**32 - 1, 1), bytes(4)), "too early|samples"),
    ("video/mp4", metadata_track(parts.numbers(0, 65, 1), parts.numbers(0, 1, 36)), "elsewhere"),
    ("video/mp4", metadata_track(parts.numbers(0, 8, 1), parts.numbers(0, 1, 0)), "elsewhere"),
    ("video/mp4", metadata_track(parts.numbers(0, 8, 1), parts.numbers(0, 2, 36, 40)), "overlap"),
    ("video/mp4", metadata_track(bytes(12), bytes(8)) + parts.box(b"moof"), "in fragments"),
    ("video/mp4", metadata_track(bytes(12), parts.numbers(0, 20_000) + bytes(80_000)), "too many"),
    (
        "video/mp4",
        movie_with(parts.box(b"mvhd", bytes(8)), PICTURE_TRACK),
        "too short a box 'mvhd'",
    ),
    ("image/heic", HEIC[:28] + parts.box(b"mdat"), "no list of pictures"),
    ("image/heic", HEIC + HEIC[28:], "or several"),
    ("image/heic", pictures(parts.box(b"iloc", b"\3" + bytes(7))), "unknown kind"),
    ("image/heic", pictures(parts.box(b"iloc", b"\2" + bytes(8))), "broken list of the places"),
    ("image/heic", pictures(parts.places((2, 2, 0, 1))), "within another"),
    ("image/heic", pictures(parts.places((2, 0, 0, 1))), "elsewhere"),
    ("image/heic", pictures(parts.places((2, 1, 8, 9))), "elsewhere"),
    ("image/heic", pictures(parts.places((2, 0, IDAT_AT, 1), (2, 1, 0, 1))), "elsewhere"),
    ("image/heic", pictures(parts.places((2, 0, 2**32 - 1, 1))), "within the data"),
    ("image/heic", pictures(parts.places((2, 0, 0, 2**63), length_width=8)), "within the data"),
    ("image/heic", pictures(parts.places((3, 0, DATA_AT, 1))), "not in its list"),
    (
        "image/heic",
        pictures(parts.places((1, 0, DATA_AT, 9), (2, 0, DATA_AT + 8, 8))),
        "metadata in its pictures",
    ),
    (
        "image/heic",
        pictures(parts.places((1, 0, DATA_AT + 8, 8), (2, 0, DATA_AT, 9))),
        "metadata in its pictures",
    ),
    (
        "image/heic",
        parts.list_of_pictures(parts.items((1, b"jpeg", b"\0")), parts.places()),
        "neither a picture nor",
    ),
    (
        "image/heic",
        parts.list_of_pictures(parts.items(*[(1, b"hvc1", b"\0")] * 2), parts.places()),
        "broken list of items",
    ),
    ("image/heic", parts.list_of_pictures(parts.items()), "0 boxes 'iloc'"),
    ("video/webm", parts.EBML + WEBM[5:], "no element|does not begin"),
    ("video/webm", WEBM[:-1], "longer than"),
    ("video/webm", webm(b"\0"), "no element"),
    ("video/webm", webm(b"\xec\0"), "no element"),
    ("video/webm", webm(b"\xec"), "no element"),
    ("video/webm", webm(b"\xec\1" + b"\xff" * 6 + b"\xfe"), "longer than"),
    ("video/webm", webm(parts.unknown(0xEC)), "unknown size"),
    ("video/webm", webm(parts.unknown(0x1654AE6B, parts.TRACKS)), "unknown size"),
    ("video/webm", webm(parts.element(0x1654AE6B, parts.element(0xAE))), "neither picture"),
    (
        "video/webm",
        webm(parts.element(0x1654AE6B, parts.element(0xAE, parts.element(0x83, b"\x11")))),
        "neither picture",
    ),
    ("video/webm", parts.vorbis_webm(comments=b"\x03vorbis" + bytes(8)), "begins wrongly"),
    ("video/webm", parts.vorbis_webm(comments=b"\x04vorbis" + bytes(9)), "begins wrongly"),
    ("video/webm", webm(parts.element(0xEC, b"x") * 20_000), "too many"),
]


@pytest.mark.parametrize(("media_type", "data", "reason"), REFUSED)
def test_what_cannot_be_understood_is_refused(media_type: str, data: bytes, reason: str) -> None:
    with pytest.raises(Uncleanable, match=reason):
        edits(Source(data), media_type)


NESTED: Final = b"".join(
    (8 * (10_000 - depth)).to_bytes(4) + (b"moov", b"trak", b"mdia")[depth % 3]
    for depth in range(10_000)
)
MANY_EXTENTS: Final = parts.box(
    b"iloc", bytes(6), parts.numbers(9, width=2), parts.numbers(2, 0, 0xFFFF, width=2) * 9
)


@pytest.mark.parametrize(
    ("media_type", "data"),
    [
        pytest.param("video/mp4", MP4 + NESTED, id="deep boxes"),
        pytest.param("image/heic", HEIC + NESTED, id="deep boxes in a picture"),
        pytest.param("image/heic", pictures(MANY_EXTENTS), id="extents of no bytes"),
        pytest.param("video/webm", webm(parts.unknown(0x1F43B675) * 50_000), id="empty clusters"),
        pytest.param("image/gif", parts.gif(b"!\xfe" + b"\1x" * 2**20 + b"\0"), id="tiny blocks"),
        pytest.param("image/jpeg", b"\xff\xd8" + b"\xff\xdb\0\2" * 2**20, id="empty segments"),
        pytest.param("image/jpeg", b"\xff\xd8" + b"\xff" * 2**22, id="fill bytes"),
        pytest.param("image/png", PNG[:33] + b"\0\0\0\0fdATcccc" * 2**19, id="empty chunks"),
    ],
)
@pytest.mark.timeout(10)
def test_a_file_of_very_many_parts_is_soon_done_with(media_type: str, data: bytes) -> None:
    is_cleaned(data, media_type)
