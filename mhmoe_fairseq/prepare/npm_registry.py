"""Tarballs of npm packages without npm, where the user's configuration names a registry."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Optional

from ..common.errors import UserError
from ..common.files import explain_full_disk

VARIABLE = "NPM_CONFIG_REGISTRY"
_TIMEOUT = 60  # seconds without a byte


def configured_registry() -> Optional[str]:
    """The registry of ``NPM_CONFIG_REGISTRY`` (in either case, as npm reads it) or of ``~/.npmrc``; None without."""
    for name in (VARIABLE, VARIABLE.lower()):
        if os.environ.get(name):
            return os.environ[name]
    settings = Path.home() / ".npmrc"
    for line in settings.read_text(encoding="utf-8", errors="replace").splitlines() if settings.is_file() else ():
        key, _, value = line.partition("=")
        if key.strip() == "registry" and value.strip():
            return value.strip().strip("\"'")
    return None


def download_tarball(registry: str, package: str, version: str, target: Path) -> None:
    """Writes a package's tarball to ``target``; its hash is the caller's to check.

    Raises:
        UserError: the registry is no web address, or does not answer with the file.
    """
    if not registry.startswith(("https://", "http://")):
        raise UserError(f"{VARIABLE} {registry}: must be a registry's address, https://...")
    address = f"{registry.rstrip('/')}/{package}/-/{package.rpartition('/')[2]}-{version}.tgz"
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
            with explain_full_disk(target), open(target, "wb") as stream:
                shutil.copyfileobj(answer, stream)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(f"--source: {address} cannot be fetched ({error})") from error
