"""Manners for the `datasets` library: quiet everywhere, and quick where there is no network."""

import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from cache.errors import SourceError

LIBRARIES = ("datasets", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Within it the libraries log nothing: what goes wrong, they raise. Not from several threads at once."""
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    try:
        for name in LIBRARIES:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def offline_without_network() -> Iterator[None]:
    """Within it the libraries look into their cache only, if the hub's name is unknown here; else they would try for half a minute.

    Raises SourceError in place of what then fails. Not from several threads at once.
    """
    import datasets.config
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if _is_known(host):
        yield
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    except Exception as error:
        raise SourceError(f"there is no network here ({host} is unknown), and nothing of that name in the local cache") from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _is_known(host: str | None) -> bool:
    """Whether the name can be resolved; a proxy, where there is one, may know it when this machine does not."""
    if urllib.request.getproxies() or not host:
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
