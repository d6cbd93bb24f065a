"""A hub repository as a folder without its weights: what a plan needs comes first, and the weights only once it stands."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from moeconv.checkpoint import Checkpoint
from moeconv.errors import MoeconvError, SourceError
from moeconv.hub import cached_folder, is_repository, local_folder, refusal
from moeconv.io.hf_folder import CONFIG, INDEX
from moeconv.io.manifest import MANIFEST
from moeconv.io.paths import check_name
from moeconv.io.safetensors import MAX_HEADER_BYTES

_READ = (CONFIG, INDEX, MANIFEST)  # what opening reads besides headers
_FIRST_BYTES = 128 << 10  # most headers end within
_CONNECTIONS = 8


@dataclass(frozen=True, slots=True)
class Preview:
    """A checkpoint as far as opening and planning look at it.

    `folder` is the checkpoint itself, or for a hub repository a stand-in: every file in its true size, of which only
    config, index, manifest and headers have their content.
    """

    folder: Path
    repository: str | None = None
    revision: str | None = None
    commit: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def download(self, checkpoint: Checkpoint) -> Path:
        """Get the files that a checkpoint, opened from the stand-in, is made of.

        Args:
            checkpoint: the checkpoint; its weights and what goes along with them are downloaded, nothing else.

        Returns:
            The folder with them.

        Raises:
            SourceError: the download failed, or the repository was changed meanwhile.
        """
        if self.repository is None:
            return self.folder
        from huggingface_hub import snapshot_download

        names = {*checkpoint.files, *checkpoint.carried, *(name for name in _READ if name in self.sizes)}
        patterns = [glob.escape(name) for name in sorted(names)]
        try:
            folder = Path(snapshot_download(self.repository, revision=self.revision, allow_patterns=patterns))
        except Exception as error:
            raise refusal(self.repository, error) from None
        if folder.name != self.commit:
            raise SourceError(f"{self.repository}: was changed while it was downloaded; start again")
        return folder


@contextmanager
def preview(source: str, revision: str | None = None) -> Iterator[Preview]:
    """Look at a checkpoint before its weights are downloaded.

    A local folder, a repository without safetensors, and one that only the cache holds are given as they are.

    Args:
        source: a folder, or a hub repository's id.
        revision: a branch, tag or commit of the repository.

    Yields:
        The preview; errors raised meanwhile name the repository instead of the stand-in.

    Raises:
        SourceError: there is neither such a folder nor such a repository.
    """
    if not is_repository(source):
        yield Preview(local_folder(source, revision))
        return
    commit, sizes = _files(source, revision)
    if commit is None or not any(_has_header(name) for name in sizes):
        yield Preview((cached_folder(source, revision) if commit is None else None) or local_folder(source, revision))
        return
    with tempfile.TemporaryDirectory(prefix="moeconv-") as root:
        folder = Path(root) / source
        try:
            _stand_in(folder, source, commit, sizes)
            yield Preview(folder, source, revision, commit, sizes)
        except MoeconvError as error:
            error.args = (str(error).replace(f"{root}/", ""),)
            raise


def opened(
    source: str,
    revision: str | None,
    open_folder: Callable[[Path], Checkpoint],
    check: Callable[[Checkpoint], object],
) -> Checkpoint:
    """Open a checkpoint; of a hub repository its weights are downloaded once nothing speaks against what is planned with it.

    Args:
        source: a folder, or a hub repository's id.
        revision: a branch, tag or commit of the repository.
        open_folder: opens the checkpoint in a folder.
        check: raises what can't be done with it, by headers alone.

    Returns:
        The checkpoint, with its weights on this machine.

    Raises:
        MoeconvError: as the hub, `open_folder` and `check` do.
    """
    with preview(source, revision) as seen:
        found = open_folder(seen.folder)
        if seen.repository is None:
            return found
        check(found)
        return open_folder(seen.download(found))


def _files(repository: str, revision: str | None) -> tuple[str | None, dict[str, int]]:
    """Ask for a repository's commit and its files' sizes; None and no files where the hub can't be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        raise refusal(repository, error) from None
    except Exception:  # without a connection, of whatever kind its client says: the cache may hold it all the same
        return None, {}
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    # A hub that doesn't tell sizes can't be looked at ahead.
    return info.sha, {} if None in sizes.values() else {name: size for name, size in sizes.items() if size is not None}


def _has_header(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")


def _stand_in(folder: Path, repository: str, commit: str, sizes: Mapping[str, int]) -> None:
    """Make a folder of a repository's files in their true sizes; on a disk they take no room."""
    hidden = [name for name in sizes if any(part.startswith(".") for part in name.split("/"))]
    for name, size in sizes.items():
        if name not in hidden:
            path = folder / check_name(name, repository)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(size)
    wanted = [name for name in sizes if name in _READ or _has_header(name)]
    try:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            for name, data in zip(wanted, pool.map(lambda n: _content(repository, commit, n), wanted), strict=True):
                with (folder / name).open("r+b") as file:
                    file.write(data[: sizes[name]])
    except MoeconvError:
        raise
    except Exception as error:
        raise refusal(repository, error) from None


def _content(repository: str, commit: str, name: str) -> bytes:
    """Give a small file's content, or a weight file's header; from the cache where it is there."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if name in _READ:
        return Path(hf_hub_download(repository, name, revision=commit)).read_bytes()
    cached = try_to_load_from_cache(repository, name, revision=commit)
    if isinstance(cached, str):
        with open(cached, "rb") as file:
            first = file.read(_FIRST_BYTES)
            return first + file.read(_missing(first))
    first = _range(repository, commit, name, 0, _FIRST_BYTES)
    missing = _missing(first)
    return first + (_range(repository, commit, name, len(first), missing) if missing else b"")


def _missing(first: bytes) -> int:
    """Give how much of a header is behind a file's first bytes; nothing of one that is absurd, which is refused when it is read."""
    length = 8 + int.from_bytes(first[:8], "little")
    return max(length - len(first), 0) if length <= MAX_HEADER_BYTES else 0


def _range(repository: str, commit: str, name: str, begin: int, count: int) -> bytes:
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but not in __all__

    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"}
    url = hf_hub_url(repository, name, revision=commit)
    with get_session().stream("GET", url, headers=headers, timeout=30) as response:
        hf_raise_for_status(response)
        skip = begin if response.status_code == 200 else 0  # a server that knows no ranges sends all of it
        data = bytearray()
        for part in response.iter_bytes():
            data += part
            if len(data) >= skip + count:
                break
    return bytes(data[skip : skip + count])
