"""An upcycling from one end to the other: planned, checked against its source, written."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.convert import Options, plan_hf, plan_sharded, write_hf, write_sharded
from moeconv.errors import RecipeError
from moeconv.extras import needed
from moeconv.hub import local_folder
from moeconv.io.carried import size_of
from moeconv.io.staging import check_free
from moeconv.layout.degrees import Degrees
from moeconv.placement import check_degrees
from moeconv.upcycling.check import check
from moeconv.upcycling.expand import plan_expand
from moeconv.upcycling.planned import Planned, plan_upcycle
from moeconv.upcycling.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What is written: shards of these degrees or, with `degrees` None, a Hugging Face folder of files of at most `max_shard_size` bytes."""

    degrees: Degrees | None = None
    max_shard_size: int | None = None


def plan(source: Checkpoint, recipe: Recipe) -> Planned:
    """Plan the mixture that a recipe asks for.

    Args:
        source: a Hugging Face folder: of a dense model, or of a mixture for the method expand.
        recipe: what to make.

    Returns:
        The mixture as a checkpoint.

    Raises:
        RecipeError: it can't be done as asked.
    """
    if recipe.method == "expand":
        return plan_expand(source, recipe)
    others = [open_checkpoint(local_folder(branch)) for branch in recipe.branches]
    planned = plan_upcycle(source, recipe, others)
    if recipe.router != "hidden":
        return planned
    copies = planned.model.sizes["experts"] // recipe.granularity
    if len(recipe.prompts) != copies:
        raise RecipeError(f"--prompts: {len(recipe.prompts)} entries for {copies} router rows; give one for each")
    with needed("router rows from texts", "take another --router"):
        from moeconv.upcycling.texts import rows_from_texts

    return plan_upcycle(source, recipe, others, rows_from_texts(source, recipe))


def upcycle(
    source: Checkpoint,
    out: Path,
    recipe: Recipe,
    target: Target,
    options: Options,
    *,
    logits: bool | None = None,
    text: Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Make a mixture of experts out of a checkpoint, after checking that it computes what the method promises.

    Args:
        source: a Hugging Face folder.
        out: the folder to make.
        recipe: what to make.
        target: in which form.
        options: how to run.
        logits: whether to compare logits with the source's; see `check`.
        text: a text to compare the loss on.
        dry_run: plan and check, and write nothing.

    Returns:
        JSON values: what was written and how long it took, what the check found, and the mixture's report.

    Raises:
        FunctionError: the mixture would compute something else.
        MoeconvError: as source, recipe, layout or output demands; `out` does not exist then.
    """
    check_free(out.absolute())
    planned = plan(source, recipe)
    if target.degrees is not None:
        check_degrees(planned.model, target.degrees)
    checked = check(source, planned, logits=logits, text=text)
    begin = time.perf_counter()
    if target.degrees is None:
        size = target.max_shard_size
        done = plan_hf(planned, size)[0] if dry_run else write_hf(planned, out, size, options)
    else:
        layout = target.degrees
        done = plan_sharded(planned, layout) if dry_run else write_sharded(planned, out, layout, options)
    return {
        "out": str(out),
        "dry_run": dry_run,
        "tensors": len(done.jobs),
        "files": {file.name: file.size for file in done.files},
        "carried": {name: size_of(content) for name, content in planned.carried_files.items()},
        "bytes": done.nbytes,
        "seconds": 0.0 if dry_run else round(time.perf_counter() - begin, 3),
        **asdict(checked),
        **planned.report,
    }
