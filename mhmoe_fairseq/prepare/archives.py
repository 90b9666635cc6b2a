"""Fetching a package's archive with its own client, checking it, and reading it without unpacking it to the disk.

Nothing of a package is ever installed, imported or run, and no member's name is used as a path.
"""

import gzip
import importlib.util
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Optional

from ..common.errors import UserError
from ..common.files import explain_full_disk, sha256_of

Say = Callable[[str], None]
_PIP = "-m pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --dest ."
# The download commands of the clients; they write into the current folder.
_COMMANDS = {
    "pip": [sys.executable, *_PIP.split(), "{package}=={version}"],
    "npm": ["npm", "pack", "--silent", "--ignore-scripts", "{package}@{version}"],
    "apt-get": ["apt-get", "download", "{package}"],
}
_REGISTRY = "NPM_CONFIG_REGISTRY"
_TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    """An archive in a package registry.

    Args:
        client: ``pip``, ``npm`` or ``apt-get``.
        version: exact version, or None for the one the Debian suite has now.
        filename: what the client names the file; ``*`` stands for an unknown version.
        sha256: full hash of an immutable archive; None where the version moves (then it is only recorded).
        instead: what to do without it, for the error messages.
        preferred: of apt-get, the version to take where the suite still has it beside newer ones.
    """

    client: str
    package: str
    version: Optional[str]
    filename: str
    sha256: Optional[str] = None
    instead: str = "choose another source (docstrings needs no download)"
    preferred: Optional[str] = None

    def command(self) -> list[str]:
        """Returns the download command."""
        return [word.format(package=self.package, version=self.version) for word in _COMMANDS[self.client]]

    def commands(self) -> list[list[str]]:
        """Returns the download commands to try, one after the other until one has fetched the archive."""
        first = [] if self.preferred is None else [[*self.command()[:-1], f"{self.package}={self.preferred}"]]
        return [*first, self.command()]

    def cached(self, cache_dir: Path) -> Optional[Path]:
        """Returns the archive in ``cache_dir``, of the preferred version if it is there, else the newest file."""
        wanted = "" if self.preferred is None else self.filename.replace("*", f"{debian_name(self.preferred)}_*")
        return (_newest(cache_dir, wanted) if wanted else None) or _newest(cache_dir, self.filename)

    def has_client(self) -> bool:
        """Whether the client is installed."""
        return bool(importlib.util.find_spec("pip") if self.client == "pip" else shutil.which(self.client))

    def check_client(self) -> None:
        """``UserError`` when the client is not installed, and for npm no registry is configured either."""
        if self.has_client() or (self.client == "npm" and npm_registry()):
            return
        registry = f", name a registry in {_REGISTRY}" if self.client == "npm" else ""
        raise UserError(
            f"--source: {self.package} is fetched with {self.client}, which is not installed here; install it"
            f"{registry}, put {self.filename} into --cache-dir, or {self.instead}"
        )

    def can_be_had(self, cache_dir: Path) -> bool:
        """Whether it lies in ``cache_dir``, or its client is there and, if that is apt, its suite has the package."""
        if any(cache_dir.glob(self.filename)):
            return True
        if not (self.has_client() or (self.client == "npm" and npm_registry())):
            return False
        if self.client != "apt-get":
            return True
        shown = subprocess.run(["apt-cache", "show", "--no-all-versions", self.package], capture_output=True, text=True)
        return shown.returncode == 0 and bool(shown.stdout.strip())


def fetch(archive: Archive, cache_dir: Path, say: Say) -> tuple[Path, dict[str, object]]:
    """Returns the archive in ``cache_dir``, downloaded if needed, and its manifest entry; ``UserError`` if it fails."""
    path = archive.cached(cache_dir)
    digest = sha256_of(path) if path else None
    if path and archive.sha256 in (None, digest):
        say(f"archive: {path.name} from {cache_dir}, SHA-256 {digest}")
    else:
        if path:
            say(f"archive: {path} has SHA-256 {digest}, not the pinned one: fetching it again")
        archive.check_client()
        say(f"archive: fetching {archive.package} with {archive.client}")
        path, digest = _download(archive, cache_dir)
        say(f"archive: {path.name}, {path.stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")
    version = archive.version or path.name.split("_")[1]
    return path, {
        "package": archive.package, "client": archive.client, "version": version, "archive": path.name,
        "archive_bytes": path.stat().st_size, "archive_sha256": digest,
    }  # fmt: skip


def _download(archive: Archive, cache_dir: Path) -> tuple[Path, str]:
    """Returns the archive in ``cache_dir``, and its hash; ``UserError`` for another hash than the pinned one."""
    with explain_full_disk(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=cache_dir) as folder:
            fetch_into = _run_client if archive.has_client() else _download_tarball
            downloaded = fetch_into(archive, Path(folder))
            digest = sha256_of(downloaded)
            if archive.sha256 not in (None, digest):
                raise UserError(
                    f"--source: {downloaded.name} as fetched has SHA-256 {digest}, pinned is {archive.sha256}: "
                    "not the file this version was checked with, so it is not used"
                )
            os.replace(downloaded, cache_dir / downloaded.name)
            return cache_dir / downloaded.name, digest


