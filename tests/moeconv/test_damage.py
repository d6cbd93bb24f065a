"""Damage and hostility beyond names: what contradicts itself, what would take all memory or all time, what changed meanwhile."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import zlib
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeconv.checking import verify
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.describe import describe
from moeconv.errors import DamageError, IntegrityError, LayoutError, MoeconvError, SourceError, WriteError
from moeconv.io.carried import CarriedFile
from moeconv.io.checksum import checksum, combined
from moeconv.io.decode import parse_json
from moeconv.io.manifest import MANIFEST, Manifest
from moeconv.io.safetensors import parse_header, read_header
from moeconv.io.staging import JOURNAL, PARTIAL, Staging
from moeconv.layout.degrees import Degrees, chunk_layers
from moeconv.layout.rect import Rect, check_cover
from moeconv.layout.shard import divisors
from moeconv.reading import VerifiedReader
from tests.moeconv.models import Spec, digests, make_folder
from tests.moeconv.test_names import change

ROOT = Path(__file__).parents[2]
DEGREES = Degrees(tp=2, ep=2, pp=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source `hf` and its shards `ck`."""
    root = tmp_path_factory.mktemp("damage")
    folder = make_folder(root / "hf", Spec(files=2, index=True))
    write_sharded(open_checkpoint(folder), root / "ck", DEGREES, Options(sync=False))
    return root


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "ck", tmp_path / "ck"))


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "hf", tmp_path / "hf"))


def each_tensor(edit: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda v: [edit(t) for f in v["files"].values() for t in f["tensors"]]


def first_file(value: dict[str, Any]) -> dict[str, Any]:
    return value["files"][next(iter(value["files"]))]  # type: ignore[no-any-return]


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no checksum of a tensor": each_tensor(lambda t: t.update(checksum=None)),
    "a checksum that is none": each_tensor(lambda t: t.update(checksum="zz" * 16)),
    "a short checksum": each_tensor(lambda t: t.update(checksum="00")),
    "a file's checksum": lambda v: first_file(v).update(checksum="0" * 32),
    "no checksum of a file": lambda v: first_file(v).pop("checksum"),
    "another family": lambda v: v.update(family="llama"),
    "other stages": lambda v: v.update(stages=[[1], [0]]),
    "no stages": lambda v: v.update(stages=[]),
    "another tp": lambda v: v["degrees"].update(tp=4),
    "another ep": lambda v: v["degrees"].update(ep=4),
    "another etp": lambda v: v["degrees"].update(etp=1),
    "another pp": lambda v: v["degrees"].update(pp=1) or v.update(stages=[[0, 1]]),
    "a degree of true": lambda v: v["degrees"].update(ep=True),
    "a degree of 2.0": lambda v: v["degrees"].update(tp=2.0),
    "a degree that is unknown": lambda v: v["degrees"].update(cp=1),
    "a thousand million stages": lambda v: v["degrees"].update(pp=10**9),
    "a shape of text": each_tensor(lambda t: t.update(shape=["a"])),
    "a negative shape": each_tensor(lambda t: t.update(shape=[-1])),
    "a shape of another rank": each_tensor(lambda t: t.update(shape=[*t["shape"], 1])),
    "offsets of another rank": each_tensor(lambda t: t.update(offsets=[])),
    "offsets of fractions": each_tensor(lambda t: t.update(offsets=[0.0] * len(t["shape"]))),
    "offsets of false": each_tensor(lambda t: t.update(offsets=[False] * len(t["shape"]))),
    "an unknown dtype": each_tensor(lambda t: t.update(dtype="F7")),
    "a field more": lambda v: v.update(extra=1),
    "a size of text": lambda v: first_file(v).update(size="1"),
    "no config": lambda v: v["carried"].pop("config.json"),
    "a header that is cut off": lambda v: _source(v).update(header=_source(v)["header"][:40]),
    "a header with more behind it": lambda v: _source(v).update(header=b64encode(zlib.compress(b"x") + b"y").decode()),
}


def _source(value: dict[str, Any]) -> dict[str, Any]:
    return value["source"][next(iter(value["source"]))]  # type: ignore[no-any-return]


