#!/usr/bin/env bash
# safetensors' save_file cuts hard links and symlinks, and makes the file private.
#
# Versions and date: safetensors 0.8.0, numpy 2.4.6; 2026-11-30.
# One would guess: save_file(tensors, path) writes into the file at the path, as open(path, "wb")
#   and torch.save do: a symlink's target gets the new weights, a hard link shows them under both
#   names, and the file keeps its mode.
# What happens: it writes another file and renames it over the path. The symlink becomes a regular
#   file and its target keeps the old bytes, the other name of a hard link too, and the mode is 0600
#   whatever the umask and the old mode were.
# Why it matters: folders of models are full of links (a hub's cache is, and so are "latest"
#   links), and weights are served by another user than the one who trained: the server goes on
#   with the old weights, or cannot read the new ones.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile safetensors==0.8.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PY'
import os
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

print(f"safetensors {safetensors.__version__}, numpy {np.__version__}")
os.umask(0o022)
old, new = {"x": np.zeros(2, np.float32)}, {"x": np.ones(2, np.float32)}
save_file(old, "target.safetensors")
os.chmod("target.safetensors", 0o644)
os.symlink("target.safetensors", "symlink.safetensors")
os.link("target.safetensors", "hardlink.safetensors")
save_file(new, "symlink.safetensors")
save_file(new, "hardlink.safetensors")

target = load_file("target.safetensors")["x"].tolist()
still = os.path.islink("symlink.safetensors")
names = os.stat("hardlink.safetensors").st_nlink
mode = os.stat("hardlink.safetensors").st_mode & 0o777
print(f"the symlink is still one: {still}; names of the hard link: {names}")
print(f"the target holds {target}, and was saved to by both names as [1.0, 1.0]")
print(f"mode of a file that had 0o644: {mode:#o}")
if (target, still, names, mode) == ([0.0, 0.0], False, 1, 0o600):
    print("as seen")
else:
    sys.exit("changed")
PY
