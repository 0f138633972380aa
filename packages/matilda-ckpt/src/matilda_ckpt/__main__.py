"""`python -m matilda_ckpt` is the `matilda-ckpt` command."""

import sys

from matilda_ckpt.cli import main

sys.exit(main())
