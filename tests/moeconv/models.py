"""Tiny random Mixtral folders, written from the definition of the model with numpy alone, and layouts that fit them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moeconv.io.safetensors import encode_header
from moeconv.layout.degrees import Degrees

# Every finished file goes to the disk; in memory that costs nothing, and hundreds of small conversions take seconds.
RAM = "/dev/shm" if Path("/dev/shm").is_dir() else None
ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """A model and the form of its folder; `fused` stands for the names of transformers 5, `router` for the gate's dtype."""

    layers: int = 2
    hidden: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    ffn: int = 12
    experts: int = 4
    vocab: int = 37
    tied: bool = False
    dtype: str = "BF16"
    router: str = "BF16"
    fused: bool = False
    files: int = 1
    index: bool = False
    new_config: bool = False
    seed: int = 0


def shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Give the shape of each stored tensor."""
    d, f, q, kv = spec.hidden, spec.ffn, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab, d), "model.norm.weight": (d,)}
    if not spec.tied:
        out["lm_head.weight"] = (spec.vocab, d)
    for layer in range(spec.layers):
        at = f"model.layers.{layer}."
        out |= {at + "input_layernorm.weight": (d,), at + "post_attention_layernorm.weight": (d,)}
        out |= {at + "self_attn.q_proj.weight": (q, d), at + "self_attn.o_proj.weight": (d, q)}
        out |= {at + "self_attn.k_proj.weight": (kv, d), at + "self_attn.v_proj.weight": (kv, d)}
        if spec.fused:
            out[at + "mlp.gate.weight"] = (spec.experts, d)
            out[at + "mlp.experts.gate_up_proj"] = (spec.experts, 2 * f, d)
            out[at + "mlp.experts.down_proj"] = (spec.experts, d, f)
            continue
        out[at + "block_sparse_moe.gate.weight"] = (spec.experts, d)
        for e in range(spec.experts):
            expert = at + f"block_sparse_moe.experts.{e}."
            out |= {expert + "w1.weight": (f, d), expert + "w2.weight": (d, f), expert + "w3.weight": (f, d)}
    return out


def config(spec: Spec) -> dict[str, Any]:
    """Give config.json as transformers 4 or 5 writes it."""
    kind = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[spec.dtype]
    out: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "num_local_experts": spec.experts,
        "num_experts_per_tok": min(2, spec.experts),
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied,
    }
    if spec.new_config:
        return out | {"dtype": kind, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return out | {"torch_dtype": kind, "rope_theta": 1e6}


def random_bytes(generator: np.random.Generator, count: int) -> bytes:
    """Give bytes of every value: as floats they hold NaNs of every payload, infinities and denormals."""
    return generator.integers(0, 256, count, np.uint8).tobytes()


def make_folder(folder: Path, spec: Spec) -> Path:
    """Write a model of random bytes as a Hugging Face folder.

    Args:
        folder: the folder to make.
        spec: the model.

    Returns:
        The folder.
    """
    generator = np.random.default_rng(spec.seed)
    names = list(shapes(spec))
    generator.shuffle(names)
    count = min(spec.files, len(names))
    cuts = [len(names) * i // count for i in range(count + 1)]
    contents = {
        "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors": names[a:b]
        for i, (a, b) in enumerate(pairwise(cuts))
    }
    folder.mkdir(parents=True)
    total = 0
    for file, held in contents.items():
        kinds = {name: spec.router if ".gate.weight" in name else spec.dtype for name in held}
        total += write_tensors(folder / file, {n: (kinds[n], shapes(spec)[n]) for n in held}, generator)
    if spec.index:
        table = {file_of: file for file, held in contents.items() for file_of in held}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config(spec), indent=2))
    (folder / "tokenizer.json").write_bytes(b'{"any": "\xc3\xa9"}')
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_bytes(random_bytes(generator, 100))
    return folder


def write_tensors(path: Path, held: dict[str, tuple[str, tuple[int, ...]]], generator: np.random.Generator) -> int:
    """Write a safetensors file of random bytes; `held` gives dtype and shape by name. Returns the bytes of tensors."""
    header = encode_header([(n, kind, shape) for n, (kind, shape) in held.items()], {"format": "pt"})
    size = sum(prod(shape) * ITEMSIZE[kind] for kind, shape in held.values())
    path.write_bytes(header.raw + random_bytes(generator, size))
    return size


def digests(folder: Path) -> dict[str, str]:
    """Give the sha256 of every file below a folder, by relative name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Draw a model."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    dtype = draw(st.sampled_from(["F32", "F16", "BF16"]))
    return Spec(
        layers=draw(st.integers(1, 5)),
        hidden=draw(st.sampled_from([8, 12, 18])),
        heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 6])),
        ffn=draw(st.sampled_from([4, 6, 12])),
        experts=draw(st.sampled_from([1, 2, 3, 4, 6, 8])),
        vocab=draw(st.integers(1, 41)),
        tied=draw(st.booleans()),
        dtype=dtype,
        router=draw(st.sampled_from([dtype, "F32"])),
        fused=draw(st.booleans()),
        files=draw(st.integers(1, 4)),
        index=draw(st.booleans()),
        new_config=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@st.composite
def layouts(draw: st.DrawFn, spec: Spec) -> Degrees:
    """Draw degrees that fit a model."""
    tp = draw(st.sampled_from([t for t in _divisors(spec.heads) if t % spec.kv_heads == 0 or spec.kv_heads % t == 0]))
    etp = draw(st.sampled_from(_divisors(spec.ffn)))
    ep = draw(st.sampled_from(_divisors(spec.experts)))
    chunks = draw(st.integers(1, spec.layers))
    pp = draw(st.sampled_from(_divisors(chunks)))
    chunks = chunks if pp > 1 else 1
    cuts = draw(st.permutations(range(1, spec.layers)))[: chunks - 1] if chunks > 1 else []
    ends = [0, *sorted(cuts), spec.layers]
    layers = tuple(b - a for a, b in pairwise(ends))
    even = spec.layers % chunks == 0 and draw(st.booleans())
    return Degrees(tp=tp, pp=pp, vpp=chunks // pp, ep=ep, etp=etp, pp_layers=None if even else layers)
