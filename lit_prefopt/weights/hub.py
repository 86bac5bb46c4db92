"""Check that the hub can be reached before many of its files are requested."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import repo_folder_name

from lit_prefopt.errors import InputError

SECONDS = 5.0
"""Time limit of the first request."""

FILE = "config.json"
"""File of the first request; it need not exist."""


def check_reachable(source: str) -> None:
    """Check that a model is a local path, in the hub's cache, or that the hub answers.

    The hub's own client tries a file that it cannot get for 40 seconds, and then names neither the
    network nor its offline mode as the cause.

    Args:
        source: Hub name, folder or file.

    Raises:
        InputError: It is no local path and the hub does not answer.
    """
    if not Path(source).exists():
        _check_hub(source)


@lru_cache
def _check_hub(name: str) -> None:
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(
            f"{name} does not exist: name a folder, or the name of a model on the hub."
        )
    try:
        url = hf_hub_url(name, FILE)  # checks the name
        folder = repo_folder_name(repo_id=name, repo_type="model")
        if any(Path(constants.HF_HUB_CACHE, folder, "snapshots").glob("*/*")):
            return
        if constants.is_offline_mode():
            raise InputError(
                f"{name} is no local folder and not in the hub's cache, and HF_HUB_OFFLINE forbids "
                "downloads: unset it, or name a local folder."
            )
        get_hf_file_metadata(url, timeout=SECONDS)
    except HFValidationError as error:
        raise InputError(
            f"{name} is neither a local folder nor a possible name on the hub: check the spelling."
        ) from error
    except HfHubHTTPError:
        return  # the hub answers, and the loader's own message names what it lacks
    except InputError:
        raise
    except Exception as error:  # errors of the hub's client, of httpx and of the system
        raise InputError(
            f"{name} is no local folder, and the network is the cause that it cannot be downloaded "
            f"({type(error).__name__} at {constants.ENDPOINT}): connect this machine, or copy the "
            "model here and name its folder."
        ) from error
