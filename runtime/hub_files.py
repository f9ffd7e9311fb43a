"""What the hub tells about a checkpoint that is not here: config.json, the index, one header.

huggingface_hub is imported by the functions: local folders need not pay its half second.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.config import Fields, one_line, read_json
from runtime.errors import CheckpointError
from runtime.shards import INDEX_NAME, read_weight_map

SINGLE_FILE = "model.safetensors"
MAX_STORED_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """The safetensors files. Of a hub id only the index and one header are read."""

    num_bytes: int | None  # None if the index does not say
    num_files: int
    dtypes: tuple[str, ...]  # as the headers spell them


def cached_snapshot(hub_id: str) -> Path | None:
    """The Hugging Face cache's folder of a hub id, complete or not; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def missing_files(folder: Path, needed: Sequence[str]) -> list[str]:
    """Of ``needed`` and the weights, what this folder has not, as after a broken download."""
    index = folder / INDEX_NAME
    if index.exists():
        needed = [*needed, *sorted(set(read_weight_map(index).values()))]
    elif not any(folder.glob("*.safetensors")):
        needed = [*needed, SINGLE_FILE]
    return [name for name in needed if not (folder / name).exists()]


def fetch_config(hub_id: str) -> Path:
    """config.json of a hub id, in the cache. Raises `CheckpointError` that says what to do."""
    try:
        return _fetch(hub_id, "config.json")
    except Exception as error:  # the library's own errors, and those of the HTTP client below it
        raise CheckpointError(f"{hub_id}: {_reason(error)}") from None


def fetch_headers(hub_id: str) -> tuple[Collection[str] | None, StoredFiles | None]:
    """Tensor names and file sizes from the index and one header; None for what cannot be had.

    Raises `CheckpointError` for an index or a header that is damaged.
    """
    from huggingface_hub import parse_safetensors_file_metadata
    from huggingface_hub.errors import SafetensorsParsingError

    weight_map: dict[str, str] | None = None
    stored: StoredFiles | None = None
    try:
        index_path = _fetch(hub_id, INDEX_NAME)
    except Exception:  # a single file needs no index; without a network config.json has to do
        file_name = SINGLE_FILE
    else:
        weight_map, stored = read_index(index_path)
        file_name = min(weight_map.values())
    dtype_bytes: dict[str, int] = {}
    try:
        header = parse_safetensors_file_metadata(hub_id, file_name)
        for tensor in header.tensors.values():
            begin, end = tensor.data_offsets
            dtype = one_line(tensor.dtype, limit=20)
            dtype_bytes[dtype] = dtype_bytes.get(dtype, 0) + end - begin
    except (SafetensorsParsingError, TypeError, ValueError) as error:
        raise CheckpointError(f"{hub_id}: {file_name}: {one_line(str(error))}") from None
    except Exception:  # no such file, or no network
        return weight_map, stored
    dtypes = by_size(dtype_bytes)
    if weight_map is not None and stored is not None:
        return weight_map, replace(stored, dtypes=dtypes)
    return header.tensors, StoredFiles(sum(dtype_bytes.values()), 1, dtypes)


def read_index(path: Path) -> tuple[dict[str, str], StoredFiles]:
    """Tensor name -> file name, and what the index says of them. Raises `CheckpointError`."""
    weight_map = read_weight_map(path)
    metadata = Fields(read_json(path), str(path)).object("metadata")
    total = metadata.raw("total_size", 0)
    is_size = isinstance(total, int | float) and 0 < total < MAX_STORED_BYTES
    num_bytes = int(total) if is_size else None
    return weight_map, StoredFiles(num_bytes, len(set(weight_map.values())), ())


def by_size(dtype_bytes: dict[str, int]) -> tuple[str, ...]:
    """The dtypes, that of most bytes first."""
    return tuple(sorted(dtype_bytes, key=lambda dtype: -dtype_bytes[dtype]))


def _fetch(hub_id: str, file_name: str) -> Path:
    """A small file, through the Hugging Face cache. Raises whatever the library raises."""
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    if not isinstance(try_to_load_from_cache(hub_id, file_name), str):
        # Fails at once where there is no network; the download would retry for half a minute.
        get_hf_file_metadata(hf_hub_url(hub_id, file_name))
    return Path(hf_hub_download(hub_id, file_name))


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )

    match error:
        case GatedRepoError():
            return "gated; accept its terms on the hub and set HF_TOKEN"
        case RepositoryNotFoundError():
            return "no such model on the hub, or a private one; check the name, or set HF_TOKEN"
        case EntryNotFoundError():
            return "the repository has no config.json"
        case HfHubHTTPError():
            return one_line(f"the hub did not give config.json: {error}")
    why = one_line(f"{type(error).__name__}: {error}")
    return f"not in the Hugging Face cache, and the hub cannot be reached ({why})"
