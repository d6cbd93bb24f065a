"""What is fuzzed: each target mutates one genuine input, reads it, and says whether what was accepted contradicts itself."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import safetensors

from moeconv.checking import verify
from moeconv.checkpoint import Checkpoint, model_of, open_checkpoint
from moeconv.convert import Options, plan_hf, plan_sharded, write_sharded
from moeconv.describe import describe
from moeconv.errors import MoeconvError
from moeconv.io.checksum import checksum
from moeconv.io.hf_folder import CONFIG, INDEX
from moeconv.io.manifest import MANIFEST, Manifest
from moeconv.io.pickling import Instance, dump_pickle
from moeconv.io.safetensors import parse_header, read_header
from moeconv.io.staging import JOURNAL
from moeconv.io.torch_archive import check_archive, lay_out_archive, read_archive, with_numbers
from moeconv.io.trainer_file import parse_trainer
from moeconv.io.unpickle import Opaque, Symbol, TensorRef, load_pickle
from moeconv.layout.degrees import Degrees
from moeconv.megatron.args import RunArgs
from moeconv.megatron.checkpoint import as_checkpoint
from moeconv.megatron.convert import export_megatron, open_megatron
from moeconv.megatron.model_args import check_args, config_from_args
from moeconv.megatron.source import TRACKER, find_iteration
from moeconv.upcycle.planned import plan_upcycle
from moeconv.upcycle.recipe import Recipe
from tests.fuzz.mutate import (
    encode_json,
    flip_bytes,
    header_bytes,
    mutate_json,
    mutate_pickle,
    mutate_tokens,
    mutate_tree,
    mutate_zip,
)

# A case takes the case's own random numbers. It raises MoeconvError for what it refuses, and gives what contradicts
# itself in what it accepted, None where nothing does.
Case = Callable[[Random], str | None]
# Takes the corpus and an empty folder of its own.
Target = Callable[[Path, Path], Case]


def _copy(corpus: Path, scratch: Path, name: str) -> Path:
    return Path(shutil.copytree(corpus / name, scratch / Path(name).name))


def safetensors_header(corpus: Path, scratch: Path) -> Case:
    """Headers, as bytes; what is accepted, the reference reader must accept with the same tensors."""
    path = sorted((corpus / "hf").glob("*.safetensors"))[0]
    header = read_header(path)
    text, data = header.raw[8:], path.read_bytes()[len(header.raw) :]
    tree = json.loads(text)

    def case(rng: Random) -> str | None:
        raw = header_bytes(mutate_json(rng, text, tree))
        if rng.random() < 0.05:
            raw = flip_bytes(rng, raw[:8]) + raw[8:]
        found = parse_header(raw, len(raw) + len(data), "file")
        try:
            known = dict(safetensors.deserialize(raw + data))
        except safetensors.SafetensorError as error:
            return f"the reference reader says {error}"
        ours = {e.name: (list(e.shape), e.end - e.begin) for e in found.entries}
        theirs = {name: (list(t["shape"]), len(t["data"])) for name, t in known.items()}
        return None if ours == theirs else "the reference reader finds other tensors"

    return case


def manifest_codec(corpus: Path, scratch: Path) -> Case:
    """Manifests alone, with a right checksum: decoded and encoded again."""
    tree = json.loads((corpus / "shards" / MANIFEST).read_bytes())

    def case(rng: Random) -> str | None:
        manifest = Manifest.decode(_signed(rng, mutate_tree(rng, tree)), MANIFEST)
        again = Manifest.decode(manifest.encode(), MANIFEST)
        return None if again == manifest else "encoded and decoded again it is another"

    return case


def manifest_open(corpus: Path, scratch: Path) -> Case:
    """Checkpoints whose manifest was changed and has a right checksum: opened, described, verified, planned."""
    folder = _copy(corpus, scratch, "shards")
    before = open_checkpoint(folder)
    tree = json.loads((folder / MANIFEST).read_bytes())

    def case(rng: Random) -> str | None:
        (folder / MANIFEST).write_bytes(_signed(rng, mutate_tree(rng, tree)))
        now = open_checkpoint(folder)
        verify(now, workers=1)
        describe(now)
        plan_sharded(now, Degrees(tp=4))
        assert now.manifest is not None
        assert before.manifest is not None
        core = ("tensors", "pieces", "checksums", "degrees", "config")
        other = [name for name in core if getattr(now, name) != getattr(before, name)]
        return f"accepted with other {other}" if other or now.manifest.stages != before.manifest.stages else None

    return case


def manifest_bytes(corpus: Path, scratch: Path) -> Case:
    """Checkpoints whose manifest was changed without its checksum: only white space may be another."""
    folder = _copy(corpus, scratch, "shards")
    raw = (folder / MANIFEST).read_bytes()
    tree = json.loads(raw)

    def case(rng: Random) -> str | None:
        changed = flip_bytes(rng, raw) if rng.random() < 0.5 else mutate_tokens(rng, raw)
        (folder / MANIFEST).write_bytes(changed)
        open_checkpoint(folder)
        return None if json.loads(changed) == tree else "accepted with other values"

    return case


def _signed(rng: Random, value: Any) -> bytes:
    if isinstance(value, dict):
        value = {key: inner for key, inner in value.items() if key != "manifest_checksum"}
        try:
            text = json.dumps(value, separators=(",", ":")).encode()
            value["manifest_checksum"] = checksum(text)
        except RecursionError:
            return b"[" * 5000
    return encode_json(rng, value)


def config_json(corpus: Path, scratch: Path) -> Case:
    """config.json of every family; an accepted one has the sizes that the tensors have."""
    folders = {p.name: _copy(corpus, scratch, f"families/{p.name}") for p in sorted((corpus / "families").iterdir())}
    raws = {name: (folder / CONFIG).read_bytes() for name, folder in folders.items()}
    counts = {name: sum(math.prod(i.shape) for i in open_checkpoint(f).tensors.values()) for name, f in folders.items()}

    def case(rng: Random) -> str | None:
        name = rng.choice(list(folders))
        folder = folders[name]
        (folder / CONFIG).write_bytes(mutate_json(rng, raws[name], json.loads(raws[name])))
        found = open_checkpoint(folder)
        describe(found)
        if sum(math.prod(i.shape) for i in found.tensors.values()) != counts[name]:
            return "not every element of the files is in a tensor"
        return None

    return case


def index_json(corpus: Path, scratch: Path) -> Case:
    """The index of a folder; an accepted one says where each tensor is."""
    folder = _copy(corpus, scratch, "hf")
    raw = (folder / INDEX).read_bytes()
    tree = json.loads(raw)

    def case(rng: Random) -> str | None:
        (folder / INDEX).write_bytes(mutate_json(rng, raw, tree))
        found = open_checkpoint(folder)
        assert found.folder is not None
        assert found.folder.index is not None
        same = json.loads(found.folder.index)["weight_map"] == tree["weight_map"]
        return None if same else "accepted with another weight_map"

    return case


def pickles(corpus: Path, scratch: Path) -> Case:
    """Pickles of all protocols, by opcodes and bytes."""
    raws = [path.read_bytes() for path in sorted((corpus / "pickles").iterdir())]

    def case(rng: Random) -> str | None:
        repr(load_pickle(mutate_pickle(rng, rng.choice(raws)), "pickle"))
        return None

    return case


def archives(corpus: Path, scratch: Path) -> Case:
    """torch.save's archives: headers and directory of the zip, or the pickle in it; every tensor lies in its storage."""
    raw = (corpus / "dcp.pt").read_bytes()
    path = scratch / "x.pt"
    state = (corpus / "pickles" / "state").read_bytes()
    storages = {key: end - begin for key, (begin, end) in read_archive(corpus / "dcp.pt").storages.items()}

    def case(rng: Random) -> str | None:
        if rng.random() < 0.6:
            changed = mutate_zip(rng, raw)
        else:
            layout = lay_out_archive("archive", mutate_pickle(rng, state), storages.items())
            out = bytearray(layout.size)
            for begin, literal in layout.literals:
                out[begin : begin + len(literal)] = literal
            changed = bytes(out)
        path.write_bytes(changed)
        archive = read_archive(path)
        with_numbers(archive)
        spans = sorted(archive.storages.values())
        wrong = any(b < a_end for (_, a_end), (b, _) in pairwise(spans))
        for ref in _tensors(archive.root):
            begin = archive.begin(ref)
            wrong = wrong or not 0 <= begin <= len(changed)
        check_archive(path)
        return "records overlap, or a tensor is outside" if wrong else None

    return case