@pytest.mark.parametrize("edit", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_manifests_that_contradict_themselves(shards: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    change(shards, edit)
    with pytest.raises(MoeconvError):
        open_checkpoint(shards)


def test_a_source_that_no_export_can_be_made_of_is_found_by_verify(shards: Path) -> None:
    change(shards, lambda v: v["source"].pop(next(iter(v["source"]))))
    with pytest.raises(MoeconvError, match="would be lost"):
        verify(open_checkpoint(shards))


@pytest.mark.parametrize("group", ["header", "source_index"])
def test_a_manifest_that_inflates_without_end(shards: Path, group: str) -> None:
    deflated = zlib.compressobj(9)
    bomb = b64encode(b"".join([deflated.compress(bytes(1 << 20)) for _ in range(130)]) + deflated.flush()).decode()
    change(shards, lambda v: v.update(source_index=bomb) if group != "header" else _source(v).update(header=bomb))
    raw = (shards / MANIFEST).read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceError, match="headers take more than"):
        Manifest.decode(raw, MANIFEST)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 250_000


def put(path: Path, text: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'.encode("utf-16"),
        b'\xef\xbb\xbf{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":{},"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[-0,0]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b"," + b"9" * 4000 + b'],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 2000) + b'],"data_offsets":[0,0]}}',
        b' {"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":[' + b"[]," * 5_000_000 + b"0]}",
    ],
    ids=["utf-16", "bom", "surrogate", "shape of a dict", "-0", "digits", "many digits", "space", "lists"],
)
def test_headers_that_other_readers_refuse(tmp_path: Path, text: bytes) -> None:
    put(tmp_path / "x.safetensors", text)
    with pytest.raises(SourceError):
        read_header(tmp_path / "x.safetensors")


def test_a_header_that_is_not_as_long_as_it_says(made: Path) -> None:
    raw = read_header(sorted((made / "hf").glob("*.safetensors"))[0])
    with pytest.raises(SourceError, match="not as long"):
        parse_header((1).to_bytes(8, "little") + raw.raw[8:], raw.file_size, "file")


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
@pytest.mark.parametrize("value", [10**9, 10**4000])
def test_models_without_bound(source: Path, key: str, value: int) -> None:
    config = json.loads((source / "config.json").read_text()) | {key: value}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoeconvError, match="no model has more"):
        open_checkpoint(source)


def test_degrees_without_bound() -> None:
    for degrees in ({"pp": 10**8}, {"pp": 2, "vpp": 10**8}, {"tp": 10**4000}):
        with pytest.raises(LayoutError, match="at most 1,000,000"):
            Degrees(**degrees)
    with pytest.raises(LayoutError, match="at most 4 stages fit"):
        chunk_layers(4, Degrees(pp=1_000_000, vpp=1_000_000))
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(2**60)[-1] == 2**19
    with pytest.raises(IntegrityError, match="more than any layout"):
        check_cover("x", (1, 2000), [(Rect((0, i), (1, 1)), "file") for i in range(2000)])


@pytest.mark.parametrize(
    "raw", [b"[" * 70 + b"]" * 70, b'{"a":' * 70 + b"1" + b"}" * 70, b"{" + b'"a":1,' * 5, b"\xff{}"]
)
def test_json_that_is_refused(raw: bytes) -> None:
    with pytest.raises(SourceError, match="file: is no JSON"):
        parse_json(raw, "file")


def test_a_folder_that_is_a_link_or_unreadable_is_not_left_out(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (source / "z").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="z: is a link to a folder"):
        open_checkpoint(source)
    (source / "z").unlink()
    (source / "z").mkdir()
    program = (
        "import os, sys\nfrom moeconv.checkpoint import open_checkpoint\nopen_checkpoint(sys.argv[1])\n"
        "os.chmod(sys.argv[1] + '/z', 0)\nos.setuid(65534)\nopen_checkpoint(sys.argv[1])"
    )
    if os.getuid():
        pytest.skip("only root can become somebody who may not read a folder")
    os.chmod(tmp_path, 0o755)
    done = subprocess.run([sys.executable, "-c", program, str(source)], cwd=ROOT, capture_output=True, text=True)
    assert "z: can't be read: Permission denied; its files would be left out" in done.stderr


