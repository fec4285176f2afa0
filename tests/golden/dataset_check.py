"""Reads dataset files by means of its own, for the tests of the Rust readers and the packer.

    dataset_check.py idx ARROW IMAGES LABELS        compare a packed file with its IDX source
    dataset_check.py cifar10|cifar100 ARROW FILE…   compare a packed file with its CIFAR source
    dataset_check.py raw ARROW H W C LEN PIXELS LABELS
                                                    compare it with raw pixels and labels; LEN is
                                                    the length of vector labels, 0 for classes
    dataset_check.py rewrite HOW IN OUT             write a packed file in another way: chunks,
                                                    nullable, lz4, zstd, stream, nulls,
                                                    dictionary, extra
    dataset_check.py versions                       exit 0 if numpy and pyarrow are there

The comparisons print the packed file's fingerprint, computed here, as JSON. pyarrow and numpy
read the bytes; nothing of the project is imported.
"""

import gzip
import hashlib
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc


def read_idx(path: str) -> np.ndarray:
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    zero, kind, n_dims = struct.unpack(">HBB", data[:4])
    assert (zero, kind) == (0, 8), path
    shape = struct.unpack(f">{n_dims}I", data[4 : 4 + 4 * n_dims])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * n_dims).reshape(shape)


def read_cifar(paths: list[str], n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    records = [np.fromfile(path, np.uint8).reshape(-1, n_labels + 3072) for path in paths]
    data = np.concatenate(records)
    images = data[:, n_labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, data[:, n_labels - 1].astype(np.int64)


def read_packed(path: str) -> tuple[pa.Table, dict[str, str]]:
    with pa.memory_map(path) as source:
        table = pa.ipc.open_file(source).read_all()
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    return table, metadata


def compare(path: str, images: np.ndarray, labels: np.ndarray) -> None:
    """`images`: `[n, h, w, c]` uint8; `labels`: `[n]` int64 or `[n, len]` float32."""
    table, metadata = read_packed(path)
    table.validate(full=True)
    n_samples, *shape = images.shape
    assert table.column_names == ["image", "label", "checksum"], table.schema
    assert table.num_rows == n_samples == int(metadata["fastaa.n_samples"])
    assert metadata["fastaa.version"] == "1"
    assert metadata["fastaa.shape"] == ",".join(map(str, shape)), metadata
    class_names = json.loads(metadata["fastaa.class_names"])
    if labels.ndim == 1:
        n_classes = int(metadata["fastaa.n_classes"])
        assert labels.max() < n_classes, n_classes
        assert len(class_names) in (0, n_classes), class_names
        packed_labels = table["label"].to_numpy()
        assert packed_labels.dtype == np.int64
        label_rows = labels.astype("<i8").reshape(n_samples, 1)
    else:
        assert metadata["fastaa.n_classes"] == "0"
        packed_labels = np.array(table["label"].to_pylist(), np.float32)
        label_rows = labels.astype("<f4")
    np.testing.assert_array_equal(packed_labels, labels)
    pixels = b"".join(table["image"].to_pylist())
    assert pixels == images.tobytes(), "pixels differ"
    checksums = [
        zlib.crc32(label.tobytes(), zlib.crc32(image.tobytes()))
        for image, label in zip(images, label_rows, strict=True)
    ]
    assert table["checksum"].to_pylist() == checksums, "checksums differ"

    digest = hashlib.sha256(struct.pack("<4Q", *shape, labels.shape[1] if labels.ndim > 1 else 0))
    for checksum, label in zip(checksums, label_rows, strict=True):
        digest.update(struct.pack("<I", checksum) + label.tobytes())
    fingerprint = digest.hexdigest()[:32]
    assert metadata["fastaa.fingerprint"] == fingerprint, metadata
    print(json.dumps({"n_samples": n_samples, "fingerprint": fingerprint}))


def rewrite(how: str, source: str, target: str) -> None:
    table, _ = read_packed(source)
    options = pa.ipc.IpcWriteOptions()
    if how in ("lz4", "zstd"):
        options = pa.ipc.IpcWriteOptions(compression=how)
    if how == "nullable":
        fields = [field.with_nullable(True) for field in table.schema]
        table = table.cast(pa.schema(fields, table.schema.metadata))
    if how in ("nulls", "dictionary"):
        labels = table["label"].to_pylist()
        labels[1] = None if how == "nulls" else labels[1]
        column = pa.array(labels, table.schema.field("label").type)
        column = column.dictionary_encode() if how == "dictionary" else column
        table = table.set_column(1, "label", column)
    if how == "extra":
        table = table.append_column("weight", pa.array([1.0] * table.num_rows))
    new = pa.ipc.new_stream if how == "stream" else pa.ipc.new_file
    with new(target, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2 if how == "chunks" else None)


def main(command: str, *arguments: str) -> None:
    match command, arguments:
        case "idx", (packed, images, labels):
            pixels = read_idx(images)
            pixels = pixels if pixels.ndim == 4 else pixels[..., None]
            compare(packed, pixels, read_idx(labels).astype(np.int64))
        case "cifar10", (packed, *files):
            compare(packed, *read_cifar(files, 1))
        case "cifar100", (packed, *files):
            compare(packed, *read_cifar(files, 2))
        case "raw", (packed, height, width, channels, length, pixels, labels):
            shape = (-1, int(height), int(width), int(channels))
            images = np.fromfile(pixels, np.uint8).reshape(shape)
            if int(length) == 0:
                compare(packed, images, np.fromfile(labels, "<i8"))
            else:
                compare(packed, images, np.fromfile(labels, "<f4").reshape(-1, int(length)))
        case "rewrite", (how, source, target):
            rewrite(how, source, target)
        case "versions", ():
            print(np.__version__, pa.__version__)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
