"""Stand-ins for the commands that ``mhmoe reproduce`` calls: what they leave behind, without training anything."""

import json
from pathlib import Path

from written_runs import make_record, text_metrics

from mhmoe_fairseq.commands.main import main as mhmoe
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.provenance import timestamp
from mhmoe_fairseq.evaluation.records import record_file, write_record


def after(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


class Commands:
    """Stand-ins: a training writes a checkpoint and logs a loss that its learning rate decides, an evaluation a record.

    Attributes:
        called: the words of every command, in their order.
        broken: a word of a command that fails.
        slow: a word of the trainings that take ten times as long as others.
        perplexities: of models' evaluations, by name; each seed adds a tenth to its model's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.called, self.broken, self.slow = folder, [], None, None
        self.perplexities: dict[str, float] = {}

    def __call__(self, words, variables, on_line, output=None) -> None:
        self.called.append((words, variables))
        if self.broken is not None and any(self.broken in word for word in words):
            raise UserError("RuntimeError: broken")
        if words[0] == "fairseq-train":
            run, lr, last = Path(after("--save-dir", words)), float(after("--lr", words)), after("--max-update", words)
            (run / "checkpoint_best.pt").write_text(" ".join(words))
            (run / "checkpoint_1_2.pt").touch()
            half, wps = str(int(last) // 2), "10" if self.slow in words else "100"
            lines = [
                json.dumps({"loss": "5.0", "wps": wps, "wpb": "4096", "peak_gb": "1.5", "num_updates": half}),
                json.dumps({"valid_loss": str(abs(lr - 4e-3)), "valid_ppl": "32.0", "valid_num_updates": last}),
            ]
            (run / "train.log").write_text("\n".join(lines))
            for line in lines:
                on_line(f"2026 | INFO | train | {line}")
        elif words[1:3] == ["checkpoint", "mix"]:
            Path(after("--output", words)).write_text(" ".join(words))
        elif "prepare" in words:
            (Path(after("--dest", words)) / "manifest.json").write_text("{}")
        elif "report" in words:
            Path(after("--out", words)).write_text(" ".join(words))
        elif "evaluate" in words:
            run = Path(words[2]).parent
            value = self.perplexities.get(run.parent.name, 20.0) + int(run.name[5:]) / 10
            path = {"path": str(Path(after("--data", words)).resolve()), "digest": "0" * 64, "source": "sentences"}
            suffix = f"-{after('--domain-mixture', words)}" if "--domain-mixture" in words else ""
            for split in (word for flag, word in zip(words, words[1:]) if flag == "--split"):
                origin = {"command": " ".join(words), "date": timestamp(), "commit": "c0ffee"}
                write_record(
                    record_file(run, split + suffix),
                    make_record(text_metrics(value), split=split, data=path, provenance=origin),
                )

    def trained(self) -> list[str]:
        """The runs trained since the last call."""
        words, self.called = [words for words, _ in self.called], []
        folders = [Path(after("--save-dir", of)) for of in words if of[0] == "fairseq-train"]
        return [path.relative_to(self.folder / "out").as_posix() for path in folders]


def reproduce(folder: Path, *words: str) -> int:
    """One seed and learning rate unless ``words`` say otherwise."""
    paths = ["--data", str(folder / "data"), "--out", str(folder / "out")]
    return mhmoe(
        ["reproduce", words[0], *paths, "--seeds", "1", *([] if "--lrs" in words else ["--lrs", "4e-3"]), *words[1:]]
    )
