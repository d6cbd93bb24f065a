"""What is planned: a model, the ranks, and those settings of the trainer that memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from moeconv.families.adapted import AdaptedModel
from moeconv.families.base import Model
from runtime.estimate.parameters import RankParameters
from runtime.fp8.config import Fp8Config
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.moe.row_margin import MARGIN
from runtime.optim.config import OptimConfig
from runtime.optim.groups import resolve_groups
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.tensor_settings import DEFAULT, TensorSettings
from runtime.settings.capture import replays
from runtime.settings.run import RunConfig
from runtime.settings.steps import CudaGraphs

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A layout of a model on so many ranks, with the sizes of its step."""

    model: Model
    world_size: int
    parallel: ParallelConfig
    moe: MoEConfig | None
    optim: OptimConfig
    recompute: RecomputeConfig
    fp8: Fp8Config = field(default_factory=Fp8Config)
    dtype: str
    """Of weights and activations."""
    seq_length: int
    micro_batch_size: int
    """Sequences."""
    num_microbatches: int
    """Of each data-parallel rank in a step."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    graphs: CudaGraphs = "auto"
    """Whether micro-batches are to be replayed as CUDA graphs: `--cuda-graph-impl`."""

    @classmethod
    def of_run(cls, run: RunConfig, world_size: int) -> Setup:
        """Take what matters from the settings of a run, which fit the world size (`check_run`)."""
        parallel = run.parallel
        dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
        return cls(
            model=run.model,
            world_size=world_size,
            parallel=parallel,
            moe=run.moe,
            optim=run.optim,
            recompute=run.recompute,
            fp8=run.fp8,
            dtype=run.dtype,
            seq_length=run.train.seq_length,
            micro_batch_size=run.train.micro_batch_size,
            num_microbatches=run.train.batch_sizes(dp).full // (run.train.micro_batch_size * dp),
            lora=run.lora,
            graphs=run.train.cuda_graph_impl,
        )

    def sharing(self, parameters: RankParameters) -> Setup:
        """Give the setup with parameters that have been worked out for the same degrees of what holds weights."""
        out = replace(self)
        out.__dict__["parameters"] = parameters
        return out

    @cached_property
    def captured(self) -> bool:
        """Whether micro-batches are replayed as CUDA graphs: then the host is never the limit."""
        return replays(self, self.world_size, self.graphs)

    @property
    def row_margin(self) -> float:
        """Rows that ranks of experts set aside, of those that they need."""
        return MARGIN if self.captured and self.parallel.ep > 1 else 1.0

    @property
    def dp(self) -> int:
        """Data-parallel degree."""
        return self.world_size // (self.parallel.tp * self.parallel.pp * self.parallel.cp)

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.world_size // (self.parallel.pp * self.parallel.ep * self.parallel.etp)

    def replicas(self, *, expert: bool) -> int:
        """Ranks that hold the same parameter and see different data."""
        return self.edp if expert else self.dp * self.parallel.cp

    @property
    def sp(self) -> bool:
        """Whether activations between tensor-parallel regions are split over tp."""
        return self.parallel.sp and self.parallel.tp > 1

    @property
    def wide(self) -> int:
        """Bytes of an element of masters and of whatever has no type of its own."""
        return 8 if self.dtype == "float64" else 4

    @property
    def gradient(self) -> int:
        """Bytes of an element of the gradients' sums and reductions."""
        return 2 if self.optim.main_grads_dtype == "bf16" else self.wide

    @property
    def reduced(self) -> int:
        """Bytes of an element of the gradients that a rank updates with: what full sharding has reduced is fp32."""
        return self.wide if self.parallel.fully_shard else self.gradient

    @property
    def master(self) -> int:
        """Bytes of an element's master, where it is kept apart from the weight; of its remainder, where that is kept alone."""
        if self.optim.master_weights == "remainder":
            return 2
        return self.wide if ITEMSIZE[self.dtype] != self.wide else 0

    @property
    def moment(self) -> int:
        """Bytes of an element of a moment."""
        return 2 if self.optim.moments_dtype == "bfloat16" else self.wide

    def states(self, settings: TensorSettings | None = DEFAULT) -> int:
        """Give the bytes that the optimizer keeps of an element beside its master, the mean of the weights included.

        Args:
            settings: how its tensor is trained; None where a parameter's tensors are trained differently.
        """
        muon = settings is not None and settings.matrix
        return (self.wide if muon else 2 * self.moment) + (self.wide if self.optim.ema_decay is not None else 0)

    @property
    def uses_host(self) -> bool:
        """Whether anything waits in the host's memory."""
        return bool(self.optim.on_host or self.recompute.offload)

    def owned(self, rank: int) -> dict[bool, float]:
        """Give the elements that each rank of a stage updates, of experts (True) and of everything else.

        Args:
            rank: the pipeline rank.
        """
        split = self.parallel.use_distributed_optimizer or self.parallel.fully_shard
        counts = self.parameters.sums(rank).by_expert
        return {expert: n / (self.replicas(expert=expert) if split else 1) for expert, n in counts.items()}

    def host_bytes(self, *, expert: bool) -> float:
        """Give the bytes of the host's memory that an element takes whose optimizer state is there.

        Args:
            expert: whether it is an expert's.
        """
        sharded = self.parallel.fully_shard and self.replicas(expert=expert) > 1  # then the masters are the weights
        return self.states() + (0 if sharded else self.master)

    @property
    def global_batch_size(self) -> int:
        """Sequences of a step."""
        return self.micro_batch_size * self.num_microbatches * self.dp

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch_size * self.seq_length

    @cached_property
    def parameters(self) -> RankParameters:
        """The parameters of each stage."""
        return RankParameters(self.model, self.parallel.layout, self.parallel.sp, self.groups)

    @cached_property
    def groups(self) -> dict[str, TensorSettings] | None:
        """How each tensor is trained; None where no flag says anything of single tensors."""
        optim = self.optim
        said = optim.freeze or optim.no_weight_decay or optim.lr_scale or optim.decoupled_lr is not None
        said = said or optim.optimizer != "adam" or isinstance(self.model, AdaptedModel)
        return resolve_groups(optim, self.model) if said else None
