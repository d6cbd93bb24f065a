"""Ranks of the real megatron-core on a CPU: they load checkpoints strictly, compute logits, and save their own.

Run in processes of its own (`run_cases`), since Megatron keeps its parallel state in globals.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.overrides import TorchFunctionMode

from tests.megatron.mcore_models import build
from tests.support.ranks import preload

WORLD = 4


def spawn_ranks(function: Callable[..., None], *args: Any) -> None:
    """Call a function with the rank and arguments in `WORLD` new processes, and wait for their end.

    Args:
        function: a top-level function.
        *args: what follows the rank.
    """
    preload()
    mp.start_processes(function, args=args, nprocs=WORLD, join=True, start_method="forkserver")


@dataclass
class Case:
    """A checkpoint for megatron-core to load, under a layout of four ranks; what it saves goes to `save`."""

    load: str
    fmt: str
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int | None = None
    spec: str = "local"
    experts: str = "sequential"
    folder: str = "release"
    save: str | None = None
    save_metadata: dict[str, Any] = field(default_factory=dict)
    fill: str | None = None
    """A checkpoint to fill the model from by `Checkpoint.load_into`; then only the arguments are taken from `load`."""

    @property
    def layout(self) -> tuple[int | None, ...]:
        """What the process groups depend on."""
        return self.tp, self.pp, self.vpp, self.ep, self.etp


def run_cases(cases: list[Case], tokens: torch.Tensor, work: Path) -> list[torch.Tensor]:
    """Run cases one after another in one world of four ranks.

    Args:
        cases: what to load and save.
        tokens: int64 [batch, length].
        work: a scratch folder.

    Returns:
        For each case the logits, float32 [batch, length, vocabulary].
    """
    torch.save(tokens, work / "tokens.pt")
    (work / "cases.json").write_text(json.dumps([asdict(c) for c in cases]))
    spawn_ranks(_rank, str(work))
    return [torch.load(work / f"logits{i}.pt", weights_only=True) for i in range(len(cases))]


def _rank(rank: int, work: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    _allow_cpu()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    numbered = [
        (number, Case(**case)) for number, case in enumerate(json.loads((Path(work) / "cases.json").read_text()))
    ]
    tokens = torch.load(Path(work) / "tokens.pt", weights_only=True)
    layouts = sorted({case.layout for _, case in numbered}, key=str)
    try:
        for layout in layouts:
            same = [(number, case) for number, case in numbered if case.layout == layout]
            with groups(rank, Path(work) / f"rendezvous{layouts.index(layout)}", same[0][1]), Cpu():
                for number, case in same:
                    logits = _case(case, tokens)
                    if rank == 0:
                        torch.save(logits, Path(work) / f"logits{number}.pt")
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        raise


@contextlib.contextmanager
def groups(rank: int, rendezvous: Path, case: Case) -> Iterator[None]:
    """Have Megatron's process groups for a case's layout, and end them: gloo keeps threads for each, and Megatron makes dozens."""
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    parallel_state.initialize_model_parallel(
        case.tp,
        case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
    )
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


class Cpu(TorchFunctionMode):
    """Give megatron-core the CPU where it asks for CUDA, and CUDA's name for the tensors' type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        out = func(*args, **(kwargs or {}))
        return out.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and isinstance(out, str) else out


def _allow_cpu() -> None:
    """Stand in for what megatron-core asks of CUDA: a device for the rotary table, dropout's seeds, TE's presence."""
    from megatron.core.safe_globals import register_safe_globals
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # v0.16.1 forgets to define it where Transformer Engine is absent
    multi_latent_attention.HAVE_TE = False  # and takes its own wrapper's module, which is there, for it

    torch.compiler.set_stance("force_eager")  # compiling takes seconds, and computes the same
    register_safe_globals()  # as Megatron's own initialisation does
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()


