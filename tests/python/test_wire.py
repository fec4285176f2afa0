"""The codec against the golden bytes that the Rust tests write and check."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import pytest
from fastaa import _messages, _wire

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "wire.json").read_text())
NAMES = [example["name"] for example in GOLDEN]

# Enum variants whose class here has a name of its own.
VARIANT_NAMES = {
    _messages.ClassLabels: "Class",
    _messages.VectorLabels: "Vector",
    _messages.Refusal: "Refused",
    _messages.BatchDescriptor: "Batch",
    _messages.ServerHello: "Hello",
    _messages.ClientHello: "Hello",
}
UNION_FIELDS = {"body", "reply", "labels"}


def as_json(value: Any) -> Any:
    """A message as the golden file writes it."""
    if isinstance(value, enum.IntEnum):
        return value.name
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {
            name: as_variant(field) if name in UNION_FIELDS else as_json(field)
            for name, field in value._asdict().items()
        }
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    return value


def as_variant(value: Any) -> Any:
    """A variant of an enum: its name and its content."""
    name = VARIANT_NAMES.get(type(value), type(value).__name__)
    if isinstance(value, _messages.Bye):
        return name
    # Rust writes these three without names for their only field.
    if isinstance(value, _messages.Release | _messages.Goodbye | _messages.Failed):
        return {name: as_json(value[0])}
    return {name: as_json(value)}


def kind_of(example: dict[str, Any]) -> Any:
    return getattr(_messages, example["message"])


def bytes_of(name: str) -> bytes:
    (found,) = [example["hex"] for example in GOLDEN if example["name"] == name]
    return bytes.fromhex(found)


@pytest.mark.parametrize("example", GOLDEN, ids=NAMES)
def test_decodes_to_the_golden_values(example: dict[str, Any]) -> None:
    message = _wire.decode(kind_of(example), bytes.fromhex(example["hex"]))
    assert as_json(message) == example["value"]


@pytest.mark.parametrize("example", GOLDEN, ids=NAMES)
def test_encodes_to_the_golden_bytes(example: dict[str, Any]) -> None:
    message = _wire.decode(kind_of(example), bytes.fromhex(example["hex"]))
    assert _wire.encode(message).hex() == example["hex"]


@pytest.mark.parametrize("example", GOLDEN, ids=NAMES)
def test_refuses_every_truncation(example: dict[str, Any]) -> None:
    data = bytes.fromhex(example["hex"])
    for length in range(len(data)):
        with pytest.raises(_wire.WireError):
            _wire.decode(kind_of(example), data[:length])


@pytest.mark.parametrize("example", GOLDEN, ids=NAMES)
def test_refuses_trailing_bytes(example: dict[str, Any]) -> None:
    with pytest.raises(_wire.WireError, match="1 trailing bytes"):
        _wire.decode(kind_of(example), bytes.fromhex(example["hex"]) + b"\0")


@pytest.mark.parametrize("example", GOLDEN, ids=NAMES)
def test_refuses_another_version_before_anything_else(example: dict[str, Any]) -> None:
    data = (_wire.PROTOCOL_VERSION + 1).to_bytes(2, "little") + b"what a later version means"
    with pytest.raises(
        _wire.WireVersionError, match=f"protocol version {_wire.PROTOCOL_VERSION + 1}"
    ):
        _wire.decode(kind_of(example), data)


def test_every_variant_has_an_example() -> None:
    """A variant that is added without golden bytes fails here."""
    text = json.dumps([example["value"] for example in GOLDEN])
    plain = (_messages.GroupMode, _messages.WireDtype, _messages.WireLayout, _messages.ErrorCode)
    expected = [f'"{variant.name}"' for kind in plain for variant in kind]
    unions = (_messages.ClientBody, _messages.DaemonBody)
    for union in unions:
        expected += [f'"{VARIANT_NAMES.get(kind, kind.__name__)}"' for kind in union.__args__]
    expected += ['"Welcome"', '"Refused"', '"Class"', '"Vector"']
    assert [name for name in expected if name not in text] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("daemon frame")])
def test_the_fast_decoder_agrees_with_the_slow_one(name: str) -> None:
    data = bytes_of(name)
    assert _wire.decode_daemon_frame(data) == _wire.decode(_messages.DaemonFrame, data)


def test_the_fast_decoder_refuses_what_the_slow_one_refuses() -> None:
    data = bytearray(bytes_of("daemon frame, batch"))
    for position, value in ((len(data) - 5, 2), (len(data) - 6, 255), (10, 9)):
        broken = bytearray(data)
        broken[position] = value
        with pytest.raises(_wire.WireError, match="malformed"):
            _wire.decode_daemon_frame(bytes(broken))
    data[0] += 1
    with pytest.raises(_wire.WireVersionError):
        _wire.decode_daemon_frame(bytes(data))


@pytest.mark.parametrize("count", ["nothing", "one", "two"])
def test_the_fast_encoder_agrees_with_the_slow_one(count: str) -> None:
    data = bytes_of(f"client frame, release of {count}")
    frame = _wire.decode(_messages.ClientFrame, data)
    assert isinstance(frame.body, _messages.Release)
    assert _wire.encode_release(frame.session, frame.body.leases) == data


def test_a_claimed_length_costs_no_memory() -> None:
    """A list or string that claims 2^60 items is refused before anything is made for it."""
    head = bytes_of("client frame, release of nothing")[:14]
    for tag in (1, 3):
        data = head[:10] + tag.to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
        with pytest.raises(_wire.WireError, match="malformed"):
            _wire.decode(_messages.ClientFrame, data)


def test_refuses_text_that_is_no_utf8_and_unknown_variants() -> None:
    goodbye = bytearray(bytes_of("daemon frame, goodbye"))
    goodbye[-1] = 0xFF
    with pytest.raises(_wire.WireError, match="malformed"):
        _wire.decode(_messages.DaemonFrame, bytes(goodbye))
    for position, name in ((10, "DaemonBody"), (14, "ErrorCode")):
        failed = bytearray(bytes_of("daemon frame, failed"))
        failed[position] = 99
        with pytest.raises(_wire.WireError, match=f"{name} has no variant 99"):
            _wire.decode(_messages.DaemonFrame, bytes(failed))


def test_refuses_to_encode_what_does_not_fit() -> None:
    version = _wire.PROTOCOL_VERSION
    for body in (
        _messages.Start(-1, 0, 0, ""),
        _messages.Start(1 << 32, 0, 0, ""),
        _messages.Start(1, 0, 0, "x" * _wire.FRAME_BYTES_MAX),
    ):
        with pytest.raises(_wire.WireError):
            _wire.encode(_messages.ClientFrame(version, 1, body))
    with pytest.raises(_wire.WireError, match="over the limit"):
        _wire.decode(_messages.DaemonFrame, bytes(_wire.FRAME_BYTES_MAX + 1))
