"""The check `certificate`: whether clients accept it, and for how long."""

import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from chatterd import settings
from chatterd.doctor import Finding, fault, ok, warning
from chatterd.doctor.x509 import Certificate, CertificateError, read_certificate

# Let's Encrypt's are renewed 30 days before their end: by then, renewing has failed for a while.
_SOON: Final = timedelta(days=21)
_NOW: Final = timedelta(days=3)
_RENEW: Final = ("sudo certbot renew", "sudo systemctl reload nginx")


# Nobody is asked for one.
_NO_PASSWORD: Final = b""


class CertificateFiles(NamedTuple):
    """A certificate in PEM, and its key where that is known."""

    certificate: Path
    key: Path | None = None


def certificate_check(files: CertificateFiles) -> list[Finding]:
    """Look at what clients will look at."""
    path = files.certificate
    try:
        certificate = read_certificate(path)
    except OSError as error:
        return [
            warning(
                f"{path} cannot be read: {error.strerror}.",
                "Name the right one with --certificate, or look as a user who may read it.",
            )
        ]
    except CertificateError as error:
        return [fault(str(error), "Get a new one, such as with:", *_RENEW)]
    findings = [*_time(certificate), *_names(certificate), *_key(files)]
    return findings or [
        ok(f"{path}, until {certificate.not_after:%Y-%m-%d}, for {', '.join(certificate.names)}")
    ]


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


def _key(files: CertificateFiles) -> Iterator[Finding]:
    if files.key is None:
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
