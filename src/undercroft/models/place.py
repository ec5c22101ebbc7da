"""Where a checkpoint is: a folder on this machine, or the name of one on the Hugging Face hub.

It knows names and files, not what is in them, and neither PyTorch nor transformers, so that a wrong name is said at
once. Invariant: pickled weights are not read.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub

from undercroft.errors import InvalidInput, TransferFailed, UndercroftError, UnsupportedModel

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*"]
_GGUF = ".gguf"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def is_gguf(source: str | Path) -> bool:
    """Whether it is a GGUF file, by its name or by how it begins."""
    path = Path(source).expanduser()
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return path.suffix == _GGUF or file.read(4) == b"GGUF"
    except OSError as error:
        raise TransferFailed(f"{path} cannot be read: {error.strerror}", errno=error.errno) from error


def locate_weights(source: str | Path) -> str:
    """As `locate`, or the path of a GGUF file.

    Raises:
        InvalidInput, UnsupportedModel, TransferFailed: see `locate`.
    """
    return str(Path(source).expanduser()) if is_gguf(source) else locate(source)


def locate(source: str | Path) -> str:
    """The folder, expanded, or the name on the hub, as transformers wants it.

    Raises:
        InvalidInput: neither a folder that exists nor a possible name; or a GGUF file.
        UnsupportedModel: a folder without a configuration, or with pickled weights only.
        TransferFailed: a name whose files were never fetched, and no network.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if is_gguf(path):
        raise InvalidInput(
            f"{path} is a GGUF file, which is only read to be packed; "
            f"pack it first, and name that folder: undercroft pack {path} FOLDER"
        )
    if path.exists():
        raise InvalidInput(f"{path} is a file; name the folder that holds config.json and *.safetensors")
    if path.suffix == _GGUF:
        raise InvalidInput(f"there is no file {path}")
    text = str(source)
    if isinstance(source, Path) or not _HUB_NAME.fullmatch(text):
        raise InvalidInput(
            f"there is no folder {path}; name one that holds config.json and *.safetensors, "
            "or a model on the Hugging Face hub, such as HuggingFaceTB/SmolLM2-135M"
        )
    _check_reachable(text)
    return text


@cache
def _check_reachable(name: str) -> None:
    """Say at once what the libraries would say of each file after five attempts."""
    hub: Any = huggingface_hub
    if hub.try_to_load_from_cache(name, "config.json") is not None or hub.constants.HF_HUB_OFFLINE:
        return
    try:
        hub.HfApi().model_info(name, timeout=10)
    except hub.errors.HfHubHTTPError:
        return  # it answers: what it has to say comes with the first file
    except Exception as error:
        raise explain(name, OSError(f"{error}.")) from error


def _check_folder(path: Path) -> None:
    if (path / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{path} holds an adapter; merge it into its model first (peft: merge_and_unload)"
        )
    if not (path / "config.json").is_file() and (found := sorted(path.glob(f"*{_GGUF}"))):
        raise UnsupportedModel(
            f"{path} holds GGUF files; name the one to pack: undercroft pack {found[0]} FOLDER"
        )
    if not (path / "config.json").is_file():
        raise UnsupportedModel(
            f"{path} holds no model: there is no config.json; name a folder that save_pretrained wrote"
        )
    if any(path.glob("*.safetensors")):
        return
    if any(found for pattern in _PICKLED for found in path.glob(pattern)):
        raise UnsupportedModel(
            f"{path} holds pickled weights only, which can run code and are never read; "
            "load it where you trust it and save_pretrained() it again as safetensors"
        )
    raise UnsupportedModel(f"{path} holds no weights: there is no *.safetensors beside config.json")


def download(source: str) -> Path:
    """The folder of a located source, fetched from the hub if that is where it is: configuration and safetensors.

    Raises:
        TransferFailed: the hub does not give it.
    """
    if Path(source).is_dir():
        return Path(source)
    hub: Any = huggingface_hub
    try:
        return Path(hub.snapshot_download(source, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:
        raise explain(source, error) from error


def explain(source: str, error: Exception) -> UndercroftError:
    """What the failure of transformers to open a located source means, as one of our errors."""
    reason = str(error).strip().partition("\n")[0]
    if not Path(source).is_dir() and isinstance(error, OSError):
        return TransferFailed(
            f"{source} is no folder here, and the Hugging Face hub did not give it: {reason} "
            "Check the name and the network. Without a network, fetch it where there is one "
            f"(hf download {source} --local-dir DIR), copy DIR here and name it."
        )
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return UnsupportedModel(
            f"{source} brings code of its own, which is never run; choose a model that transformers knows"
        )
    return UnsupportedModel(f"{source} cannot be opened: {reason}")
