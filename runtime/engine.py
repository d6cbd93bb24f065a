"""The engine: a model over all axes of parallelism, and one optimizer step at a time.

All gradients are sums: a micro-batch's loss is divided by the tokens of the whole global batch at once, so that adding
up over micro-batches and ranks gives the gradient of the mean, whatever the layout. No gradient is averaged anywhere.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeconv.families.adapted import AdaptedModel
from moeconv.families.base import Model
from moeconv.layout.degrees import chunk_layers
from moeconv.layout.rect import Rect
from runtime.checkpoint import rectangles as states
from runtime.data.batch import IGNORED_LABEL, Batch
from runtime.fp8.config import Fp8Config
from runtime.fp8.scaling import FP8_HISTORY, Scaling
from runtime.model.batches import to_device
from runtime.model.captured import CapturedModel
from runtime.model.combination import assert_combination
from runtime.model.context import ModelContext
from runtime.model.decoder import DecoderStage
from runtime.model.diagnosis import NonFiniteError, diagnose
from runtime.model.lora import LoraConfig
from runtime.model.pairs import PairedMicrobatches
from runtime.model.recompute import RecomputeConfig
from runtime.model.routing_report import RouterMetrics
from runtime.model.step_loss import StepLoss
from runtime.moe.config import MoEConfig
from runtime.moe.layer import moe_layers, reset_stats, set_row_budget
from runtime.moe.row_budget import RowBudget
from runtime.ops.reading import Reading
from runtime.optim.adamw import squared_norm
from runtime.optim.config import OptimConfig
from runtime.optim.ema import WithMean
from runtime.optim.groups import describe_groups, resolve_groups
from runtime.optim.loss_scale import LossScale
from runtime.optim.make import make_optimizer
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.runner import Microbatch, Runner, WholeModel
from runtime.parallel.stores import allocate_buffers, make_store
from runtime.quantised_base import QuantisedBase, ReadBlocks
from runtime.step_result import StepResult

__all__ = ["Engine", "NonFiniteError", "StepResult"]

OUTGROWN = 2
"""Of what `_sum_over_ranks` gives."""


class Engine:
    """This rank's part of a model and its optimizer."""

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype,
        parallel: ParallelConfig,
        moe: MoEConfig | None,
        optim: OptimConfig,
        recompute: RecomputeConfig,
        mesh: ParallelMesh,
        device: torch.device,
        *,
        trains: bool = True,
        lora: LoraConfig | None = None,
        fp8: Fp8Config | None = None,
        captures: bool = False,
    ) -> None:
        """Build the model and the optimizer; weights are zero until `load_state`. Collective.

        Args:
            model: the architecture.
            dtype: of weights and activations.
            parallel: the degrees.
            moe: the MoE layer's options; None for a dense model.
            optim: the optimizer's settings.
            recompute: what is computed again in the backward pass.
            mesh: the ranks.
            device: where to compute.
            trains: whether there will be steps; else there is room for weights only.
            lora: of the model's adapters; None for a model without.
            fp8: what is computed in FP8; None for nothing.
            captures: set room aside for rows that travel, and on a GPU replay micro-batches as CUDA graphs, where
                `runtime.settings.capture.obstacle` sees none.
        """
        assert_combination(parallel, moe)
        mesh.share_heads(model.sizes["kv_heads"])
        self.mesh, self.device, self._optim, self._moe = mesh, device, optim, moe
        in_fp8 = fp8 is not None and fp8.format is not None
        self._fp8 = Scaling(fp8, device, mesh.group("tp_dp_cp")) if fp8 is not None and in_fp8 else None
        groups = resolve_groups(optim, model, trains=trains)
        self._context = ModelContext(
            model=model, dtype=dtype, parallel=parallel, moe=moe, recompute=recompute, mesh=mesh, device=device,
            groups=groups, lora=lora or LoraConfig(), fp8=self._fp8,
        )  # fmt: skip
        chunks = chunk_layers(model.sizes["layers"], parallel.layout)[mesh.rank("pp") :: parallel.pp]
        stages = [DecoderStage(self._context, layers) for layers in chunks]
        self.module = nn.ModuleList(stages)
        self.quantised = QuantisedBase.of(self.module, self._context)
        self.store = make_store(self.module, stages, parallel, mesh, device, **optim.storage)
        allocate_buffers(self.module, device)
        self.trained = [shard for shard in self.store.shards if not shard.topology.frozen]
        self.optimizer = make_optimizer(optim, self.trained)
        self.loss_scale = LossScale.start(optim, fp16=self._context.dtype == torch.float16)
        self._metrics = RouterMetrics(self._context, self.module)
        self._budget = RowBudget(device) if captures and parallel.ep > 1 else None
        set_row_budget(self.module, self._budget)
        self._loss = StepLoss(self._context, self.module)
        self._runner = self._make_runner(stages, captures=captures)

    @property
    def context(self) -> ModelContext:
        """What the model's modules are built with."""
        return self._context

    @property
    def num_graphs(self) -> int:
        """CUDA graphs from which micro-batches are replayed."""
        return self._runner.num_graphs if isinstance(self._runner, CapturedModel) else 0

    def set_lr(self, lr: float, decoupled_lr: float | None = None) -> None:
        """Set the learning rate of the next steps, and that of embedding and head where it is another."""
        self.optimizer.set_lr(lr, decoupled_lr)

    def train_step(self, microbatches: Sequence[Batch]) -> StepResult:
        """Do one optimizer step. Collective.

        Args:
            microbatches: this data-parallel rank's micro-batches of the global batch, equally many on each rank and all
                of one shape.

        Returns:
            Losses, norm and expert load; the host waits for the device once, to read them.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite, and steps are not to be skipped; weights and
                optimizer are as before the step.
        """
        batches, sums = self._step(microbatches)
        repeated = bool(sums[OUTGROWN] > 0)
        if repeated and self._budget is not None:
            self._budget.read_again()
            batches, sums = self._step(microbatches)
        if self._budget is not None and self._budget.room is None:
            self._budget.agree()
        result = self._report(sums, len(batches) * self.mesh.size("dp"), repeated=repeated)
        self._conclude(result, batches)
        return result

    def _step(self, microbatches: Sequence[Batch]) -> tuple[list[Microbatch], Tensor]:
        """Do the passes and the update.

        Returns:
            What was computed, on the device; and what `_sum_over_ranks` gives, on the host.
        """
        batches, num_tokens = self._accumulate(microbatches)
        sums = self._sum_over_ranks(num_tokens)
        read = Reading(sums)
        self._update(sums)
        # The optimizer is still at work: the host goes on with the next step meanwhile.
        return batches, read.wait()

    def accumulate(self, microbatches: Sequence[Batch]) -> None:
        """Sum up the gradients of a step, without an update: what a step takes besides. Collective.

        Args:
            microbatches: as of `train_step`.
        """
        self._accumulate(microbatches)

    def _accumulate(self, microbatches: Sequence[Batch]) -> tuple[list[Microbatch], Tensor]:
        """Do the passes of a step.

        Returns:
            What was computed, on the device; and the tokens of the global batch, 0-dim fp64.
        """
        self.module.train()
        batches = [to_device(batch, self.device) for batch in microbatches]
        num_tokens = self._count_tokens(batches).clamp(min=1)
        self._loss.begin(self.loss_scale.scale, num_tokens, len(batches) * self.mesh.size("dp"))
        self._reset(trains=True)
        self.store.begin(self._runner.backwards(len(batches)))
        self._runner.run(batches, backward=True)
        self.store.finish()
        return batches, num_tokens

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Measure the loss. Collective.

        Args:
            batches: this data-parallel rank's micro-batches, equally many on each rank and all of one shape.

        Returns:
            Mean cross entropy over all labels of all ranks, nats a token, the same on every rank; 0 where there are none.
        """
        self.module.eval()
        mine = [to_device(batch, self.device) for batch in batches]
        # An interleaved schedule takes its micro-batches in rounds of pp: fill up with ones that don't count.
        while len(mine) % self.mesh.size("pp"):
            mine.append(replace(mine[0], labels=torch.full_like(mine[0].labels, IGNORED_LABEL)))
        num_tokens = self._count_tokens(mine)
        self._reset(trains=False)
        self._runner.run(mine, backward=False)
        loss = self._loss.sum.clone()
        if self.mesh.world_size > 1:
            dist.all_reduce(loss)
        return float(loss) / max(int(num_tokens), 1)

    @contextmanager
    def mean_of_weights(self) -> Iterator[None]:
        """Compute with the mean of the weights for a while. Collective."""
        assert isinstance(self.optimizer, WithMean), "--eval-ema needs --ema-decay"
        self._settle()
        with self.optimizer.exchanged():
            self.store.weights_from_masters()
            yield
        self.store.weights_from_masters()

    def state(self, with_optimizer: bool) -> list[states.StateTensor]:
        """Give the rectangles that this rank writes; of each global element, one rank has it.

        Args:
            with_optimizer: master weights and moments, too.

        Returns:
            Views of live memory.
        """
        self._settle()
        out = list(states.weights(self.store.shards))
        if self.mesh.rank("tp") == 0 and self.mesh.rank("dp_cp") == 0:
            out += [states.whole(name, tensor) for name, tensor in self._buffers()]
        model = self._context.model
        if isinstance(model, AdaptedModel):  # the rest is as it was
            out = [item for item in out if item.name in model.own]
        if with_optimizer:
            out += states.optimizer_state(self.trained, self.optimizer)
        return out

    def gradients(self) -> list[states.StateTensor]:
        """Give the clipped gradients of the last step, each global element on one rank, under the weights' names."""
        divisor, items = self.optimizer.divisor, states.gradients(self.trained)
        return [item if divisor is None else replace(item, live=item.live / divisor) for item in items]

    def load_state(
        self, read: states.Read, stored: Container[str] | None = None, blocks: ReadBlocks | None = None
    ) -> None:
        """Fill the model, and the optimizer.

        Args:
            read: gives a rectangle of a tensor by its name on disk; only what this rank holds is asked for.
            stored: the names on disk, for master weights and the optimizer's states, too; None leaves these as they are.
            blocks: gives a rectangle of a quantised base as it is held, where it is stored so.

        Raises:
            MoeconvError: a tensor is missing, or can't be read.
        """
        self._settle()
        states.load_weights(self.store.shards, read)
        if self.quantised is not None:
            self.quantised.load(read, blocks)
        for name, tensor in self._buffers():
            tensor.copy_(states.to_tensor(read(name, Rect.whole(tuple(tensor.shape)))))
        if stored is not None:
            states.load_optimizer(self.trained, self.optimizer, read, stored)
            self.store.weights_from_masters()
        states.start_derived(self.trained, self.optimizer, read, stored or ())

    def scalars(self) -> dict[str, Any]:
        """Give what a checkpoint must keep besides tensors, as JSON; the same on every rank. Collective."""
        out = self.optimizer.scalars()
        if groups := describe_groups(self._optim):
            out["groups"] = groups
        if self._context.dtype == torch.float16:
            out |= {"loss_scale": self.loss_scale.scale, "good_steps": self.loss_scale.good_steps}
        if self._moe is not None and self._moe.enable_expert_bias and not self._moe.router.bias:
            out["expert_bias"] = self._metrics.expert_bias().tolist()
        if self._fp8 is not None and (history := self._fp8.history(self.mesh.group("pp"))):
            out[FP8_HISTORY] = history
        return out

    def load_scalars(self, scalars: dict[str, Any]) -> list[str]:
        """Take back what `scalars` gave; what is missing stays as it is.

        Returns:
            Lines about what begins anew.
        """
        self.optimizer.load_scalars(scalars)
        if self._context.dtype == torch.float16 and "loss_scale" in scalars:
            self.loss_scale = LossScale(float(scalars["loss_scale"]), int(scalars.get("good_steps", 0)))
        if "expert_bias" in scalars:
            self._metrics.set_expert_bias(torch.tensor(scalars["expert_bias"]))
        return [] if self._fp8 is None else self._fp8.load_history(scalars.get(FP8_HISTORY, {}))

    def _settle(self) -> None:
        """Wait for what the last step has left under way: states on the host, and updated weights."""
        self.optimizer.settle()
        self.store.settle()

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers of this stage that checkpoints hold as tensors, by their names on the hub."""
        for buffer in self._context.parameters.buffers:
            yield buffer.name, getattr(buffer.module, buffer.attribute).view(buffer.shape)

    def _make_runner(self, stages: Sequence[DecoderStage], *, captures: bool) -> Runner:
        parallel = self._context.parallel
        if parallel.pp == 1:
            whole = (PairedMicrobatches if parallel.overlap_exchange else WholeModel)(stages[0], self._loss)
            captures &= self.device.type == "cuda"
            return CapturedModel(whole, self.store, self.device, self._budget, self._fp8) if captures else whole
        from runtime.parallel.pipeline import Pipeline

        taken = (self._activation_shape, self._context.dtype, self._loss, self.store.collect)
        return Pipeline(stages, self.mesh, self.device, parallel.pp_schedule, *taken)

    def _count_tokens(self, batches: Sequence[Microbatch]) -> Tensor:
        """Labels of the global batch that count; 0-dim fp64."""
        count = torch.stack([(x.labels != IGNORED_LABEL).sum() for x in batches]).sum().double()
        if self.mesh.size("dp") > 1:
            dist.all_reduce(count, group=self.mesh.group("dp"))
        return count

    def _reset(self, *, trains: bool) -> None:
        self._loss.sum.zero_()
        if self._fp8 is not None:
            self._fp8.begin(trains=trains)
        if self._budget is not None and trains:
            self._budget.begin()
        reset_stats(moe_layers(self.module))

    def _activation_shape(self, batch: int, positions: int) -> tuple[int, ...]:
        shares = self.mesh.size("cp") * (self.mesh.size("tp") if self._context.sp else 1)
        return positions // shares, batch, self._context.model.sizes["hidden"]

    def _sum_over_ranks(self, num_tokens: Tensor) -> Tensor:
        """Sum everything that is reported over all ranks, stages without MoE layers included.

        Returns:
            fp64 on the device: squared gradient norm, loss, ranks whose rows had too little room, routing statistics, tokens of
            the global batch.
        """
        numbers = torch.stack([squared_norm(self.trained, self.device), self._loss.sum])
        outgrown = numbers.new_zeros(1) if self._budget is None else self._budget.outgrown()
        packed = torch.cat([numbers, outgrown, self._metrics.pack()])
        if self.mesh.world_size > 1:
            dist.all_reduce(packed)
        return torch.cat([packed, num_tokens.view(1)])

    def _update(self, sums: Tensor) -> None:
        """Update the weights unless a number is not finite, or rows were left out; decided on the device, so that the host needn't wait."""
        scale, limit = self.loss_scale.scale, self._optim.clip_grad
        norm = sums[0].sqrt() / scale
        # As torch.nn.utils.clip_grad_norm_ has it, 1e-6 keeps the division safe.
        coefficient = (limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0 else torch.ones_like(norm)
        bad = ~torch.isfinite(sums[:2]).all() | (sums[OUTGROWN] > 0)
        self.store.settle()
        self.optimizer.step(scale / coefficient, bad)
        self.store.share_weights()

    def _report(self, sums: Tensor, num_microbatches: int, *, repeated: bool) -> StepResult:
        return StepResult(
            lm_loss=float(sums[1] / sums[-1]),
            grad_norm=float(sums[0].sqrt()) / self.loss_scale.scale,
            skipped=not bool(torch.isfinite(sums[:2]).all()),
            repeated=repeated,
            routing=self._metrics.unpack(sums[OUTGROWN + 1 : -1], num_microbatches),
        )

    def _conclude(self, result: StepResult, batches: Sequence[Microbatch]) -> None:
        """Account for the step; every rank sees the same numbers and decides alike."""
        if not result.skipped:
            self.optimizer.num_steps += 1
            self.loss_scale.success(self._optim)
            for layer in moe_layers(self.module):
                layer.finish_step()
            return
        overflow = self._context.dtype == torch.float16 and self.loss_scale.overflow(self._optim)
        if not (overflow or self._optim.on_nonfinite == "skip"):
            self._settle()
            raise diagnose(self.module, self.store, self.mesh, lambda: self._again(batches), result.lm_loss)

    @torch.no_grad()
    def _again(self, batches: Sequence[Microbatch]) -> None:
        self._runner.run(batches, backward=False)
