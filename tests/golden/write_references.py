"""Write the golden references that are missing, for the fairseq release and the dropout masks of this environment.

    python tests/golden/write_references.py                    # adds what is missing
    python tests/golden/write_references.py --again xmoe smoe  # writes these kinds anew

The checkpoints come from the release that Python 3.11 has: run it there first.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the tests' helpers


def main() -> None:
    # Here, because the processes that train import this file, too, and are to find the plugin by --user-dir alone.
    from golden_runs import KINDS, add_references, write_data

    parser = argparse.ArgumentParser(description="write the golden references that are missing")
    parser.add_argument("--again", nargs="+", default=[], metavar="KIND", choices=KINDS, help="write these anew")
    again = parser.parse_args().again
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for name in KINDS:
            add_references(name, Path(folder), name in again)


if __name__ == "__main__":
    main()
