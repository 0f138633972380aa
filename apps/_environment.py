"""Imported first by every app: a wrong Python is told in one sentence, not by a traceback.

For that it must itself run on every Python 3. Then it settles the standard streams, before
anything is opened.
"""

import importlib.util
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (older ones do come here)
    trouble = "Matilda needs Python 3.11 or newer, and this is {}.{}".format(*sys.version_info)
elif importlib.util.find_spec("matilda_train") is None:
    trouble = f"this Python ({sys.executable}) has no `matilda_train`"
else:
    trouble = ""
if trouble:
    sys.stderr.write(f"error: {trouble}; give the command as `uv run {sys.argv[0]}`.\n")
    sys.exit(2)

from matilda_train.standard_streams import settle_streams

settle_streams()
