"""From what a user calls a model to its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.errors import ModelLoadError, SettingsError

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""Config, tokenizer and templates: what a gateway needs."""
ALL_FILES = (*SMALL_FILES, "*.safetensors")
"""What a worker needs."""


def find_model_dir(model: str, files: Sequence[str] = ALL_FILES) -> Path:
    """A local folder as it is, or a hub id, of which only `files` are downloaded on first use.

    Raises `SettingsError` for what can be no model, `ModelLoadError` if it cannot be fetched.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.count("/") != 1:
        raise SettingsError(
            f"--model = {model!r}: neither a folder nor a hub id of the form owner/name"
        )
    # Imported here: a process that serves a local folder needs no hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            f"{model!r} is no local folder and could not be fetched from the hub: {error}"
        ) from error
