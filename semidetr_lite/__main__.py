"""`python -m semidetr_lite` is the command `semidetr`."""

import sys

from semidetr_lite.cli import main

if __name__ == "__main__":
    sys.exit(main())
