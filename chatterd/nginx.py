"""The configuration of an Nginx in front of the server, with the limits of the settings.

`deploy/nginx` holds what `files` returns for the default settings; `python -m tests.nginx` writes
it anew. Why it is as it is stands in docs/decisions/0014-nginx.md.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import indent
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from chatterd import settings
from chatterd.bodies import FORM_MAX_SIZE, PROMPT_MAX_SIZE, too_large
from chatterd.errors import Problem, problem_body
from chatterd.media import MEDIA_TYPES

DEFAULT_UPSTREAMS: Final = ("unix:/run/chatterd/1.sock", "unix:/run/chatterd/2.sock")


class NginxError(Exception):
    """What cannot be configured. The message is for the operator."""


class Site(NamedTuple):
    """What an operator decides.

    `upstreams` are the instances' addresses, like unix:/run/chatterd/1.sock and 127.0.0.1:8000.
    With no certificate the site is plain HTTP.
    """

    names: tuple[str, ...]
    upstreams: tuple[str, ...]
    media_root: Path
    certificate: Path | None = None
    certificate_key: Path | None = None
    port: int = 443
    http_port: int = 80


def default_names() -> tuple[str, ...]:
    """Return the host names that the settings tell; `_`, for any, where they tell none."""
    if settings.PUBLIC_URL is not None:
        host = urlsplit(settings.PUBLIC_URL).hostname
        assert host is not None  # the settings have seen to it
        return (host.encode("idna").decode(),)
    return ("_",) if "*" in settings.ALLOWED_HOSTS else settings.ALLOWED_HOSTS


def whole(site: Site) -> str:
    """Return the configuration as one file that includes nothing; raises `NginxError`."""
    texts = files(site)
    text = texts.pop("site.conf")
    for name, included in texts.items():
        before, space, after = re.split(
            rf"^( *)include {re.escape(name)};\n", text, flags=re.MULTILINE
        )
        text = before + indent(included, space) + after
    return text


def files(site: Site) -> dict[str, str]:
    """Return the configuration by file: site.conf, and what it includes. Raises `NginxError`."""
    if settings.PROXY_HEADERS != "x-forwarded":
        raise NginxError("this Nginx speaks in X-Forwarded-*; PROXY_HEADERS must be x-forwarded")
    if (site.certificate is None) != (site.certificate_key is None):
        raise NginxError("TLS needs both --certificate and --certificate-key")
    limits = {
        "JSON_MAX": str(settings.JSON_MAX_SIZE),
        "FORM_MAX": str(FORM_MAX_SIZE),
        "PROMPT_MAX": str(PROMPT_MAX_SIZE),
    }
    root = {"PATH": settings.ROOT_PATH, "PATTERN": re.escape(settings.ROOT_PATH)}
    problems = {
        f"PROBLEM_{problem.status}": f"'{problem_body(problem, '$chatterd_request_id').decode()}'"
        for problem in _PROBLEMS
    }
    return {
        "site.conf": _filled(_SITE + (_PLAIN if site.certificate is None else _TLS), _values(site)),
        "chatterd/http.conf": _filled(_HTTP, limits | root | problems),
        "chatterd/server.conf": _filled(
            _SERVER + (_BELOW if settings.ROOT_PATH else _AT_ROOT),
            limits
            | root
            | problems
            | {
                "EXTENSIONS": "|".join(sorted(suffix[1:] for suffix in MEDIA_TYPES)),
                "TYPES": _lines(
                    8, (f"{kind} {suffix[1:]};" for suffix, kind in MEDIA_TYPES.items())
                ),
                "METRICS": _lines(
                    4, (f"allow {net};" for net in settings.METRICS_ALLOWED.networks)
                ),
            },
        ),
    }


def _values(site: Site) -> dict[str, str]:
    # Behind a socket's path, a colon ends it.
    addresses = [
        f"http://{each}:" if each.startswith("unix:") else f"http://{each}"
        for each in site.upstreams
    ]
    instances = enumerate(addresses, 1)
    return {
        "SERVERS": _lines(4, (f"server {_quoted(each)} max_fails=0;" for each in site.upstreams)),
        "INSTANCES": _lines(4, (f"{number} {_quoted(address)};" for number, address in instances)),
        "NAMES": " ".join(map(_quoted, site.names)),
        "MEDIA_ROOT": _quoted(site.media_root),
        "CERTIFICATE": _quoted(site.certificate),
        "CERTIFICATE_KEY": _quoted(site.certificate_key),
        "PORT": str(site.port),
        "HTTP_PORT": str(site.http_port),
        "REDIRECT": "$host" if site.port == 443 else f"$host:{site.port}",
    }


def _quoted(value: object) -> str:
    """Return a value as Nginx reads it; raises `NginxError` for one that it cannot read."""
    text = str(value)
    if re.search(r"[$\x00-\x1f]", text):
        raise NginxError(f"{text!r} has a character that Nginx takes in no value")
    if re.fullmatch(r"[\w./:*\[\]-]+", text, re.ASCII):
        return text
    escaped = re.sub(r'(["\\])', r"\\\1", text)
    return f'"{escaped}"'


def _lines(spaces: int, lines: Iterable[str]) -> str:
    return ("\n" + " " * spaces).join(lines)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """Return the template with its names between @ signs replaced; a line left empty goes."""
    text = re.sub(r"@([A-Z_0-9]+)@", lambda match: values[match[1]], template)
    return re.sub(r"^ +\n", "", text, flags=re.MULTILINE)


# What Nginx says by itself.
_PROBLEMS: Final = (
    Problem("request-malformed", "The request is no HTTP that is understood here."),
    Problem("address-not-allowed", "This is not for your address to read."),
    Problem("not-found", "There is nothing at this address."),
    too_large("$chatterd_body_max"),
    Problem("address-too-long", "The address of the request is too long."),
    Problem("headers-too-large", "The headers of the request are too large."),
    Problem("internal-error", "Something went wrong in front of the server; try again later."),
    Problem("bad-gateway", "The server does not answer at the moment; try again in a moment."),
    Problem("gateway-timeout", "The server takes too long to answer; try again later."),
)

_SITE: Final = """\
# chatterd behind Nginx: names, certificate, instances and the media folder. The rest is included.

