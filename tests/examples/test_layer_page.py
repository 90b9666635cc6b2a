"""The page about the layer in other code: all of its examples, one after the other, as a reader runs them."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "layer.md"


def test_the_pages_examples_run_without_fairseq_and_torchscale(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL))
    blocked = "import sys; sys.modules.update(fairseq=None, torchscale=None)\n"
    (tmp_path / "page.py").write_text(blocked + code, encoding="utf-8")
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert code.count("\n") > 50
