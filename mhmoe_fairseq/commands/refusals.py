"""What a fairseq command says when our code refuses a flag or a file: one line and status 2, as ``mhmoe`` does."""

import sys
from pathlib import Path
from types import TracebackType

from ..common.errors import USER_ERRORS, UserError

_PACKAGE = Path(__file__).resolve().parent.parent


def refuse_in_one_line() -> None:
    """Let fairseq's commands, and only they, end without a traceback where this package has refused something.

    fairseq has no place for it: its commands let every error through to the interpreter.
    """
    program = Path(sys.argv[0] if sys.argv else "")
    if not program.name.startswith("fairseq-") and program.parent.name != "fairseq_cli":
        return
    stock = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not is_refusal(error, trace):
            stock(kind, error, trace)
            return
        sys.stdout.flush()
        sys.stderr.write(f"{program.stem}: error: {error}\n")
        raise SystemExit(2)

    sys.excepthook = hook


def is_refusal(error: BaseException, trace: TracebackType | None) -> bool:
    """True for an error that this package raised itself and the user can mend.

    Args:
        error: the error.
        trace: where it was raised.
    """
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_here = trace is not None and _PACKAGE in Path(trace.tb_frame.f_code.co_filename).parents
    return isinstance(error, UserError) or (raised_here and isinstance(error, USER_ERRORS))