def _tensors(value: Any) -> list[TensorRef]:
    if isinstance(value, TensorRef):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [ref for item in inner for ref in _tensors(item)]


def bin_folder(corpus: Path, scratch: Path) -> Case:
    """Folders from before safetensors."""
    folder = _copy(corpus, scratch, "bin")
    path = folder / "pytorch_model.bin"
    raw = path.read_bytes()

    def case(rng: Random) -> str | None:
        path.write_bytes(mutate_zip(rng, raw) if rng.random() < 0.5 else _in_pickle(rng, raw))
        found = open_checkpoint(folder)
        plan_sharded(found, Degrees(tp=2))
        return _outside(found)

    return case


def _in_pickle(rng: Random, raw: bytes) -> bytes:
    """Mutate bytes where an archive's pickle is; it keeps its length, so that the zip stays whole."""
    begin = raw.index(b"\x80\x02")
    end = raw.index(b"PK", begin + 1000)
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(begin, end)
        out[at] = rng.choice((rng.randrange(256), out[at] ^ 1, *b"(.0]}RQq"))
    return bytes(out)


def _outside(found: Checkpoint) -> str | None:
    for name, pieces in found.pieces.items():
        for piece in pieces:
            if piece.begin < 0 or (
                not piece.strides and piece.begin + piece.nbytes > os.stat(found.root / piece.file).st_size
            ):
                return f"{name} is outside its file"
    return None


