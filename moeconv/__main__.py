"""`python -m moeconv` is the command `moeconv`.

The commands lie above this package, which must not import them: what is run is whatever the installation says that the
command is, by its entry point.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

commands = entry_points(group="console_scripts", name="moeconv")
if not commands:
    sys.exit(
        "error: the package moeconv is not installed, so that its command isn't known; run `pip install .` in its folder"
    )
sys.exit(next(iter(commands)).load()())
