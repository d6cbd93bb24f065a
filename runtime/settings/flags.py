"""The trainer's flags, under the names that Megatron-Core gave them where it has them.

Source:
    https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/training/arguments.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import ConfigError
from runtime.moe import config as moe
from runtime.optim.schedule import DECAY_STYLES, WSD_STYLES

# Flags that chose between code paths of Megatron's that don't exist here, and why they change nothing.
NO_EFFECT = {
    "use-mcore-models": "there is one model implementation",
    "no-masked-softmax-fusion": "attention is scaled_dot_product_attention",
    "no-position-embedding": "positions are rotary, there is no table of them",
    "use-flash-attn": "attention is scaled_dot_product_attention",
    "attention-softmax-in-fp32": "attention is scaled_dot_product_attention",
    "no-gradient-accumulation-fusion": "gradients are accumulated in fp32",
    "accumulate-allreduce-grads-in-fp32": "gradients are accumulated and reduced in fp32",
    "no-bias-swiglu-fusion": "there are no biases to fuse",
    "no-rope-fusion": "there is one implementation of rotary embeddings",
    "moe-grouped-gemm": "experts always run as grouped GEMMs; --moe-grouped-gemm-backend chooses the kernel",
    "async-save": "saves are always asynchronous",
    "exit-signal-handler": "SIGTERM always saves and leaves",
    "distributed-backend": "NCCL on GPUs, gloo on CPUs",
    "num-workers": "token files are mapped into memory",
}
_NO_EFFECT_WITH_VALUE = {"distributed-backend", "num-workers"}


def _paths(group: argparse._ArgumentGroup, *names: str, text: str) -> None:
    group.add_argument(*names, type=Path, nargs="+", default=[], metavar="PATH", help=text)


def _switch(group: argparse._ArgumentGroup, *names: str, text: str) -> None:
    group.add_argument(*names, action="store_true", help=text)


def _architecture(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("architecture (comes from the checkpoint; what is given here must agree with it)")
    sizes = ("num-layers", "hidden-size", "ffn-hidden-size", "moe-ffn-hidden-size", "num-attention-heads")
    for name in (*sizes, "num-query-groups", "kv-channels", "vocab-size", "max-position-embeddings", "num-experts"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--moe-router-topk", type=int, help="experts that each token is routed to")
    group.add_argument("--rotary-base", type=float)
    group.add_argument("--norm-epsilon", type=float)
    group.add_argument("--init-method-std", type=float, help="no effect: weights come from the checkpoint")
    group.add_argument("--normalization", choices=["RMSNorm"])
    group.add_argument("--position-embedding-type", choices=["rope"])
    for name in ("swiglu", "disable-bias-linear", "group-query-attention", "untie-embeddings-and-output-weights"):
        _switch(group, f"--{name}", text="checked against the checkpoint")
    for name in ("attention-dropout", "hidden-dropout"):
        group.add_argument(f"--{name}", type=float, default=0.0, help="only 0: the runtime trains without dropout")


def _parallelism(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parallelism (data parallel is what the world size leaves)")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1)
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    group.add_argument("--num-virtual-stages-per-pipeline-rank", type=int, default=1, help="model chunks a rank")
    group.add_argument("--pp-layers", type=_integers, metavar="N,N,...", help="layers of each stage; default: even")
    group.add_argument("--pipeline-schedule", choices=["gpipe", "1f1b", "interleaved", "zero-bubble"])
    group.add_argument("--context-parallel-size", type=int, default=1)
    group.add_argument("--expert-model-parallel-size", type=int, default=1)
    group.add_argument("--expert-tensor-parallel-size", type=int, default=0, help="default: the tensor-parallel size")
    _switch(group, "--sequence-parallel", text="split activations over the tensor-parallel ranks")
    _switch(group, "--use-distributed-optimizer", text="shard gradients and optimizer state over data parallel")
    _switch(group, "--fully-shard", "--use-torch-fsdp2", text="shard parameters over data parallel, too")
    group.add_argument(
        "--distributed-timeout-minutes", type=float, default=10, help="a run that stands still this long is ended"
    )


def _moe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mixture of experts")
    add = group.add_argument
    add("--moe-router-load-balancing-type", nargs="+", default=["aux_loss"], choices=moe.LOAD_BALANCING_TYPES)
    add("--moe-aux-loss-coeff", type=float, nargs="+", default=[0.0], help="1e-2 is a good start")
    add("--moe-aux-loss-mode", default="megatron", choices=moe.AUX_LOSS_MODES)
    add("--moe-z-loss-coeff", type=float, default=0.0, help="1e-3 is a good start")
    add("--moe-input-jitter-eps", type=float, default=0.0)
    add("--moe-router-score-function", default="softmax", choices=moe.SCORE_FUNCTIONS)
    _switch(group, "--moe-router-pre-softmax", text="softmax before the top-k")
    add("--moe-router-dtype", default="fp32", choices=moe.ROUTER_DTYPES)
    add("--moe-router-num-groups", type=int)
    add("--moe-router-group-topk", type=int)
    add("--moe-router-topk-scaling-factor", type=float)
    _switch(group, "--moe-router-enable-expert-bias", text="balance by a bias on the scores instead of a loss")
    add("--moe-router-bias-update-rate", type=float, default=1e-3)
    _switch(group, "--moe-token-dropping", text="drop tokens above an expert's capacity")
    add("--moe-expert-capacity-factor", type=float, help="default with --moe-token-dropping: 1.0")
    _switch(group, "--moe-pad-expert-input-to-capacity", text="fill every expert up to its capacity")
    add("--moe-token-drop-policy", default="probs", choices=moe.DROP_POLICIES)
    add("--moe-token-dispatcher-type", default="alltoall", choices=moe.DISPATCHERS)
    add("--moe-grouped-gemm-backend", default="auto", choices=moe.GEMM_BACKENDS)
    add("--moe-permute-fusion", action=argparse.BooleanOptionalAction, default=True)
    add("--moe-shared-expert-intermediate-size", type=int)
    _switch(group, "--moe-layer-recompute", text="recompute MoE layers in the backward pass; routing is kept")
    _switch(group, "--moe-per-layer-logging", text="log losses and load of each layer")
    add("--fp8-format", choices=moe.FP8_FORMATS)
    add("--fp8-recipe", default="delayed", choices=moe.FP8_RECIPES)


def _training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--micro-batch-size", type=int, default=1, help="sequences of one forward pass of a data-parallel rank")
    add("--global-batch-size", type=int, default=0, help="sequences of a step; default: one micro-batch a rank")
    add("--seq-length", type=int, help="default: 2048, or the checkpoint's longest if that is shorter")
    add("--train-iters", type=int, default=0, help="steps in all, the ones before a resume included")
    add("--seed", type=int, default=1234)
    add("--optimizer", default="adam", choices=["adam"], help="AdamW: weight decay is decoupled")
    add("--lr", type=float, default=1e-4)
    add("--min-lr", type=float, default=0.0)
    add("--lr-decay-style", default="linear", choices=DECAY_STYLES)
    add("--lr-decay-iters", type=int, help="default: --train-iters")
    warmup = group.add_mutually_exclusive_group()
    warmup.add_argument("--lr-warmup-iters", type=int, default=0)
    warmup.add_argument("--lr-warmup-fraction", type=float, help="of --lr-decay-iters")
    add("--lr-warmup-init", type=float, default=0.0)
    add("--lr-wsd-decay-style", default="exponential", choices=WSD_STYLES)
    add("--lr-wsd-decay-iters", type=int, default=0)
    add("--weight-decay", type=float, default=0.01)
    add("--adam-beta1", type=float, default=0.9)
    add("--adam-beta2", type=float, default=0.999)
    add("--adam-eps", type=float, default=1e-8)
    add("--clip-grad", type=float, default=1.0, help="0 doesn't clip")
    add("--on-nonfinite", default="stop", choices=["stop", "skip"], help="what a NaN or inf loss or gradient does")
    precision = group.add_mutually_exclusive_group()
    for name in ("bf16", "fp16", "fp32", "fp64"):
        precision.add_argument(f"--{name}", action="store_true", help="compute type; default: the checkpoint's own")
    add("--initial-loss-scale", type=float, default=2.0**32, help="fp16")
    add("--min-loss-scale", type=float, default=1.0, help="fp16")
    add("--loss-scale-window", type=int, default=1000, help="fp16")
    add("--recompute-granularity", choices=["selective", "full"])
    _switch(group, "--recompute-activations", text="the same as --recompute-granularity selective")
    add("--recompute-method", choices=["uniform", "block"])
    add("--recompute-num-layers", type=int, default=0)
    add("--recompute-modules", nargs="+", default=["moe_act", "layernorm", "core_attn"])


def _data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    _paths(group, "--data", "--data-path", text="text, .jsonl, .bin (bare ids, or with .idx), or folders of these")
    group.add_argument("--split", type=_numbers, default=(969.0, 30.0, 1.0), metavar="TRAIN,VALID,TEST")
    for split in ("train", "valid", "test"):
        _paths(group, f"--{split}-data-path", text=f"data of the {split} split, instead of --data and --split")
    types = ["HuggingFaceTokenizer", "Llama2Tokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer"]
    group.add_argument("--tokenizer-type", choices=types, help="whichever it is, transformers loads it")
    group.add_argument("--tokenizer-model", type=Path, help="folder or file; default: the checkpoint's own")
    group.add_argument("--data-cache-path", type=Path, help="where tokenized text is kept; default: ~/.cache/moeconv")


def _checkpoints_and_logs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints, evaluation and logs")
    add = group.add_argument
    add(
        "--load", type=Path, required=True, help="a checkpoint of any layout: sharded, Hugging Face, or a --save folder"
    )
    add("--save", type=Path, help="folder for checkpoints; where it has one, the run goes on from the latest")
    add("--save-interval", type=int, default=0, help="0 saves at the end only")
    add("--keep-last", type=int, default=0, help="checkpoints that are kept; 0 keeps all")
    add("--ckpt-step", type=int, help="go on from the checkpoint of this iteration instead of the latest")
    _switch(group, "--finetune", text="take only the weights from --load")
    _switch(group, "--no-load-optim", text="don't take the optimizer's state from --load")
    _switch(group, "--no-load-rng", text="don't take the seed from --load")
    _switch(group, "--no-save-optim", text="save weights only; a run can't go on exactly from that")
    _switch(group, "--skip-train", text="evaluate only")
    add("--eval-interval", type=int, default=0, help="0 evaluates at the end only")
    add("--eval-iters", type=int, default=0, help="global batches; 0 doesn't evaluate, -1 takes the whole split")
    add("--log-interval", type=int, default=1)
    add("--log-file", type=Path, help="JSONL, an object an interval; default: metrics.jsonl in --save")
    add("--moe-dead-expert-steps", type=int, default=100, help="steps without a token after which an expert is named")
    add("--progress-bar", action=argparse.BooleanOptionalAction, default=True, help="on a terminal")
    add("--exit-interval", type=int, default=0, help="save and leave after an iteration that is a multiple of it")
    add("--exit-duration-in-mins", type=float, default=0.0, help="save and leave so many minutes after the start")
    add("--tensorboard-dir", type=Path)
    add("--wandb-project")
    add("--wandb-exp-name", default="")


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of `python -m runtime.train`.

    Returns:
        The parser; a flag it doesn't know ends the program with its usage and status 2.
    """
    parser = argparse.ArgumentParser(
        prog="torchrun [...] -m runtime.train", description="Continue the training of a checkpoint.", allow_abbrev=False
    )
    for add in (_architecture, _parallelism, _moe, _training, _data, _checkpoints_and_logs):
        add(parser)
    group = parser.add_argument_group("accepted without effect")
    for name, reason in NO_EFFECT.items():
        if name in _NO_EFFECT_WITH_VALUE:
            group.add_argument(f"--{name}", help=reason)
        else:
            _switch(group, f"--{name}", text=reason)
    return parser


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line and refuse what can't be honoured whatever the checkpoint.

    Args:
        arguments: the command line without the program's name.

    Returns:
        The flags' values.

    Raises:
        ConfigError: a flag has a value that the runtime can't honour.
    """
    flags = make_parser().parse_args(arguments)
    for name in ("attention_dropout", "hidden_dropout"):
        if getattr(flags, name) != 0:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(flags, name)}; the runtime trains without dropout: give 0"
            )
    if flags.train_iters < 1 and not flags.skip_train:
        raise ConfigError(
            "--train-iters is missing: say how many steps to train in all, or --skip-train to evaluate only"
        )
    if flags.recompute_method and flags.recompute_granularity != "full":
        raise ConfigError(f"--recompute-method {flags.recompute_method} needs --recompute-granularity full")
    if flags.recompute_method == "uniform" and flags.recompute_num_layers > 1:
        raise ConfigError(
            f"--recompute-num-layers is {flags.recompute_num_layers} with --recompute-method uniform; each layer is "
            "recomputed on its own: give 1, or --recompute-method block"
        )
    return flags


def without_effect(flags: argparse.Namespace) -> list[str]:
    """List the flags that were given and have no effect, each with the reason.

    Args:
        flags: what `parse_flags` returned.

    Returns:
        Lines for the log.
    """
    given = [name for name in NO_EFFECT if getattr(flags, name.replace("-", "_"))]
    lines = [f"--{name}: no effect ({NO_EFFECT[name]})" for name in given]
    if flags.init_method_std is not None:
        lines.append("--init-method-std: no effect (weights come from the checkpoint)")
    return lines
