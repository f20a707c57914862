"""Safetensors files of a model folder, tensor by tensor.

In: a folder and the tensors one part of a model wants. Out: those tensors filled, one at a time, so
the peak above the model itself is a single tensor. Knows names, shapes and files, not layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shared.errors import ModelLoadError
from shared.model.registry import Family, Part

ProgressCallback = Callable[[int, int], None]
# A tensor, or one per expert where the checkpoint stacks experts.
Destination = torch.Tensor | tuple[torch.Tensor, ...]

# Buffers that older checkpoints stored although they follow from the config.
_IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    "embeddings.position_ids",
)
_INDEX_NAME = "model.safetensors.index.json"


def fill_from_checkpoint(
    model_dir: Path,
    family: Family,
    part: Part,
    destinations: Mapping[str, Destination],
    *,
    optional: frozenset[str] = frozenset(),
    on_progress: ProgressCallback | None = None,
) -> None:
    """Copy one part's tensors into `destinations`, keyed by their names inside the part.

    `optional` names may be in the files without a destination. Every destination must be filled and
    every tensor of the part must have one; `ModelLoadError` names what is missing, unexpected or of
    another shape. A tuple of destinations takes the slices of a tensor stacked over experts, whose
    matrices may be stored transposed. `on_progress(bytes_done, bytes_total)` counts destination
    bytes.
    """
    sources = _sources(model_dir, family, part)
    _check_names(model_dir, part, sources, destinations, optional)
    bytes_total = sum(map(_num_bytes, destinations.values()))
    bytes_done = 0
    for local_name, tensor in _read(sources, destinations):
        _copy(local_name, tensor, destinations[local_name])
        bytes_done += _num_bytes(destinations[local_name])
        if on_progress is not None:
            on_progress(bytes_done, bytes_total)


def part_names(model_dir: Path, family: Family, part: Part) -> frozenset[str]:
    """Names that the checkpoint holds for one part, as they are called inside it."""
    return frozenset(_sources(model_dir, family, part))


def _sources(model_dir: Path, family: Family, part: Part) -> dict[str, tuple[Path, str]]:
    """Name inside the part -> file and name inside the file."""
    sources = {}
    for file_name, tensor_name in _listing(model_dir):
        if tensor_name.endswith(_IGNORED_SUFFIXES):
            continue
        place = family.classify(tensor_name)
        if place is None:
            raise ModelLoadError(
                f"{model_dir}: tensor {tensor_name} belongs to no part of {family.model_type}"
            )
        if place[0] == part:
            sources[place[1]] = (model_dir / file_name, tensor_name)
    return sources


def _listing(model_dir: Path) -> Iterator[tuple[str, str]]:
    """File and tensor names of a sharded or a single-file checkpoint."""
    index = model_dir / _INDEX_NAME
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        for tensor_name, file_name in weight_map.items():
            yield file_name, tensor_name
        return
    single = model_dir / "model.safetensors"
    if not single.is_file():
        raise ModelLoadError(f"{model_dir}: neither {_INDEX_NAME} nor model.safetensors is there")
    with _opened(single) as file:
        names = list(file.keys())
    for tensor_name in names:
        yield single.name, tensor_name


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path}: not a readable safetensors file ({error})") from error


def _check_names(
    model_dir: Path,
    part: Part,
    sources: Mapping[str, object],
    destinations: Mapping[str, object],
    optional: frozenset[str],
) -> None:
    missing = sorted(destinations.keys() - sources.keys())
    unexpected = sorted(sources.keys() - destinations.keys() - optional)
    for problem, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ModelLoadError(f"{model_dir}: {part} part, {len(names)} {problem}: {shown}")


def _read(
    sources: Mapping[str, tuple[Path, str]], destinations: Mapping[str, Destination]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Wanted tensors, file by file, so that each file is opened once."""
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for local_name in destinations:
        path, tensor_name = sources[local_name]
        by_file.setdefault(path, []).append((local_name, tensor_name))
    for path, names in by_file.items():
        with _opened(path) as file:
            for local_name, tensor_name in names:
                try:
                    yield local_name, file.get_tensor(tensor_name)
                except SafetensorError as error:
                    raise ModelLoadError(f"{path}: {tensor_name}: {error}") from error


def _copy(name: str, tensor: torch.Tensor, destination: Destination) -> None:
    if isinstance(destination, tuple):
        _copy_stacked(name, tensor, destination)
        return
    _check_shape(name, tensor, list(destination.shape))
    destination.copy_(tensor)


def _copy_stacked(name: str, tensor: torch.Tensor, destinations: tuple[torch.Tensor, ...]) -> None:
    """Slice `i` fills destination `i`, turned over if only that fits its shape."""
    shape = [len(destinations), *destinations[0].shape]
    if tensor.ndim == 3 and list(tensor.shape) != shape:
        tensor = tensor.transpose(1, 2)
    _check_shape(name, tensor, shape)
    for part, destination in zip(tensor, destinations, strict=True):
        destination.copy_(part)


def _check_shape(name: str, tensor: torch.Tensor, needed: list[int]) -> None:
    if list(tensor.shape) != needed:
        raise ModelLoadError(
            f"{name}: the checkpoint has shape {list(tensor.shape)}, the config needs {needed}"
        )


def _num_bytes(destination: Destination) -> int:
    if isinstance(destination, tuple):
        return sum(tensor.nbytes for tensor in destination)
    return destination.nbytes
