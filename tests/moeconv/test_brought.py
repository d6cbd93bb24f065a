"""Folders as people bring them: each is read right, or refused with advice that gives the right result when it is obeyed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moeconv.checking import check_tied, compare, lone_state
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.errors import MappingError, SourceError
from moeconv.finish import finish_checkpoint
from moeconv.io.hf_folder import INDEX
from moeconv.io.safetensors import encode_header, read_header
from moeconv.io.shards import ShardEntry, write_shard_file
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.prefixes import shared_prefix
from tests.moeconv.models import Spec, digests, make_folder

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rewrite(folder: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Write a folder's weights anew: name -> dtype, shape, data."""
    header = encode_header([(name, kind, shape) for name, (kind, shape, _) in tensors.items()], {"format": "pt"})
    data = b"".join(tensors[entry.name][2] for entry in header.entries)
    (folder / "model.safetensors").write_bytes(header.raw + data)


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read a folder's weights: name -> dtype, shape, data."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    return {e.name: (e.dtype, e.shape, raw[e.begin : e.end]) for e in read_header(file).entries}


def edit_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | keys))


def there_and_back(folder: Path, work: Path, prefix: str = "") -> Path:
    write_sharded(open_checkpoint(folder, (), prefix), work / "shards", Degrees(tp=2), Options())
    write_hf(open_checkpoint(work / "shards"), work / "back", None, Options())
    return work / "back"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_a_prefix_of_all_names_is_named_and_taken_off(tmp_path: Path, prefix: str) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    plain = open_checkpoint(shutil.copytree(folder, tmp_path / "plain"))
    rewrite(folder, {prefix + name: tensor for name, tensor in stored(folder).items()})
    with pytest.raises(MappingError, match=f"begins with '{prefix}'.*--strip-prefix {prefix}"):
        open_checkpoint(folder)
    back = open_checkpoint(there_and_back(folder, tmp_path, prefix))
    assert list(compare(back, plain)) == []
    assert {e.name for e in read_header(back.root / "model.safetensors").entries} == set(plain.tensors)


