"""Checkpoints on the Hugging Face hub: a repository's safetensors files into the local cache, and folders back up."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

from moeconv.errors import MoeconvError, SourceError, WriteError
from moeconv.io.hf_folder import CONFIG
from moeconv.io.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest
from moeconv.io.paths import brief_path, read_whole
from moeconv.io.torch_bin import BIN_PATTERN

# Everything that could be a second copy of the weights stays where it is.
_IGNORED = (
    "consolidated*",
    "*/*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx*",
    "*.ot",
    "*.tflite",
    "*.npz",
)
# What says what a model and its tokenizer are, without the weights.
_DESCRIPTION = (
    CONFIG,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "tiktoken.model",
    "chat_template.jinja",
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_folder(source: str, revision: str | None = None) -> Path:
    """Find a checkpoint: a local folder as it is, or a hub repository downloaded into huggingface_hub's cache.

    Args:
        source: a folder, or a repository's id such as `mistralai/Mixtral-8x7B-v0.1`.
        revision: a branch, tag or commit of the repository.

    Returns:
        The folder.

    Raises:
        SourceError: there is neither such a folder nor such a repository, or the download failed.
    """
    path = Path(source)
    if os.path.lexists(path):
        if revision is not None:
            raise SourceError(f"{source}: is a local folder, which has no --revision {revision}")
        return path
    if not _REPOSITORY.fullmatch(source):
        raise SourceError(f"{brief_path(path)}: no such folder, and no repository id (OWNER/NAME)")
    return _download(source, revision, lambda: _checkpoint(source, revision))


def _checkpoint(repository: str, revision: str | None) -> Path:
    """Download a checkpoint: what the manifest of a sharded one names, else its safetensors, else its .bin files."""
    from huggingface_hub import snapshot_download

    manifest = _manifest(repository, revision)
    if manifest is not None:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_listed(manifest)))
    folder = Path(snapshot_download(repository, revision=revision, ignore_patterns=list(_IGNORED)))
    if any(folder.glob("*.safetensors")):
        return folder
    # A repository from before safetensors: its .bin files are no second copy. The folder's name is the commit.
    return Path(snapshot_download(repository, revision=folder.name, allow_patterns=[BIN_PATTERN]))


def _download(repository: str, revision: str | None, download: Callable[[], Path]) -> Path:
    """Download a folder; without a connection, give what the cache holds of the repository.

    Raises:
        SourceError: the hub can't give it, and the cache has none.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return download()
    except LocalEntryNotFoundError as error:
        cached = cached_folder(repository, revision)
        if cached is None:
            raise refusal(repository, error) from None
        return cached
    except MoeconvError:
        raise
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise refusal(repository, error) from None


def description_folder(source: str) -> Path:
    """Find a folder with a model's config.json and tokenizer: a local one as it is, or of a hub repository all but its weights.

    Args:
        source: a file or folder, or a repository's id.

    Returns:
        The file or folder.

    Raises:
        SourceError: there is neither such a folder nor such a repository, or the download failed.
    """
    path = Path(source)
    if os.path.lexists(path):
        return path
    if not is_repository(source):
        raise SourceError(f"{brief_path(path)}: no such file or folder, and no repository id (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    return _download(source, None, lambda: Path(snapshot_download(source, allow_patterns=list(_DESCRIPTION))))


def cached_folder(repository: str, revision: str | None = None) -> Path | None:
    """Find what the cache holds of a repository, without a connection; opening it finds out whether that is enough.

    Args:
        repository: its id.
        revision: a branch, tag or commit.

    Returns:
        The snapshot's folder; None where the cache has none.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, CONFIG, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def config_file(repository: str, revision: str | None = None) -> Path:
    """Download a hub repository's config.json into huggingface_hub's cache, and nothing else.

    Args:
        repository: its id, such as `mistralai/Mixtral-8x7B-v0.1`.
        revision: a branch, tag or commit.

    Returns:
        The file.

    Raises:
        SourceError: it is no repository's id, or the hub can't give the file.
    """
    if not is_repository(repository):
        raise SourceError(f"{brief_path(Path(repository))}: no such folder or file, and no repository id (OWNER/NAME)")
    from huggingface_hub import hf_hub_download

    return (
        _download(repository, revision, lambda: Path(hf_hub_download(repository, CONFIG, revision=revision)).parent)
        / CONFIG
    )


def is_repository(source: str) -> bool:
    """Say whether a source is a hub repository's id, and no local folder."""
    return not os.path.lexists(source) and _REPOSITORY.fullmatch(source) is not None


def refusal(repository: str, error: Exception) -> SourceError:
    """Make one line of what the hub or the connection to it answered."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return SourceError(
        f"{repository}: no such folder, and the hub can't give it: {reason}. Gated repositories need `hf auth login`"
    )


def _manifest(repository: str, revision: str | None) -> Path | None:
    """Download the manifest of a sharded checkpoint; None where the repository is of another kind."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, MANIFEST, revision=revision))
    except LocalEntryNotFoundError:  # no connection, which says nothing of the repository
        raise
    except EntryNotFoundError:
        return None


def _listed(path: Path) -> list[str]:
    """Give the names of a sharded checkpoint's files, in folders below too, as patterns that match nothing else."""
    manifest = Manifest.decode(read_whole(path, MAX_MANIFEST_BYTES), str(path))
    return [glob.escape(name) for name in (MANIFEST, *manifest.files, *manifest.carried)]


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder to the hub; the repository is created where it does not exist.

    Args:
        folder: a Hugging Face checkpoint.
        repository: the repository's id.
        private: whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        WriteError: the hub refused it; the local folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload the model"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WriteError(
            f"{repository}: the hub refused the upload: {reason}; {folder} is complete, upload it with `hf upload`"
        ) from None
