"""Megatron checkpoints of other origins, damaged ones, and ones that mean another model."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cli.main import main
from moeconv import sweep
from moeconv.convert import Options
from moeconv.errors import IntegrityError, MappingError, SourceError, WriteError
from moeconv.formats import open_any
from moeconv.layout.degrees import Degrees
from moeconv.megatron.convert import export_megatron, import_megatron, open_megatron
from tests.megatron.conftest import assert_same, tensors_of
from tests.megatron.test_round_trips import bring_back, export


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a torch.save file in place."""
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("etp", [1, 2])
def test_old_grouped_mlp(hf_bf16: Path, tmp_path: Path, etp: int) -> None:
    """weight1 and weight2 as GroupedMLP.forward views them: [experts, hidden, 2 ffn] and [experts, ffn, hidden]."""
    out = export(hf_bf16, tmp_path / "old", "torch", {"tp": 2, "ep": 2, "etp": etp}, "local", "sequential")

    def fuse(state: dict[str, Any]) -> None:
        model = state["model"]
        for layer in range(4):
            prefix = f"decoder.layers.{layer}.mlp.experts."
            names = [f"{prefix}local_experts.{e}.linear_fc" for e in range(4)]
            first = torch.stack([model.pop(f"{n}1.weight").T for n in names])
            second = torch.stack([model.pop(f"{n}2.weight").T for n in names])
            model[f"{prefix}weight1"] = first.reshape(16, -1).contiguous()
            model[f"{prefix}weight2"] = second.reshape(-1, 16).contiguous()
            for n in names:
                del model[f"{n}1._extra_state"], model[f"{n}2._extra_state"]

    for path in out.rglob("*.pt"):
        edit(path, fuse)
    assert_same(bring_back(out, tmp_path / "hf"), hf_bf16)
    read = open_any(out).read("model.layers.1.block_sparse_moe.experts.5.w1.weight")
    expected = tensors_of(hf_bf16)["model.layers.1.block_sparse_moe.experts.5.w1.weight"]
    assert read.tobytes() == expected.view(torch.uint8).numpy().tobytes()


def test_padding_with_anything_is_dropped(hf_bf16: Path, tmp_path: Path) -> None:
    out = export(hf_bf16, tmp_path / "m", "torch", {"tp": 2})
    path = out / "release/mp_rank_01/model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    rows = state["model"]["embedding.word_embeddings.weight"]
    assert rows.shape == (128, 16)
    assert torch.equal(rows[122:], rows[121].expand(6, 16))  # 250 rows, then the last one again
    rows[122:] = torch.randn(6, 16)
    torch.save(state, path)
    assert_same(bring_back(out, tmp_path / "hf"), hf_bf16)


def test_replicas_that_differ_are_refused(hf_bf16: Path, tmp_path: Path) -> None:
    out = export(hf_bf16, tmp_path / "m", "torch", {"tp": 2, "ep": 2})
    name = "decoder.layers.2.mlp.router.weight"
    edit(out / "release/mp_rank_01_001/model_optim_rng.pt", lambda s: s["model"][name].view(-1)[3].add_(1))
    with pytest.raises(IntegrityError, match=r"layers\.2\.block_sparse_moe\.gate.*mp_rank_01_001"):
        import_megatron(open_megatron(out), tmp_path / "out", Degrees(), Options())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].pop("decoder.layers.1.mlp.router.weight"), "lacks 1 tensors .*layers.1.*gate"),
        (lambda s: s["model"].update(stray=torch.zeros(2)), "stray in .* is no tensor"),
        (lambda s: s["model"].update({"decoder.final_layernorm.weight": torch.zeros(3)}), r"has shape \[3\]"),
        (lambda s: s["model"].pop("decoder.layers.3.mlp.experts.linear_fc1.weight5"), "lacks 1 tensors"),
        (
            lambda s: setattr(s["args"], "moe_router_pre_softmax", True),
            "moe_router_pre_softmax True in args, False in config",
        ),
        (lambda s: setattr(s["args"], "rotary_base", 10000), "rotary_base 10000 in args"),
        (lambda s: setattr(s["args"], "num_layers", 5), "num_layers 5 in args, 4 in config"),
        (lambda s: s.update(surprise=1), "unknown entries"),
    ],
    ids=["missing", "unknown", "shape", "expert", "router", "rotary", "layers", "entry"],
)
def test_unfit_rank_files(hf_bf16: Path, tmp_path: Path, change: Any, message: str) -> None:
    out = export(hf_bf16, tmp_path / "m", "torch", {})
    edit(out / "release/mp_rank_00/model_optim_rng.pt", change)
    with pytest.raises(MappingError, match=message):
        open_megatron(out)


