"""Everything this package raises: subclasses of `Error` whose text says what to do."""

from __future__ import annotations

from ._messages import ErrorCode, Refusal


class Error(Exception):
    """Base of all errors of this package.

    `message` says what is wrong, `hint` what to do about it (or is empty); the text is both.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\nhint: {hint}" if hint else message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return str(self.args[0])


class DaemonNotRunning(Error, ConnectionError):
    """No daemon answers where one was looked for."""


class DaemonGone(Error, ConnectionError):
    """The daemon died and did not come back in time. A new `for` connects again."""


class DaemonStopping(Error, ConnectionError):
    """The daemon was told to stop and did not come back in time. A new `for` connects again."""


class ProtocolError(Error):
    """Client and daemon do not understand each other: two versions, or a damaged message."""


class ForbiddenError(Error, PermissionError):
    """The daemon does not serve this user, or the token is wrong."""


class NotFoundError(Error, LookupError):
    """The daemon knows no such dataset, split or policy."""


class InvalidRequestError(Error, ValueError):
    """A value that was asked for makes no sense."""


class StateError(InvalidRequestError):
    """A `state_dict` belongs to another stream, or is none."""


class UnsupportedError(Error, NotImplementedError):
    """What was asked for comes in a later version."""


class UsageError(Error, RuntimeError):
    """The loader is used in a way that cannot work: closed, after a fork, twice at once."""


class ExhaustedError(Error):
    """A limit of the daemon is reached: sessions, memory, slots."""


class DataError(Error):
    """A sample or file could not be read, or the dataset is not the one it was."""


class InternalError(Error):
    """A fault of the daemon; its log says more."""


class GpuFailedError(Error):
    """The daemon cannot put batches on the GPU any more; the loader then copies them itself."""


class DaemonRestartWarning(RuntimeWarning):
    """The daemon is gone, and the loader waits for it to come back."""


class ReplayWarning(RuntimeWarning):
    """`FASTAA_REPLAY` is set: the same batches come again and again, for measuring only."""


class AllSlotsHeldWarning(RuntimeWarning):
    """Batches are copied because the program keeps so many that no slot is left to fill."""


class PinningWarning(RuntimeWarning):
    """The slab cannot be page-locked for the GPU: copies take longer."""


class GpuCopyWarning(RuntimeWarning):
    """The daemon cannot put batches on this GPU, so this process copies them there."""


_CLASS_BY_CODE: dict[ErrorCode, type[Error]] = {
    ErrorCode.Protocol: ProtocolError,
    ErrorCode.Malformed: ProtocolError,
    ErrorCode.Forbidden: ForbiddenError,
    ErrorCode.NotFound: NotFoundError,
    ErrorCode.Invalid: InvalidRequestError,
    ErrorCode.Exhausted: ExhaustedError,
    ErrorCode.Data: DataError,
    ErrorCode.Stopping: DaemonStopping,
    ErrorCode.Internal: InternalError,
    ErrorCode.Gpu: GpuFailedError,
}


def error_from_refusal(refusal: Refusal) -> Error:
    """The exception that a refusal of the daemon becomes."""
    return _CLASS_BY_CODE[refusal.code](refusal.message, refusal.hint)
