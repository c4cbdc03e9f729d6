"""The `bantamweight` command: `bantamweight compress | evaluate | info | bench | train | sensitivity`."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence

from .cli.arguments import parse
from .errors import BantamweightError

OK, INTERNAL_ERROR, BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0 done, 2 bad input (one sentence on stderr), 1 a bug of ours."""
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    try:
        args = parse(argv)
        # Imported only now, so that --help and a mistyped option do not wait for torch.
        importlib.import_module(f"bantamweight.cli.{args.command}").run(args)
        return OK
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        sentence, code = _explain(error)
        print(f"bantamweight: {_printable(sentence)}", file=sys.stderr)
        return code


def _explain(error: BaseException) -> tuple[str, int]:
    match error:
        case BantamweightError():
            return " ".join(str(error).split()), BAD_INPUT
        case KeyboardInterrupt():
            return "stopped by Ctrl-C before anything was written; run the same command again", BAD_INPUT
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"no space left on the disk{_named(error)}; free some space or choose another --out", BAD_INPUT
        case OSError(errno=int()):
            return f"{error.strerror}{_named(error)}; check the path and its permissions", BAD_INPUT
        case MemoryError():
            return "out of memory; use fewer calibration images or a smaller --batch-size", BAD_INPUT
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"internal error, please report it with the output of the same command and --debug: {what[:300]}",
        INTERNAL_ERROR,
    )


def _printable(text: str) -> str:
    """With escapes for what a terminal would act on: names in a sentence may be a stranger's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _named(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


if __name__ == "__main__":
    sys.exit(main())
