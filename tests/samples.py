"""The smallest real media files: a decoder opens each of them, so no sniffer may refuse one."""

from __future__ import annotations

from base64 import b64decode
from typing import NamedTuple

JPEG = b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAP//////////////////////////////////////////////////////"
    "////////////////////////////////2wBDAf//////////////////////////////////////////////////"
    "////////////////////////////////////wAARCAACAAIDASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAA"
    "AAH/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFQEBAQAAAAAAAAAAAAAAAAAAAAL/xAAUEQEAAAAAAAAAAAAAAAAA"
    "AAAA/9oADAMBAAIRAxEAPwCAC3//2Q=="
)
PNG = b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR42mM8IWfDwMDAxMDAwMDAAAAOTgEmRbQB"
    "FQAAAABJRU5ErkJggg=="
)
GIF = b64decode("R0lGODdhAgACAIEAAMgePAAAAAAAAAAAACwAAAAAAgACAAAIBgABCAQQEAA7")
WEBP = b64decode("UklGRh4AAABXRUJQVlA4TBEAAAAvAUAAAAdQjyKXp/+BiOh/AAA=")
HEIC = b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAA"
    "AAAAAAAAAAAAACJpbG9jAAAAAERAAAEAAQAAAAABoAABAAAAAAAAACUAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAA"
    "AAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34"
    "+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm"
    "4CGgwIAAAAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAA"
    "AChjbGFwAAAACAAAAAEAAAAIAAAAAf///8gAAAAC////yAAAAAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAA"
    "AAAAAQABBYECAwWEAAAALW1kYXQAAAAhKAGvBRITDOD6ulI7n9mBnAY6ez5UrO8W/KCVWhCR8VtA"
)
MP4 = b64decode(
    "AAAAHGZ0eXBpc29tAAACAGlzb21pc28ybXA0MQAAAAhmcmVlAAAAGG1kYXQAAAGzABAHAAABthYFG237AAADMW1vb3YA"
    "AABsbXZoZAAAAAAAAAAAAAAAAAAAA+gAAAPoAAEAAAEAAAAAAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAQAAAAAAAAAA"
    "AAAAAAAAQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAIAAAJbdHJhawAAAFx0a2hkAAAAAwAAAAAAAAAAAAAA"
    "AQAAAAAAAAPoAAAAAAAAAAAAAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAQAAAAAAAAAAAAAAAAAAQAAAAAAQAAAAEAAA"
    "AAAAJGVkdHMAAAAcZWxzdAAAAAAAAAABAAAD6AAAAAAAAQAAAAAB021kaWEAAAAgbWRoZAAAAAAAAAAAAAAAAAAAQAAA"
    "AEAAVcQAAAAAAC1oZGxyAAAAAAAAAAB2aWRlAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAX5taW5mAAAAFHZtaGQA"
    "AAABAAAAAAAAAAAAAAAkZGluZgAAABxkcmVmAAAAAAAAAAEAAAAMdXJsIAAAAAEAAAE+c3RibAAAANpzdHNkAAAAAAAA"
    "AAEAAADKbXA0dgAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAQABAASAAAAEgAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAABj//wAAAGBlc2RzAAAAAAOAgIBPAAEABICAgEEgEQAAAAAAAIAAAAAABYCAgC8AAAGwAQAA"
    "AbWJEwAAAQAAAAEgAMSNiAANAIQCFGMAAAGyTGF2YzYyLjI4LjEwMgaAgIABAgAAABRidHJ0AAAAAAAAAIAAAAAAAAAA"
    "GHN0dHMAAAAAAAAAAQAAAAEAAEAAAAAAHHN0c2MAAAAAAAAAAQAAAAEAAAABAAAAAQAAABRzdHN6AAAAAAAAABAAAAAB"
    "AAAAFHN0Y28AAAAAAAAAAQAAACwAAABiZnJlZQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=="
)
QUICKTIME = b64decode(
    "AAAAFGZ0eXBxdCAgAAACAHF0ICAAAAAId2lkZQAAABhtZGF0AAABswAQBwAAAbYWBRtt+wAAAwhtb292AAAAbG12aGQA"
    "AAAAAAAAAAAAAAAAAAPoAAAD6AABAAABAAAAAAAAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAAAAAAAAAEAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACAAACc3RyYWsAAABcdGtoZAAAAAMAAAAAAAAAAAAAAAEAAAAAAAAD"
    "6AAAAAAAAAAAAAAAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAAAAAAAAAEAAAAAAEAAAABAAAAAAACRlZHRz"
    "AAAAHGVsc3QAAAAAAAAAAQAAA+gAAAAAAAEAAAAAAettZGlhAAAAIG1kaGQAAAAAAAAAAAAAAAAAAEAAAABAAH//AAAA"
    "AAAtaGRscgAAAABtaGxydmlkZQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAGWbWluZgAAABR2bWhkAAAAAQAAAAAA"
    "AAAAAAAALGhkbHIAAAAAZGhscnVybCAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAkZGluZgAAABxkcmVmAAAAAAAA"
    "AAEAAAAMdXJsIAAAAAEAAAEqc3RibAAAAMZzdHNkAAAAAAAAAAEAAAC2bXA0dgAAAAAAAAABAAAAAAAAAAAAAAIAAAAC"
    "AAAQABAASAAAAEgAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABj//wAAAGBlc2RzAAAAAAOA"
    "gIBPAAEABICAgEEgEQAAAAAAAIAAAAAABYCAgC8AAAGwAQAAAbWJEwAAAQAAAAEgAMSNiAANAIQCFGMAAAGyTGF2YzYy"
    "LjI4LjEwMgaAgIABAgAAABhzdHRzAAAAAAAAAAEAAAABAABAAAAAABxzdHNjAAAAAAAAAAEAAAABAAAAAQAAAAEAAAAU"
    "c3RzegAAAAAAAAAQAAAAAQAAABRzdGNvAAAAAAAAAAEAAAAkAAAAIWZyZWUAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
)
WEBM = b64decode(
    "GkXfo59ChoEBQveBAULygQRC84EIQoKEd2VibUKHgQJChYECGFOAZwEAAAAAAAG3EU2bdLpNu4tTq4QVSalmU6yBoU27"
    "i1OrhBZUrmtTrIHY7I0AAAAAAAAAAAAAAAAATbuMU6uEHFO7a1OsggGh7OAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAVSalmsirXsYMPQkBNgI0AAAAAAAAAAAAAAAAAV0GNAAAAAAAAAAAAAAAAAESJiECPQAAAAAAAFlSua76uAQAAAAAA"
    "ADXXgQFzxYhc/cactppXHpyBACK1nIN1bmSIgQCGhVZfVlA4g4EBI+ODhDuaygDghrCBELqBEOzbAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAB9DtnWk54EAo5+BAACAEAIAnQEqEAAQAABHCIWFiJmEiAICAAYZaAAAHFO7a5G7j7OBALeK94EB8YIB"
    "ePCBAw=="
)
MATROSKA = b64decode(
    "GkXfo6NChoEBQveBAULygQRC84EIQoKIbWF0cm9za2FCh4EEQoWBAhhTgGcBAAAAAAACLRFNm3TAv4TCOSc/TbuL"
    "U6uEFUmpZlOsgaFNu4tTq4QWVK5rU6yB8U27jFOrhBJUw2dTrIIBik27jFOrhBxTu2tTrIICEewBAAAAAAAAUwAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAFUmpZsu/hO5YgNEq17GDD0JATYCNTGF2ZjYyLjEyLjEwMldBjUxhdmY2Mi4xMi4xMDJz"
    "pJCVKG20xZ5nXpYNr+tc8qGnRImIQI9AAAAAAAAWVK5rQJO/hOEp1SquAQAAAAAAAITXgQFzxYg31tmqjFLoUpyB"
    "ACK1nIN1bmSIgQCGj1ZfTVBFRzQvSVNPL0FTUIOBASPjg4Q7msoA4IqwgRC6gRBUsoEEVe6BAOwBAAAAAAAAAgAA"
    "Y6KvAAABsAEAAAG1iRMAAAEAAAABIADEjYgADQCEAhRjAAABskxhdmM2Mi4yOC4xMDISVMNn3r+EGy+9QXNzoGPA"
    "gGfImkWjh0VOQ09ERVJEh41MYXZmNjIuMTIuMTAyc3OyY8CLY8WIN9bZqoxS6FJnyKFFo4hEVVJBVElPTkSHkzAw"
    "OjAwOjAxLjAwMDAwMDAwMAAfQ7Z1n7+E10K9/+eBAKOUgQAAgAAAAbMAEAcAAAG2FgUbbfscU7trl7+EFjKFHLuP"
    "s4EAt4r3gQHxggHt8IEJ"
)


