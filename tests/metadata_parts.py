"""Files put together by hand, for what no encoder at hand writes and for what no encoder would."""

from typing import Final

from chatterd.metadata import Edit
from tests.samples import HEIC, MP4

SECRET: Final = b"planted by hand"


def applied(data: bytes, changes: list[Edit]) -> bytes:
    """Return `data` after `changes`, which must be in order, within it and not overlap."""
    result = []
    kept_from = 0
    for start, stop, replacement in changes:
        assert kept_from <= start <= stop <= len(data)
        result += [data[kept_from:start], replacement]
        kept_from = stop
    return b"".join([*result, data[kept_from:]])


def box(kind: bytes, *contents: bytes) -> bytes:
    """A box of an ISO base media file."""
    data = b"".join(contents)
    return (len(data) + 8).to_bytes(4) + kind + data


def wide_box(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    """A box whose size has 64 bits."""
    return b"\0\0\0\x01" + kind + (len(data) + 16 if size is None else size).to_bytes(8) + data


def numbers(*values: int, width: int = 4) -> bytes:
    return b"".join(value.to_bytes(width) for value in values)


def track(handler: bytes, *, sizes: bytes, chunks: bytes, offsets: bytes) -> bytes:
    """A track with the tables that say where its samples are."""
    table = box(b"stbl", box(b"stsz", sizes), box(b"stsc", chunks), offsets)
    media = box(b"mdia", box(b"hdlr", bytes(8), handler, bytes(12)), box(b"minf", table))
    return box(b"trak", box(b"tkhd", bytes(84)), media)


def telephone_movie() -> bytes:
    """A movie with a track of metadata, two samples in one chunk and one in another."""
    start, end = MP4.index(b"moov") - 4, len(MP4)
    moov = MP4[start + 8 : end]
    first = start + 8
    second = first + 2 * len(SECRET) + 8
    metadata = track(
        b"meta",
        sizes=numbers(0, 0, 3, *[len(SECRET)] * 3),
        chunks=numbers(0, 2, 1, 2, 1, 2, 1, 1),
        offsets=box(b"co64", numbers(0, 2), numbers(first, second, width=8)),
    )
    data = box(b"mdat", SECRET * 2, bytes(8), SECRET)
    return MP4[:start] + data + box(b"moov", moov, metadata)


def tagged_movie() -> bytes:
    """A movie with boxes of all the kinds that go, also within others, also of 64 bits."""
    start = MP4.index(b"moov") - 4
    end = start + int.from_bytes(MP4[start : start + 4])
    moov = MP4[start + 8 : end] + box(b"udta", box(b"\xa9xyz", SECRET)) + box(b"meta", SECRET)
    return (
        MP4[:start]
        + wide_box(b"uuid", bytes(16) + SECRET)
        + box(b"moov", moov)
        + box(b"skip", SECRET)
        + box(b"zzzz", SECRET * 3)
        + b"\0\0\0\0free"
        + SECRET  # a size of zero: to the end
    )


def items(*entries: tuple[int, bytes, bytes]) -> bytes:
    """A list of items: the number, the type, what follows it."""
    infos = [
        box(b"infe", b"\2\0\0\0", numbers(number, 0, width=2), kind, rest)
        for number, kind, rest in entries
    ]
    return box(b"iinf", bytes(4), numbers(len(infos), width=2), *infos)


def places(*entries: tuple[int, int, int, int], length_width: int = 4) -> bytes:
    """A list of the places of items: the number, the method, the start, the length."""
    sizes = bytes([0x40 + length_width, 0])
    data = [
        numbers(number, method, 0, 1, width=2) + numbers(start) + length.to_bytes(length_width)
        for number, method, start, length in entries
    ]
    return box(b"iloc", b"\1\0\0\0", sizes, numbers(len(entries), width=2), *data)


def list_of_pictures(*parts: bytes) -> bytes:
    return HEIC_HEAD + box(b"meta", bytes(4), box(b"hdlr", bytes(8), b"pict", bytes(13)), *parts)


HEIC_HEAD: Final = HEIC[: int.from_bytes(HEIC[:4])]


def picture_with_items() -> bytes:
    """A picture with an item of metadata in `mdat` and one in `idat`."""
    entries = items((1, b"hvc1", b"name\0"), (2, b"Exif", b"\0"), (3, b"mime", SECRET + b"\0"))
    properties = box(b"iprp", box(b"ipco", box(b"ispe", bytes(12)), box(b"udes", SECRET)))

    def head(start: int) -> bytes:
        place = places((1, 0, start, 8), (2, 0, start + 8, len(SECRET)), (3, 1, 0, len(SECRET)))
        return list_of_pictures(entries, place, properties, box(b"idat", SECRET))

    return head(len(head(0)) + 8) + box(b"mdat", b"pixels!!", SECRET)


def element(number: int, *contents: bytes, width: int = 1) -> bytes:
    """An element of EBML, its size in `width` bytes."""
    data = b"".join(contents)
    size = (1 << 7 * width) | len(data)
    return number.to_bytes((number.bit_length() + 7) // 8) + size.to_bytes(width) + data


def unknown(number: int, *contents: bytes) -> bytes:
    """An element of EBML of unknown size."""
    return number.to_bytes((number.bit_length() + 7) // 8) + b"\xff" + b"".join(contents)


EBML: Final = element(0x1A45DFA3, element(0x4282, b"webm"))
INFO: Final = element(
    0x1549A966,
    element(0xBF, bytes(4)),
    element(0x2AD7B1, b"\x0f\x42\x40"),
    element(0x7BA9, SECRET),
    element(0x4461, bytes(8)),
    element(0x4D80, SECRET),
    element(0x5741, SECRET),
)
TRACKS: Final = element(
    0x1654AE6B,
    element(
        0xAE,
        element(0xD7, b"\1"),
        element(0x83, b"\1"),
        element(0x86, b"V_VP9"),
        element(0x536E, SECRET),
    ),
)
CLUSTER: Final = (element(0xE7, b"\0"), element(0xA3, b"\x81\0\0\x80frame"))
TAGS: Final = element(0x1254C367, element(0x7373, SECRET), width=8)


def live_webm() -> bytes:
    """A recording such as browsers make, which does not know how long it will be."""
    void = element(0xEC, SECRET)
    return EBML + unknown(
        0x18538067, INFO, TRACKS, unknown(0x1F43B675, *CLUSTER), unknown(0x1F43B675, *CLUSTER, void)
    )


def tagged_webm() -> bytes:
    """A file with its tags at the end, and pointers to them at the beginning."""
    seeks = [element(0x4DBB, element(0x53AB, numbers(n))) for n in (0x1549A966, 0x1254C367)]
    cluster = element(0x1F43B675, *CLUSTER, element(0xEC, SECRET))
    segment = element(0x18538067, element(0x114D9B74, *seeks), INFO, TRACKS, cluster, TAGS, width=8)
    return EBML + segment + SECRET


def vorbis_webm(*, comments: bytes = b"\x03vorbis" + SECRET * 20) -> bytes:
    """A file of sound that has comments among its headers."""
    sizes = b"\2\x1e" + b"\xff" * (len(comments) // 255) + bytes([len(comments) % 255])
    private = element(0x63A2, sizes, b"\x01vorbis" + bytes(23), comments, b"\x05vorbis", width=2)
    sound = element(0xAE, element(0x83, b"\2"), element(0x86, b"A_VORBIS"), private, width=2)
    return EBML + element(0x18538067, INFO, element(0x1654AE6B, sound, width=2), width=8)


def gif_blocks(*blocks: bytes) -> bytes:
    return b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def gif(*blocks: bytes) -> bytes:
    """A GIF file of these blocks and a picture of one pixel."""
    screen = b"GIF89a\1\0\1\0\x80\0\0" + bytes(6)
    return screen + b"".join(blocks) + b",\0\0\0\0\1\0\1\0\0\2" + gif_blocks(b"\x44\1") + b";"


def gif_application(name: bytes, *blocks: bytes) -> bytes:
    return b"!\xff\x0b" + name + gif_blocks(*blocks)


def tagged_gif() -> bytes:
    return (
        gif(
            b"!\xfe" + gif_blocks(SECRET, SECRET),
            gif_application(b"NETSCAPE2.0", b"\1\5\0", SECRET),
            gif_application(b"XMP DataXMP", SECRET),
            gif_application(b"ICCRGBG1012", b"colours"),
            b"!\x01" + gif_blocks(bytes(12), SECRET),
            b"!\xf9\x04\0\0\0\0\0",
        )
        + SECRET
    )


def segment(code: int, data: bytes, length: int | None = None) -> bytes:
    """A segment of a JPEG file."""
    return bytes([0xFF, code]) + (len(data) + 2 if length is None else length).to_bytes(2) + data


def tiff(orientation: int, order: str) -> bytes:
    """Exif data with a maker, then an orientation, numbers in the order given."""

    def number(value: int, width: int) -> bytes:
        return value.to_bytes(width, "little" if order == "II" else "big")

    def entry(*values: tuple[int, int]) -> bytes:
        return b"".join(number(value, width) for value, width in values)

    maker = entry((0x010F, 2), (2, 2), (4, 4)) + b"ann\0"
    turned = entry((0x0112, 2), (3, 2), (1, 4), (orientation, 2), (0, 2))
    head = order.encode() + number(42, 2) + number(8, 4) + number(2, 2)
    return head + maker + turned + bytes(4)


def riff(*chunks: bytes) -> bytes:
    data = b"WEBP" + b"".join(chunks)
    return b"RIFF" + len(data).to_bytes(4, "little") + data


def riff_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + len(data).to_bytes(4, "little") + data + bytes(len(data) % 2)
