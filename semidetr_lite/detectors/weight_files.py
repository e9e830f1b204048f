"""Files of weights that others wrote, read without running anything in them."""

import argparse
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file

from semidetr_lite.errors import UserError

WRAPPINGS = ("model", "state_dict", "ema_model", "inited_model")  # keys that hold the tensors
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def is_weights_file(name: str) -> bool:
    """Whether a name is that of a file of weights, and not of weights to download."""
    return name.lower().endswith(SUFFIXES) or "/" in name or Path(name).is_file()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, without outer wrappings. Raises UserError."""
    content = load_weights(path)
    content = content if isinstance(content, dict) else {}
    for wrapping in WRAPPINGS:
        if isinstance(content.get(wrapping), dict):
            content = content[wrapping]
            break
    return {
        str(key).removeprefix("module."): value
        for key, value in content.items()
        if torch.is_tensor(value)
    }


def load_weights(path: Path):
    """The content of a file of weights; nothing in it is executed. Raises UserError."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # some files hold the options of their training
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of weights") from None
    except (pickle.UnpicklingError, EOFError):
        reason = "not a file of tensors alone, as torch.save writes it"
        raise UserError(f"{path}: cannot be read as weights: {reason}") from None
    except Exception as problem:  # damaged pickles raise almost anything
        reason = (str(problem).splitlines() or [type(problem).__name__])[0][:100]
        advice = "give the published .pth or .safetensors"
        raise UserError(f"{path}: cannot be read as weights ({reason}); {advice}") from None
