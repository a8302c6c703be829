"""Whether Triton kernels serve, or the plain PyTorch that does the same."""

import functools
import importlib.util
import logging
import os

_log = logging.getLogger(__name__)


def takes_triton(variable: str, on_gpu: bool) -> bool:
    """Whether to take the kernels: the environment variable says so (`triton`, `torch`), or, unset, a GPU with Triton.

    ValueError for another value, and for `triton` where it is not installed.
    """
    choice = os.environ.get(variable, "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"{variable}={choice} is not known; set it to torch or triton, or unset it.")
    if choice == "triton" and not has_triton():
        raise ValueError(f"{variable}={choice}, but Triton is not installed; pip install triton, or unset it.")
    return choice == "triton" or (on_gpu and not choice and has_triton())


@functools.cache
def has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _log.warning("Triton is not installed: plain PyTorch takes the place of kernels, which is slower on a GPU.")
    return found
