"""How long a folder of many small files takes to be indexed, and to be opened again.

Makes 200,000 files of one small PNG in 1,000 class folders (`--files`, `--classes`) in a temporary
folder, and times `fastaa-ctl dataset inspect` with an empty and with a kept index. The page cache
is warm: the files were written just before. torchvision's `ImageFolder` is timed for comparison.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from host import binary
from PIL import Image
from torchvision.datasets import ImageFolder


def seconds(folder: Path, cache: Path) -> float:
    """The time of one inspection."""
    began = time.perf_counter()
    program = binary("fastaa-ctl", "FASTAA_CTL")
    command = [program, "dataset", "inspect", str(folder), "--cache-dir", str(cache), "--json"]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    with tempfile.TemporaryDirectory(prefix="fastaa-index-") as name:
        folder = Path(name) / "data"
        for number in range(args.files):
            path = folder / f"class{number % args.classes:04}" / f"{number:07}.png"
            if number < args.classes:
                path.parent.mkdir(parents=True)
            path.write_bytes(buffer.getvalue())
        made, again = [], []
        for round_ in range(args.rounds):
            cache = Path(name) / f"cache{round_}"
            made.append(seconds(folder, cache))
            again.append(seconds(folder, cache))
        began = time.perf_counter()
        ImageFolder(str(folder))
        report = {
            "files": args.files,
            "classes": args.classes,
            "index_made_seconds": statistics.median(made),
            "index_kept_seconds": statistics.median(again),
            "torchvision_seconds": time.perf_counter() - began,
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
