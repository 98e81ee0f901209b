"""The model of a simulation: of a weights file, or a description of one that need not exist."""

from __future__ import annotations

import json
from pathlib import Path

from hpcmoe.config import ModelConfig, from_dict
from hpcmoe.data.weights import WeightsFile
from hpcmoe.errors import UserError, at
from hpcmoe.files import read_toml
from hpcmoe.model.families import model_config
from hpcmoe.model.tensors import check_model


def read_model(path: str) -> ModelConfig:
    """By the file's ending: .h5, a weights file; .json, a Hugging Face config.json; .toml, the fields of ModelConfig (inputs/models).

    Raises UserError naming file, field and value.
    """
    ending = Path(path).suffix
    if ending in (".h5", ".hdf5"):
        with WeightsFile(path) as file:
            return file.config
    if ending not in (".json", ".toml"):
        raise at("command line", "MODEL", path, "a file ending in .h5 (weights), .json (a Hugging Face config.json) or .toml (a model's sizes)")
    if ending == ".json":
        return model_config(_read_json(path), path)
    model = from_dict(ModelConfig, read_toml(path), path)
    check_model(model, path)
    return model


def _read_json(path: str) -> dict:
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also of UTF-8
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise at(path, "document", type(data).__name__, "a table of keys and values")
    return data
