"""OCR: read text in images with RapidOCR."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from lit_prefopt.errors import InputError


def rapid_ocr() -> Callable[[Image.Image], list[str]]:
    """Return an OCR function that runs on the CPU.

    Raises:
        InputError: It is not installed.
    """
    try:
        module: Any = importlib.import_module("rapidocr")
        engine = module.RapidOCR(params={"Global.log_level": "error"})
    except ImportError as error:  # its constructor imports onnxruntime
        raise InputError(
            "Reading text needs RapidOCR: `pip install lit-prefopt[ocr]`, or name a function of "
            "your own as `reader`."
        ) from error

    def read(image: Image.Image) -> list[str]:
        return [*(engine(np.asarray(image)[..., ::-1]).txts or ())]  # BGR

    return read