def longer_jpeg(size: int, filling: bytes = b"\0") -> bytes:
    """A JPEG file of `size` bytes, all of which are kept: they pass for a colour profile's."""
    segments = bytearray()
    while room := size - len(JPEG) - len(segments):
        length = min(room, 65_537)
        if 0 < room - length < 20:  # the next would be too short for its head
            length -= 20
        head = b"\xff\xe2" + (length - 2).to_bytes(2) + b"ICC_PROFILE\0"
        segments += head + (filling * length)[: length - len(head)]
    return JPEG[:2] + bytes(segments) + JPEG[2:]


def longer_mp4(size: int, filling: bytes = b"\0") -> bytes:
    """An MP4 file of `size` bytes, all of which are kept: they are in no track."""
    length = size - len(MP4)
    return MP4 + length.to_bytes(4) + b"mdat" + (filling * length)[: length - 8]


class Sample(NamedTuple):
    """Bytes of one kind, the types they may be served as, and the extensions their key may have.

    `stored` is what is left of them when they have been cleaned.
    """

    kind: str
    data: bytes
    types: frozenset[str]
    extensions: frozenset[str]
    stored: bytes


def sample(
    kind: str, data: bytes, types: str, extensions: str, *, stored: bytes | None = None
) -> Sample:
    kept = data if stored is None else stored
    return Sample(kind, data, frozenset(types.split()), frozenset(extensions.split()), kept)


