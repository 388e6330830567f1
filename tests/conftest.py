"""One thread per process: the rank tests fork, and a fork that inherits a used thread pool waits for it for ever."""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
