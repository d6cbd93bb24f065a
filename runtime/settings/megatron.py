"""Megatron's flags that are no settings here: the ones without effect, of one value only, and refused, each with its reason.

Source:
    https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/training/arguments.py
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NoEffect:
    """A flag that is accepted and changes nothing."""

    reason: str
    values: str | int = 0
    """How many words follow it, as argparse's nargs says it."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A flag that is accepted with the values that the runtime computes anyway."""

    allowed: tuple[str, ...]
    """Numbers are compared as numbers."""
    reason: str


_SDPA = "attention takes the fastest kernel that knows its kind"
_SUMS = "gradients are summed, and added inside the products that give them"
_OVERLAP = "reductions and gathers always overlap with computation"
_FORMAT = "checkpoints have their own format, which is found out when one is read"
_PARALLEL = "every rank always writes and reads its own part"
_FUSED = "there is one implementation"
_LOGGED = "it is always logged"

NO_EFFECT: dict[str, NoEffect] = {
    "--use-mcore-models": NoEffect("there is one model implementation"),
    "--transformer-impl": NoEffect("there is one model implementation", 1),
    "--no-masked-softmax-fusion": NoEffect(_SDPA),
    "--attention-softmax-in-fp32": NoEffect(_SDPA),
    "--apply-query-key-layer-scaling": NoEffect(_SDPA),
    "--attention-backend": NoEffect(_SDPA, 1),
    "--use-flash-attn": NoEffect(_SDPA),
    "--no-create-attention-mask-in-dataloader": NoEffect("there are no masks in the data"),
    "--no-position-embedding": NoEffect("positions are rotary, there is no table of them"),
    "--use-rotary-position-embeddings": NoEffect("positions are rotary"),
    "--no-gradient-accumulation-fusion": NoEffect(_SUMS),
    "--calculate-per-token-loss": NoEffect("the loss is always the mean over the tokens of the global batch"),
    "--no-bias-swiglu-fusion": NoEffect("there are no biases to fuse"),
    "--no-bias-gelu-fusion": NoEffect("the activation is SwiGLU"),
    "--no-bias-dropout-fusion": NoEffect("there is no dropout"),
    "--no-rope-fusion": NoEffect(_FUSED),
    "--no-persist-layer-norm": NoEffect(_FUSED),
    "--cross-entropy-loss-fusion": NoEffect(_FUSED),
    "--cross-entropy-fusion-impl": NoEffect(_FUSED, 1),
    "--moe-router-fusion": NoEffect("a GPU kernel is taken where one fits"),
    "--moe-grouped-gemm": NoEffect(
        "experts always run as grouped GEMMs; --moe-grouped-gemm-backend chooses the kernel"
    ),
    "--overlap-grad-reduce": NoEffect(_OVERLAP),
    "--overlap-param-gather": NoEffect(_OVERLAP),
    "--no-overlap-p2p-communication": NoEffect("the pipeline's schedule decides"),
    "--ddp-num-buckets": NoEffect("buckets follow the layers", 1),
    "--ddp-bucket-size": NoEffect("buckets follow the layers", 1),
    "--ddp-average-in-collective": NoEffect(_SUMS),
    "--use-checkpoint-args": NoEffect("the architecture always comes from the checkpoint, where there is one"),
    "--override-opt_param-scheduler": NoEffect("the flags always decide; a change on a resume is logged"),
    "--make-vocab-size-divisible-by": NoEffect(
        "the vocabulary is padded for the tensor-parallel ranks, in memory only", 1
    ),
    "--ckpt-format": NoEffect(_FORMAT, 1),
    "--auto-detect-ckpt-format": NoEffect(_FORMAT),
    "--use-dist-ckpt": NoEffect(_FORMAT),
    "--async-strategy": NoEffect("a thread of each rank writes", 1),
    "--use-persistent-ckpt-worker": NoEffect("a thread of each rank writes"),
    "--ckpt-fully-parallel-save": NoEffect(_PARALLEL),
    "--ckpt-fully-parallel-load": NoEffect(_PARALLEL),
    "--no-ckpt-fully-parallel-save": NoEffect(_PARALLEL),
    "--ckpt-assume-constant-structure": NoEffect(_PARALLEL),
    "--dist-ckpt-optim-fully-reshardable": NoEffect("a checkpoint loads under any layout"),
    "--dist-ckpt-strictness": NoEffect("a tensor that is missing or left over is always an error", 1),
    "--exit-signal-handler": NoEffect("SIGTERM always saves and leaves"),
    "--distributed-backend": NoEffect("NCCL on GPUs, gloo on CPUs", 1),
    "--no-mmap-bin-files": NoEffect("token files are mapped into memory"),
    "--log-throughput": NoEffect(_LOGGED),
    "--log-timers-to-tensorboard": NoEffect("the curves have the throughput"),
    "--timing-log-level": NoEffect("the log has the time of a step, no timers of its parts", 1),
    "--log-validation-ppl-to-tensorboard": NoEffect("the curves have the loss, whose exponential it is"),
    "--enable-experimental": NoEffect("there is nothing to unlock"),
    "--overlap-cpu-optimizer-d2h-h2d": NoEffect("--optimizer-cpu-offload copies both ways at once by itself"),
    "--te-rng-tracker": NoEffect("each step seeds its random numbers anew"),
}

