#!/usr/bin/env bash
# Pillow 13 resizes pictures that are more than twice as high as wide in another order of passes.
#
# Versions and date: pillow 12.0.0 and 13.0.0, numpy 2.4.6, transformers 5.23.0; 2026-12-01.
# One would guess: the bicubic resize of a picture is the same in both versions, and the resize of
#   a transposed picture is the transposed resize of the picture up to a rare rounding.
# What happens: `resize` runs over rows first and then over columns, and rounds to 8 bits between
#   the two. Pillow 13 runs over columns first when the picture is more than twice as high as wide
#   and the columns shrink enough, so that 640 x 1290 differs from Pillow 12 in a sixth of all values
#   (by 1 or 2 of 255) and 640 x 1280 in none. CLIP's image processor of transformers passes it on.
# Why it matters: judges read pictures through this resize. Scores of tall pictures change with an
#   upgrade of Pillow, and a preprocessing on tensors that is equal to the stock processor to the
#   last bit in one version is not in the other: compare such code to a tolerance.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 transformers==5.23.0
for version in 12.0.0 13.0.0; do
    "$work/venv/bin/pip" install --quiet --no-compile --target "$work/$version" "pillow==$version"
done
cd "$work"
cat > resized.py <<'PY'
import sys

import numpy
import PIL
from PIL import Image
from transformers import CLIPImageProcessor

PASSES = Image.Resampling.BICUBIC
SHORT = 224
processor = CLIPImageProcessor()
found = {"pillow": numpy.array(PIL.__version__)}
for width, height in [(640, 1280), (640, 1290), (640, 1536), (1536, 640)]:
    noise = numpy.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    picture = Image.fromarray(noise)
    size = tuple(SHORT * side // min(width, height) for side in (width, height))
    whole = numpy.asarray(picture.resize(size, PASSES))
    rows = numpy.asarray(picture.resize((size[0], height), PASSES).resize(size, PASSES))
    columns = numpy.asarray(picture.resize((width, size[1]), PASSES).resize(size, PASSES))
    order = [name for name, same in (("rows", rows), ("columns", columns)) if (whole == same).all()]
    read = processor(picture, return_tensors="np", do_normalize=False, do_center_crop=False)
    assert numpy.abs(read["pixel_values"][0].transpose(1, 2, 0) * 255 - whole).max() < 1e-3
    found[f"{width}x{height}"], found[f"{width}x{height} first"] = whole, numpy.array(order)
numpy.savez(sys.argv[1], **found)
PY
for version in 12.0.0 13.0.0; do
    PYTHONPATH="$work/$version" venv/bin/python resized.py "$version.npz" 2> /dev/null
done
venv/bin/python - <<'PY'
import sys

import numpy

old, new = (dict(numpy.load(f"{version}.npz")) for version in ("12.0.0", "13.0.0"))
print("pillow", old.pop("pillow"), "and", new.pop("pillow"))
shares, orders = {}, {}
for name in [name for name in old if "first" not in name]:
    apart = numpy.abs(old[name].astype(int) - new[name].astype(int))
    shares[name] = (apart > 0).mean()
    orders[name] = [[str(x) for x in one[f"{name} first"]] for one in (old, new)]
    print(f"{name}: {shares[name]:.1%} of the values differ, by at most {apart.max()}; "
          f"first pass over {orders[name][0]} and {orders[name][1]}")
tall, others = ["640x1290", "640x1536"], ["640x1280", "1536x640"]
seen = all(shares[name] > 0.1 and orders[name] == [["rows"], ["columns"]] for name in tall)
seen &= all(shares[name] == 0 and orders[name] == [["rows"], ["rows"]] for name in others)
print("as seen" if seen else "CHANGED")
sys.exit(0 if seen else 1)
PY