@pytest.mark.parametrize("form", ["link", "absolute link"])
def test_shards_outside_the_folder_are_refused(shards: Path, tmp_path: Path, form: str) -> None:
    path = shards / "dense-tp0-pp0.safetensors"
    path.rename(tmp_path / "x")
    path.symlink_to("../x" if form == "link" else tmp_path / "x")
    with pytest.raises(SourceError, match="outside the folder"):
        open_checkpoint(shards)


def test_large_files_beside_the_weights_are_streamed(source: Path, tmp_path: Path) -> None:
    size = 300 << 20
    with open(source / "model.nemo", "wb") as file:
        file.truncate(size)
    program = (
        "import sys, resource\nfrom pathlib import Path\n"
        "from moeconv.checkpoint import open_checkpoint\nfrom moeconv.convert import Options, write_hf, write_sharded\n"
        "from moeconv.layout.degrees import Degrees\nfrom moeconv.checking import verify\n"
        "source, ck, hf = map(Path, sys.argv[1:])\noptions = Options(sync=False)\n"
        "write_sharded(open_checkpoint(source), ck, Degrees(tp=2), options)\n"
        "write_hf(open_checkpoint(ck), hf, None, options)\nverify(open_checkpoint(ck))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    names = [str(source), str(tmp_path / "ck"), str(tmp_path / "out")]
    # A process's peak begins with that of the process that started it: a small one stands between.
    between = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    words = [sys.executable, "-I", "-S", "-c", between, sys.executable, "-c", program, *names]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150_000
    assert (tmp_path / "out" / "model.nemo").stat().st_size == size


def test_a_carried_file_that_was_changed_is_found_while_it_is_copied(shards: Path, tmp_path: Path) -> None:
    path = shards / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    for use in (lambda c: write_hf(c, tmp_path / "out", None, Options()), verify):
        with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
            use(open_checkpoint(shards))
    assert not (tmp_path / "out").exists()
    assert isinstance(open_checkpoint(shards).carried_files["config.json"], CarriedFile)


def test_a_reader_verifies_what_it_reads_whole(shards: Path) -> None:
    checkpoint = open_checkpoint(shards)
    name = "model.layers.0.self_attn.q_proj.weight"
    pieces = checkpoint.pieces[name]
    reader = VerifiedReader(checkpoint)
    assert reader.read(name).tobytes() == checkpoint.read(name).tobytes()
    assert reader.verified == sorted((p.file, name) for p in pieces)
    assert reader.unverified == []
    part = VerifiedReader(checkpoint)
    part.read(name, Rect.slab(checkpoint.tensors[name].shape, 0, 0, 1))
    assert (part.verified, part.unverified) == ([], [(pieces[0].file, name)])
    part.read(name, pieces[0].rect)
    assert (part.verified, part.unverified) == ([(pieces[0].file, name)], [])
    split = "model.layers.0.self_attn.o_proj.weight"  # its pieces are columns
    assert VerifiedReader(checkpoint).read(split).tobytes() == checkpoint.read(split).tobytes()
    for tensor in (name, split):
        piece = checkpoint.pieces[tensor][1]
        path = shards / piece.file
        raw = bytearray(path.read_bytes())
        raw[piece.begin + piece.nbytes - 1] ^= 1
        path.write_bytes(raw)
        checkpoint.read(tensor)
        with pytest.raises(DamageError, match=tensor) as caught:
            VerifiedReader(checkpoint).read(tensor)
        assert (caught.value.file, caught.value.tensor) == (path, tensor)


def killed(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, form: str = "shards") -> Path:
    """Leave a run behind with all its weight files finished."""
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "commit", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as stopped:
            convert(source, out, form, resume=False)
    assert stopped.value.__notes__ == [f"{out}.partial keeps what was finished; go on with --resume"]
    return out.with_name(out.name + PARTIAL)


def convert(source: Path, out: Path, form: str, *, resume: bool) -> None:
    options, checkpoint = Options(resume=resume, sync=False), open_checkpoint(source)
    if form == "hf":
        write_hf(checkpoint, out, None, options)
    else:
        write_sharded(checkpoint, out, DEGREES, options)


@pytest.mark.parametrize("form", ["shards", "hf"])
@pytest.mark.parametrize("damage", ["tensor", "header", "empty", "longer", "zeros", "missing", "link"])
def test_resume_takes_no_damaged_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, damage: str
) -> None:
    source = made / ("ck" if form == "hf" else "hf")
    convert(source, tmp_path / "whole", form, resume=False)
    partial = killed(source, tmp_path / "out", monkeypatch, form)
    kept, path = sorted(partial.glob("*.safetensors"))[:2]
    inode, raw = kept.stat().st_ino, bytearray(path.read_bytes())
    if damage in ("tensor", "header"):
        raw[-1 if damage == "tensor" else 20] ^= 4
    path.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(raw)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage != "missing":
        path.write_bytes({"empty": b"", "zeros": bytes(len(raw)), "longer": raw + b"x"}.get(damage, bytes(raw)))
    convert(source, tmp_path / "out", form, resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert (tmp_path / "out" / kept.name).stat().st_ino == inode  # what was right is not written again
    assert not path.is_symlink()


@pytest.mark.parametrize(
    "tail", [bytes(50) + b"\n", b"\xff\xfe\n", b"{\n", b"[1]\n", b'{"file": 5}\n', b"null\n", b'{"file":"a"']
)
def test_resume_with_a_damaged_journal(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: bytes
) -> None:
    convert(made / "hf", tmp_path / "whole", "shards", resume=False)
    partial = killed(made / "hf", tmp_path / "out", monkeypatch)
    lines = (partial / JOURNAL).read_bytes().splitlines(keepends=True)
    (partial / JOURNAL).write_bytes(b"".join(lines[:3]) + tail + b"".join(lines[3:]))
    convert(made / "hf", tmp_path / "out", "shards", resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("head", [b"", bytes(80), bytes(80) + b"\n", b"{}x\n"])
def test_resume_without_knowing_what_was_begun(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes
) -> None:
    partial = killed(made / "hf", tmp_path / "out", monkeypatch)
    (partial / JOURNAL).write_bytes(head)
    with pytest.raises(WriteError, match="journal is damaged"):
        convert(made / "hf", tmp_path / "out", "shards", resume=True)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(partial)  # what the message says
    convert(made / "hf", tmp_path / "out", "shards", resume=True)


def test_a_run_that_comes_as_another_finishes_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's rename comes between the look whether the name is free and the lock."""
    import fcntl

    out, real = tmp_path / "out", fcntl.flock
    first = Staging(out, {"a": 1}, resume=False, sync=False)
    for moment in ("while it opens", "before it makes the folder"):
        if moment == "while it opens":

            def late(file: Any, how: int) -> None:
                first.commit()
                real(file, how)

            monkeypatch.setattr(fcntl, "flock", late)
        else:
            shutil.move(out, tmp_path / "aside")

            def later(file: Any, how: int) -> None:
                real(file, how)
                os.replace(tmp_path / "aside", out)

            monkeypatch.setattr(fcntl, "flock", later)
        with pytest.raises(WriteError, match="another run has just finished it"):
            Staging(out, {"a": 1}, resume=True, sync=False)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("length", [248, 256, 5000])
def test_names_too_long_for_an_output(made: Path, tmp_path: Path, length: int) -> None:
    with pytest.raises(WriteError, match=r"can.t be an output|can.t be written"):
        convert(made / "hf", tmp_path / ("x" * length), "shards", resume=False)
    with pytest.raises(SourceError):
        open_checkpoint(tmp_path / ("x" * length))


def test_a_described_checkpoint_says_what_the_files_say(shards: Path) -> None:
    assert describe(open_checkpoint(shards))["stages"] == [[0], [1]]


def test_a_shard_that_tells_torch_other_offsets_is_found_by_verify(shards: Path) -> None:
    path = shards / "dense-tp1-pp0.safetensors"
    header = read_header(path)
    changed = header.raw.replace(b'\\"saved_offsets\\":[8,', b'\\"saved_offsets\\":[0,')
    assert changed != header.raw
    path.write_bytes(changed + path.read_bytes()[len(changed) :])

    def sign(value: dict[str, Any]) -> None:
        entry = value["files"][path.name]
        entry["header"] = checksum(changed)
        entry["checksum"] = combined([entry["header"], *(t["checksum"] for t in entry["tensors"])])

    change(shards, sign)
    with pytest.raises(IntegrityError, match="elsewhere in their tensors"):
        verify(open_checkpoint(shards))
