"""A process that has imported what the tests import, and forks itself for every run of pytest.

Started in a copy of the checkout with the names of modules to import; reads lines of JSON, the arguments of one run,
and answers each with pytest's exit status. What pytest writes is in pytest.txt. Importing torch and fairseq takes
longer than most mutants' tests.
"""

import importlib
import importlib.util
import json
import logging
import os
import sys

LOG = "pytest.txt"


def main(modules: list[str]) -> None:
    sys.path[0] = os.getcwd()  # as for ``python -m pytest``
    level = logging.root.level
    for module in modules:
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            importlib.import_module(module)
    logging.root.setLevel(level)  # fairseq leaves it at DEBUG
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(arguments: list[str]) -> None:
    """Run pytest; never returns."""
    import pytest

    output, nothing = os.open(LOG, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), os.open(os.devnull, os.O_RDONLY)
    for descriptor, file in enumerate((nothing, output, output)):
        os.dup2(file, descriptor)
    status = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
