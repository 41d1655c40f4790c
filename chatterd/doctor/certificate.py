"""The check `certificate`: whether clients accept it, and for how long."""

import ssl
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import SplitResult, urlsplit

from chatterd import settings
from chatterd.doctor import Finding, fault, ok, warning
from chatterd.doctor.x509 import (
    Certificate,
    CertificateError,
    parse_certificate,
    read_certificate,
)

# Let's Encrypt's are renewed 30 days before their end: by then, renewing has failed for a while.
_SOON: Final = timedelta(days=21)
_NOW: Final = timedelta(days=3)
_RENEW: Final = ("sudo certbot renew", "sudo systemctl reload nginx")


_CONNECT_SECONDS: Final = 5.0
# Nobody is asked for one.
_NO_PASSWORD: Final = b""


class CertificateFiles(NamedTuple):
    """A certificate in PEM, and its key where that is known."""

    certificate: Path
    key: Path | None = None


def certificate_check(files: CertificateFiles | None) -> list[Finding]:
    """Look at what clients will look at: at the files, else at what PUBLIC_URL answers with."""
    place = str(files.certificate) if files else ""
    url = urlsplit(settings.PUBLIC_URL or "")
    try:
        certificate = None
        # Certbot's folders are open to root alone.
        with suppress(PermissionError):
            certificate = read_certificate(files.certificate) if files else None
        if certificate is None:
            if url.scheme != "https":
                return [_not_there(place)]
            place, files = url.netloc, None
            certificate = _served(url)
    except OSError as error:
        return [
            warning(
                f"{place} cannot be read: {error.strerror or error}.",
                "Name the right one with --certificate, or look as a user who may read it.",
            )
        ]
    except CertificateError as error:
        return [fault(str(error), "Get a new one, such as with:", *_RENEW)]
    findings = [*_time(certificate), *_names(certificate), *_key(files)]
    return findings or [
        ok(f"{place}, until {certificate.not_after:%Y-%m-%d}, for {', '.join(certificate.names)}")
    ]


def _not_there(place: str) -> Finding:
    if place:
        return warning(
            f"{place} cannot be read by this user.",
            "Set PUBLIC_URL, to look at what that answers with; or look as root at this alone:",
            f"sudo openssl x509 -noout -dates -in {place}",
        )
    return ok("none found; --certificate FILE names one")


def _served(url: SplitResult) -> Certificate:
    assert url.hostname is not None  # the settings have seen to it
    address = (url.hostname, url.port or 443)
    pem = ssl.get_server_certificate(address, timeout=_CONNECT_SECONDS)
    return parse_certificate(pem, url.netloc)


def _time(certificate: Certificate) -> Iterator[Finding]:
    now = datetime.now(UTC)
    left = certificate.not_after - now
    until = f"{certificate.not_after:%Y-%m-%d %H:%M} UTC"
    mend = "Renew it, and let Nginx read the new one:"
    if left < timedelta(0):
        yield fault(f"It expired on {until}: clients refuse to connect.", mend, *_RENEW)
    elif left < _NOW:
        yield fault(f"It expires on {until}, in {left / timedelta(hours=1):.0f} h.", mend, *_RENEW)
    elif left < _SOON:
        yield warning(f"It expires on {until}, in {left.days} days.", mend, *_RENEW)
    if now < certificate.not_before:
        yield fault(
            f"It is not valid before {certificate.not_before:%Y-%m-%d %H:%M} UTC.",
            "See whether this machine's clock is right; else get one that is valid:",
            "timedatectl status",
        )


def _names(certificate: Certificate) -> Iterator[Finding]:
    host = urlsplit(settings.PUBLIC_URL or "").hostname
    if host is not None and not certificate.is_for(host):
        names = ", ".join(certificate.names) or "no name at all"
        yield fault(
            f"It is for {names}; PUBLIC_URL has {host}: clients refuse it.",
            "Get one for that name:",
            f"sudo certbot --nginx -d {host}",
        )


def _key(files: CertificateFiles | None) -> Iterator[Finding]:
    if files is None or files.key is None:
        return
    try:
        files.key.open("rb").close()
    except PermissionError:  # as it should be: only root starts Nginx
        return
    except OSError as error:
        yield fault(
            f"Its key {files.key} cannot be read: {error.strerror}.",
            "Bring it back, or get a new certificate:",
            *_RENEW,
        )
        return
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(files.certificate, files.key, password=_NO_PASSWORD)
    except ssl.SSLError as error:
        yield fault(
            f"The key {files.key} cannot be used with it: {error.reason or error}.",
            "Give Nginx the key that the certificate was made for.",
        )
