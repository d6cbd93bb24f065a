"""Between Hugging Face, sharded and Megatron-Core: the commands of the section `Convert`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moeconv.api.written import Written
from moeconv.checkpoint import TRAINER, Checkpoint, open_checkpoint
from moeconv.convert import Options, plan_hf, plan_sharded, write_hf, write_sharded
from moeconv.errors import SourceError
from moeconv.forms import Names
from moeconv.hub import local_folder
from moeconv.hub_preview import opened, preview
from moeconv.io.carried import Content
from moeconv.io.staging import check_free
from moeconv.layout.degrees import Degrees
from moeconv.plan import Plan

if TYPE_CHECKING:  # each function imports what it alone needs when it is called, so that a command starts at once
    from moeconv.megatron.convert import Format, Summary
    from moeconv.megatron.names import Experts, Spec
    from moeconv.upcycling.recipe import Recipe


def open(source: str | Path, *, revision: str | None = None, recipe: Recipe | None = None) -> Checkpoint:
    """Open a checkpoint of any kind; headers alone are read (of a hub repository, its files are downloaded or found in the cache).

    Args:
        source: a folder (Hugging Face, sharded, a save of adapters, Megatron-Core), or a hub repository's id.
        revision: a branch, tag or commit of the repository.
        recipe: give the mixture that this recipe makes of the dense checkpoint; it is made as it is read, and nothing is written.

    Returns:
        The checkpoint: `model`, `config`, `tensors` by name; `tensor(name)`, `rank(...)`, `load_into(module)`.

    Raises:
        MoeconvError: it is none, contradicts itself, or the recipe doesn't fit.

    >>> import moeconv
    >>> checkpoint = moeconv.open("mixtral")
    >>> checkpoint.family.name, checkpoint.kind, len(checkpoint.tensors)
    ('Mixtral', 'hf', 41)
    >>> checkpoint.tensor("model.norm.weight").numpy().shape
    (32,)
    >>> planned = moeconv.open("dense", recipe=moeconv.Recipe(experts=4, top_k=2))
    >>> planned.kind, planned.tensor("model.layers.0.block_sparse_moe.experts.3.w1.weight").shape
    ('planned', (24, 32))
    """
    from moeconv.formats import open_any

    found = open_any(local_folder(str(source), revision))
    if recipe is None:
        return found
    from moeconv.upcycling.make import plan

    return plan(found, recipe)


def import_hf(
    source: str | Path | Checkpoint,
    out: str | Path,
    degrees: Degrees | None = None,
    *,
    revision: str | None = None,
    carry: Sequence[str] = (),
    strip_prefix: str = "",
    dtype: Literal["bfloat16", "float16", "float32", "fp8"] | None = None,
    options: Options | None = None,
    dry_run: bool = False,
) -> Written:
    """Turn a Hugging Face checkpoint into a sharded one.

    Args:
        source: a folder or a hub repository's id; or an opened checkpoint, such as a planned mixture.
        out: the folder to make.
        degrees: the layout, such as `moeconv.Degrees(tp=4, ep=4)`; by default one rank.
        revision: a branch, tag or commit of the repository.
        carry: shell-style patterns of tensors that the family doesn't know and that go along unread.
        strip_prefix: what is taken off the front of every tensor's name.
        dtype: cast weights on the way: quantised ones to plain numbers, plain ones to fp8 blocks.
        options: threads, resuming, progress.
        dry_run: check and plan everything, and write nothing.

    Returns:
        What was written.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.

    >>> import moeconv
    >>> done = moeconv.import_hf("mixtral", "shards", moeconv.Degrees(tp=2, ep=2))
    >>> sorted(done.files)[:2]
    ['dense-tp0-pp0.safetensors', 'dense-tp1-pp0.safetensors']
    >>> str(done.open().degrees)
    'tp2 pp1 ep2 etp2'
    """
    layout, to = degrees or Degrees(), Path(out)
    check_free(to.absolute())

    def open_folder(folder: Path) -> Checkpoint:
        found = open_checkpoint(folder, carry, strip_prefix)
        if found.kind == "sharded":
            raise SourceError(f"{source}: is sharded already; change its layout with `moeconv reshard`")
        if dtype is None:
            return found
        from moeconv.quant.cast import cast

        return cast(found, dtype)

    if isinstance(source, Checkpoint):
        return _sharded(source, to, layout, options, dry_run)
    if dry_run:
        with preview(str(source), revision) as seen:
            return _sharded(open_folder(seen.folder), to, layout, options, dry_run)
    found = opened(str(source), revision, open_folder, lambda found: plan_sharded(found, layout))
    return _sharded(found, to, layout, options, dry_run)


def reshard(
    source: str | Path,
    out: str | Path,
    degrees: Degrees | None = None,
    *,
    options: Options | None = None,
    dry_run: bool = False,
) -> Written:
    """Turn a sharded checkpoint into one of another layout; optimizer state goes along.

    Args:
        source: the sharded checkpoint's folder.
        out: the folder to make.
        degrees: the new layout; by default one rank.
        options: threads, resuming, progress.
        dry_run: check and plan everything, and write nothing.

    Returns:
        What was written.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.

    >>> import moeconv
    >>> moeconv.reshard("ckpt", "ckpt-ep4", moeconv.Degrees(ep=4, etp=1)).nbytes
    66136
    """
    found = open_checkpoint(source, adapters=True)
    if found.kind != "sharded":
        raise SourceError(f"{source}: is a Hugging Face folder; shard it with `moeconv import-hf`")
    return _sharded(found, Path(out), degrees or Degrees(), options, dry_run)


def export_hf(
    source: str | Path | Checkpoint,
    out: str | Path,
    *,
    max_shard_size: int | None = None,
    names: Names | None = None,
    weights: Literal["trained", "ema"] = "trained",
    options: Options | None = None,
    dry_run: bool = False,
) -> Written:
    """Turn a sharded checkpoint into a Hugging Face folder: byte for byte what was imported, unless it was trained.

    Args:
        source: the sharded checkpoint's folder; or an opened checkpoint, such as a planned mixture.
        out: the folder to make.
        max_shard_size: bytes of tensors a file at most; None gives the imported files back.
        names: `hub` or `fused` cuts files anew, under the names of published checkpoints or as transformers 5 keeps experts.
        weights: `ema` takes the exponential mean that a run with --ema-decay keeps.
        options: threads, resuming, progress.
        dry_run: check and plan everything, and write nothing.

    Returns:
        What was written.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.

    >>> import moeconv, pathlib
    >>> done = moeconv.export_hf("ckpt", "exported")
    >>> names = [path.name for path in pathlib.Path("mixtral").iterdir() if path.is_file()]
    >>> all(pathlib.Path("exported", n).read_bytes() == pathlib.Path("mixtral", n).read_bytes() for n in names)
    True
    """
    found = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if weights == "ema":
        from moeconv.quant.mean import with_mean

        found = with_mean(found)
    to, run = Path(out), options or Options()
    if dry_run:
        check_free(to.absolute())
        plan, seconds = plan_hf(found, max_shard_size, names)[0], None
    else:
        begin = time.perf_counter()
        plan = write_hf(found, to, max_shard_size, run, names)
        seconds = time.perf_counter() - begin
    carried = {name: content for name, content in found.carried_files.items() if name != TRAINER}
    return _written(found, plan, to, seconds, carried)


def import_megatron(
    source: str | Path,
    out: str | Path,
    degrees: Degrees | None = None,
    *,
    iteration: int | None = None,
    hf_config: str | Path | None = None,
    ignore_args: bool = False,
    optimizer: bool = True,
    options: Options | None = None,
    dry_run: bool = False,
) -> Summary:
    """Turn a Megatron-Core checkpoint into a sharded one, after checking that ranks which should be alike are.

    Args:
        source: the folder that Megatron's --save named, or one iteration in it; either format (torch, torch_dist), any layout.
        out: the folder to make.
        degrees: the new layout; by default the source's own.
        iteration: by default the one that the tracker names.
        hf_config: the model's config.json or a folder with it; by default one beside the checkpoint, else made from its args.
        ignore_args: trust `hf_config` where the checkpoint's args say otherwise.
        optimizer: whether the optimizer's state comes along (torch_dist).
        options: threads, resuming, progress.
        dry_run: check and plan everything, and write nothing.

    Returns:
        What was written: `files`, `nbytes`, `dropped`, `degrees` of the source, `notes`.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.

    >>> import moeconv
    >>> done = moeconv.import_megatron("megatron", "from-megatron", moeconv.Degrees(ep=4, etp=1))
    >>> done.degrees, done.files
    ('tp2 pp1 ep2 etp2', 5)
    """
    from moeconv.megatron import convert as megatron

    config = None if hf_config is None else Path(hf_config)
    found = megatron.open_megatron(
        Path(source), iteration=iteration, hf_config=config, ignore_args=ignore_args, optimizer=optimizer
    )
    layout = degrees or found.degrees
    return megatron.import_megatron(found, Path(out), layout, options or Options(), dry_run=dry_run)


def export_megatron(
    source: str | Path,
    out: str | Path,
    degrees: Degrees | None = None,
    *,
    format: Format,
    spec: Spec = "te",
    experts: Experts | None = None,
    optimizer: bool = True,
    options: Options | None = None,
    dry_run: bool = False,
) -> Summary:
    """Turn a sharded checkpoint or a Hugging Face folder into a Megatron-Core checkpoint, ready for Megatron's --load.

    Args:
        source: the folder.
        out: the folder to make; it also gets config and tokenizer, which Megatron leaves alone.
        degrees: the layout; by default one rank.
        format: `torch_dist` loads under any layout, `torch` only under this one.
        spec: Megatron's --transformer-impl: `te`, or `local`.
        experts: `grouped` for --moe-grouped-gemm (the default of te), `sequential` without (the default of local).
        optimizer: whether the optimizer's state goes along (torch_dist).
        options: threads, resuming, progress.
        dry_run: check and plan everything, and write nothing.

    Returns:
        What was written, and in `notes` what Megatron must be told besides.

    Raises:
        MoeconvError: anything is wrong; then `out` does not exist.

    >>> import moeconv
    >>> done = moeconv.export_megatron("mixtral", "for-megatron", moeconv.Degrees(tp=2), format="torch_dist")
    >>> done.degrees
    'tp2 pp1 ep1 etp2'
    """
    from moeconv.megatron import convert as megatron

    return megatron.export_megatron(
        Path(source),
        Path(out),
        fmt=format,
        degrees=degrees or Degrees(),
        spec=spec,
        experts=experts or ("grouped" if spec == "te" else "sequential"),
        options=options or Options(),
        optimizer=optimizer,
        dry_run=dry_run,
    )


def _sharded(source: Checkpoint, out: Path, degrees: Degrees, options: Options | None, dry_run: bool) -> Written:
    if dry_run:
        check_free(out.absolute())
        return _written(source, plan_sharded(source, degrees), out, None, source.carried_files)
    begin = time.perf_counter()
    plan = write_sharded(source, out, degrees, options or Options())
    return _written(source, plan, out, time.perf_counter() - begin, source.carried_files)


def _written(
    source: Checkpoint, plan: Plan, out: Path, seconds: float | None, carried: Mapping[str, Content]
) -> Written:
    notes = getattr(source, "notes", ())
    return Written.of_plan(plan, out, seconds=seconds, carried=carried, dropped=source.dropped, notes=notes)