include chatterd/http.conf;

# The instances. None is ever taken for dead (max_fails=0): one that restarts is passed by for the
# requests that find it away, and for no more.
upstream chatterd {
    @SERVERS@

    # The server closes a connection that is idle for 75 seconds. Nginx does so before, or it would
    # send a post into a connection that is just being closed, and must not send it again.
    keepalive 64;
    keepalive_timeout 60s;
}

# Whose numbers /metrics and /metrics/<n> tell.
map $chatterd_instance $chatterd_instance_address {
    default "";
    "" http://chatterd;
    @INSTANCES@
}
"""

_PLAIN: Final = """
server {
    listen @HTTP_PORT@;
    listen [::]:@HTTP_PORT@;
    server_name @NAMES@;

    # MEDIA_ROOT. Nginx's user needs x on the folders and r on the files; what it may not read, it
    # leaves to the server.
    set $chatterd_media_root @MEDIA_ROOT@;

    include chatterd/server.conf;
}
"""

_TLS: Final = """
server {
    listen @HTTP_PORT@;
    listen [::]:@HTTP_PORT@;
    server_name @NAMES@;
    server_tokens off;

    # For certificates: certbot certonly --webroot --webroot-path /var/www/html
    location /.well-known/acme-challenge/ {
        root /var/www/html;
    }

    # 308, unlike 301, leaves a POST what it is.
    location / {
        return 308 https://@REDIRECT@$request_uri;
    }
}

server {
    listen @PORT@ ssl http2;
    listen [::]:@PORT@ ssl http2;
    server_name @NAMES@;

    ssl_certificate @CERTIFICATE@;
    ssl_certificate_key @CERTIFICATE_KEY@;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_cache shared:chatterd:10m;
    ssl_session_timeout 1d;
    ssl_session_tickets off;

    # MEDIA_ROOT. Nginx's user needs x on the folders and r on the files; what it may not read, it
    # leaves to the server.
    set $chatterd_media_root @MEDIA_ROOT@;

    include chatterd/server.conf;
}
"""

_HTTP: Final = r"""# What chatterd needs in Nginx's http block. Operators change nothing here.