def _megatron(form: str, patterns: tuple[str, ...], change: Callable[[Random, bytes, Path], bytes]) -> Target:
    def target(corpus: Path, scratch: Path) -> Case:
        folder = _copy(corpus, scratch, form)
        raws = {path: path.read_bytes() for pattern in patterns for path in sorted(folder.glob(pattern))}

        def case(rng: Random) -> str | None:
            path = rng.choice(list(raws))
            try:
                path.write_bytes(change(rng, raws[path], path))
                found = as_checkpoint(open_megatron(folder, optimizer=True))
                plan_sharded(found, Degrees(tp=2))
                if rng.random() < 0.2:
                    found.check()
                return _outside(found)
            finally:
                path.write_bytes(raws[path])

        return case

    target.__doc__ = f"Megatron checkpoints of the {form} format: {', '.join(patterns)}."
    return target


def _change_archive(rng: Random, raw: bytes, path: Path) -> bytes:
    if path.name == ".metadata":
        return mutate_pickle(rng, raw)
    if path.suffix in (".json", ".txt"):
        return mutate_json(rng, raw, json.loads(raw)) if path.suffix == ".json" else flip_bytes(rng, raw)
    return (
        mutate_zip(rng, raw)
        if rng.random() < 0.6
        else _in_pickle(rng, raw)
        if len(raw) > 3000
        else flip_bytes(rng, raw)
    )


megatron_torch = _megatron("torch", ("*/*/*.pt", TRACKER, CONFIG), _change_archive)
megatron_dist = _megatron(
    "torch_dist", ("*/.metadata", "*/common.pt", "*/metadata.json", "*/*.distcp", TRACKER, CONFIG), _change_archive
)


def run_args(corpus: Path, scratch: Path) -> Case:
    """Megatron's args: a config is made of them, and its model opened."""
    source = open_megatron(corpus / "torch")
    tree = {k: v for k, v in source.args.values.items() if not isinstance(v, Symbol | Opaque)}

    def case(rng: Random) -> str | None:
        args = RunArgs(mutate_tree(rng, tree))
        config = config_from_args(args, "bfloat16")
        model = model_of(json.loads(json.dumps(config)), CONFIG)
        check_args(args, model)
        args.degree("tensor_model_parallel_size")
        return None if model.sizes["layers"] == args.num_layers else "the config has another number of layers"

    return case


def trainer_json(corpus: Path, scratch: Path) -> Case:
    """trainer.json; an accepted one can be written again."""
    raw = (corpus / "trainer.json").read_bytes()
    tree = json.loads(raw)

    def case(rng: Random) -> str | None:
        found = parse_trainer(mutate_json(rng, raw, tree), "trainer.json")
        kinds = {"iteration": int, "consumed_train_samples": int, "seed": int, "schedule": dict, "optimizer": dict}
        wrong = [key for key, kind in kinds.items() if type(found[key]) is not kind]
        return f"accepted with {wrong}" if wrong or found["iteration"] < 0 else None

    return case


