#!/usr/bin/env bash
# pytest 9.2 with pytest-xdist 3.8: `xdist_group` is ignored, and every worker makes the fixture.
#
# Versions and date: pytest 9.2.0, pytest-xdist 3.8.0; 2026-11-30.
# One would guess: under `--dist loadgroup` all tests with the same `xdist_group` run in one worker,
#   so that their module's fixture is made once.
# What happens: they are spread over the workers as under `load`. The worker marks a group by
#   writing `@name` behind the test's `_nodeid`, which pytest 9.2 no longer reads: a node's id comes
#   from another attribute. There is neither error nor warning. `--dist loadfile`, which reads the
#   id only, works.
# Why it matters: groups hold what is expensive or exclusive: a training run that several tests look
#   at, one GPU, one port. The suite stays green, and takes twice the time, or fails now and then.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile pytest==9.2.0 pytest-xdist==3.8.0
cd "$work"
cat > test_group.py <<'PY'
import os
import time

import pytest

pytestmark = pytest.mark.xdist_group("expensive")


@pytest.fixture(scope="module")
def made():
    with open(os.environ["MADE"], "a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")


@pytest.mark.parametrize("number", range(4))
def test_uses_it(made, number):
    time.sleep(0.5)
PY
venv/bin/pip list 2> /dev/null | grep -E "^pytest"
for dist in loadgroup loadfile; do
  MADE="$work/$dist" venv/bin/python -m pytest -q -n 2 --dist "$dist" test_group.py > /dev/null
  echo "--dist $dist: the fixture was made $(wc -l < "$dist") time(s), by $(sort "$dist" | tr '\n' ' ')"
done
if [ "$(wc -l < loadgroup)" = 2 ] && [ "$(wc -l < loadfile)" = 1 ]; then
  echo "as seen"
else
  echo "changed"
  exit 1
fi
