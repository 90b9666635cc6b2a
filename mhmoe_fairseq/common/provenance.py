"""When and with what something was made, for manifests and records."""

import contextlib
import datetime
import platform
from collections.abc import Iterable
from importlib import metadata


def timestamp() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of Python and of those ``packages`` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
