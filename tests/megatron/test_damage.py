"""Pickles that ask for all memory or time, archives that contradict themselves, and Megatron folders that lead outside."""

from __future__ import annotations

import copyreg
import os
import pickle
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from moeconv.errors import IntegrityError, MappingError, MoeconvError, SourceError
from moeconv.io.pickling import Call, Persistent, dump_pickle
from moeconv.io.torch_archive import (
    check_archive,
    read_archive,
    small_archive,
    tensor_value,
    whole_tensor,
    with_numbers,
)
from moeconv.io.unpickle import Symbol, load_pickle
from moeconv.megatron.args import RunArgs
from moeconv.megatron.checkpoint import as_checkpoint
from moeconv.megatron.convert import open_megatron
from moeconv.megatron.source import TRACKER
from tests.megatron.test_sources import export


def doubled(pair: bytes, levels: int = 40) -> bytes:
    """Opcodes of a collection that holds the one before it twice, `levels` times over."""
    out = b")q\x00" if pair == b"\x86" else b"]q\x00"
    for index in range(levels):
        twice = b"h" + bytes([index]) + b"h" + bytes([index])
        out += (twice + b"\x86" if pair == b"\x86" else b"](" + twice + b"e") + b"q" + bytes([index + 1])
    return out


ENDLESS = {
    "a list that holds itself": b"]q\x00h\x00a.",
    "a dict that holds itself": b"}q\x00Nh\x00s.",
    "lists doubled": doubled(b"e") + b".",
    "tuples doubled": doubled(b"\x86") + b".",
    "tuples doubled as a key": b"}" + doubled(b"\x86") + b"Ns.",
    "tuples doubled as a member": b"\x8f(" + doubled(b"\x86") + b"\x90.",
    "tuples doubled as a persistent id": doubled(b"\x86") + b"Q.",
    "tuples doubled as a shape": b"ctorch\nSize\n" + doubled(b"\x86") + b"R.",
    "lists nested": b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples nested": b")" + b"\x85" * 100_000 + b".",
    "a key of nested tuples": b"}" + b")" + b"\x85" * 100_000 + b"Ns.",
    "a string longer than the pickle": b"X\xff\xff\xff\x7fa.",
    "bytes longer than the pickle": b"\x8e" + b"\xff" * 8 + b".",
    "a frame longer than the pickle": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "a number of 5000 digits": b"L" + b"9" * 5000 + b"L\n.",
    "a key of many bits": b"}\x8a\x20" + b"\x7f" * 32 + b"Ns.",
}


@pytest.mark.parametrize("data", ENDLESS.values(), ids=ENDLESS.keys())
def test_pickles_without_end_are_refused_at_once(data: bytes) -> None:
    begin = time.process_time()
    with pytest.raises(SourceError, match="file: its pickle can't be read as data") as caught:
        load_pickle(data, "file")
    assert time.process_time() - begin < 5
    assert len(str(caught.value)) < 1000


def test_a_number_far_beyond_the_memo_takes_no_memory() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_pickle(b"Nr\xff\xff\xff\x3f.", "file") is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


def test_codes_that_the_process_registered_call_nothing(tmp_path: Path) -> None:
    """A code that was used once lies in a cache that the unpickler of Python asks before anything else."""
    copyreg.add_extension("os", "mkdir", 77)
    try:
        data = b"\x80\x02\x82\x4d" + dump_pickle((str(tmp_path / "made"),))[2:-1] + b"R."
        pickle.loads(data[:4] + b".")
        with pytest.raises(SourceError, match="by a number that only the program that wrote it knows"):
            load_pickle(data, "file")
    finally:
        copyreg.remove_extension("os", "mkdir", 77)
    assert not (tmp_path / "made").exists()


STORAGE = Persistent(("storage", Symbol("torch", "FloatStorage"), "0", "cpu", 4))