FIXED: dict[str, Fixed] = {
    "--normalization": Fixed(("RMSNorm",), "the models that the runtime trains have RMSNorm"),
    "--position-embedding-type": Fixed(("rope",), "the models that the runtime trains have rotary positions"),
    "--attention-dropout": Fixed(("0",), "the runtime trains without dropout"),
    "--hidden-dropout": Fixed(("0",), "the runtime trains without dropout"),
    "--dataloader-type": Fixed(("single",), "samples are dealt out in one shuffled order"),
    "--rerun-mode": Fixed(("disabled",), "no step is run a second time"),
    "--tokenizer-type": Fixed(
        (
            "HuggingFaceTokenizer",
            "Llama2Tokenizer",
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "NullTokenizer",
        ),
        "transformers loads whatever --tokenizer-model is; token files and mock data need none",
    ),
}

_OVERLAP = "--tp-comm-overlap overlaps gathers and sums together, or neither: leave it out"
_RESULTS = "leave it out: the results are the same"
_NO_FAMILY = "no model that the runtime trains has it: leave it out"
_CONFIG = "name a config.json that has it with --init-config; of a checkpoint it is known: leave it out"
_LAYERS = "give the layers of each stage with --pp-layers N,N,..."
_PROFILE = "use an outside profiler, such as nsys or py-spy, on the command"

