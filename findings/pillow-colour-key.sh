#!/usr/bin/env bash
# Pillow ignores the transparent colour of a 16-bit RGB and of a 2-bit grey PNG, without a word.
#
# Versions and date: Pillow 13.0.0; 2026-11-30.
# One would guess: convert("RGBA") makes the pixels of the PNG's transparent colour (its tRNS chunk)
#   transparent, whatever the number of bits a sample has, as it does for 8-bit RGB.
# What happens: pixels are scaled to 8 bits, the transparent colour stays as it is stored (0 to 3 for
#   2 bits, 0 to 65535 for 16), and the two are compared: no pixel is equal, and the picture is
#   opaque in the colour that was meant to be invisible.
# Why it matters: cut-out pictures of data sets show a background that the people who judged them
#   never saw, and a check for transparency counts none.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile pillow==13.0.0
cd "$work"
venv/bin/python - <<'PY'
import io
import struct
import sys
import zlib

import PIL
from PIL import Image


def png(bits, kind, row, key):
    """Return a PNG of one row, whose transparent colour is `key`."""

    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0)
    image = zlib.compress(b"\0" + row)
    parts = [(b"IHDR", header), (b"tRNS", key), (b"IDAT", image), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


GREY, RGB = 0, 2
colour = struct.pack(">3H", 0x8000, 0, 0)  # the first of two pixels, and the transparent colour
pictures = {
    "RGB,  8 bits": png(8, RGB, bytes([128, 0, 0, 9, 9, 9]), struct.pack(">3H", 128, 0, 0)),
    "RGB, 16 bits": png(16, RGB, colour + struct.pack(">3H", 9, 9, 9), colour),
    "grey, 2 bits": png(2, GREY, bytes([0b10_01_0000]), struct.pack(">H", 0b10)),
}
print(f"Pillow {PIL.__version__}")
alphas = {}
for name, data in pictures.items():
    pixel = Image.open(io.BytesIO(data)).convert("RGBA").getpixel((0, 0))
    alphas[name] = pixel[3]
    print(f"{name}: the transparent pixel is {pixel}")
if list(alphas.values()) == [0, 255, 255]:
    print("as seen")
else:
    sys.exit("changed")
PY
