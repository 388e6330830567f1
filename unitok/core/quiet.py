"""What other libraries print, where a process of ours begins."""

import logging
import os


def quiet_libraries() -> None:
    """Loading bars and notices of the libraries are not part of our output; warnings still are."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank: pages of C++ frames before our one line
    # transformers imports torchao where it is installed, which makes torch speak of torchao's own affairs
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
