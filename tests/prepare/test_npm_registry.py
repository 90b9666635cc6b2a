"""npm's tarballs without npm, from a registry that the user's configuration names."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.prepare.archives import Archive, fetch
from mhmoe_fairseq.prepare.npm_registry import configured_registry

CONTENT = b"a package"
ARCHIVE = Archive("npm", "some-data", "1.2.3", "some-data-1.2.3.tgz", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def registry():
    """The address of a server that has one package, and what was asked of it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path == "/npm/some-data/-/some-data-1.2.3.tgz" else 404)
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *arguments):
            """Nothing on stderr."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/npm/", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def machine_without_npm(tmp_path, monkeypatch):
    """No program on the path, no settings of npm."""
    for name in ("NPM_CONFIG_REGISTRY", "npm_config_registry", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_tarball_comes_from_the_configured_registry(registry, tmp_path, monkeypatch):
    address, asked = registry
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
    fetched = fetch(ARCHIVE, tmp_path / "cache", lambda line: None)
    assert fetched.path.read_bytes() == CONTENT and asked == ["/npm/some-data/-/some-data-1.2.3.tgz"]
    assert fetch(ARCHIVE, tmp_path / "cache", lambda line: None).path == fetched.path and len(asked) == 1


def test_another_file_than_the_pinned_one_is_not_used(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", registry[0])
    other = Archive("npm", "some-data", "1.2.3", "some-data-1.2.3.tgz", "0" * 64)
    with pytest.raises(UserError, match="pinned is 0000"):
        fetch(other, tmp_path / "cache", lambda line: None)
    assert not list((tmp_path / "cache").iterdir())


def test_a_package_that_is_not_there(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", registry[0])
    with pytest.raises(UserError, match="other-1.0.tgz cannot be fetched .*404"):
        fetch(Archive("npm", "other", "1.0", "other-1.0.tgz"), tmp_path / "cache", lambda line: None)


def test_the_settings_file_names_a_registry_too(tmp_path):
    assert configured_registry() is None
    (tmp_path / ".npmrc").write_text("cache=/somewhere\nregistry = 'https://example.org/npm'\n")
    assert configured_registry() == "https://example.org/npm"


def test_without_npm_and_without_a_registry(tmp_path):
    with pytest.raises(UserError, match="install it, name a registry in NPM_CONFIG_REGISTRY, put some-data-1.2.3.tgz"):
        fetch(ARCHIVE, tmp_path / "cache", lambda line: None)


def test_what_is_no_address(tmp_path, monkeypatch):
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "file:///etc")
    with pytest.raises(UserError, match="NPM_CONFIG_REGISTRY file:///etc: must be a registry's address"):
        fetch(ARCHIVE, tmp_path / "cache", lambda line: None)