def test_a_prefix_of_some_names_is_not_taken_off(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    rewrite(folder, {"module." * (name != HEAD) + name: tensor for name, tensor in stored(folder).items()})
    with pytest.raises(MappingError, match=r"module\..* is no tensor of Mixtral"):
        open_checkpoint(folder)
    with pytest.raises(
        MappingError, match=f"--strip-prefix module.: {HEAD} in model.safetensors does not begin with it"
    ):
        open_checkpoint(folder, (), "module.")
    assert shared_prefix(["model.a", "model.b"], {"model.a"}) is None
    assert shared_prefix(["x.model.a", "x.model.b"], {"model.a"}) == "x."


def test_an_index_of_other_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    weight_map = dict.fromkeys(stored(folder), "model-00001-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(
        SourceError,
        match=r"belongs to other files.*model-00001-of-00002.*holds model\.safetensors.*move the index away",
    ):
        open_checkpoint(folder)
    (folder / INDEX).unlink()
    assert digests(there_and_back(folder, tmp_path)) == digests(folder)


STATE = (
    "pytorch_model_fsdp_0/__0_0.distcp",
    "pytorch_model_fsdp_0/.metadata",
    "optimizer.pt",
    "global_step5/mp_rank_00_model_states.pt",
    "global_step5/notes.txt",
    "checkpoint-500/config.json",
    "checkpoint-500/model.safetensors",
    "runs/a/events.out.tfevents.17",
    "events.out.tfevents.18",
    "config.json.bak",
    "consolidated.safetensors",
    "model.gguf",
    ".hidden",
)


def test_what_is_no_part_of_the_model_stays_behind_and_is_listed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    kept = digests(folder)
    for name in (*STATE, ".gitattributes", ".cache/huggingface/x.metadata"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 7)
    source = open_checkpoint(folder)
    assert sorted(source.dropped) == sorted(f"{name}, 7 bytes (no part of the model)" for name in STATE)
    assert digests(there_and_back(folder, tmp_path)) == kept


def test_rotary_buffers_go_along_and_are_lost_by_no_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    rewrite(folder, stored(folder) | {name: ("F32", (2,), bytes(8)) for name in names})
    assert sorted(open_checkpoint(folder).model.carried) == names
    assert digests(there_and_back(folder, tmp_path)) == digests(folder)


def test_an_unknown_quantisation_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    open_checkpoint(folder)  # its weights are plain
    weight = "model.layers.0.self_attn.q_proj.weight"
    rewrite(folder, stored(folder) | {f"{weight}.quant_map": ("F32", (16,), bytes(64))})
    with pytest.raises(
        MappingError, match=r"quantised by bitsandbytes.*known are fp8, mxfp4.*Convert the original repository"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("said", [True, False])
def test_numbers_without_their_scale_are_refused(tmp_path: Path, said: bool) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    weight = "model.layers.0.self_attn.q_proj.weight"
    tensors = stored(folder)
    shape = tensors[weight][1]
    rewrite(folder, tensors | {weight: ("F8_E4M3", shape, bytes(shape[0] * shape[1]))})
    if said:
        edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(MappingError, match=f"{weight} is F8_E4M3 and no scale belongs to it"):
        open_checkpoint(folder)


def test_a_head_that_is_the_embedding_must_be_said(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", Spec(tied=True))
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(MappingError, match=f"lacks {HEAD}.*Put tie_word_embeddings: true into config.json"):
        open_checkpoint(folder)
    edit_config(folder, tie_word_embeddings=True)
    assert digests(there_and_back(folder, tmp_path)) == digests(folder)


@pytest.mark.parametrize("index", [False, True])
def test_a_run_of_a_tied_model_keeps_no_copy_of_its_head(tmp_path: Path, index: bool) -> None:
    """What a run saves of a source with a stored copy is exported without it, in the source's own files."""
    folder = make_folder(tmp_path / "hf", Spec())
    edit_config(folder, tie_word_embeddings=True)
    tensors = stored(folder)
    rewrite(folder, tensors | {HEAD: tensors[EMBEDDING]})
    if index:
        weight_map = dict.fromkeys(tensors, "model.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    source = open_checkpoint(folder)
    check_tied(source, "training")
    run = tmp_path / "run"
    run.mkdir()
    whole = [(info, source.read(name)) for name, info in source.tensors.items() if name != HEAD]
    entries = [
        ShardEntry(i.name, i.dtype, i.shape, Rect.whole(i.shape), a.reshape(-1).view(np.uint8)) for i, a in whole
    ]
    finish_checkpoint(run, source, Degrees(), [write_shard_file(run, "dense-tp0-pp0.safetensors", entries)])
    write_hf(open_checkpoint(run), tmp_path / "back", None, Options())
    back = open_checkpoint(tmp_path / "back")
    assert [d.name for d in compare(back, source)] == [HEAD]
    if index:
        said = json.loads((back.root / INDEX).read_bytes())
        assert said["metadata"]["total_size"] == sum(info.nbytes for info in back.tensors.values())


def test_optimizer_state_on_one_side_is_no_difference(tmp_path: Path) -> None:
    source = open_checkpoint(make_folder(tmp_path / "hf", Spec()))
    run = tmp_path / "run"
    run.mkdir()
    whole = [(info, source.read(name)) for name, info in source.tensors.items()]
    named = [(prefix + i.name, i, a) for prefix in ("", "optimizer.exp_avg.") for i, a in whole]
    entries = [ShardEntry(n, i.dtype, i.shape, Rect.whole(i.shape), a.reshape(-1).view(np.uint8)) for n, i, a in named]
    finish_checkpoint(run, source, Degrees(), [write_shard_file(run, "dense-tp0-pp0.safetensors", entries)])
    saved = open_checkpoint(run)
    assert list(compare(saved, source)) == list(compare(source, saved)) == []
    assert lone_state(source, saved) is saved
    assert lone_state(saved, saved) is None


def test_a_tied_model_with_another_head_is_refused_where_it_would_be_lost(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    edit_config(folder, tie_word_embeddings=True)
    source = open_checkpoint(folder)
    with pytest.raises(MappingError, match=f"{HEAD} differs from {EMBEDDING}.*Put tie_word_embeddings: false"):
        check_tied(source, "training")
    edit_config(folder, tie_word_embeddings=False)
    check_tied(open_checkpoint(folder), "training")
    assert digests(there_and_back(folder, tmp_path)) == digests(folder)
