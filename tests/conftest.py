"""Set before any test module loads the libraries: what `vo run` sets for itself (see vo/cli.py)."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
