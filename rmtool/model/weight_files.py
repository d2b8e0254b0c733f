"""The safetensors files of a checkpoint: names, shapes and types of what they contain.

In: a folder. Out: `StoredWeights`, or an error for files that are missing or corrupted.
Cost: reads the headers of the files.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from rmtool.checkpoint.foreign import PICKLED_HEADS, foreign_weights
from rmtool.errors import RmtoolError, first_line

INDEX = "model.safetensors.index.json"
HEAD_WEIGHT = "score.weight"
# One linear layer, as other tools call it (OpenRLHF, TRL and LLaMA-Factory, PKU, Eurus, Open-Assistant, NeMo).
_HEAD = re.compile(
    r"((?:base_|pretrained_|reward_)?model\.|module\.|_orig_mod\.|(?:rw)?transformer\.)*((\w+_)?head|fc|linear|dense"
    r"|(value|reward|regression|score|output)(_layer|_proj|_model)?|scorer|regressor|classifier|out_proj)"
    r"(\.(summary|out_proj|linear|dense|fc))?\.weight"
)


@dataclass(frozen=True)
class StoredWeights:
    """The weights that the safetensors files of `folder` contain, by name; FILE:NAME for score heads in files that
    transformers does not load.
    """

    folder: Path
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(own_name(name))

    def sizes(self) -> dict[str, int]:
        """Return the number of weights of each dtype, by safetensors' names of dtypes."""
        sizes = dict[str, int]()
        for name, shape in self.shapes.items():
            sizes[self.dtypes[name]] = sizes.get(self.dtypes[name], 0) + math.prod(shape)
        return sizes

    def beside(self) -> list[str]:
        """List the score heads in files that transformers does not load."""
        return sorted(name for name in self.files if ":" in name)

    def new_head(self) -> str:
        """Return the hint to train a new score head."""
        return f"train a new one: rmtool train --model {shlex.quote(str(self.folder))} --set model.head=new"

    def change(self, name: str, change: str) -> str:
        """Return the command that changes the tensors `w` of the file with this one."""
        code = f"p = {str(self.files[name])!r}; w = load_file(p); {change}; save_file(w, p, {{'format': 'pt'}})"
        return f"python -c {shlex.quote(f'from safetensors.torch import load_file, save_file; {code}')}"

    def rename(self, name: str) -> str:
        """Return the command that makes this tensor the score head."""
        return self.change(name, f"w[{HEAD_WEIGHT!r}] = w.pop({own_name(name)!r}).reshape(1, -1)")

    def pickled_heads(self) -> list[Path]:
        """List files of score heads that are not read."""
        return sorted(path for pattern in PICKLED_HEADS for path in self.folder.glob(pattern))


def own_name(name: str) -> str:
    """Return the name of a weight in its file."""
    return name.rpartition(":")[2]


def names_head(name: str) -> bool:
    """Whether tools call a score head like this."""
    return _HEAD.fullmatch(own_name(name)) is not None


def read_headers(folder: Path) -> StoredWeights:
    """Read the headers of the files that transformers loads, and of any other with weights of a score head.

    Raises:
        RmtoolError: E0404 a file is corrupted or missing; E0407 no safetensors.
    """
    loaded = _files(folder)
    paths = [*loaded, *(path for path in sorted(folder.glob("*.safetensors")) if path not in loaded)]
    files, shapes, dtypes = dict[str, Path](), dict[str, tuple[int, ...]](), dict[str, str]()
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                # LLaMA-Factory writes value_head.safetensors; consolidated.safetensors repeats the model's weights.
                names = file.keys()
                found = {name: file.get_slice(name) for name in names if path in loaded and name not in shapes}
                if path not in loaded:
                    named = names_head(f"{path.stem}.weight")
                    heads = [name for name in names if named or names_head(name) or "_head." in name]
                    found = {f"{path.name}:{name}": file.get_slice(name) for name in heads}
                shapes |= {name: tuple(each.get_shape()) for name, each in found.items()}
                dtypes |= {name: each.get_dtype() for name, each in found.items()}
        except (SafetensorError, OSError) as error:
            raise _corrupted(path, error) from error
        files |= dict.fromkeys(found, path)
    return StoredWeights(folder, files, shapes, dtypes)


def _files(folder: Path) -> list[Path]:
    """The files that transformers loads."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).is_file():
        raise foreign_weights(folder) or RmtoolError(
            "E0407", f"no safetensors weights found in {folder}", "save the model with save_pretrained"
        )
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        paths = [folder / name for name in sorted(set(index["weight_map"].values()))]
        index["metadata"]  # transformers needs it
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise _corrupted(folder / INDEX, error) from error
    if missing := [path.name for path in paths if not path.is_file()]:
        what = f"{len(missing)} of {len(paths)} weight files are missing from {folder} (first: {missing[0]})"
        raise RmtoolError("E0404", what, "download or copy the checkpoint again")
    return paths


def _corrupted(path: Path, error: Exception) -> RmtoolError:
    hint = f"download or copy {path.name} again"
    if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        what = f"{path} is a Git LFS pointer, not the weights"
        return RmtoolError("E0404", what, f"run cd {shlex.quote(str(path.parent))} && git lfs pull")
    return RmtoolError("E0404", f"cannot load the model: {path} is corrupted: {first_line(error)}", hint)
