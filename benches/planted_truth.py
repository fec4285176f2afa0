"""Does the search find what the data varies in? `python benches/planted_truth.py`

Three datasets are made from Fashion-MNIST: as it is, every image (train and test alike) rotated at
random within 25 degrees, and every image made brighter or darker at random. For each search seed
the same search runs on all three. Two questions:

  1. How much of Rotate (Brightness) does the found policy use, and up to which strength? Use =
     weight x probability x mean strength, in hundredths; compared with the plain dataset's, paired
     by seed. The strength is the upper end of the range, in degrees (as factor of the brightness
     above or below 1).
  2. Does training with it give a better clean test accuracy on its own dataset than `none` does?
     Trained on as many random samples as the search had, from streams of the daemon, last epoch,
     paired by seed.

Training is long for its few images, because that is where augmentation pays: on short schedules the
search rightly prefers next to none. Intervals are 95 % by Student's t over the search seeds.
Everything is kept below --out, and what is there is not done again: a run that was cut goes on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

ROOT = Path(__file__).resolve().parent.parent
RAW = Path("/usr/share/datasets/fashion-mnist")
KINDS = ("plain", "rotated", "bright")
PLANTED = {"rotated": "Rotate", "bright": "Brightness"}
DEGREES = 25.0
# What strength 1 of TrivialAugment-wide is: degrees, and distance of the factor from 1.
STRENGTH_ONE = {"Rotate": 135.0, "Brightness": 0.99}
BRIGHTNESS = (0.3, 1.7)
# Two-sided 95 % points of Student's t, by degrees of freedom.
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
READY_SECONDS_MAX = 60


def read_idx(name: str, header: int) -> np.ndarray:
    with gzip.open(RAW / name) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def varied(images: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """The images with what is planted into them."""
    rng = np.random.default_rng(seed)
    if kind == "plain":
        return images
    out = []
    for image in images:
        picture = Image.fromarray(image)
        if kind == "rotated":
            angle = rng.uniform(-DEGREES, DEGREES)
            picture = picture.rotate(angle, Image.Resampling.BILINEAR)
        else:
            picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(*BRIGHTNESS))
        out.append(np.asarray(picture))
    return np.stack(out)


def make_dataset(folder: Path, kind: str) -> None:
    """Writes IDX files, train and test."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, prefix in ((1, "train"), (2, "t10k")):
        path = folder / f"{prefix}-images-idx3-ubyte"
        if path.exists():
            continue
        images = read_idx(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read_idx(f"{prefix}-labels-idx1-ubyte.gz", 8)
        header = np.array([0x803, *images.shape], ">u4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, len(labels)], ">u4").tobytes() + labels.tobytes()
        )
        temp = path.with_suffix(".partial")
        temp.write_bytes(header + varied(images, kind, seed).tobytes())
        temp.rename(path)


def config(args: argparse.Namespace, kind: str, seed: int) -> Path:
    """The configuration of one search."""
    folder = args.out / f"{kind}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    path.write_text(
        f"""runtime_dir = "run"
state_dir = "state"
[[dataset]]
name = "{kind}"
path = "../data-{kind}"
[stream.defaults]
crop = {{ kind = "pad", size = 28, pad = 4 }}
hflip = true
normalize = {{ mean = [0.286], std = [0.353] }}
[search]
enabled = false
algorithm = "{args.algorithm}"
reduced = {args.reduced}
folds = {args.folds}
fold_epochs = {args.epochs}
gate_epochs = {args.epochs}
gate_seeds = 2
rounds = 1
seed = {seed}
threads = {args.threads}
[telemetry]
log = "warn"
"""
    )
    return path


def records(folder: Path) -> dict[str, object]:
    """The journal of the only search below a state folder, by key."""
    (journal,) = folder.glob("state/search/*/*/journal")
    lines = [json.loads(line)["record"] for line in journal.read_text().splitlines()[1:]]
    return {line["key"]: line["value"] for line in lines}


