"""Writing that never leaves half a file, and reading that says where a file is broken."""

import contextlib
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any, Iterator

from .errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turns "no space left", "quota exceeded" and "file too large" while writing ``path`` into a :class:`UserError`."""
    try:
        yield
    except UserError:  # it names its file already
        raise
    except Exception as error:
        number = _system_error(error)
        if number not in _NO_ROOM:
            raise
        raise UserError(
            f"{path}: cannot be written ({os.strerror(number).lower()}): free some space or name another folder, then "
            "run the same command again; finished stages and earlier outputs are kept"
        ) from error


def _system_error(error: BaseException | None) -> int | None:
    """The number of the system's error behind ``error``; a library may have turned it into one of its own.

    ``torch.save`` raises a RuntimeError while it handles the OSError, safetensors writes the number into its message.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if told := _RUST_ERROR.search(str(error)):
            return int(told[1])
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and moves it there on success; on an error ``path`` stays as it was.

    The temporary name is fixed (``.NAME.tmp``), so an interrupted run leaves at most one such file, and the next run
    replaces it. The bytes reach the disk before the name changes, so that a machine that loses power keeps one of the
    two files. Who may read it is decided by the process's umask, whatever library wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with explain_full_disk(path):
            yield temporary
            with open(temporary, "rb") as written:
                with contextlib.suppress(PermissionError):  # file systems without modes
                    os.umask(mask := os.umask(0o077))  # the system tells it only to who sets it
                    os.fchmod(written.fileno(), 0o666 & ~mask)
                os.fsync(written.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """Like ``open(path, "wb")``, but ``path`` appears only when everything was written and flushed to the disk."""
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        yield stream


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path``, which takes its place on success; on an error ``path`` stays as it was.

    The temporary names are fixed, as those of :func:`atomic_path`. A folder that cannot be renamed, such as a volume,
    stays, and what was made within it takes the place of what it had.
    """
    path = path.resolve()
    if path.is_dir() and (path.is_mount() or not os.access(path.parent, os.W_OK)):
        with _atomic_contents(path) as temporary:
            yield temporary
        return
    temporary, earlier = (path.with_name(f".{path.name}.{ending}") for ending in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explain_full_disk(path):
            temporary.mkdir(parents=True)
            yield temporary
            shutil.rmtree(earlier, ignore_errors=True)
            if path.exists():
                path.rename(earlier)
            temporary.rename(path)
    finally:
        if earlier.exists() and not path.exists():  # something came between the two
            earlier.rename(path)
        for left in (temporary, earlier):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _atomic_contents(path: Path) -> Iterator[Path]:
    temporary = path / f".{path.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with explain_full_disk(path):
            temporary.mkdir()
            yield temporary
            for before in {*path.iterdir()} - {temporary}:
                shutil.rmtree(before) if before.is_dir() and not before.is_symlink() else before.unlink()
            for made in temporary.iterdir():
                made.rename(path / made.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` atomically as indented UTF-8 JSON."""
    with atomic_open(path) as stream:
        stream.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads a JSON file; ``UserError`` names the file, the line and the fault when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 at byte {error.start}") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def refuse_path_separator(path: Path, flag: str) -> None:
    """``UserError`` if fairseq could not open what is made at ``path``: it takes ``:`` for the end of a path."""
    if os.pathsep in str(path.absolute()):
        rule = f"must have no {os.pathsep!r} in its path ({path.absolute()})"
        raise UserError(f"{flag} {path}: {rule}, which fairseq takes for the separator of two")


def require_files(paths: list[Path], flag: str) -> None:
    """Checks that every path is a readable file; ``UserError`` names ``flag`` and the first that is not."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"{flag}: {'not a file' if path.exists() else 'no such file'}: {path}")
        if not os.access(path, os.R_OK):
            raise UserError(f"{flag}: no permission to read {path}")


def read_utf8_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a UTF-8 file without their line end; ``.gz`` is unpacked on the fly, a leading BOM dropped.

    Lines end as Python's own universal newlines do: with ``\\n``, ``\\r\\n``, or old Macs' ``\\r``.

    Raises:
        UserError: invalid UTF-8 (names the file and the byte offset in the unpacked text) or a damaged ``.gz``.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    offset = 0
    try:
        with opener(path, "rb") as stream:
            for raw in stream:
                if offset == 0 and raw.startswith(b"\xef\xbb\xbf"):
                    raw, offset = raw[3:], 3
                yield from raw.decode("utf-8").rstrip("\r\n").split("\r")
                offset += len(raw)
    except UnicodeDecodeError as error:
        found = f"byte {offset + error.start} (0x{error.object[error.start]:02x})"
        raise UserError(f"{path}: invalid UTF-8 at {found}; the corpus must be UTF-8 text") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields ``file:line`` and value of every line that is not empty; ``UserError`` names one that is not JSON."""
    for number, line in enumerate(read_utf8_lines(path), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not valid JSON ({error})") from error


def json_line(value: Any) -> bytes:
    """``value`` as one line of a JSON-lines file, in UTF-8."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