def _case(case: Case, tokens: torch.Tensor) -> torch.Tensor:
    args = _args_of(case)
    models = build(case, args)
    with torch.no_grad():
        for model in models:
            for name, held in (*model.named_parameters(), *model.named_buffers()):
                if held.requires_grad or name.endswith("expert_bias"):
                    held.fill_(float("nan"))  # whatever the load leaves out shows in the logits
        if case.fill is not None:
            _fill(case, models)
        else:
            (_load_torch if case.fmt == "torch" else _load_dist)(case, models)
        logits = _forward(case, models, tokens, args.vocab_size)
    if case.save is not None:
        (_save_torch if case.fmt == "torch" else _save_dist)(case, models, args)
    return logits


def _args_of(case: Case) -> argparse.Namespace:
    """Read the arguments of the checkpoint that a case loads, as Megatron does."""
    from megatron.core import dist_checkpointing

    root = Path(case.load)
    said = (root / "latest_checkpointed_iteration.txt").read_text()
    folder = root / (said if said == "release" else f"iter_{int(said):07d}")
    if (folder / ".metadata").exists():
        args = dist_checkpointing.load_common_state_dict(str(folder))["args"]
    else:
        args = torch.load(next(folder.rglob("model_optim_rng.pt")), weights_only=False)["args"]
    assert isinstance(args, argparse.Namespace)
    return args


def _rank_path(case: Case, root: str, folder: str) -> Path:
    """The path of this rank's file, as megatron/training/checkpointing.py (get_checkpoint_name) makes it."""
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if case.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if case.ep > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return Path(root) / folder / name / "model_optim_rng.pt"


def _load_torch(case: Case, models: list[Any]) -> None:
    saved = torch.load(_rank_path(case, case.load, case.folder), weights_only=True)
    assert saved["checkpoint_version"] == 3.0
    assert saved["args"].tensor_model_parallel_size == case.tp
    for number, model in enumerate(models):
        entries = saved["model"] if len(models) == 1 else saved[f"model{number}"]
        if case.spec == "te" or case.experts == "grouped":
            entries = _as_local(entries, case.tp)
        model.load_state_dict(entries, strict=True)


def _fill(case: Case, models: list[Any]) -> None:
    """Fill this rank's modules as somebody with a trainer of their own does."""
    from megatron.core import parallel_state

    import moeconv

    degrees = moeconv.Degrees(tp=case.tp, pp=case.pp, vpp=case.vpp or 1, ep=case.ep, etp=case.etp or case.tp)
    rank = {
        "tp": parallel_state.get_tensor_model_parallel_rank(),
        "pp": parallel_state.get_pipeline_model_parallel_rank(),
        "ep": parallel_state.get_expert_model_parallel_rank(),
        "etp": parallel_state.get_expert_tensor_parallel_rank(),
    }
    for chunk, model in enumerate(models):
        nbytes = moeconv.open(str(case.fill)).load_into(
            model, degrees=degrees, rank=rank | {"vpp": chunk}, names="megatron"
        )
        assert nbytes > 0


def _as_local(entries: dict[str, Any], tp: int) -> dict[str, Any]:
    """Rename a Transformer Engine model's state dict to the local layers', by what TE's modules are called.

    TELayerNormColumnParallelLinear keeps its norm as `layer_norm_weight`; TEGroupedLinear its matrices as `weight{i}`
    of one module; both, the attention core and the norms have an `_extra_state`. What leads to latent vectors it has whole on each rank.
    """
    from megatron.core import parallel_state

    out = {}
    for name, value in entries.items():
        name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        for n in ("q", "kv"):
            name = name.replace(
                f"self_attention.linear_{n}_up_proj.layer_norm_weight", f"self_attention.{n}_layernorm.weight"
            )
        name = re.sub(
            r"mlp\.experts\.linear_fc([12])\.(weight|bias)(\d+)$", r"mlp.experts.local_experts.\3.linear_fc\1.\2", name
        )
        if re.search(r"linear_(q|kv)_down_proj\.weight$", name):
            value = value.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()]
        if name.endswith("_extra_state"):
            assert value is None or (value.dtype == torch.uint8 and value.numel() == 0), name
            continue
        out[name] = value
    return out


def _sharded(models: list[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    keys = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    return {
        key: model.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})
        for key, model in zip(keys, models, strict=True)
    }


