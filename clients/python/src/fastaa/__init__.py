"""Policy-augmented image batches from the fastaa-loaderd daemon.

::

    import fastaa

    loader = fastaa.Loader("fashion-mnist", split="train", batch_size=256)
    for images, labels in loader:
        ...

The daemon decodes and augments; batches arrive in shared memory and are views of it, as torch
tensors or numpy arrays. Start one with `fastaa-loaderd --config FILE`.
"""

from ._batch import Batch
from ._version import __version__
from .errors import (
    AllSlotsHeldWarning,
    DaemonGone,
    DaemonNotRunning,
    DaemonRestartWarning,
    DaemonStopping,
    DataError,
    Error,
    ExhaustedError,
    ForbiddenError,
    GpuCopyWarning,
    GpuFailedError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    PinningWarning,
    ProtocolError,
    ReplayWarning,
    StateError,
    UnsupportedError,
    UsageError,
)
from .loader import Loader

__all__ = [
    "AllSlotsHeldWarning",
    "Batch",
    "DaemonGone",
    "DaemonNotRunning",
    "DaemonRestartWarning",
    "DaemonStopping",
    "DataError",
    "Error",
    "ExhaustedError",
    "ForbiddenError",
    "GpuCopyWarning",
    "GpuFailedError",
    "InternalError",
    "InvalidRequestError",
    "Loader",
    "NotFoundError",
    "PinningWarning",
    "ProtocolError",
    "ReplayWarning",
    "StateError",
    "UnsupportedError",
    "UsageError",
    "__version__",
]
