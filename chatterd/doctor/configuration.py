"""The check `settings`: how those of the environment and of `.env` combine."""

import difflib
import ipaddress
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, urlsplit

from starlette.config import Config

from chatterd import settings
from chatterd.doctor import Finding, fault, ok, warning

NAMES: Final = tuple(name for name in settings.__annotations__ if name.isupper())
"""Every setting."""

_ENV: Final = Path(".env")
# Names of other programs' variables are often made of the same words: DATABASE_NAME.
_LIKENESS: Final = 0.85
# A network of so many addresses is not the proxies'.
_LARGE: Final = {4: 2**24, 6: 2**96}


def settings_check() -> list[Finding]:
    """Look at values that are right by themselves and wrong together."""
    in_file = Config(_ENV).file_values if (is_there := _ENV.is_file()) else {}
    set_here = [name for name in NAMES if name in os.environ]
    set_there = [name for name in NAMES if name in in_file and name not in os.environ]
    findings = [
        *_misspelt(in_file, "in .env"),
        *_misspelt(os.environ, "in the environment"),
        *_readable(),
        *_address(),
        *_peers(),
    ]
    file = f"{len(set_there)} from {_ENV.absolute()}" if is_there else f"no .env in {Path.cwd()}"
    return findings or [ok(f"{len(set_here)} from the environment, {file}")]


def _misspelt(names: Mapping[str, str], where: str) -> Iterator[Finding]:
    for name in names:
        near = difflib.get_close_matches(name.upper(), NAMES, 1, _LIKENESS)
        if name not in NAMES and near:
            yield warning(
                f"{name} {where} is no setting, and is not read.",
                f"Call it {near[0]} if that is meant.",
            )


def _readable() -> Iterator[Finding]:
    has_password = settings.DATABASE_URL is not None and settings.DATABASE_URL.password is not None
    if has_password and "DATABASE_URL" not in os.environ and _ENV.stat().st_mode & stat.S_IROTH:
        yield warning(
            ".env holds the database's password, and everybody may read it.",
            "Leave it to its owner and group:",
            "chmod o= .env",
        )


def _address() -> Iterator[Finding]:
    if settings.PUBLIC_URL is None:
        return
    url = urlsplit(settings.PUBLIC_URL)
    host = url.hostname or ""
    if url.path != settings.ROOT_PATH:
        yield fault(
            f"PUBLIC_URL ends in {url.path or 'no path'}, ROOT_PATH is"
            f" {settings.ROOT_PATH or 'empty'}: pictures are not found where they are linked.",
            "Set both to the path under which the proxy shows this server:",
            f"PUBLIC_URL={url.scheme}://{url.netloc}{settings.ROOT_PATH}",
        )
    if url.scheme == "http" and not _is_private(host):
        yield warning(
            "PUBLIC_URL is http: pictures are sent in the clear, and apps refuse them in a page"
            " that came by https.",
            "Once the proxy has a certificate:",
            f"PUBLIC_URL={_with_https(url)}",
        )
    if "*" in settings.ALLOWED_HOSTS:
        yield warning(
            "ALLOWED_HOSTS is *: requests may name any host, though PUBLIC_URL names the right"
            " one.",
            "Allow that one alone, and where you look from this machine:",
            f"ALLOWED_HOSTS={host},127.0.0.1",
        )
    elif not any(allowed in {host, f"*.{host.partition('.')[2]}"} for allowed in _allowed()):
        yield fault(
            f"ALLOWED_HOSTS has no {host}, which PUBLIC_URL names: requests get 400.",
            "Add it:",
            f"ALLOWED_HOSTS={host},{','.join(settings.ALLOWED_HOSTS)}",
        )


def _allowed() -> Iterator[str]:
    return (allowed.strip("[]") for allowed in settings.ALLOWED_HOSTS)


def _is_private(host: str) -> bool:
    """Tell whether `host` is this machine or in its own network, where certificates are rare."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return host == "localhost" or "." not in host


def _with_https(url: SplitResult) -> str:
    return url._replace(scheme="https").geturl()


def _peers() -> Iterator[Finding]:
    for name, peers, harm in (
        ("TRUSTED_PROXIES", settings.TRUSTED_PROXIES, "who a client is and which host it named"),
        ("METRICS_ALLOWED", settings.METRICS_ALLOWED, "the metrics"),
    ):
        for network in peers.networks:
            if network.num_addresses <= _LARGE[network.version]:
                continue
            mend = f"Name the addresses themselves in {name}; unix for those at a unix socket:"
            right = f"{name}=unix"
            if name == "METRICS_ALLOWED":
                yield warning(
                    f"METRICS_ALLOWED has {network}: so many may read {harm}.", mend, right
                )
            elif network.prefixlen == 0:
                yield fault(f"TRUSTED_PROXIES has {network}: anybody may say {harm}.", mend, right)
            else:
                yield warning(
                    f"TRUSTED_PROXIES has {network}: so many may say {harm}.", mend, right
                )