def test_a_missing_rank_folder(hf_bf16: Path, tmp_path: Path) -> None:
    out = export(hf_bf16, tmp_path / "m", "torch", {"tp": 2, "pp": 2})
    shutil.rmtree(out / "release/mp_rank_00_001")
    with pytest.raises(SourceError, match="lacks mp_rank_00_001"):
        open_megatron(out)


def test_a_hole_in_a_torch_dist_tensor(hf_bf16: Path, tmp_path: Path) -> None:
    """Megatron's own loader takes such a checkpoint without a word."""
    out = export(hf_bf16, tmp_path / "m", "torch_dist", {"tp": 2})
    path = out / "release/.metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.experts.experts.linear_fc2.weight"].chunks.pop(9)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(IntegrityError, match=r"experts\.\d\.w2\.weight: 192 of 384 elements are in no file"):
        open_megatron(out)


def test_an_unfinished_torch_dist_save(hf_bf16: Path, tmp_path: Path) -> None:
    out = export(hf_bf16, tmp_path / "m", "torch_dist", {})
    (out / "release/metadata.json").unlink()
    with pytest.raises(SourceError, match="never completed"):
        open_megatron(out)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_formats_of_fully_sharded_runs_are_named(hf_bf16: Path, tmp_path: Path) -> None:
    """What Megatron saves as fsdp_dtensor or torch_dcp: the model's state dict, under a key of its own."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    folder = tmp_path / "megatron" / "iter_0000010"
    folder.mkdir(parents=True)
    files = sorted(hf_bf16.glob("*.safetensors"))
    state = {"module." + name: tensor for file in files for name, tensor in load_file(file).items()}
    dcp.save({"model": state}, checkpoint_id=str(folder), no_dist=True)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(SourceError, match="fsdp_dtensor or torch_dcp; torch and torch_dist are read here"):
        open_megatron(folder.parent)


@pytest.mark.parametrize("fmt", ["torch", "torch_dist"])
def test_truncated_files(hf_bf16: Path, tmp_path: Path, fmt: str) -> None:
    out = export(hf_bf16, tmp_path / "m", fmt, {})
    path = next(iter([*out.rglob("model_optim_rng.pt"), *out.rglob("*.distcp")]))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(SourceError, match="truncated"):
        open_megatron(out)


def test_both_metadata_json_forms(hf_bf16: Path, tmp_path: Path) -> None:
    out = export(hf_bf16, tmp_path / "m", "torch_dist", {"tp": 2})
    config = out / "release/metadata.json"
    assert json.loads(config.read_text())["common_backend"] == "torch"
    config.write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    assert_same(bring_back(out, tmp_path / "hf"), hf_bf16)


def test_an_optimizer_by_data_parallel_rank_is_refused_by_name(hf_bf16: Path, tmp_path: Path) -> None:
    out = export(hf_bf16, tmp_path / "m", "torch_dist", {})
    path = out / "release/.metadata"
    metadata = pickle.loads(path.read_bytes())
    tensors, key = metadata.state_dict_metadata, "optimizer.distributed.dp_group_idx_0.exp_avg"
    tensors[key] = tensors["decoder.final_layernorm.weight"]
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == "decoder.final_layernorm.weight":  # a copy of its own: no two items share bytes
            file = path.with_name(info.relative_path)
            raw = file.read_bytes()
            file.write_bytes(raw + raw[info.offset : info.offset + info.length])
            metadata.storage_data[type(index)(key, index.offset)] = dataclasses.replace(info, offset=len(raw))
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        MappingError, match=r"dp_group_idx_0\.exp_avg: the optimizer state is stored by data-parallel rank"
    ):
        open_megatron(out, optimizer=True)
    source = open_megatron(out, optimizer=False)
    assert any("optimizer" in what for what in source.dropped)


def test_a_killed_export_goes_on(hf_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = export(hf_bf16, tmp_path / "whole", "torch", {"tp": 2, "ep": 4})
    real, calls = sweep._pwrite, 0

    def fails_later(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 200:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(sweep, "_pwrite", fails_later)
    with pytest.raises(WriteError, match="No space left"):
        export(hf_bf16, tmp_path / "out", "torch", {"tp": 2, "ep": 4})
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(sweep, "_pwrite", real)
    with pytest.raises(WriteError, match="--resume"):
        export(hf_bf16, tmp_path / "out", "torch", {"tp": 2, "ep": 4})
    options = Options(resume=True)
    layout = Degrees(tp=2, ep=4)
    export_megatron(
        hf_bf16, tmp_path / "out", fmt="torch", degrees=layout, spec="te", experts="grouped", options=options
    )
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert all((whole / f).read_bytes() == (tmp_path / "out" / f).read_bytes() for f in files)


def test_a_changed_byte_in_shards_is_caught_on_export(hf_bf16: Path, tmp_path: Path) -> None:
    out = export(hf_bf16, tmp_path / "m", "torch", {"tp": 2})
    import_megatron(open_megatron(out), tmp_path / "shards", Degrees(tp=2), Options())
    path = tmp_path / "shards/experts-ep0-etp1-pp0.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match="experts-ep0-etp1"):
        export(tmp_path / "shards", tmp_path / "again", "torch_dist", {})
    assert not (tmp_path / "again").exists()


def make_bin_folder(src: Path, folder: Path) -> Path:
    """Write a model as transformers did before safetensors, rotary frequencies included."""
    folder.mkdir()
    shutil.copy(src / "config.json", folder)
    tensors = tensors_of(src)
    names = sorted(tensors)
    tensors |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": 1e6 ** -(torch.arange(2) / 2) for n in range(4)}
    buffers = [n for n in tensors if n.endswith("inv_freq")]
    files = {"pytorch_model-00001-of-00002.bin": names[::2] + buffers, "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in files.items():
        torch.save({n: tensors[n] for n in held}, folder / file)
    weight_map = {n: file for file, held in files.items() for n in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_torch_bin_folders(hf_bf16: Path, tmp_path: Path) -> None:
    folder = make_bin_folder(hf_bf16, tmp_path / "bin")
    checkpoint = open_any(folder)
    for name, value in tensors_of(hf_bf16).items():
        assert checkpoint.read(name).tobytes() == value.view(torch.uint8).numpy().tobytes(), name
    assert_same(bring_back(export(folder, tmp_path / "m", "torch_dist", {"tp": 2}), tmp_path / "hf"), hf_bf16)


def test_import_hf_of_a_torch_bin_folder(hf_bf16: Path, tmp_path: Path) -> None:
    folder, run = make_bin_folder(hf_bf16, tmp_path / "bin"), CliRunner()
    shards, back = str(tmp_path / "shards"), tmp_path / "back"
    made = run.invoke(main, ["import-hf", str(folder), shards, "--tp", "2", "--ep", "4", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["dropped"] == ["4 rotary_emb.inv_freq buffers (computed from config.json)"]
    for other in (folder, hf_bf16):
        assert "same bytes" in run.invoke(main, ["verify", shards, "--against", str(other)]).output
    assert run.invoke(main, ["export-hf", shards, str(back)]).exit_code == 0
    assert_same(back, hf_bf16)


def test_a_torch_bin_folder_of_another_model_or_with_code_is_refused(hf_bf16: Path, tmp_path: Path) -> None:
    folder = make_bin_folder(hf_bf16, tmp_path / "bin")
    path = folder / "pytorch_model-00002-of-00002.bin"
    edit(path, lambda state: state.update({"model.stray": torch.zeros(2)}))
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["model.stray"] = path.name
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    stray = CliRunner().invoke(main, ["import-hf", str(folder), str(tmp_path / "out")])
    assert (stray.exit_code, "model.stray" in stray.output) == (1, True)
    torch.save({"model.norm.weight": Path}, path)
    code = CliRunner().invoke(main, ["import-hf", str(folder), str(tmp_path / "out")])
    assert (code.exit_code, "is no tensor" in code.output) == (1, True), code.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fmt", ["torch", "torch_dist"])
def test_the_commands_on_megatron_folders(hf_bf16: Path, tmp_path: Path, fmt: str) -> None:
    run, folder = CliRunner(), str(tmp_path / "m")
    made = run.invoke(main, ["export-megatron", str(hf_bf16), folder, "--format", fmt, "--tp", "2", "--ep", "2"])
    assert (made.exit_code, "wrote" in made.output) == (0, True), made.output
    shown = run.invoke(main, ["inspect", folder])
    assert f"Megatron-Core {fmt} (te layers, grouped experts" in shown.output
    assert "same bytes" in run.invoke(main, ["verify", folder, "--against", str(hf_bf16)]).output
    assert run.invoke(main, ["diff", folder, str(hf_bf16)]).exit_code == 0
    shards = str(tmp_path / "shards")
    planned = run.invoke(main, ["import-megatron", folder, shards, "--dry-run", "--json"])
    assert json.loads(planned.stdout)["dry_run"] is True
    assert not Path(shards).exists()
    assert run.invoke(main, ["import-megatron", folder, shards, "--tp", "4", "--ep", "8"]).exit_code == 0
    assert "same bytes" in run.invoke(main, ["verify", shards, "--against", folder]).output
    path = next(iter([*Path(folder).rglob("model_optim_rng.pt"), *Path(folder).rglob("*.distcp")]))
    piece = next(p for p in open_megatron(Path(folder)).pieces if (Path(folder) / p.file) == path)
    with open(path, "r+b") as file:
        file.seek(piece.begin + 1)
        byte = file.read(1)[0]
        file.seek(piece.begin + 1)
        file.write(bytes([byte ^ 1]))
    damaged = run.invoke(main, ["verify", folder])
    assert damaged.exit_code == 1
    assert run.invoke(main, ["diff", folder, str(hf_bf16)]).exit_code == 3
