"""Streams reference results of every operation to tests/pillow_ops.rs.

The installed Pillow is the judge of the `fastaa` profile, whose operations are written down here
in Pillow calls; torchvision's own `_apply_op` and magnitude tables are the judge of the other two
profiles. Nothing is read; the output on stdout is a sequence of records, little-endian:

    "I" width:u32 height:u32 channels:u8 kind:u8 bytes        an input image; numbered from 0
    "C" image:u32 op:u8 profile:u8 magnitude:f64 negative:u8 centre_x:f64 centre_y:f64 bytes
                                                              an operation's result, same shape
    "E" n_cases:u64                                           the end

Exits with 3 when Pillow, numpy or torchvision is missing.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

try:
    import numpy as np
    from PIL import Image, ImageDraw, ImageEnhance, ImageOps
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import autoaugment as tv
except ImportError as error:
    print(error, file=sys.stderr)
    sys.exit(3)

OPS = [
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "AutoContrast",
    "Invert",
    "Equalize",
    "Solarize",
    "Posterize",
    "Contrast",
    "Color",
    "Brightness",
    "Sharpness",
    "Cutout",
]
FASTAA, TORCHVISION, TRIVIAL_WIDE = range(3)
SIZES = [(1, 1), (1, 7), (7, 1), (28, 28), (32, 32), (33, 47), (224, 224)]
# Too wide for 16.16 fixed-point coordinates.
WIDE_SIZE = (40_000, 2)
KINDS = ["random", "constant", "two-valued", "narrow"]

Case = tuple[int, int, float, bool, tuple[float, float], Image.Image]


def make_image(kind: str, size: tuple[int, int], channels: int) -> Image.Image:
    """An input image; a pure function of its arguments."""
    width, height = size
    rng = np.random.RandomState(KINDS.index(kind) * 1000 + channels * 100 + width % 97)
    shape = (height, width, channels)
    if kind == "random":
        pixels = rng.randint(0, 256, shape)
    elif kind == "constant":
        pixels = np.broadcast_to(rng.randint(0, 256, channels), shape)
    elif kind == "two-valued":
        pixels = np.where(rng.randint(0, 3, shape) == 0, 37, 201)
    else:
        # Few values, many pixels each: the histogram operations have something to do.
        pixels = rng.binomial(60, 0.4, shape) + 90
    pixels = pixels.astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def cutout(image: Image.Image, fraction: float, centre: tuple[float, float]) -> Image.Image:
    """A box of `fraction` of the width, kept inside at the left and top, as published."""
    if fraction <= 0.0:
        return image
    width, height = image.size
    side = fraction * width
    left = int(max(0, centre[0] - side / 2.0))
    top = int(max(0, centre[1] - side / 2.0))
    box = (left, top, min(width, left + side), min(height, top + side))
    image = image.copy()
    ImageDraw.Draw(image).rectangle(box, (125, 123, 114) if image.mode == "RGB" else 124)
    return image


# Per operation: range of its value, and what is done with it. Geometric operations are mirrored.
Published = tuple[float, float, Callable[[Image.Image, float], Image.Image]]
PUBLISHED: dict[str, Published] = {
    "ShearX": (-0.3, 0.3, lambda im, v: affine(im, 1, v, 0, 0, 1, 0)),
    "ShearY": (-0.3, 0.3, lambda im, v: affine(im, 1, 0, 0, v, 1, 0)),
    "TranslateX": (-0.45, 0.45, lambda im, v: affine(im, 1, 0, v * im.width, 0, 1, 0)),
    "TranslateY": (-0.45, 0.45, lambda im, v: affine(im, 1, 0, 0, 0, 1, v * im.height)),
    "Rotate": (-30, 30, lambda im, v: im.rotate(v)),
    "AutoContrast": (0, 1, lambda im, _: ImageOps.autocontrast(im)),
    "Invert": (0, 1, lambda im, _: ImageOps.invert(im)),
    "Equalize": (0, 1, lambda im, _: ImageOps.equalize(im)),
    "Solarize": (0, 256, lambda im, v: ImageOps.solarize(im, v)),  # type: ignore[arg-type]
    "Posterize": (4, 8, lambda im, v: ImageOps.posterize(im, int(v))),
    "Contrast": (0.1, 1.9, lambda im, v: ImageEnhance.Contrast(im).enhance(v)),
    "Color": (0.1, 1.9, lambda im, v: ImageEnhance.Color(im).enhance(v)),
    "Brightness": (0.1, 1.9, lambda im, v: ImageEnhance.Brightness(im).enhance(v)),
    "Sharpness": (0.1, 1.9, lambda im, v: ImageEnhance.Sharpness(im).enhance(v)),
}
MIRRORED = OPS[:5]
# The grid, and some values between its points.
MAGNITUDES = [i / 20 for i in range(21)] + [0.017_3, 0.333_3, 0.618_034, 0.987_654_321]


def fastaa_cases(image: Image.Image, ops: list[str] = OPS) -> Iterator[Case]:
    rng = np.random.RandomState(image.width * 1000 + image.height)
    for op in ops:
        for magnitude in MAGNITUDES:
            if op == "Cutout":
                corner = (image.width - 1e-9, image.height - 1e-9)
                anywhere = (rng.uniform(0, image.width), rng.uniform(0, image.height))
                for centre in [(0.0, 0.0), corner, anywhere]:
                    result = cutout(image, magnitude * (0.2 - 0) + 0, centre)
                    yield OPS.index(op), FASTAA, magnitude, False, centre, result
                continue
            lo, hi, apply = PUBLISHED[op]
            value = magnitude * (hi - lo) + lo
            yield OPS.index(op), FASTAA, magnitude, False, (0.0, 0.0), apply(image, value)
            if op in MIRRORED:
                yield OPS.index(op), FASTAA, magnitude, True, (0.0, 0.0), apply(image, -value)


def table_cases(
    image: Image.Image, profile: int, space: dict[str, Any], bins: int
) -> Iterator[Case]:
    """Every entry of one of torchvision's tables, with both signs where it draws one."""
    for op, (magnitudes, signed) in space.items():
        if op == "Identity":
            continue
        entries = list(enumerate(magnitudes.tolist())) if magnitudes.ndim else [(0, 0.0)]
        for index, value in entries:
            magnitude = index / (bins - 1)
            if profile == TORCHVISION and bins == 31 and index == 20:
                # 20/30 and 6/9 are one number, but the tables of 31 and 10 bins differ there.
                magnitude += 1e-12
            for negative in [False, True] if signed else [False]:
                signed_value = -value if negative else value
                if op == "Posterize":
                    signed_value = int(signed_value)
                nearest = InterpolationMode.NEAREST
                result = tv._apply_op(image, op, signed_value, interpolation=nearest, fill=None)
                yield OPS.index(op), profile, magnitude, negative, (0.0, 0.0), result


