"""Downloads Fashion-MNIST's four files into a folder, for machines without Debian's package."""

from __future__ import annotations

import hashlib
import sys
import urllib.request
from pathlib import Path

BASE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# MD5 sums as https://github.com/zalandoresearch/fashion-mnist publishes them.
FILES = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
TIMEOUT_SECONDS = 60


def main() -> int:
    """Downloads what is not there yet; returns the exit code."""
    if len(sys.argv) != 2:
        print("usage: download_fashion_mnist.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, md5 in FILES.items():
        path = folder / name
        if path.exists():
            continue
        try:
            with urllib.request.urlopen(BASE + name, timeout=TIMEOUT_SECONDS) as response:
                content = response.read()
        except OSError as error:
            print(f"error: cannot download {BASE + name}: {error}", file=sys.stderr)
            print(f"hint: put Fashion-MNIST's four .gz files into {folder}", file=sys.stderr)
            return 1
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            print(f"error: {name} has MD5 {found}, not {md5}", file=sys.stderr)
            return 1
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.rename(path)
        print(f"{path}: {len(content):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
