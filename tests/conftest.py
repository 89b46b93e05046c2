"""For all tests: one thread per process. Their tensors are tiny, and threads that wait for each other cost more than they give."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, so before any test module is