def all_cases(image: Image.Image) -> Iterator[Case]:
    height_width = (image.height, image.width)
    yield from fastaa_cases(image)
    auto, rand, trivial = tv.AutoAugment(), tv.RandAugment(), tv.TrivialAugmentWide()
    yield from table_cases(image, TORCHVISION, auto._augmentation_space(10, height_width), 10)
    yield from table_cases(image, TORCHVISION, rand._augmentation_space(31, height_width), 31)
    yield from table_cases(image, TRIVIAL_WIDE, trivial._augmentation_space(31), 31)


def main(out: BinaryIO) -> None:
    n_images = n_cases = 0

    def send(image: Image.Image, kind: int, cases: Iterator[Case]) -> None:
        nonlocal n_images, n_cases
        channels = len(image.getbands())
        out.write(b"I" + struct.pack("<IIBB", *image.size, channels, kind) + image.tobytes())
        for op, profile, magnitude, negative, centre, result in cases:
            assert (result.size, result.mode) == (image.size, image.mode)
            head = struct.pack("<IBBdBdd", n_images, op, profile, magnitude, negative, *centre)
            out.write(b"C" + head + result.tobytes())
            n_cases += 1
        n_images += 1

    for size in SIZES:
        for channels in (1, 3):
            for kind, name in enumerate(KINDS):
                image = make_image(name, size, channels)
                send(image, kind, all_cases(image))
    for channels in (1, 3):
        image = make_image("random", WIDE_SIZE, channels)
        send(image, 0, fastaa_cases(image, ["ShearX", "ShearY", "TranslateX", "Rotate"]))
    out.write(b"E" + struct.pack("<Q", n_cases))
    out.flush()


if __name__ == "__main__":
    try:
        main(sys.stdout.buffer)
    except BrokenPipeError:
        sys.exit(1)