# The client's own id where it is sane: the server's rule.
map $http_x_request_id $chatterd_request_id {
    default $request_id;
    "~^[A-Za-z0-9._:-]{1,128}$" $http_x_request_id;
}

# Clients of HTTP/1.0 may name no host; the server wants one.
map $http_host $chatterd_host {
    default $http_host;
    "" $host;
}

# WebSockets are passed on, and no other change of protocol.
map $http_upgrade $chatterd_upgrade {
    default "";
    "~*^websocket$" websocket;
}
map $http_upgrade $chatterd_connection {
    default "";
    "~*^websocket$" upgrade;
}

# The limit that a body is over when Nginx refuses it.
map "$uri $content_type" $chatterd_body_max {
    default @JSON_MAX@;
    "~^@PATTERN@/postimages/? " @FORM_MAX@;
    "~*^@PATTERN@/v1/chatts/? multipart/form-data" @FORM_MAX@;
    "~^@PATTERN@/llmprompt/? " @PROMPT_MAX@;
}

# Nginx answers a GET for a whole file, or for one range that begins with the first byte or is
# counted from the end. What else there is, HEAD, ?thumb, conditions and lists of ranges, is for the
# server: Nginx has other rules there. So is a range that may lie behind the end: Nginx would refuse
# it with the headers of the file, to be kept for a year.
map "$request_method?$args$http_if_none_match$http_if_match$http_if_unmodified_since?$http_range"
    $chatterd_is_plain {
    default "";
    "~^GET\?\?(bytes=(0-[0-9]{0,18}|-0*[1-9][0-9]{0,17}))?$" 1;
}
# Nginx says by itself that it accepts ranges, except in an answer to one.
map "$http_range?$http_if_range?$uri" $chatterd_accept_ranges {
    default "";
    "~^bytes=[^?]*\?\?" bytes;
    "~^bytes=[^?]*\?\"([0-9a-f]{32})\"\?@PATTERN@/media/\1" bytes;
}

# Errors of Nginx's own, as the server would say them.
map $status $chatterd_problem {
    default @PROBLEM_500@;
    400 @PROBLEM_400@;
    403 @PROBLEM_403@;
    404 @PROBLEM_404@;
    413 @PROBLEM_413@;
    414 @PROBLEM_414@;
    431 @PROBLEM_431@;
    502 @PROBLEM_502@;
    504 @PROBLEM_504@;
}
map $status $chatterd_retry_after {
    default "";
    502 1;
}
# What Nginx takes for a malformed request although only its path leads nowhere (%00, or out of the
# root by ..): it has no $request_uri then.
map "$request_uri?$server_protocol?$request" $chatterd_is_path_bad {
    default "";
    "~^\?HTTP/2" 1;
    "~^\?[^?]*\?[A-Z]+ /" 1;
}
"""

_SERVER: Final = r"""# What chatterd needs in a server block of Nginx. Operators change nothing here:
# limits and paths are those of the settings, and where they are not the default ones, `chatterd
# nginx` prints it all anew.

server_tokens off;
charset off;
# The server compresses, and gives what it has compressed a tag of its own. Nginx would make that a
# weak one, with which no download is continued.
gzip off;
# The paths are the server's to understand.
merge_slashes off;

# Slow clients are held here, where one costs next to nothing. The server gets whole requests, and
# gives away its answers at once.
client_header_timeout 30s;
client_body_timeout 60s;
send_timeout 60s;
reset_timedout_connection on;
client_body_buffer_size 128k;
proxy_request_buffering on;
proxy_buffer_size 16k;
proxy_buffers 8 64k;
proxy_busy_buffers_size 128k;
# Together about the 16 KiB that the server takes.
client_header_buffer_size 1k;
large_client_header_buffers 2 8k;
client_max_body_size @JSON_MAX@;
# Over HTTP/2, what is a little too long is taken before it is refused: not every client that waits
# to send the rest sees the refusal.
http2_body_preread_size 128k;

proxy_http_version 1.1;
proxy_redirect off;
proxy_pass_header X-Accel-Buffering;
proxy_set_header Host $chatterd_host;
proxy_set_header X-Forwarded-For $remote_addr;
proxy_set_header X-Forwarded-Proto $scheme;
proxy_set_header X-Forwarded-Host $chatterd_host;
proxy_set_header Forwarded "";
proxy_set_header X-Request-Id $chatterd_request_id;
proxy_set_header Upgrade $chatterd_upgrade;
proxy_set_header Connection $chatterd_connection;

