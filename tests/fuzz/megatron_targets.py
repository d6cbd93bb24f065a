"""The targets of Megatron's formats, and of what is exported to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from moeconv.checkpoint import model_of, open_checkpoint
from moeconv.convert import Options, plan_hf, plan_sharded
from moeconv.io.hf_folder import CONFIG
from moeconv.io.unpickle import Opaque, Symbol
from moeconv.layout.degrees import Degrees
from moeconv.megatron.args import RunArgs
from moeconv.megatron.checkpoint import as_checkpoint
from moeconv.megatron.convert import export_megatron, open_megatron
from moeconv.megatron.described import config_from_args
from moeconv.megatron.model_args import check_args
from moeconv.megatron.source import TRACKER, find_iteration
from moeconv.upcycling.planned import plan_upcycle
from moeconv.upcycling.recipe import Recipe
from tests.fuzz.mutate import flip_bytes, mutate_in_pickle, mutate_json, mutate_pickle, mutate_tree, mutate_zip
from tests.fuzz.support import Case, Target, copied, outside


def _megatron(form: str, patterns: tuple[str, ...], change: Callable[[Random, bytes, Path], bytes]) -> Target:
    def target(corpus: Path, scratch: Path) -> Case:
        folder = copied(corpus, scratch, form)
        raws = {path: path.read_bytes() for pattern in patterns for path in sorted(folder.glob(pattern))}

        def case(rng: Random) -> str | None:
            path = rng.choice(list(raws))
            try:
                path.write_bytes(change(rng, raws[path], path))
                found = as_checkpoint(open_megatron(folder, optimizer=True))
                plan_sharded(found, Degrees(tp=2))
                if rng.random() < 0.2:
                    found.check()
                return outside(found)
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
        else mutate_in_pickle(rng, raw)
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
    dense, mixture = copied(corpus, scratch, "families/llama"), copied(corpus, scratch, "megatron-source")
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
