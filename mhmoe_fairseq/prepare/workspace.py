"""The destination of a preparation: stages that survive a kill, and outputs that appear all at once.

Everything is made in ``DEST/.partial`` and moved into ``DEST`` when the last stage is done, the manifest last. Until
then what ``DEST`` held before stays complete and usable. ``DEST/.partial/progress.json`` records the settings and the
finished stages, so that the same command continues where it was killed.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

from ..common.errors import UserError
from ..common.files import explain_full_disk, read_json, refuse_path_separator, sha256_of, write_json
from ..data.identity import MANIFEST, read_manifest

_OUTPUT_NAMES = ("dict.txt", "train.bin", "train.idx", "text/train.txt")
_PARTIAL, _PROGRESS = ".partial", "progress.json"


class Workspace:
    """One destination folder; ``UserError`` if fairseq could not read from it.

    Args:
        settings: flag name without dashes -> value; two preparations with equal settings make equal data.
    """

    def __init__(self, dest: Path, settings: Mapping[str, Any]):
        refuse_path_separator(dest, "--dest")
        self.dest = dest
        self.partial = dest / _PARTIAL
        self.settings = json.loads(json.dumps(settings))  # as the manifest has them
        self._stages: dict[str, Any] = {}

    def begin(self, *, overwrite: bool, say: Callable[[str], None]) -> str:
        """Decides what there is to do: ``complete``, ``resumed`` or ``fresh``.

        An unfinished preparation of other settings is thrown away: only time is lost.

        Raises:
            UserError: without ``overwrite``, the folder holds data of other settings, damaged or not made here.
        """
        progress = read_json(path) if (path := self.partial / _PROGRESS).exists() else {}
        if progress.get("publishing"):
            self._move_outputs()
            progress = {}
        if progress and progress["settings"] == self.settings:
            self._stages = progress["stages"]
            return "resumed"
        if not overwrite and self._holds_finished_data():
            return "complete"
        if unfinished := _first_difference(progress.get("settings", self.settings), self.settings):
            name, old, _ = unfinished
            say(f"{self.dest}: throwing away an unfinished preparation made with another {name} ({old})")
        shutil.rmtree(self.partial, ignore_errors=True)
        self._save_progress()
        return "fresh"

    def _save_progress(self, **extra: Any) -> None:
        write_json(self.partial / _PROGRESS, {"settings": self.settings, "stages": self._stages, **extra})

    def _holds_finished_data(self) -> bool:
        """Whether this very preparation is there and intact; ``UserError`` when something else or less is."""
        manifest = read_manifest(self.dest)
        if not manifest:
            if foreign := [name for name in _OUTPUT_NAMES if (self.dest / name).exists()]:
                raise UserError(
                    f"--dest {self.dest}: holds {foreign[0]} but no {MANIFEST}, so it was not made here; choose "
                    "another --dest, or add --overwrite to replace it"
                )
            return False
        if difference := _first_difference(manifest.get("settings", {}), self.settings):
            name, old, new = difference
            raise UserError(
                f"--dest {self.dest}: holds data made with another {name} ({old}, now {new}); choose another --dest, "
                "or add --overwrite to replace it"
            )
        for name, recorded in manifest["files"].items():
            size, expected = _size(self.dest / name), recorded["bytes"]
            if size != expected:
                found = f"{self.dest / name}: {'is missing' if size is None else f'has {size} bytes'}"
                raise UserError(f"{found}, {MANIFEST} says {expected} bytes; add --overwrite to make it again")
        return True

    def stage(self, name: str, outputs: list[str], make: Callable[[], Any]) -> Any:
        """Returns the result of ``make()``, or what is recorded of it if the ``outputs`` that it wrote are intact."""
        done = self._stages.get(name)
        if done is not None and all(_size(self.partial / file) == size for file, size in done["outputs"].items()):
            return done["result"]
        result = make()
        self._stages[name] = {"result": result, "outputs": {file: _size(self.partial / file) for file in outputs}}
        self._save_progress()
        return result

    def publish(self, manifest: Mapping[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Moves the outputs into ``dest``, in place of an earlier preparation's; returns the manifest with hashes."""
        files = describe_files(self.partial, sorted(outputs))
        complete = {**manifest, "settings": self.settings, "files": files}
        write_json(self.partial / MANIFEST, complete)
        self._save_progress(publishing=True)
        self._move_outputs()
        return complete

    def _move_outputs(self) -> None:
        """Moves what is still in ``partial``; a run killed in between is finished by the next one."""
        if (self.partial / MANIFEST).exists():
            files = read_json(self.partial / MANIFEST)["files"]
            for name in read_manifest(self.dest).get("files", {}).keys() - files.keys():
                (self.dest / name).unlink(missing_ok=True)
            (self.dest / MANIFEST).unlink(missing_ok=True)
            with explain_full_disk(self.dest):
                for name in files:
                    (self.dest / name).parent.mkdir(parents=True, exist_ok=True)
                    if (self.partial / name).exists():
                        os.replace(self.partial / name, self.dest / name)
                os.replace(self.partial / MANIFEST, self.dest / MANIFEST)
        shutil.rmtree(self.partial)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns size and hash of each file, as manifests have them."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Returns name and both values of the first setting that differs; inside ``source`` of the part that differs."""
    for name in [*new, *(old.keys() - new.keys())]:
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(before, dict) and isinstance(now, dict):
            inner = next(part for part in [*now, *before] if before.get(part) != now.get(part))
            flag, before, now = f"{flag} {inner}", before.get(inner), now.get(inner)
        old_text, new_text = (text if len(text) <= 100 else text[:97] + "..." for text in (str(before), str(now)))
        return flag, old_text, new_text
    return None