REFUSED: dict[str, str] = {
    "--tp-comm-overlap-cfg": "--tp-comm-overlap has one way, a piece a rank, and nothing to configure: leave it out",
    "--disable-tp-comm-overlap-ag": _OVERLAP,
    "--disable-tp-comm-overlap-rs": _OVERLAP,
    "--disable-tp-comm-bulk-dgrad": _OVERLAP,
    "--disable-tp-comm-bulk-wgrad": _OVERLAP,
    "--tp-comm-overlap-rs-dgrad": _OVERLAP,
    "--tp-comm-bootstrap-backend": "--tp-comm-overlap uses the job's own process groups: leave it out",
    "--delay-wgrad-compute": f"--pipeline-schedule zero-bubble delays weight gradients; else {_RESULTS}",
    "--moe-shared-expert-overlap": f"the shared expert is not overlapped; {_RESULTS}",
    "--moe-flex-dispatcher-backend": "there is no DeepEP dispatcher; take --moe-token-dispatcher-type alltoall",
    "--use-megatron-fsdp": "parameters are sharded by --fully-shard (FSDP2)",
    "--data-parallel-sharding-strategy": "give --use-distributed-optimizer (optim_grads) or --fully-shard (all of it)",
    "--num-distributed-optimizer-instances": "the optimizer is sharded over all data-parallel ranks; leave it out",
    "--use-precision-aware-optimizer": "each type has its own flag: --master-weights remainder, --moments-dtype bfloat16, --main-grads-dtype bf16; leave "
    "it out",
    "--main-params-dtype": "masters are fp32; --master-weights remainder keeps 2 bytes of each: give that, or leave it out",
    "--exp-avg-dtype": "give both moments' type with --moments-dtype float32 or bfloat16",
    "--exp-avg-sq-dtype": "give both moments' type with --moments-dtype float32 or bfloat16",
    "--use-torch-optimizer-for-cpu-offload": "with --optimizer-cpu-offload the GPU computes the update; leave it out",
    "--no-pin-cpu-grads": "with --optimizer-cpu-offload gradients stay on the GPU; leave it out",
    "--no-pin-cpu-params": "--optimizer-cpu-offload page-locks the host's memory; leave it out",
    "--fp8-param-gather": "parameters are gathered in bf16; leave it out",
    "--first-last-layers-bf16": "FP8 is the same in all layers: leave it out",
    "--use-tp-pp-dp-mapping": "ranks are laid out with tp fastest, then cp, dp and pp; leave it out",
    "--hierarchical-context-parallel-sizes": "context parallelism has one level: leave it out",
    "--cp-comm-type": f"context parallelism has one implementation; {_RESULTS}",
    "--pipeline-model-parallel-layout": _LAYERS,
    "--decoder-first-pipeline-num-layers": _LAYERS,
    "--decoder-last-pipeline-num-layers": _LAYERS,
    "--account-for-embedding-in-pipeline-split": _LAYERS,
    "--account-for-loss-in-pipeline-split": _LAYERS,
    "--save-retain-interval": "--keep-last N keeps the newest checkpoints",
    "--multi-latent-attention": _CONFIG,
    "--q-lora-rank": _CONFIG,
    "--kv-lora-rank": _CONFIG,
    "--qk-head-dim": _CONFIG,
    "--qk-pos-emb-head-dim": _CONFIG,
    "--v-head-dim": _CONFIG,
    "--mtp-num-layers": _NO_FAMILY,
    "--mtp-loss-scaling-factor": _NO_FAMILY,
    "--squared-relu": _NO_FAMILY,
    "--apply-layernorm-1p": _NO_FAMILY,
    "--hybrid-layer-pattern": _NO_FAMILY,
    "--spec": "the architecture comes from the checkpoint, --init-config or the other flags; leave it out",
    "--use-rope-scaling": _CONFIG,
    "--rotary-scaling-factor": _CONFIG,
    "--mscale": _CONFIG,
    "--mscale-all-dim": _CONFIG,
    "--init-method-xavier-uniform": "weights are drawn from normal distributions: give --init-method-std",
    "--moe-use-upcycling": "turn the checkpoint into a mixture with `moeconv upcycle` first",
    "--vocab-file": "give the tokenizer, a folder or file that transformers loads, with --tokenizer-model",
    "--merge-file": "give the tokenizer, a folder or file that transformers loads, with --tokenizer-model",
    "--no-check-for-nan-in-loss-and-grad": "NaN and inf are always noticed; --on-nonfinite skip leaves such steps out",
    "--deterministic-mode": "attention's kernels are chosen for speed; leave it out (the MoE layer is deterministic)",
    "--pretrained-checkpoint": "give it with --load and --finetune",
    "--load-main-params-from-ckpt": "--finetune takes weights only, and --load everything",
    "--wandb-entity": "set the variable WANDB_ENTITY",
    "--wandb-save-dir": "set the variable WANDB_DIR",
    "--profile": _PROFILE,
    "--use-pytorch-profiler": _PROFILE,
    "--record-memory-history": _PROFILE,
    "--sft": "give the conversations with --finetune-data instead of --data-path; the tokenizer's own chat template renders them",
    "--sft-tokenizer-prompt-format": "the tokenizer's own chat template renders conversations; another is given with --chat-template FILE",
}
