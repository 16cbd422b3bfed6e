"""`python -m sievit` is `sievit`."""

import sys

from sievit.cli import main

if __name__ == "__main__":
    sys.exit(main())
