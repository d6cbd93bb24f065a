"""transformers as systems of `benchmarks.train_step --peers`: on one GPU, and with its expert parallelism on several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import at_depth
from benchmarks.step_work import Layout, MakeStep, Slice, Step, device_of_rank, join_ranks
from runtime.moe.routing import turns


@dataclass(frozen=True, kw_only=True, slots=True)
class Net:
    """A model, and what updates it."""

    net: Any
    forward: Callable[..., Any]
    """The model, or what it was compiled to."""
    optimizer: torch.optim.Optimizer

    def step(self, batches: Sequence[Tensor]) -> Tensor:
        """Train on micro-batches: tokens [B, S] each, which are their own labels.

        Returns:
            The mean of the micro-batches' losses on this rank, balancing loss included; a tensor, which waits for nothing.
        """
        num, total = len(batches), torch.zeros((), device=batches[0].device)
        sharded = hasattr(self.net, "set_requires_gradient_sync")
        for place, batch in enumerate(batches):
            if sharded:  # gradients go over the links behind the last micro-batch alone
                self.net.set_requires_gradient_sync(place == num - 1)
            loss = self.forward(input_ids=batch, labels=batch, use_cache=False).loss
            (loss / num).backward()
            total += loss.detach() / num
        clip(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def distribute(net: Any, layout: Layout) -> Any:
    """Spread a model over the ranks of a layout, as `from_pretrained(..., distributed_config=...)` does.

    Each data-parallel rank has its own batches, experts lie whole on the ranks of a group and rows are exchanged between them,
    everything else is sharded by FSDP2.

    Args:
        net: the model, whole on each rank and the same on all.
        layout: the ranks.

    Returns:
        The model.

    Raises:
        RuntimeError: transformers is older than this expert parallelism.
    """
    from transformers import __version__
    from transformers.distributed import DistributedConfig

    if "ep_size" not in DistributedConfig.__dataclass_fields__:
        raise RuntimeError(f"transformers {__version__} has no DistributedConfig(ep_size=...); 5.23 has")
    config = DistributedConfig(tp_size=layout.tp, fsdp_size=layout.data_ranks, ep_size=layout.ep)
    config, _, mesh = type(net).prepare_distribute_model(config)
    return type(net).maybe_distribute_model(net, config, mesh)


def mixtral(model: Slice) -> Any:
    """A Mixtral of transformers with a slice's sizes: random weights, the same on each rank, in torch's default type and device."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        num_hidden_layers=model.layers, hidden_size=model.hidden, intermediate_size=model.ffn,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_dim,
        num_local_experts=model.experts, num_experts_per_tok=model.topk, vocab_size=model.vocab,
        max_position_embeddings=model.positions, output_router_logits=True, router_aux_loss_coef=0.01,
    )  # fmt: skip
    config._attn_implementation, config._experts_implementation = "sdpa", "grouped_mm"
    return drawn(MixtralForCausalLM(config))


def of_hub(config: dict[str, Any]) -> Any:
    """A model of transformers with a config.json: random weights, in torch's default type and device.

    Its attention is torch's `scaled_dot_product_attention` where the family knows that, else torch's flex attention (gpt-oss,
    whose other kernels transformers fetches from the hub), or written out where that doesn't train (CPUs).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype", "architectures")}
    made = AutoConfig.for_model(config["model_type"], **given)
    kind = AutoModelForCausalLM._model_mapping[type(made)]
    flexible = "flex_attention" if torch.get_default_device().type == "cuda" else "eager"
    made._attn_implementation = "sdpa" if kind._supports_sdpa else flexible
    made._experts_implementation = "grouped_mm"
    if hasattr(made, "router_aux_loss_coef"):
        made.output_router_logits, made.router_aux_loss_coef = True, 0.01
    return drawn(kind(made))


def balance(net: Any) -> None:
    """Send tokens to all experts in turn, with the weights that the router gives these: of a Mixtral."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    def send(router: MixtralTopKRouter, _: Any, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        logits, scores, experts = found
        chosen = turns(experts.numel(), router.num_experts, experts.device).view_as(experts)
        weights = logits.float().softmax(-1).gather(-1, chosen)
        return logits, (weights / weights.sum(-1, keepdim=True)).to(scores.dtype), chosen

    for module in net.modules():
        if isinstance(module, MixtralTopKRouter):
            module.register_forward_hook(send)


def drawn(net: Any) -> Any:
    """Draw a model's weights, the same on each rank."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02)
    return net


def trained(net: Any, *, compiled: bool = False, lr: float = 1e-5) -> Net:
    """Give a model its optimizer: fused AdamW, whose state has the weights' type."""
    groups = [{"params": group} for group in by_mesh(net.parameters()).values()]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    return Net(net=net, forward=torch.compile(net) if compiled else net, optimizer=optimizer)


def transformers(model: Slice, layout: Layout, *, compiled: bool, spread: bool = False) -> MakeStep:
    """transformers in pure bf16: no masters, moments and gradients in bf16; fused AdamW, grouped_mm experts; `spread` over ranks."""
    if spread:
        join_ranks()
    device = device_of_rank()
    torch.set_default_dtype(torch.bfloat16)
    with device:
        net = mixtral(model) if model.hub is None else of_hub(at_depth(model.hub, model.layers))
    if layout.balanced:
        balance(net)
    torch.set_default_dtype(torch.float32)
    system = trained(distribute(net, layout) if spread else net, compiled=compiled)

    def make(num: int) -> Step:
        generator = torch.Generator(device).manual_seed(layout.data_rank)
        tokens = torch.randint(
            0, model.vocab, (num, layout.sequences, model.positions), device=device, generator=generator
        )
        return lambda: float(system.step(list(tokens)))

    return make


def by_mesh(tensors: Any) -> dict[Any, list[Any]]:
    """Sort tensors by the ranks that they lie over: no kernel for many tensors takes those of several meshes."""
    from torch.distributed.tensor import DTensor

    found = defaultdict(list)
    for tensor in tensors:
        found[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    return found


def clip(parameters: Any, max_norm: float) -> None:
    """Clip gradients by the norm of all, as transformers' trainer does where they lie over several meshes.

    Source:
        https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/trainer.py (_mixed_mesh_grad_norm)
    """
    from torch.distributed.tensor import DTensor
    from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

    groups = by_mesh(parameter for parameter in parameters if parameter.grad is not None)
    if list(groups) == [None]:
        clip_grad_norm_(groups[None], max_norm)
        return
    norms = [get_total_norm([parameter.grad for parameter in group]) for group in groups.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole))
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, total)