def search(args: argparse.Namespace, kind: str, seed: int) -> dict[str, object]:
    """Runs the search to its end (or takes what it found before) and gives its round's record."""
    path = config(args, kind, seed)
    began = time.monotonic()
    command = [args.ctl, "search", "run", "--offline", "--config", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record = records(path.parent)["round/1"]
    assert isinstance(record, dict)
    seconds = time.monotonic() - began
    print(f"{kind} seed {seed}: searched in {seconds:.0f} s: {record['summary']}", flush=True)
    (path.parent / "policy.json").write_text(json.dumps(record["candidate"]))
    return record


def use(policy: dict[str, object], op: str) -> float:
    """Weight x probability x mean strength of an operation, in hundredths of the whole."""
    subs = policy["sub_policies"]
    assert isinstance(subs, list)
    total = sum(sub["weight"] for sub in subs)
    used = 0.0
    for sub in subs:
        for name, probability, magnitude in sub["ops"]:
            if name == op:
                ends = magnitude if isinstance(magnitude, list) else [magnitude, magnitude]
                strength = sum(ends) / 2
                if policy["ops_profile"] == "fastaa":
                    # A signed position in the range: 1/2 is the identity.
                    strength = sum(abs(2 * end - 1) for end in ends) / 2
                used += sub["weight"] * probability * strength
    return 100 * used / total * float(policy.get("draws", 1))  # type: ignore[arg-type]


def strongest(policy: dict[str, object], op: str) -> float:
    """Upper end of an operation's range in the policy, in the operation's own unit; 0 without."""
    assert policy["ops_profile"] == "trivial-wide"
    ends = [0.0]
    subs = policy["sub_policies"]
    assert isinstance(subs, list)
    for sub in subs:
        for name, _, magnitude in sub["ops"]:
            if name == op:
                ends.append(max(magnitude) if isinstance(magnitude, list) else magnitude)
    return STRENGTH_ONE[op] * max(ends)


TRAIN = r"""
import json, sys
import numpy as np
import torch
from torch import nn
import fastaa
run_dir, seed, policy, epochs = sys.argv[1:5]
torch.set_num_threads(1)
torch.manual_seed(int(seed))
use_bf16 = torch.cpu._is_avx512_bf16_supported()

def block(i, o, stride):
    conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU(True))

net = nn.Sequential(block(1, 16, 2), block(16, 32, 1), block(32, 32, 1), block(32, 64, 2),
                    block(64, 96, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))
net = net.to(memory_format=torch.channels_last)
loader = fastaa.Loader("subset", batch_size=128, seed=int(seed), policy=policy, drop_last=True,
                       runtime_dir=run_dir)
n_steps = int(epochs) * len(loader)
sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=2e-4, nesterov=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.1, total_steps=n_steps, pct_start=0.05)
for _ in range(int(epochs)):
    for images, labels in loader:
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            loss = nn.functional.cross_entropy(net(images).float(), labels)
        sgd.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        sgd.step()
        schedule.step()
net.eval()
clean = fastaa.Loader("subset", split="test", batch_size=500, shuffle=False, policy="none",
                      hflip=False, crop={"kind": "none"}, runtime_dir=run_dir)
right = 0
with torch.no_grad():
    for images, labels in clean:
        right += (net(images).argmax(1) == labels).sum().item()
print(right / 10_000)
"""


def write_subset(args: argparse.Namespace, kind: str, seed: int, folder: Path) -> None:
    """A dataset of as many random train samples as the search had, and the whole test split."""
    source = args.out / f"data-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    images = np.fromfile(source / "train-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
    labels = np.fromfile(source / "train-labels-idx1-ubyte", np.uint8)[8:]
    chosen = np.random.default_rng(1000 + seed).permutation(len(labels))[: args.reduced]
    for name, header, array in (
        ("images-idx3", [0x803, args.reduced, 28, 28], images[chosen]),
        ("labels-idx1", [0x801, args.reduced], labels[chosen]),
    ):
        data = np.array(header, ">u4").tobytes() + array.tobytes()
        (folder / f"train-{name}-ubyte").write_bytes(data)
        test = source / f"t10k-{name}-ubyte"
        (folder / f"t10k-{name}-ubyte").write_bytes(test.read_bytes())


def train(args: argparse.Namespace, kind: str, seed: int) -> dict[str, list[float]]:
    """Clean test accuracies in points, by arm, over the training seeds of a search seed."""
    folder = args.out / f"{kind}-{seed}"
    result = folder / "accuracies.json"
    if result.exists():
        return json.loads(result.read_text())
    subset = folder / "subset"
    write_subset(args, kind, seed, subset)
    path = folder / "train.toml"
    path.write_text(
        """runtime_dir = "run"
state_dir = "train-state"
[[dataset]]
name = "subset"
path = "subset"
[stream.defaults]
crop = { kind = "pad", size = 28, pad = 4 }
hflip = true
normalize = { mean = [0.286], std = [0.353] }
[search]
enabled = false
[telemetry]
log = "warn"
"""
    )
    daemon = subprocess.Popen([args.loaderd, "--config", str(path)])
    try:
        end = time.monotonic() + READY_SECONDS_MAX
        status = [args.ctl, "--runtime-dir", str(folder / "run"), "status"]
        while subprocess.run(status, capture_output=True).returncode and time.monotonic() < end:
            time.sleep(0.1)
        arms = {
            "found": str(folder / "policy.json"),
            "none": "none",
        }
        jobs = [(arm, s) for s in range(args.train_seeds) for arm in arms]

        def one(job: tuple[str, int]) -> float:
            arm, train_seed = job
            arguments = [str(folder / "run"), str(100 * seed + train_seed), arms[arm]]
            command = [sys.executable, "-c", TRAIN, *arguments, str(args.train_epochs)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            return 100 * float(done.stdout)

        with ThreadPoolExecutor(args.threads) as pool:
            accuracies = list(pool.map(one, jobs))
    finally:
        daemon.terminate()
        daemon.wait()
    by_arm: dict[str, list[float]] = {arm: [] for arm in arms}
    for (arm, _), accuracy in zip(jobs, accuracies, strict=True):
        by_arm[arm].append(accuracy)
    result.write_text(json.dumps(by_arm))
    return by_arm


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = T95[min(len(values) - 1, 9)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "planted")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--algorithm", default="ranged")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--reduced", type=int, default=500)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--train-epochs", type=int, default=150)
    parser.add_argument("--train-seeds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ctl", default=str(ROOT / "target/release/fastaa-ctl"))
    parser.add_argument("--loaderd", default=str(ROOT / "target/release/fastaa-loaderd"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    planted = {kind: op for kind, op in PLANTED.items() if kind in args.kinds}
    for kind in args.kinds:
        make_dataset(args.out / f"data-{kind}", kind)
    found: dict[str, list[dict[str, object]]] = {kind: [] for kind in args.kinds}
    gains: dict[str, list[float]] = {kind: [] for kind in planted}
    for seed in range(args.seeds):
        for kind in args.kinds:
            candidate = search(args, kind, seed)["candidate"]
            assert isinstance(candidate, dict)
            found[kind].append(candidate)
            if kind in planted:
                arms = train(args, kind, seed)
                gain = statistics.mean(arms["found"]) - statistics.mean(arms["none"])
                gains[kind].append(gain)
                print(f"{kind} seed {seed}: {gain:+.2f} points over none", flush=True)
    print(f"\n{args.algorithm}, {args.seeds} seeds, {args.reduced} images, {args.epochs} epochs")
    print("| planted | what | there | on plain | difference |")
    print("|---|---|---|---|---|")
    for kind, op in planted.items():
        for what, figure in (("use", use), ("strongest", strongest)):
            there = [figure(policy, op) for policy in found[kind]]
            plain = [figure(policy, op) for policy in found["plain"]]
            difference = [a - b for a, b in zip(there, plain, strict=True)]
            means = f"{statistics.mean(there):.2f} | {statistics.mean(plain):.2f}"
            print(f"| {op} | {what} | {means} | {interval(difference)} |")
        print(f"| {op} | points over none | | | {interval(gains[kind])} |")


if __name__ == "__main__":
    main()
