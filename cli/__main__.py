"""`python -m cli` is `moeconv`."""

from cli.main import run

run()
