"""``fastrnn`` and ``python -m fastrnn``: parse, run the command, turn what goes wrong into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C), 143 terminated.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from .cli import UsageError, build_parser

# Which module runs a command, loaded when the command is run; its function is `run(options) -> exit code`.
RUNNERS = {
    "demo": "demo", "train": "cli_train", "generate": "cli_generate", "score": "cli_score", "bench": "cli_bench",
    "info": "info", "recipe": "cli_recipe",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; usage errors that argparse finds exit with 2 at once."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        from . import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    debug = options.debug or os.environ.get("FASTRNN_DEBUG", "0") not in ("", "0")
    try:
        code = importlib.import_module(f".{RUNNERS[options.command]}", __package__).run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our stdout has gone, as `| head` does. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError, ImportError) as problem:
        if debug:
            raise
        text = str(problem) or type(problem).__name__
        print(f"fastrnn {options.command}: {text}", file=sys.stderr)
        return 2 if isinstance(problem, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
