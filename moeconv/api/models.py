"""New models out of others: the commands `upcycle`, `merge` and `export-adapter`."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from moeconv.adapters.export import Form, plan_peft, write_peft
from moeconv.adapters.merge import merge as merged_model
from moeconv.adapters.merge import plan_merge, write_merge
from moeconv.adapters.peft_config import WEIGHTS_FILE
from moeconv.adapters.source import open_adapter
from moeconv.api.written import Written
from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.convert import Options
from moeconv.errors import RecipeError, SourceError
from moeconv.hub import local_folder
from moeconv.hub_preview import opened
from moeconv.io.manifest import MANIFEST
from moeconv.io.staging import check_free
from moeconv.layout.degrees import Degrees
from moeconv.upcycling.make import Target, plan
from moeconv.upcycling.make import upcycle as make
from moeconv.upcycling.recipe import Recipe


def upcycle(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    degrees: Degrees | None = None,
    *,
    hf: bool = False,
    max_shard_size: int | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    check: bool | None = None,
    text: str | Path | None = None,
    options: Options | None = None,
    dry_run: bool = False,
) -> Written:
    """Turn a dense checkpoint into a mixture of experts, after checking that it computes what the method promises.

    Args:
        source: a Hugging Face folder, or a hub repository's id.
        out: the folder to make.
        recipe: method, experts, top-k and so on; by default 8 copies.
        degrees: the layout of the shards; by default one rank.
        hf: write a Hugging Face folder instead of shards.
        max_shard_size: with `hf`, bytes of tensors a file at most; by default 5 GB.
        revision: a branch, tag or commit of the repository.
        dtype: the safetensors dtype that the source must have; None for any.
        check: whether to compare logits with the source's; None: where a layer in fp32 fits into memory.
        text: a file with text on which to compare the loss, too.
        options: threads, resuming, progress.
        dry_run: plan and check everything, and write nothing.

    Returns:
        What was written; `details` holds what the check found, and the mixture's report.

    Raises:
        FunctionError: the mixture would compute something else than the method promises.
        MoeconvError: anything else is wrong; `out` does not exist then, either.

    >>> import moeconv
    >>> recipe = moeconv.Recipe(method="virtual-group", experts=8, top_k=4, granularity=2)
    >>> done = moeconv.upcycle("dense", "mixture", recipe, moeconv.Degrees(ep=2))
    >>> done.details["exact"], done.details["check"], done.details["logits_error"] < 1e-5
    (True, 'done', True)
    """
    asked, layout = recipe or Recipe(), degrees or Degrees()
    _check_out(Path(out), layout, hf=hf)
    found = _dense(source, revision, asked, dtype)
    value = make(
        found,
        Path(out),
        asked,
        Target(degrees=None if hf else layout, max_shard_size=max_shard_size),
        options or Options(),
        logits=check,
        text=None if text is None else Path(text),
        dry_run=dry_run,
    )
    kept = {name: value[name] for name in ("tensors", "files", "carried", "seconds", "notes")}
    return Written(out=Path(out), dry_run=dry_run, nbytes=value["bytes"], details=value, **kept)


def _check_out(out: Path, layout: Degrees, *, hf: bool) -> None:
    if hf and layout != Degrees():
        raise RecipeError(f"--hf writes no shards; leave out --hf, or the degrees ({layout})")
    check_free(out.absolute())


def _dense(source: str | Path, revision: str | None, recipe: Recipe, dtype: str | None) -> Checkpoint:
    """Open what is to be upcycled."""
    # The plan of router rows from texts reads weights: that one is made when they are there.
    found = opened(str(source), revision, open_checkpoint, lambda f: recipe.router == "hidden" or plan(f, recipe))
    if dtype is not None and {info.dtype for info in found.tensors.values()} != {dtype}:
        raise RecipeError(f"{source}: dtype {dtype} is asked for, which its weights don't have; leave dtype out")
    return found


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    hf: bool = False,
    check: bool | None = None,
    options: Options | None = None,
    dry_run: bool = False,
) -> Written:
    """Add trained adapters to a checkpoint's weights: sums in fp32, rounded once, and proved before `out` gets its name.

    Args:
        base: the model: a sharded checkpoint, a Hugging Face folder, or a hub repository's id.
        adapter: a PEFT folder, or a run that trained adapters.
        out: the folder to make.
        hf: write a sharded base as a Hugging Face folder.
        check: whether to compare logits with those of base and adapter; None: where a layer in fp32 fits into memory.
        options: threads, resuming, progress.
        dry_run: plan everything, and write nothing.

    Returns:
        What was written; `details` holds the proof.

    Raises:
        ProofError: what was written is not the sum.
        MoeconvError: anything else is wrong, or something of the adapter would be left out; `out` does not exist then, either.

    >>> import moeconv
    >>> done = moeconv.merge("mixtral", "adapter", "merged")
    >>> done.details["added_to"], done.details["proof"]["logits_error"] < 1e-3
    (8, True)
    """
    check_free(Path(out).absolute())
    found = open_checkpoint(local_folder(str(base)))
    if hf and found.kind != "sharded":
        raise SourceError(f"{base}: is a Hugging Face folder, and so will be {out}; leave --hf out")
    merged = merged_model(found, open_adapter(local_folder(str(adapter)), found.model))
    begin, proof = time.perf_counter(), None
    if dry_run:
        done = plan_merge(merged, hf=hf)[0]
    else:
        done, proof = write_merge(merged, Path(out), options or Options(), hf=hf, logits=check)
    what = merged.adapter_of
    record = what.save.adapter if what.save is not None else None
    details = {
        "base": str(merged.root),
        "trained_over": record.quantize_base if record is not None else None,
        "adapter": str(what.root),
        "adapter_kind": what.title,
        "added_to": len(what.deltas),
        "replaced": len(what.whole),
        "notes": list(merged.notes),
        "proof": None if proof is None else asdict(proof),
    }
    seconds = None if dry_run else time.perf_counter() - begin
    carried = merged.carried_files
    return Written.of_plan(done, Path(out), seconds=seconds, carried=carried, dropped=merged.stale, details=details)


def export_adapter(
    source: str | Path,
    out: str | Path,
    *,
    form: Form | None = None,
    base_name: str | None = None,
    options: Options | None = None,
    dry_run: bool = False,
) -> Written:
    """Turn the adapters that a run has trained into a PEFT folder.

    Args:
        source: the run's save.
        out: the folder to make.
        form: routed experts' adapters `stacked`, as PEFT has them with transformers 5, or each of `experts` by its name; by
            default stacked where the family has stacks.
        base_name: what the config calls the model; by default the path that was trained.
        options: threads, progress.
        dry_run: plan everything, and write nothing.

    Returns:
        What was written; `details` holds PEFT's config.

    Raises:
        MoeconvError: PEFT has no form for something that was trained, or anything else is wrong; then `out` does not exist.

    >>> import moeconv
    >>> done = moeconv.export_adapter("run", "for-peft", base_name="mistralai/Mixtral-8x7B-v0.1")
    >>> done.details["config"]["peft_type"], done.details["config"]["r"]
    ('LORA', 2)
    """
    check_free(Path(out).absolute())
    save = Path(source)
    found = save / "latest" if (save / "latest" / MANIFEST).is_file() else save
    folder = plan_peft(open_checkpoint(found.resolve(), adapters=True), form, base_name)
    begin = time.perf_counter()
    if not dry_run:
        write_peft(folder, Path(out), options or Options())
    return Written(
        out=Path(out),
        dry_run=dry_run,
        tensors=len(folder.matrices),
        files={WEIGHTS_FILE: folder.nbytes},
        nbytes=folder.nbytes,
        seconds=0.0 if dry_run else round(time.perf_counter() - begin, 3),
        details={"config": folder.config},
    )