IMAGES = (
    sample("jpeg", JPEG, "image/jpeg", ".jpg .jpeg"),
    # A camera's file begins with Exif, not with JFIF.
    sample(
        "jpeg-exif",
        b"\xff\xd8\xff\xe1\0\x08Exif\0\0" + JPEG[2:],
        "image/jpeg",
        ".jpg .jpeg",
        stored=JPEG,
    ),
    sample("png", PNG, "image/png", ".png"),
    sample("gif87a", GIF, "image/gif", ".gif"),
    sample("gif89a", GIF.replace(b"GIF87a", b"GIF89a"), "image/gif", ".gif"),
    sample("webp", WEBP, "image/webp", ".webp"),
    sample("heic", HEIC, "image/heic", ".heic"),
    sample(
        "heif", HEIC.replace(b"ftypheic", b"ftypmif1"), "image/heif image/heic", ".heif .heic .hif"
    ),
)
VIDEOS = (
    sample("mp4-isom", MP4, "video/mp4", ".mp4"),
    # The brand that Android's recorder writes.
    sample("mp4-mp42", MP4.replace(b"ftypisom", b"ftypmp42"), "video/mp4", ".mp4"),
    # The brand that an iPhone's camera writes.
    sample("quicktime", QUICKTIME, "video/quicktime", ".mov .qt"),
    sample("webm", WEBM, "video/webm", ".webm"),
)

# What a stranger may try to have served from our host.
NEITHER = {
    "text": b"hello, this is no picture",
    "html": b"<!DOCTYPE html><html><script>alert(1)</script></html>",
    "html-after-blanks": b"\n\n   <html><body onload=alert(1)></body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "svg-with-prolog": b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n",
    "elf": b"\x7fELF\x02\x01\x01" + bytes(57),
    "zip": b"PK\x03\x04" + bytes(26),
    "matroska": MATROSKA,
    "riff-wave": b"RIFF\x24\0\0\0WAVEfmt " + bytes(28),
    "ftyp-of-audio": b"\0\0\0\x18ftypM4A \0\0\0\0M4A isom" + bytes(64),
    "one-byte": b"\xff",
    "zeros": bytes(4096),
}
