"""The genuine tiny files that are mutated: checkpoints of each form that is read, and pickles that torch wrote."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.io.hf_folder import CONFIG
from moeconv.io.safetensors import encode_header
from moeconv.layout.degrees import Degrees
from moeconv.megatron.convert import export_megatron
from tests.moeconv.models import Spec, make_folder
from tests.support.configs import tiny_config, tiny_model

FAMILIES = ("mixtral", "llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "glm4_moe", "dots1")
TRAINER = {
    "version": 1,
    "iteration": 7,
    "consumed_train_samples": 56,
    "seed": 3,
    "data_fingerprint": "ab",
    "schedule": {"max_lr": 1e-3, "min_lr": 0.0, "warmup_iters": 2, "decay_iters": 10, "style": "linear"},
    "optimizer": {"num_steps": 7, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "loss_scale": 1024.0},
}

_SMALL = {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts": 4}


def build(root: Path) -> None:
    """Write everything below an empty folder."""
    hf = make_folder(root / "hf", Spec(files=2, index=True))
    write_sharded(open_checkpoint(hf), root / "shards", Degrees(tp=2, ep=2, pp=2), Options(sync=False))
    _bin_folder(hf, root / "bin")
    model, options = _family(root / "megatron-source", "mixtral", **_SMALL), Options(sync=False)
    torch_form = {"fmt": "torch", "degrees": Degrees(tp=2, ep=2), "spec": "te", "experts": "grouped"}
    dist_form = {"fmt": "torch_dist", "degrees": Degrees(tp=2), "spec": "local", "experts": "sequential"}
    for form in (torch_form, dist_form):
        export_megatron(model, root / str(form["fmt"]), options=options, **form)
    for family in FAMILIES:
        _family(root / "families" / family, family, num_hidden_layers=2)
    (root / "pickles").mkdir()
    for name, data in _pickles(root / "dcp").items():
        (root / "pickles" / name).write_bytes(data)
    (root / "trainer.json").write_text(json.dumps(TRAINER))


def _bin_folder(hf: Path, out: Path) -> None:
    """Save a folder's weights as old ones are: by torch, in one file."""
    out.mkdir()
    checkpoint = open_checkpoint(hf)
    tensors = {n: torch.from_numpy(checkpoint.read(n).view(np.int16)).view(torch.bfloat16) for n in checkpoint.tensors}
    torch.save(tensors, out / "pytorch_model.bin")
    shutil.copy(hf / CONFIG, out / CONFIG)


def _family(folder: Path, model_type: str, **sizes: int) -> Path:
    """Write a model of zeros of a family."""
    model = tiny_model(model_type, **sizes)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(tiny_config(model_type, **sizes)))
    header = encode_header([(t.name, "BF16", t.shape) for t in model.tensors.values() if not model.optional(t)], {})
    (folder / "model.safetensors").write_bytes(header.raw + bytes(header.file_size - len(header.raw)))
    return folder


def _pickles(scratch: Path) -> dict[str, bytes]:
    """Give pickles of the kinds that checkpoints hold, as torch and Python write them."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(a=1, b=[None]),
    }
    torch.save(state, scratch.with_suffix(".pt"))
    raw = torch.PyTorchFileReader(str(scratch.with_suffix(".pt"))).get_record("data.pkl")
    save({"a": torch.zeros(4, 2), "b": torch.zeros(3)}, storage_writer=FileSystemWriter(scratch), no_dist=True)
    plain = {"a": [1, -2, 300, 2**40, -(2**70), 1.5, None, True], "b": (1, (2, "x")), 3: {"c": b"d"}, "s": {1, 2}}
    out = {"state": raw, "metadata": (scratch / ".metadata").read_bytes()}
    return out | {f"plain{protocol}": pickle.dumps(plain, protocol) for protocol in range(6)}
