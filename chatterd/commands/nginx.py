"""chatterd nginx."""

import argparse
import sys

from chatterd import nginx, settings


def run(options: argparse.Namespace) -> None:
    """Print a configuration; raises `NginxError`."""
    site = nginx.Site(
        options.server_name or nginx.default_names(),
        options.upstream or nginx.DEFAULT_UPSTREAMS,
        settings.MEDIA_ROOT,
        options.certificate and options.certificate.absolute(),
        options.certificate_key and options.certificate_key.absolute(),
        options.port,
        options.http_port,
    )
    sys.stdout.write(nginx.whole(site))