# Where an instance is away, the next one is asked. A post that has been sent is never sent again:
# non_idempotent is not among these.
proxy_next_upstream error timeout;
proxy_next_upstream_timeout 10s;
proxy_connect_timeout 5s;
# Longer than a long poll waits.
proxy_read_timeout 90s;

# An error before the request has a path leads to an address; one after it, to a name, which leaves
# the path as it is.
error_page 400 = /.chatterd/malformed;
error_page 497 501 505 =400 /.chatterd/problem;
error_page 414 /.chatterd/problem;
error_page 494 =431 /.chatterd/problem;
error_page 403 404 413 500 502 503 504 507 @problem;
error_page 405 = @chatterd;
# What is left to the server may find no server.
recursive_error_pages on;
types {}
default_type application/problem+json;

location = /.chatterd/malformed {
    internal;
    add_header X-Request-Id $chatterd_request_id always;
    if ($chatterd_is_path_bad) {
        return 404 @PROBLEM_404@;
    }
    return 400 @PROBLEM_400@;
}
location = /.chatterd/problem {
    internal;
    add_header X-Request-Id $chatterd_request_id always;
    return 400 $chatterd_problem;
}
location @problem {
    add_header X-Request-Id $chatterd_request_id always;
    add_header Retry-After $chatterd_retry_after always;
    # The status is that of the error.
    return 500 $chatterd_problem;
}
location @chatterd {
    proxy_pass http://chatterd;
}

location ~ "^@PATTERN@/(?:postimages|v1/chatts)/?$" {
    client_max_body_size @FORM_MAX@;
    proxy_pass http://chatterd;
}

# The first word may take minutes.
location ~ "^@PATTERN@/llmprompt/?$" {
    client_max_body_size @PROMPT_MAX@;
    proxy_buffering off;
    proxy_read_timeout 1h;
    proxy_pass http://chatterd;
}

# The server breaks the silence every 15 and 20 seconds.
location ~ "^@PATTERN@/v1/(?:stream|ws)/?$" {
    proxy_buffering off;
    proxy_read_timeout 1h;
    proxy_send_timeout 1h;
    proxy_pass http://chatterd;
}

# METRICS_ALLOWED. With a number behind it, that instance's.
location ~ "^@PATTERN@/metrics(?:/(?<chatterd_instance>[0-9]+))?/?$" {
    @METRICS@
    deny all;
    if ($chatterd_instance_address = "") {
        return 404;
    }
    proxy_pass $chatterd_instance_address/metrics$is_args$args;
}

# Files that are named by their digest. The tag is its first half, whatever the file's date.
location ~ "^@PATTERN@/media/(?<chatterd_key>(?<chatterd_tag>[0-9a-f]{32})[0-9a-f]{32}\.(?:@EXTENSIONS@))\z" {
    # What Nginx does not find, may not read or has another rule for, the server answers.
    error_page 403 404 418 = @chatterd;
    error_page 413 500 @problem;
    if ($chatterd_is_plain = "") {
        return 418;
    }
    alias $chatterd_media_root/$chatterd_key;
    disable_symlinks on from=$chatterd_media_root;
    types {
        @TYPES@
    }
    etag off;
    if_modified_since off;
    max_ranges 1;
    add_header ETag '"$chatterd_tag"';
    add_header Last-Modified "";
    add_header Accept-Ranges $chatterd_accept_ranges;
    add_header Cache-Control "public, max-age=31536000, immutable";
    add_header X-Content-Type-Options nosniff;
    add_header Content-Security-Policy "default-src 'none'; sandbox";
    add_header X-Request-Id $chatterd_request_id;
}
"""  # noqa: E501 - a pattern is one word to Nginx

_AT_ROOT: Final = """
location / {
    proxy_pass http://chatterd;
}
"""

_BELOW: Final = """
# ROOT_PATH. The server takes it off.
location = @PATH@ {
    proxy_pass http://chatterd;
}
location @PATH@/ {
    proxy_pass http://chatterd;
}
location / {
    return 404;
}
"""
