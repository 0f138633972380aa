"""`python -m matilda_data`: the command `matilda-data` without its script on the path."""

from __future__ import annotations

import sys

from matilda_data.cli import main

if __name__ == "__main__":
    sys.exit(main())