def _load_dist(case: Case, models: list[Any]) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    folder = str(Path(case.load) / case.folder)
    common = dist_checkpointing.load_common_state_dict(folder)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    strict = StrictHandling.RETURN_ALL
    loaded, left_over, missing = dist_checkpointing.load(_sharded(models, metadata), folder, strict=strict)
    assert not missing, missing
    # Keys must match both ways, but for the states of TE's norms, which local modules don't have.
    assert (case.spec == "te") == bool(left_over), left_over
    states = r".*((input|pre_mlp|final|[qk])_layernorm|core_attention)\._extra_state"
    assert all(re.fullmatch(states, key) for key in left_over), left_over
    for number, model in enumerate(models):
        model.load_state_dict(loaded["model" if len(models) == 1 else f"model{number}"], strict=True)


def _forward(case: Case, models: list[Any], tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    """Run the stages one after another; each hands its hidden states to all ranks of the pipeline."""
    from megatron.core import parallel_state

    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, length)
    mask = torch.ones(length, length).triu(1).bool()[None, None]
    group = parallel_state.get_pipeline_model_parallel_group()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    mine, out = parallel_state.get_pipeline_model_parallel_rank(), torch.empty(0)
    hidden = None
    for number, model in enumerate(models):
        for stage in range(stages):
            last = number == len(models) - 1 and stage == stages - 1
            if stage == mine:
                model.set_input_tensor(hidden)
                out = model(tokens, positions, mask)
            shape = (batch, length, _rows(case, vocab)) if last else (length, batch, models[0].config.hidden_size)
            hidden = (out if stage == mine else torch.empty(shape)).contiguous()
            dist.broadcast(hidden, dist.get_global_rank(group, stage), group=group)
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(hidden) for _ in range(tensor_group.size())]
    dist.all_gather(shards, hidden, group=tensor_group)
    return torch.cat(shards, dim=-1)[..., :vocab].float()


def _rows(case: Case, vocab: int) -> int:
    multiple = 128 * case.tp
    return (vocab + multiple - 1) // multiple * 128


def _args(case: Case, args: argparse.Namespace) -> argparse.Namespace:
    """Arguments as a run has them: the model's, its own layout, and an enum that only Megatron can unpickle."""
    from megatron.core.transformer.enums import AttnBackend

    layout = {
        "tensor_model_parallel_size": case.tp,
        "pipeline_model_parallel_size": case.pp,
        "virtual_pipeline_model_parallel_size": case.vpp,
        "expert_model_parallel_size": case.ep,
        "expert_tensor_parallel_size": case.etp or case.tp,
        "params_dtype": torch.float32,
        "moe_grouped_gemm": False,
    }
    return argparse.Namespace(**{**vars(args), **layout, "attention_backend": AttnBackend.auto})


def _save_torch(case: Case, models: list[Any], args: argparse.Namespace) -> None:
    state: dict[str, Any] = {"args": _args(case, args), "checkpoint_version": 3.0, "iteration": 7}
    for number, model in enumerate(models):
        state["model" if len(models) == 1 else f"model{number}"] = model.state_dict_for_save_checkpoint()
    path = _rank_path(case, str(case.save), "iter_0000007")
    path.parent.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() < WORLD:  # replicas over data parallel ranks write the same bytes
        torch.save(state, path.with_suffix(f".{dist.get_rank()}"))
        path.with_suffix(f".{dist.get_rank()}").rename(path)
    dist.barrier()
    (Path(str(case.save)) / "latest_checkpointed_iteration.txt").write_text("7")


def _save_dist(case: Case, models: list[Any], args: argparse.Namespace) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    folder = Path(str(case.save)) / "iter_0000007"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = {
        "args": _args(case, args),
        "checkpoint_version": 3.0,
        "iteration": 7,
        **_sharded(models, case.save_metadata),
    }
    metadata = {"singleton_local_shards": False, **case.save_metadata}
    # A writer is a process: one a rank is quicker, two are Megatron's default.
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=2 if case.save_metadata else 1)
    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, content_metadata=metadata)
    dist.barrier()
    (Path(str(case.save)) / "latest_checkpointed_iteration.txt").write_text("7")
