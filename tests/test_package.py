"""What a user installs: every module imports, and the wheel carries recipes and the toy world."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lit_prefopt

ROOT = Path(__file__).parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(lit_prefopt.__path__, "lit_prefopt.")]


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("name", lit_prefopt.__all__)
def test_names_of_the_package(name: str) -> None:
    assert getattr(lit_prefopt, name) is not None
    assert (ROOT / "lit_prefopt" / "py.typed").is_file()


def test_names_that_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Bakbone'"):
        _ = lit_prefopt.Bakbone


def test_the_package_imports_without_torch() -> None:
    code = "import sys, lit_prefopt; print(lit_prefopt.__version__, 'torch' in sys.modules)"
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert out.split() == [lit_prefopt.__version__, "False"]


def test_files_are_short() -> None:
    long = {p.name: len(p.read_text().splitlines()) for p in ROOT.glob("lit_prefopt/**/*.py")}
    assert max(long.values()) <= 300, long


@pytest.mark.slow
def test_recipes_work_from_an_installed_wheel(tmp_path: Path) -> None:
    """The wheel is installed outside the checkout, and a run is made from there."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("*.whl")
    assert wheel.stat().st_size < 30e6
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    assert (site / "lit_prefopt" / "py.typed").is_file()
    for part in ("page.html", "page.css", "page.js"):
        assert (site / "lit_prefopt" / "evaluate" / "report" / "templates" / part).is_file()
    own = tmp_path / "own"  # with a method beside it, and parts by their shipped names
    own.mkdir()
    (own / "my_method.py").write_text(
        "from lit_prefopt.methods import DiffusionDPO\n\n\n"
        "class Mine(DiffusionDPO):\n    'A method.'\n"
    )
    (own / "mine.yaml").write_text(
        "backbone: backbone/sd15-lora.yaml\nbackbone.lora.rank: 3\n"
        "model: {class_path: my_method.Mine, init_args: {beta: 7, optimizer: AdamW}}\n"
        "model.optimizer.lr: 0.5\ntrainer: hardware/zero2.yaml\n"
    )
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import lit_prefopt; from lit_prefopt.cli import main\n"
        f"assert lit_prefopt.__file__.startswith({str(site)!r}), lit_prefopt.__file__\n"
        "main(['fit', '--config', 'toy-diffusion-dpo', '--trainer.max_steps', '1',\n"
        "      '--data.batch_size', '4', '--batch.pairs', '4', '--data.validation_pairs', '4'])\n"
        "main(['fit', '--config', 'own/mine.yaml', '--print_config'])\n"
    )
    command = [sys.executable, "-P", "-c", script]
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    printed = yaml.safe_load(said[said.index("# lightning.pytorch==") :])
    assert printed["model"]["class_path"] == "my_method.Mine"
    assert printed["backbone"]["init_args"]["lora"]["rank"] == 3
    assert printed["trainer"]["strategy"]["init_args"]["stage"] == 2
    weights = tmp_path / "runs" / "toy-diffusion-dpo" / "weights" / "unet"
    assert (weights / "diffusion_pytorch_model.safetensors").is_file()
