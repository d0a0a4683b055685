"""`python -m vo`: the same as the `vo` command."""

import sys

from vo.cli import program

sys.exit(program())
