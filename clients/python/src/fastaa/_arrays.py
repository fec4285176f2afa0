"""Slots as tensors or arrays: views of a root buffer, never copies.

torch is imported only when tensors are asked for, and numpy arrays never import it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import _messages
from ._slab import views
from ._values import shown
from .errors import InvalidRequestError, UsageError

_TORCH_DTYPES = {
    _messages.WireDtype.U8: "uint8",
    _messages.WireDtype.F16: "float16",
    _messages.WireDtype.Bf16: "bfloat16",
    _messages.WireDtype.F32: "float32",
}
_NUMPY_DTYPES: dict[_messages.WireDtype, Any] = {
    _messages.WireDtype.U8: np.uint8,
    _messages.WireDtype.F16: np.float16,
    _messages.WireDtype.F32: np.float32,
}


def check_output(output: str, dtype: object = None) -> None:
    """Refuses an output that cannot be made, before a daemon is asked for it."""
    if not isinstance(output, str) or output not in ("torch", "numpy"):
        raise InvalidRequestError(
            f"output={shown(output)} is unknown", 'use output="torch" or output="numpy"'
        )
    if output == "torch" and importlib.util.find_spec("torch") is None:
        raise UsageError(
            'output="torch" needs PyTorch, which is not installed',
            'pip install torch, or use output="numpy"',
        )
    if output == "numpy" and dtype == "bf16":
        raise InvalidRequestError(
            'numpy has no bfloat16, so output="numpy" cannot deliver dtype="bf16"',
            'use dtype="f32" or "f16", or output="torch"',
        )


class Arrays(NamedTuple):
    """One batch: three views of a root, and the indices as numpy sees them."""

    images: Any
    labels: Any
    indices: Any
    places: npt.NDArray[np.int64]
    """Every sample that the batch stands for; a skipped one as `-1 - index`, at the end."""


class ArrayMaker:
    """Makes the arrays of a stream's batches."""

    def __init__(self, welcome: _messages.Welcome, output: str) -> None:
        """`output` is "torch" or "numpy". Raises `InvalidRequestError` for bf16 in numpy."""
        check_output(output, "bf16" if welcome.dtype == _messages.WireDtype.Bf16 else None)
        self._torch: Any = importlib.import_module("torch") if output == "torch" else None
        library: Any = self._torch if output == "torch" else np
        self._label_shape: tuple[int, ...]
        self._image_shape: tuple[int, ...]
        self._pixel_dtype: Any = (
            getattr(library, _TORCH_DTYPES[welcome.dtype])
            if self._torch
            else _NUMPY_DTYPES[welcome.dtype]
        )
        if welcome.layout == _messages.WireLayout.Nchw:
            self._image_shape = (welcome.channels, welcome.height, welcome.width)
        else:
            self._image_shape = (welcome.height, welcome.width, welcome.channels)
        n_views = views(welcome)
        if n_views > 1:
            self._image_shape = (n_views, *self._image_shape)
        self._label_dtype, self._label_shape = library.int64, ()
        if isinstance(welcome.labels, _messages.VectorLabels):
            self._label_dtype, self._label_shape = library.float32, (welcome.labels.len,)
        self._index_dtype = library.int64
        self._labels_offset = welcome.labels_offset
        self._indices_offset = welcome.indices_offset
        self._gpu_labels_offset = 0 if welcome.gpu is None else welcome.gpu.labels_offset

    def arrays(self, root: Any, n_samples: int) -> Arrays:
        """Views of the samples in the first `n_samples` places of `root`; with 0, new empty arrays.

        The places of skipped samples are the last ones, and are no part of the views. Images are
        `[n, channels, height, width]` or `[n, height, width, channels]`, labels int64 `[n]` or
        float32 `[n, len]`, indices int64 `[n]`.
        """
        places, n_samples = self.places(root, n_samples)
        images = self._view(root, self._pixel_dtype, (n_samples, *self._image_shape), 0)
        labels = self._view(
            root, self._label_dtype, (n_samples, *self._label_shape), self._labels_offset
        )
        indices = self._view(root, self._index_dtype, (n_samples,), self._indices_offset)
        return Arrays(images, labels, indices, places)

    def places(self, root: Any, n_samples: int) -> tuple[npt.NDArray[np.int64], int]:
        """Every sample that the first `n_samples` places stand for, and how many are there."""
        if n_samples == 0:
            return np.empty(0, np.int64), 0
        places = np.frombuffer(root, np.int64, n_samples, self._indices_offset)
        if places[-1] < 0:
            n_samples = int(np.count_nonzero(places >= 0))
        return places, n_samples

    def on_gpu(self, root: Any, slot: Any, n_samples: int) -> Arrays:
        """As `arrays`, of a slot on a GPU that is a tensor of bytes; `root` is the slab's slot.

        `indices` are on the host, and a copy.
        """
        found, n_samples = self.places(root, n_samples)
        places = found.copy()

        def view(dtype: Any, shape: tuple[int, ...], offset: int) -> Any:
            n_bytes = math.prod(shape) * dtype.itemsize
            return slot[offset : offset + n_bytes].view(dtype).reshape(shape)

        images = view(self._pixel_dtype, (n_samples, *self._image_shape), 0)
        labels = view(self._label_dtype, (n_samples, *self._label_shape), self._gpu_labels_offset)
        indices = self._torch.from_numpy(places[:n_samples].copy())
        return Arrays(images, labels, indices, places)

    def _view(self, root: Any, dtype: Any, shape: tuple[int, ...], offset: int) -> Any:
        library = self._torch or np
        n_values = 1
        for side in shape:
            n_values *= side
        if n_values == 0:
            return library.empty(shape, dtype=dtype)
        flat = library.frombuffer(root, dtype=dtype, count=n_values, offset=offset)
        return flat.reshape(shape)