def dumped_pickles(corpus: Path, scratch: Path) -> Case:
    """What is pickled again: any JSON that a config may hold; Python reads back the same."""
    tree = json.loads((corpus / "torch" / CONFIG).read_bytes())

    def case(rng: Random) -> str | None:
        value = mutate_tree(rng, tree)
        try:
            data = dump_pickle(value)
        except RecursionError:
            raise MoeconvError("nested too deeply, which parse_json refuses before") from None
        load_pickle(dump_pickle(Instance(Symbol("argparse", "Namespace"), value)), "pickle")
        same = repr(pickle.loads(data)) == repr(value)
        return None if same else "Python reads another value"

    return case


def journal(corpus: Path, scratch: Path) -> Case:
    """Journals of killed runs, and their finished files: a resumed run gives the right bytes, or ends."""
    source, out = open_checkpoint(corpus / "hf"), scratch / "out"
    write_sharded(source, scratch / "whole", Degrees(tp=2), Options(sync=False))
    whole = {p.name: p.read_bytes() for p in (scratch / "whole").iterdir() if p.is_file()}
    partial = scratch / "out.partial"
    killed = _killed(source, out, partial)

    def case(rng: Random) -> str | None:
        for folder in (partial, out):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(killed, partial)
        path = partial / JOURNAL if rng.random() < 0.6 else rng.choice(sorted(partial.glob("*.safetensors")))
        path.write_bytes(flip_bytes(rng, path.read_bytes()))
        write_sharded(source, out, Degrees(tp=2), Options(sync=False, resume=True, workers=1))
        now = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
        return None if now == whole else "the result is another"

    return case


def _killed(source: Checkpoint, out: Path, partial: Path) -> Path:
    """Leave a run behind that had finished its tensors' files."""

    class Killed(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Killed

    from moeconv import convert

    real = convert.make_manifest
    convert.make_manifest = stop  # type: ignore[assignment]
    try:
        write_sharded(source, out, Degrees(tp=2), Options(sync=False))
    except Killed:
        pass
    finally:
        convert.make_manifest = real
    return partial.rename(partial.with_name("killed"))


def tracker(corpus: Path, scratch: Path) -> Case:
    """The file that names Megatron's latest iteration."""
    folder = scratch / "root"
    (folder / "release").mkdir(parents=True)
    words = (b"release", b"12", b"../..", b"/", b"1" * 400, b"\xff", b"-1", b"\xd9\xa1", b"release\0", b"")

    def case(rng: Random) -> str | None:
        (folder / TRACKER).write_bytes(flip_bytes(rng, rng.choice(words)) if rng.random() < 0.8 else rng.choice(words))
        root, name = find_iteration(folder)
        return None if (root, name) == (folder, "release") else "another folder"

    return case


def exports(corpus: Path, scratch: Path) -> Case:
    """upcycle and export-megatron of a model whose config was changed: planned whole, nothing written."""
    dense, mixture = _copy(corpus, scratch, "families/llama"), _copy(corpus, scratch, "megatron-source")
    raws = {folder: (folder / CONFIG).read_bytes() for folder in (dense, mixture)}
    recipe = Recipe(method="copy", experts=2, top_k=1)
    options = Options(sync=False)

    def case(rng: Random) -> str | None:
        folder = rng.choice((dense, mixture))
        (folder / CONFIG).write_bytes(mutate_json(rng, raws[folder], json.loads(raws[folder])))
        if folder == dense and rng.random() < 0.5:
            plan_hf(plan_upcycle(open_checkpoint(dense), recipe), None)
            return None
        export_megatron(
            *(folder, scratch / "out"),
            fmt=rng.choice(("torch", "torch_dist")),
            degrees=Degrees(tp=2),
            spec="local",
            experts="sequential",
            options=options,
            dry_run=True,
        )
        return None

    return case


# Name -> target and its share of a million cases.
TARGETS: dict[str, tuple[Target, int]] = {
    "safetensors header": (safetensors_header, 330_000),
    "manifest": (manifest_codec, 90_000),
    "manifest, opened": (manifest_open, 20_000),
    "manifest bytes": (manifest_bytes, 20_000),
    "config.json": (config_json, 50_000),
    "index.json": (index_json, 40_000),
    "pickle": (pickles, 180_000),
    "torch archive": (archives, 110_000),
    ".bin folder": (bin_folder, 20_000),
    "Megatron torch": (megatron_torch, 15_000),
    "Megatron torch_dist": (megatron_dist, 10_000),
    "Megatron args": (run_args, 30_000),
    "trainer.json": (trainer_json, 30_000),
    "dump_pickle": (dumped_pickles, 30_000),
    "journal": (journal, 5_000),
    "tracker": (tracker, 10_000),
    "upcycle, export": (exports, 10_000),
}