def debian_name(version: str) -> str:
    """A version as names of Debian's files have it: without what a colon would mean."""
    return version.replace(":", "%3a")


def _newest(folder: Path, pattern: str) -> Optional[Path]:
    return max(filter(Path.is_file, folder.glob(pattern)), key=lambda path: path.stat().st_mtime_ns, default=None)


def _run_client(archive: Archive, folder: Path) -> Path:
    """Runs the client inside ``folder``; ``UserError`` carries the last line it said when it fails."""
    for command in archive.commands():
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        path = _newest(folder, archive.filename)
        if done.returncode == 0 and path is not None:
            return path
    said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    full = [line for line in said if "no space left" in line.lower()]
    complaints = [line for line in said if line.lower().startswith(("error", "e:", "npm err"))]
    reason = [*full[:1], *complaints[:1], *said[-1:], "no message"][0]
    raise UserError(
        f"--source: {archive.client} could not fetch {archive.package} (exit status {done.returncode}: {reason}); run "
        f"again with a network, put {archive.filename} into --cache-dir, or {archive.instead}"
    )


def npm_registry() -> Optional[str]:
    """Returns the registry of ``NPM_CONFIG_REGISTRY`` (in either case, as npm reads it) or ``~/.npmrc``, if any."""
    found = os.environ.get(_REGISTRY) or os.environ.get(_REGISTRY.lower())
    settings = Path.home() / ".npmrc"
    lines = settings.read_text(encoding="utf-8", errors="replace").splitlines() if settings.is_file() else []
    pairs = (line.partition("=") for line in lines)
    values = (value.strip().strip("\"'") for key, _, value in pairs if key.strip() == "registry")
    return next(filter(None, [found, *values]), None)


def _download_tarball(archive: Archive, folder: Path) -> Path:
    """Writes the tarball of an npm package into ``folder``, without npm."""
    registry = npm_registry() or ""
    if not registry.startswith(("https://", "http://")):
        raise UserError(f"{_REGISTRY} {registry}: must be a registry's address, https://...")
    name = f"{archive.package.rpartition('/')[2]}-{archive.version}.tgz"
    address, target = f"{registry.rstrip('/')}/{archive.package}/-/{name}", folder / archive.filename
    try:
        with (
            urllib.request.urlopen(address, timeout=_TIMEOUT) as answer,
            open(target, "wb") as stream,
        ):
            shutil.copyfileobj(answer, stream)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(f"--source: {address} cannot be fetched ({error})") from error
    return target


def read_zip_member(path: Path, member: str) -> bytes:
    """Returns the bytes of one member of a wheel; ``UserError`` when the file is damaged or has no such member."""
    for _, content in iter_zip_members(path, lambda name: name == member):
        return content
    raise UserError(f"{path}: has no member {member}")


def iter_zip_members(path: Path, is_wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
    """Yields ``(name, content)`` of the wanted members of a wheel, by name; ``UserError`` when it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(filter(is_wanted, archive.namelist())):
                yield name, archive.read(name)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged archive ({error}); delete it and run again") from error


def iter_tar_members(
    path: Path, is_wanted: Callable[[str], object], content: Optional[bytes] = None
) -> Iterator[tuple[str, bytes]]:
    """Yields ``(name, content)`` of the regular files of a tar archive whose name is wanted, by name.

    Args:
        content: the bytes of the archive, when it lies inside another file, ``path``.
    """
    try:
        with tarfile.open(path, mode="r:*", fileobj=None if content is None else io.BytesIO(content)) as archive:
            found = [
                (member.name, stream.read())  # in the archive's order: going back would unpack from the start again
                for member in archive
                if member.isfile() and is_wanted(member.name) and (stream := archive.extractfile(member))
            ]
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: damaged archive ({error}); delete it and run again") from error
    yield from sorted(found)


def iter_deb_members(path: Path, is_wanted: Callable[[str], object]) -> Iterator[tuple[str, bytes]]:
    """Yields name, without ``.gz``, and content of the wanted files of a Debian package; ``UserError`` if damaged."""
    for name, content in iter_tar_members(path, is_wanted, read_deb_data(path)):
        try:
            unpacked = gzip.decompress(content) if name.endswith(".gz") else content
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: damaged member {name} ({error}); delete it and run again") from error
        yield name.removesuffix(".gz"), unpacked


def read_deb_data(path: Path) -> bytes:
    """Returns the compressed ``data.tar`` of a Debian package (an ``ar`` archive: 60-byte headers, even offsets)."""
    content = path.read_bytes()
    start = 8 + 60  # of a member, behind its header
    if not content.startswith(b"!<arch>\n"):
        raise UserError(f"{path}: not a Debian package; delete it and run again")
    while content[start - 12 : start - 2].strip().isdigit():
        name, size = content[start - 60 : start - 44], int(content[start - 12 : start - 2])
        if name.startswith(b"data.tar.zst"):
            raise UserError(f"{path}: its data is compressed with zstandard; only xz, gzip and bzip2 can be read")
        if name.startswith(b"data.tar") and start + size <= len(content):
            return content[start : start + size]
        start += size + size % 2 + 60
    raise UserError(f"{path}: damaged Debian package; delete it and run again")
