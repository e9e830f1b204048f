"""What the scripts of this folder share: one clear line for an error, and the exit status."""

import sys
from collections.abc import Callable

from semidetr_lite.errors import UserError


def run(work: Callable, *arguments) -> int:
    """Call `work(*arguments)` and return the exit status.

    0; 2 after one line about a UserError or an OSError such as a full disk; 130 after Ctrl-C.
    """
    try:
        work(*arguments)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        file = f"{problem.filename}: " if problem.filename else ""
        print(f"error: {file}{problem.strerror or problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