@pytest.mark.parametrize(
    "args",
    [
        (STORAGE, "x", (4,), (1,)),
        (STORAGE, None, (4,), (1,)),
        (STORAGE, -1, (4,), (1,)),
        (STORAGE, 0, (4.0,), (1,)),
        (STORAGE, 0, (-4,), (1,)),
        (STORAGE, 0, ("a",), (1,)),
        (STORAGE, 0, (True,), (1,)),
        (STORAGE, 0, [4], [1]),
        (STORAGE, 0, (4,), ()),
        (STORAGE, 0, (4,), (-1,)),
        (STORAGE, 0, (1,) * 40, (1,) * 40),
        ("no storage", 0, (4,), (1,)),
        (STORAGE,),
    ],
    ids=str,
)
def test_tensors_of_impossible_shapes(args: tuple[Any, ...]) -> None:
    value = Call(Symbol("torch._utils", "_rebuild_tensor_v2"), (*args, False, ()))
    with pytest.raises(SourceError, match="its pickle can't be read as data"):
        load_pickle(dump_pickle(value), "file")
    state = dump_pickle(tensor_value(whole_tensor("0", "F32", (4,))))[:-1] + b"}b."
    with pytest.raises(SourceError, match="state for a TensorRef"):
        load_pickle(state, "file")


def archive_of(shape: tuple[int, ...], **storages: bytes) -> bytes:
    return small_archive("archive", {"a": tensor_value(whole_tensor("0", "F32", shape)), "n": 1}, storages)


