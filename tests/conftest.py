"""Workers share the processor: each computes on one thread, and so do the processes it starts."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"
