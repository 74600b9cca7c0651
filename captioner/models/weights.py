"""Weights: read without running code, and put into modules that are built without memory.

Sizes that a stranger's file asks for are compared with the tensors that it has before anything of
these sizes is allocated; and no time goes into random numbers that are replaced at once.
"""

import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captioner.errors import CheckpointError, name_some


class Unallocated(TorchFunctionMode):
    """Within this context the weights of new modules are on torch's meta device.

    torch.nn's layers make their weights by ``torch.empty``. What is made in another way, constants
    in buffers above all, is made as always, since no file brings it.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if function is torch.empty:
            kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module copies of tensors as its weights, in its own dtypes.

    Args:
        module: Made ``Unallocated``, or not.
        tensors: By the names of its ``state_dict``.

    Raises:
        CheckpointError: They don't fit; nothing was allocated.
    """
    weights = module.state_dict()
    if reason := misfit(weights, tensors):
        raise CheckpointError(reason)
    for name, own in weights.items():
        given = tensors.get(name, torch.zeros((), dtype=torch.long))  # see ``misfit``
        weights[name] = given.to(own.dtype, copy=True, memory_format=torch.contiguous_format)
    module.load_state_dict(weights, assign=True)


def misfit(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    """Return why tensors can't become these weights, or ``""``.

    How many batches a batch norm has seen may be missing: nothing uses it.
    """
    common = [key for key in weights if key in tensors]
    problems = {
        "missing": [
            key for key in weights if key not in tensors and "num_batches_tracked" not in key
        ],
        "of another shape": [key for key in common if tensors[key].shape != weights[key].shape],
        "no floating-point numbers": [
            key
            for key in common
            if weights[key].is_floating_point() and not tensors[key].is_floating_point()
        ],
        "too many": [key for key in tensors if key not in weights],
    }
    for what, keys in problems.items():
        if keys:
            return f"{len(keys)} are {what} ({name_some(keys)})"
    return ""


def load_pickled(file: BinaryIO) -> Any:
    """Read tensors and plain values that ``torch.save`` wrote; code in the file is refused.

    Raises:
        ValueError: It is damaged or something else; the message says it in one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # guesses about what the file is
            return torch.load(file, map_location="cpu", weights_only=True)
    # torch's reader raises almost anything on damaged files and on those that are something else.
    except Exception as error:
        raise ValueError(reason_of(error)) from None


def reason_of(error: Exception) -> str:
    """Return in one line why weights can't be read."""
    if isinstance(error, pickle.UnpicklingError):
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            return f"it calls {wanted[1]}"
    elif isinstance(error, OSError | RuntimeError | SafetensorError):
        reason = str(error).partition("\n")[0][:300]
        # Some of torch's messages advise to load the file in the way that runs code from it.
        if reason and "weights_only" not in reason:
            return reason
    return "it is damaged or of another format"