def test_archives_that_contradict_themselves(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    good = small_archive("archive", tensor_value(whole_tensor("0", "F32", (2,))), {"0": b"\0" * 8, "1": b"\1" * 8})
    central = good.index(b"PK\x01\x02")
    where = good.index(b"archive/data/1", central) - 4  # the position that the directory gives for record 1
    other = struct.unpack_from("<I", good, good.index(b"archive/data/0", central) - 4)[0]

    def damaged(*changes: tuple[int, bytes]) -> bytes:
        out = bytearray(good)
        for at, new in changes:
            out[at : at + len(new)] = new
        return bytes(out)

    zero = good.index(b"archive/data/0")
    one, named_one = good.index(b"archive/data/1"), good.index(b"archive/data/1", central)
    cases = {
        "another record where one is said to be": damaged((where, struct.pack("<I", other))),
        "a record of another name": damaged((one, b"archive/data/2")),
        "a name twice": damaged((one, b"archive/data/0"), (named_one, b"archive/data/0")),
        "a record that reaches into the next": damaged(
            (good.index(b"archive/data/0", central) - 46 + 20, struct.pack("<2I", 200, 200))
        ),
        "a compressed record": damaged((named_one - 46 + 10, b"\x08\0")),
        "an encrypted record": damaged((named_one - 46 + 8, b"\x01\x08")),
        "names that are no text": damaged((zero, b"\xff\xfe\xfd")),
        "sizes apart": damaged((named_one - 46 + 20, struct.pack("<I", 4))),
        "a directory that is said to be elsewhere": damaged((len(good) - 6, struct.pack("<I", central + 99_999))),
        "a record that begins far behind the end": damaged((where, struct.pack("<I", 2**31))),
        "no records": b"PK\x05\x06" + bytes(18),
    }
    path.write_bytes(good)
    read_archive(path)
    check_archive(path)
    for name, raw in cases.items():
        path.write_bytes(raw)
        for read in (read_archive, check_archive):
            if name != "no records" or read is read_archive:
                with pytest.raises(SourceError, match=r"x\.pt: "):
                    read(path)
    path.write_bytes(damaged((good.index(b"\1" * 8), b"\2")))
    with pytest.raises(IntegrityError, match="archive/data/1 differs from its CRC-32"):
        check_archive(path)


def test_storages_shorter_than_they_are_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    value = tensor_value(whole_tensor("0", "F32", (4,)))
    path.write_bytes(small_archive("archive", value, {"0": bytes(8)}))
    archive = read_archive(path)
    with pytest.raises(SourceError, match="does not fit its storage of 8 bytes"):
        archive.begin(archive.root)


def test_large_pickles_and_pipes_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    os.mkfifo(path)
    for read in (read_archive, check_archive):
        with pytest.raises(SourceError, match="no regular file"):
            read(path)
    raw = bytearray(small_archive("archive", 1, {"0": b""}))
    path.unlink()
    path.write_bytes(raw)
    assert with_numbers(read_archive(path)) == 1
    assert load_pickle(dump_pickle(-(2**9000)), "file") == -(2**9000)


@pytest.fixture(scope="module")
def saves(hf_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saves")
    export(hf_bf16, root / "torch", "torch", {"tp": 2, "ep": 4})
    export(hf_bf16, root / "torch_dist", "torch_dist", {"tp": 2})
    return root


INSIDE = {
    "torch": ["release/mp_rank_00_000/model_optim_rng.pt", "release/mp_rank_01_001", "release", TRACKER, "config.json"],
    "torch_dist": ["release/.metadata", "release/common.pt", "release/metadata.json", "release/__0_0.distcp", TRACKER],
}


@pytest.mark.parametrize(("form", "name"), [(form, name) for form, names in INSIDE.items() for name in names])
@pytest.mark.parametrize("what", ["link", "fifo"])
def test_nothing_outside_a_megatron_folder_is_read(
    saves: Path, tmp_path: Path, form: str, name: str, what: str
) -> None:
    folder = shutil.copytree(saves / form, tmp_path / "inner" / form)
    path = folder / name
    path.rename(tmp_path / "elsewhere")
    if what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(
        MoeconvError, match=r"outside the folder|no regular file|is a link|lacks|holds no|has no folder"
    ):
        _ = as_checkpoint(open_megatron(folder)).carried_files


@pytest.mark.parametrize("said", [b"1" * 400, b"../..", b"/", b"-1", b"\xd9\xa1", b"\xff", b"", b"x" * 5000])
def test_trackers_that_name_no_iteration(saves: Path, tmp_path: Path, said: bytes) -> None:
    folder = shutil.copytree(saves / "torch", tmp_path / "torch")
    (folder / TRACKER).write_bytes(said)
    with pytest.raises(SourceError, match=TRACKER.replace(".", r"\.")) as caught:
        open_megatron(folder)
    assert len(str(caught.value)) < 500


def edit_metadata(folder: Path, edit: Any) -> None:
    path = folder / "release/.metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def first(metadata: Any) -> tuple[str, Any]:
    return next((key, t) for key, t in metadata.state_dict_metadata.items() if len(getattr(t, "chunks", ())) > 1)


def share(metadata: Any) -> None:
    """Let two chunks of a tensor name the same bytes."""
    key, tensor = first(metadata)
    infos = {i.offset: i for i in metadata.storage_data if i.fqn == key}
    a, b = (infos[c.offsets] for c in tensor.chunks[:2])
    metadata.storage_data[b] = metadata.storage_data[a]


def set_chunk(**fields: Any) -> Any:
    def edit(metadata: Any) -> None:
        for name, value in fields.items():
            setattr(first(metadata)[1].chunks[0], name, value)

    return edit


def set_item(**fields: Any) -> Any:
    def edit(metadata: Any) -> None:
        info = next(iter(metadata.storage_data.values()))
        for name, value in fields.items():
            object.__setattr__(info, name, value)

    return edit


METADATA = {
    "two chunks of the same bytes": share,
    "a chunk beyond the tensor": set_chunk(offsets=(4, 0, 0)),
    "a chunk before the tensor": set_chunk(offsets=(-1, 0, 0)),
    "a chunk of text": set_chunk(offsets=("a", 0, 0)),
    "a chunk of fractions": set_chunk(sizes=(1.0, 4, 4)),
    "a chunk of another rank": set_chunk(offsets=(0,)),
    "an offset of text": set_item(offset="1"),
    "a negative length": set_item(length=-1),
    "a path outside": set_item(relative_path="../x.distcp"),
    "a path with a zero": set_item(relative_path="x\0.distcp"),
    "a path of 5000": set_item(relative_path="x" * 5000),
    "a key that is no text": lambda m: m.state_dict_metadata.update({3: first(m)[1]}),
    "no storage": lambda m: m.storage_data.clear(),
}


@pytest.mark.parametrize("edit", METADATA.values(), ids=METADATA.keys())
def test_metadata_that_contradicts_itself(saves: Path, tmp_path: Path, edit: Any) -> None:
    folder = shutil.copytree(saves / "torch_dist", tmp_path / "save")
    edit_metadata(folder, edit)
    with pytest.raises(MoeconvError):
        open_megatron(folder)


def test_args_whose_names_are_none() -> None:
    with pytest.raises(MappingError, match="no argument's name"):
        RunArgs({"num_layers": 4, None: True})
