"""The check `certificate`, and what it reads from certificates."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import trustme

from chatterd.doctor.certificate import CertificateFiles, certificate_check
from chatterd.doctor.x509 import CertificateError, read_certificate
from tests.doctor import alone

if TYPE_CHECKING:
    from pathlib import Path

DAY = timedelta(days=1)
NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def written(
    folder: Path, certificate: trustme.LeafCert, name: str = "cert.pem"
) -> CertificateFiles:
    """The certificate with those that it is signed by, as Nginx wants them, and its key."""
    files = CertificateFiles(folder / name, folder / f"key-{name}")
    chain = b"".join(each.bytes() for each in certificate.cert_chain_pems)
    files.certificate.write_bytes(chain)
    assert files.key is not None
    files.key.write_bytes(certificate.private_key_pem.bytes())
    return files


@pytest.mark.parametrize("key_type", trustme.KeyType)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (NOW, NOW + 90 * DAY),
        (datetime(1950, 1, 1, tzinfo=UTC), NOW),
        (NOW, datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (NOW, datetime(2050, 1, 1, tzinfo=UTC)),  # another kind of time from here on
    ],
)
def test_times_and_names_are_those_that_the_certificate_was_made_with(
    authority: trustme.CA,
    tmp_path: Path,
    before: datetime,
    after: datetime,
    key_type: trustme.KeyType,
) -> None:
    names = ("chatter.example", "*.chatter.example", "192.0.2.1", "2001:db8::1")
    leaf = authority.issue_cert(*names, not_before=before, not_after=after, key_type=key_type)
    certificate = read_certificate(written(tmp_path, leaf).certificate)
    assert certificate == (before, after, names)


def test_openssl_reads_the_same(authority: trustme.CA, tmp_path: Path) -> None:
    # 130 names: sizes in the certificate that have sizes of their own.
    names = [f"host-{number}.chatter.example" for number in range(130)]
    files = written(tmp_path, authority.issue_cert(*names))
    certificate = read_certificate(files.certificate)
    command = ["openssl", "x509", "-in", str(files.certificate), "-noout", "-text"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"Not After : {certificate.not_after:%b %e %H:%M:%S %Y} GMT" in text
    assert ", ".join(f"DNS:{name}" for name in certificate.names) in text
    assert list(certificate.names) == names


def test_no_damage_to_a_certificate_is_more_than_an_error(
    authority: trustme.CA, tmp_path: Path
) -> None:
    path = written(tmp_path, authority.issue_cert("chatter.example")).certificate
    whole = path.read_text()
    lines = whole.split("-----END CERTIFICATE-----")[0].splitlines()[1:]
    for row, line in enumerate(lines):
        for column in range(0, len(line), 7):
            for other in "A/=\x00":
                broken = [
                    *lines[:row],
                    line[:column] + other + line[column + 1 :],
                    *lines[row + 1 :],
                ]
                body = "\n".join(broken)
                path.write_text(f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
                try:
                    read_certificate(path)
                except CertificateError as error:
                    assert str(path) in str(error)  # noqa: PT017 - not each damage is one
    der = ssl.PEM_cert_to_DER_cert(whole[: whole.index("-----END")] + "-----END CERTIFICATE-----")
    for size in range(len(der)):
        path.write_text(ssl.DER_cert_to_PEM_cert(der[:size]))
        with pytest.raises(CertificateError):
            read_certificate(path)


@pytest.mark.parametrize(
    ("host", "is_right"),
    [
        ("chatter.example", True),
        ("CHATTER.example", True),
        ("a.chatter.example", True),
        ("a.b.chatter.example", False),
        ("other.example", False),
        ("example", False),
        ("192.0.2.1", True),
        ("192.0.2.2", False),
    ],
)
def test_a_certificate_is_for_its_names_and_one_label_where_it_has_a_star(
    authority: trustme.CA, tmp_path: Path, host: str, *, is_right: bool
) -> None:
    leaf = authority.issue_cert("chatter.example", "*.chatter.example", "192.0.2.1")
    certificate = read_certificate(written(tmp_path, leaf).certificate)
    assert str(ipaddress.ip_address("192.0.2.1")) in certificate.names
    assert certificate.is_for(host) is is_right


@pytest.mark.parametrize(
    ("before", "after", "level", "words"),
    [
        (-DAY, 90 * DAY, "ok", f"until {NOW + 90 * DAY:%Y-%m-%d}, for chatter.example"),
        (-DAY, 22 * DAY, "ok", "until"),
        (-DAY, 20 * DAY, "warning", "in 19 days"),
        (-DAY, 2 * DAY, "fault", "in 48 h"),
        (-2 * DAY, -DAY, "fault", "expired"),
        (DAY, 90 * DAY, "fault", "not valid before"),
    ],
)
def test_what_expires_soon_is_found(  # noqa: PLR0913, PLR0917 - a row of the table
    authority: trustme.CA,
    tmp_path: Path,
    before: timedelta,
    after: timedelta,
    level: str,
    words: str,
) -> None:
    leaf = authority.issue_cert("chatter.example", not_before=NOW + before, not_after=NOW + after)
    (finding,) = certificate_check(written(tmp_path, leaf))
    assert finding.level == level
    assert words in finding.found
    assert bool(finding.mend and finding.commands) == (level != "ok")


def test_a_key_that_is_another_certificates_is_a_fault(
    authority: trustme.CA, tmp_path: Path
) -> None:
    files = written(tmp_path, authority.issue_cert("chatter.example"))
    other = written(tmp_path, authority.issue_cert("chatter.example"), "other.pem")
    (finding,) = certificate_check(files._replace(key=other.key))
    assert finding.level == "fault"
    assert "KEY_VALUES_MISMATCH" in finding.found
    (finding,) = certificate_check(files._replace(key=tmp_path / "gone.pem"))
    assert finding.level == "fault"
    assert "No such file" in finding.found


def test_a_file_that_cannot_be_read_is_a_warning_and_one_without_certificate_a_fault(
    tmp_path: Path,
) -> None:
    (finding,) = certificate_check(CertificateFiles(tmp_path / "gone.pem"))
    assert finding.level == "warning"
    assert "No such file" in finding.found
    (tmp_path / "text.pem").write_text("This is no certificate.\n")
    (finding,) = certificate_check(CertificateFiles(tmp_path / "text.pem"))
    assert finding.level == "fault"
    assert "no certificate" in finding.found


async def test_without_a_file_that_can_be_read_it_is_the_one_that_clients_get(
    authority: trustme.CA, tmp_path: Path
) -> None:
    files = written(tmp_path, authority.issue_cert("localhost", not_after=NOW + 10 * DAY))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*files)
    server = await asyncio.start_server(
        lambda _, writer: writer.close(), "localhost", 0, ssl=context
    )
    async with server:
        port = server.sockets[0].getsockname()[1]
        (findings,) = await asyncio.to_thread(
            alone,
            tmp_path,
            ("certificate", "certificate_check", None),
            {"PUBLIC_URL": f"https://localhost:{port}"},
        )
    (finding,) = findings
    assert finding.level == "warning"
    assert "in 9 days" in finding.found


def test_where_there_is_none_it_is_said(tmp_path: Path) -> None:
    without, away = alone(
        tmp_path,
        ("certificate", "certificate_check", None),
        {},
        {"PUBLIC_URL": "https://127.0.0.1:1"},
    )
    assert [finding.level for finding in (*without, *away)] == ["ok", "warning"]
    assert "127.0.0.1:1 cannot be read: Connection refused" in away[0].found
