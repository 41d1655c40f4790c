"""What a certificate says of its time and its names (RFC 5280 §4.1), read from DER (X.690).

Python reads those of a peer only, and of one that it trusts. Nothing is verified here.
"""

import ipaddress
import re
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

_SIZE_MAX: Final = 2**20
_PEM: Final = re.compile(r"-----BEGIN CERTIFICATE-----\s.*?-----END CERTIFICATE-----", re.DOTALL)
_SUBJECT_ALT_NAME: Final = bytes.fromhex("0603551d11")  # the identifier 2.5.29.17, with its head
_VERSION, _EXTENSIONS = 0xA0, 0xA3
_OCTET_STRING, _UTC_TIME, _GENERALIZED_TIME = 0x04, 0x17, 0x18
_DNS_NAME, _IP_ADDRESS = 0x82, 0x87


class CertificateError(ValueError):
    """The file holds no certificate, or one that cannot be read."""


class Certificate(NamedTuple):
    """When it holds, and for which host names, `*.example.com` among them, and addresses."""

    not_before: datetime
    not_after: datetime
    names: tuple[str, ...]

    def is_for(self, host: str) -> bool:
        """Tell whether it holds for `host` (RFC 9525 §6.3)."""
        host = host.lower()
        return any(name in {host, f"*.{host.partition('.')[2]}"} for name in self.names)


def read_certificate(path: Path) -> Certificate:
    """Return the first certificate of a PEM file, which is the server's own.

    Raises `CertificateError`, `OSError`.
    """
    with path.open("rb") as file:
        return parse_certificate(file.read(_SIZE_MAX).decode("latin-1"), str(path))


def parse_certificate(pem: str, place: str) -> Certificate:
    """Return the first certificate in PEM, found at this place; raises `CertificateError`."""
    if (match := _PEM.search(pem)) is None:
        raise CertificateError(f"{place} holds no certificate in PEM.")
    try:
        return _parse(ssl.PEM_cert_to_DER_cert(match[0]))
    except (ValueError, IndexError) as error:
        raise CertificateError(f"The certificate in {place} is damaged.") from error


def _parse(der: bytes) -> Certificate:
    ((_, certificate),) = _elements(der)
    (_, signed), *_ = _elements(certificate)
    fields = list(_elements(signed))
    # Absent in version 1, which has no names either.
    if fields[0][0] == _VERSION:
        del fields[0]
    validity = list(_elements(fields[3][1]))
    names: list[str] = []
    for tag, content in fields[6:]:
        if tag == _EXTENSIONS:
            ((_, extensions),) = _elements(content)
            for _, extension in _elements(extensions):
                names.extend(_names(extension))
    before, after = (_time(*each) for each in validity)
    return Certificate(before, after, tuple(names))


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and content of each element; raises `ValueError` where one is cut off."""
    at = 0
    while at < len(data):
        tag, size = data[at], data[at + 1]
        at += 2
        if size & 0x80:  # the size's own size; 0x80 alone is not DER
            count = size & 0x7F
            size = int.from_bytes(data[at : at + count], "big")
            at += count
        if size > len(data) - at:
            raise ValueError("an element is cut off")
        yield tag, data[at : at + size]
        at += size


def _time(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == _UTC_TIME:  # RFC 5280 §4.1.2.5.1
        text = ("19" if text >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


def _names(extension: bytes) -> Iterator[str]:
    if not extension.startswith(_SUBJECT_ALT_NAME):
        return
    *_, (tag, content) = _elements(extension)  # a flag may stand before it
    if tag != _OCTET_STRING:
        raise ValueError("no octet string")
    ((_, names),) = _elements(content)
    for kind, value in _elements(names):
        if kind == _DNS_NAME:
            yield value.decode("ascii").lower()
        elif kind == _IP_ADDRESS:
            yield str(ipaddress.ip_address(value))
