"""The layouts whose training must equal that of one rank."""

from __future__ import annotations

from typing import Any

from runtime.parity.case import Case

DIST = {"use_distributed_optimizer": True}
SHARD = {"fully_shard": True}
SP = {"sp": True}
EXCHANGE = {"overlap_exchange": True}
SOME_LAYERS = {"granularity": "full", "method": "block", "num_layers": 3}
GATHERS = SP | {"tp_comm_overlap": True}
QWEN2: dict[str, Any] = {"model_type": "qwen2"}
GLM: dict[str, Any] = {
    "model_type": "glm4_moe",
    "first_k_dense_replace": 1,
    "use_qk_norm": True,
    "attention_bias": True,
}
GATED: dict[str, Any] = {"model_type": "qwen2_moe"}
LATENT: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}
LATENT_2 = {
    "q_lora_rank": None,
    "model_type": "deepseek_v2",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
}
OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "sliding_window": 5,
    "rope_parameters": {"rope_type": "default"},
    "swiglu_limit": 1.0,
}
ERNIE = {"model_type": "ernie4_5_moe", "use_bias": True, "moe_layer_start_index": 1, "tie_word_embeddings": False}
PHI = {"model_type": "phimoe", "lm_head_bias": True, "attention_bias": True, "vocab_size": 65}
GRANITE = {
    "model_type": "granitemoe",
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.5,
}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
# Whole layers, single experts, one of three matrices that are a parameter together, and the ends, each trained differently;
# and a mean of it all.
GROUPS: dict[str, Any] = {
    "freeze": (
        "*embed_tokens*",
        "*layers.0.*",
        "*layers.1.*.q_proj.weight",
        "*layers.1.*experts.[0-3].w2.*",
        "*experts.1.*",
    ),
    "no_weight_decay": ("*.o_proj.weight",),
    "lr_scale": ("*.gate.weight=0.1", "*experts.2.w1.weight=2", "*norm.weight=0.5"),
    "decoupled_lr": 3e-3,
    "ema_decay": 0.5,
}
# Below the experts of one rank nothing is trained: that of the others must still pass gradients on.
SOME_EXPERTS: dict[str, Any] = {
    "freeze": ("*embed*", "*norm*", "*attn*", "*gate*", "*head*", "*experts.[0-5].*"),
    "clip_grad": 0.05,
}

# Adapters on attention and all feed-forward parts; routers are trained whole, one layer's A and everything else is frozen.
LORA: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 6.0, "targets": ("*_proj*", "*experts*"), "also_train": ("*.gate.weight", "*layers.2.*norm*")},
    "optim": {"clip_grad": 0.05, "freeze": ("*layers.0*lora_A*",), "no_weight_decay": ("*.w2.lora_B*",)},
}  # fmt: skip
ALL: dict[str, Any] = {"lora": {"rank": 3, "rslora": True, "targets": ("*_proj*",)}, "optim": {"clip_grad": 0.05}}
# Every rank's columns are whole blocks of 64, so that each layout holds the same numbers.
WIDE: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}
NF4, FP8 = (
    {
        "lora": {"rank": 4, "targets": ("*_proj*", "*experts*"), "quantize_base": kind},
        "optim": {"clip_grad": 0.05},
        "model": WIDE,
        "num_microbatches": 2,
        "dtype": "float64",
    }
    for kind in ("nf4", "fp8")
)

REPLAYED: dict[str, Any] = {"captures": True, "num_microbatches": 12, "warm_up": 4}


def case(name: str, num_ranks: int, parallel: dict[str, Any] | None = None, **options: Any) -> Case:
    """A case with its degrees as one dict."""
    return Case(name=name, num_ranks=num_ranks, parallel=parallel or {}, **options)


CASES = (
    # Each axis alone.
    case("dp2", 2),
    case("dp2 distributed optimizer", 2, DIST),
    case("tp2", 2, {"tp": 2}),
    case("tp2 sp", 2, {"tp": 2} | SP),
    case("ep2", 2, {"ep": 2}),
    case("etp2", 2, {"etp": 2}),
    case("pp2", 2, {"pp": 2}),
    case("cp2", 2, {"cp": 2}),
    # Experts and attention on different grids.
    case("tp2 sp ep2", 4, {"tp": 2, "ep": 2} | SP),
    case("tp2 sp ep2 etp1", 2, {"tp": 2, "ep": 2, "etp": 1} | SP),
    case("tp2 sp ep2 etp1 dp2", 4, {"tp": 2, "ep": 2, "etp": 1} | SP),
    case("tp2 sp ep4 etp1", 4, {"tp": 2, "ep": 4, "etp": 1} | SP),
    case("tp4 sp ep2", 8, {"tp": 4, "ep": 2} | SP),
    case("tp2 etp1", 2, {"tp": 2, "etp": 1}),
    case("ep2 etp2 dp4 without tp", 4, {"ep": 2, "etp": 2}),
    case("ep4", 4, {"ep": 4}),
    case("ep8", 8, {"ep": 8}, num_microbatches=8),
    case("ep2 dp2", 4, {"ep": 2}),
    case("ep2 dp2 distributed optimizer", 4, {"ep": 2} | DIST),
    case("cp2 tp2 sp ep2", 4, {"cp": 2, "tp": 2, "ep": 2} | SP),
    case("cp2 tp2 sp ep4 etp1 dp2", 8, {"cp": 2, "tp": 2, "ep": 4, "etp": 1} | SP | DIST),
    case("tp2 sp ep2 all-gather", 4, {"tp": 2, "ep": 2} | SP, moe={"dispatcher": "allgather"}),
    # Communication of tensor parallelism beside its products.
    case("tp4 sp gathers overlapped, biases everywhere", 4, {"tp": 4} | GATHERS, model={"model_type": "llama", "attention_bias": True, "mlp_bias": True}),
    case(
        "tp2 sp ep2 etp1 gathers and exchanges overlapped, selective recompute",
        2,
        {"tp": 2, "ep": 2, "etp": 1} | GATHERS | EXCHANGE,
        recompute={"granularity": "selective"},
    ),
    case("tp2 sp ep2 etp1 gathers overlapped, adapters", 2, {"tp": 2, "ep": 2, "etp": 1} | GATHERS, **LORA),
    case("tp2 sp ep2 etp1 gathers overlapped, latent attention", 2, {"tp": 2, "ep": 2, "etp": 1} | GATHERS, model=LATENT),
    case("pp2 tp2 sp gathers overlapped, zero-bubble, tied", 4, {"pp": 2, "tp": 2, "pp_schedule": "zero-bubble"} | GATHERS, model=TIED),
    case("tp2 sp gathers overlapped, dp2 fully sharded, recomputed", 4, {"tp": 2} | GATHERS | SHARD, recompute={"granularity": "full"}),
    # Full sharding.
    case("dp2 fully sharded", 2, SHARD),
    case("ep2 dp2 fully sharded", 4, {"ep": 2} | SHARD),
    case("tp2 sp ep2 etp1 dp2 fully sharded", 4, {"tp": 2, "ep": 2, "etp": 1} | SP | SHARD, model={"vocab_size": 65}),
    case("pp2 tp2 dp2 tied fully sharded", 8, {"pp": 2, "tp": 2} | SHARD, model=TIED),
    case("pp2 dp2 fully sharded, recomputed", 4, {"pp": 2} | SHARD, recompute={"granularity": "full"}),
    # Pipelines.
    case("pp4 interleaved", 4, {"pp": 4, "vpp": 2, "pp_schedule": "interleaved"}, model={"num_hidden_layers": 8}),
    case("pp2 ep2", 4, {"pp": 2, "ep": 2}),
    case("pp2 tp2 sp ep2", 8, {"pp": 2, "tp": 2, "ep": 2} | SP),
    case("pp2 cp2 dp2", 8, {"pp": 2, "cp": 2} | DIST),
    case("pp4", 4, {"pp": 4}),
    case("pp2 uneven", 2, {"pp": 2, "pp_layers": (3, 1)}),
    case("pp2 vpp2 uneven", 2, {"pp": 2, "vpp": 2, "pp_layers": (2, 2, 3, 1), "pp_schedule": "interleaved"}, model={"num_hidden_layers": 8}),
    case("pp2 a stage without MoE", 4, {"pp": 2, "ep": 2}, model={"model_type": "qwen3_moe", "mlp_only_layers": [0, 1]}),
    case("pp4 fewer micro-batches than stages", 4, {"pp": 4}, num_microbatches=2),
    case("pp4 gpipe", 4, {"pp": 4, "pp_schedule": "gpipe"}),
    case("pp2 zero-bubble", 2, {"pp": 2, "pp_schedule": "zero-bubble"}),
    case("pp2 vpp2 ep2 zero-bubble", 4, {"pp": 2, "vpp": 2, "ep": 2, "pp_schedule": "zero-bubble"}),
    # Shapes that don't divide, and sharing.
    case("tp4 two kv heads, vocabulary 65", 4, {"tp": 4} | SP, model={"vocab_size": 65}),
    case("tp4 one kv head, vocabulary 9", 4, {"tp": 4}, model={"num_key_value_heads": 1, "vocab_size": 9}),
    case("pp2 tied", 2, {"pp": 2}, model=TIED),
    case("pp2 tp2 dp2 tied, vocabulary 61", 8, {"pp": 2, "tp": 2} | DIST, model=TIED | {"vocab_size": 61}),
    case("cp2 sliding window", 2, {"cp": 2}, model={"sliding_window": 5}),
    case("tp2 dp2 dense", 4, {"tp": 2} | DIST, model=QWEN2),
    case("tp4 sp dense, two kv heads", 4, {"tp": 4} | SP, model=QWEN2),
    # Rows of several documents, which every stage and every part of a sequence must tell apart.
    case("cp2 tp2 sp documents, sliding window", 4, {"cp": 2, "tp": 2} | SP, model={"sliding_window": 5}, documents=True),
    case("pp2 cp2 documents, sinks, recomputed", 4, {"pp": 2, "cp": 2}, model=OSS, recompute={"granularity": "full"}, documents=True),
    case("pp2 vpp2 zero-bubble, documents, latent attention", 2, {"pp": 2, "vpp": 2, "pp_schedule": "zero-bubble"}, model=LATENT, documents=True),
    # Pairs of micro-batches, one of which is computed while the other's rows travel; and a last one alone.
    case("ep2 in pairs", 2, {"ep": 2} | EXCHANGE, num_microbatches=6),
    case("ep2 in pairs, full recompute", 2, {"ep": 2} | EXCHANGE, recompute={"granularity": "full"}),
    case("ep2 in pairs, each token once to each rank", 2, {"ep": 2} | EXCHANGE, model={"num_experts_per_tok": 4}),
    case("tp2 sp ep2 in pairs, selective recompute", 4, {"tp": 2, "ep": 2} | SP | EXCHANGE, recompute={"granularity": "selective"}),
    case("ep2 dp2 distributed optimizer, in pairs, shared experts", 4, {"ep": 2} | DIST | EXCHANGE, model=GLM, num_microbatches=8, recompute=SOME_LAYERS),
    case("tp2 sp ep2 etp1 in pairs, overlapped, sinks, clamped experts", 2, {"tp": 2, "ep": 2, "etp": 1} | GATHERS | EXCHANGE, model=OSS),
    # Recomputed activations.
    case("ep2 full recompute", 2, {"ep": 2}, recompute={"granularity": "full"}),
    case("pp2 tp2 sp one recomputed", 4, {"pp": 2, "tp": 2} | SP, recompute={"granularity": "full", "num_layers": 1}),
    case("tp2 sp ep2 selective recompute", 4, {"tp": 2, "ep": 2} | SP, recompute={"granularity": "selective"}),
    case("ep2 MoE recompute", 2, {"ep": 2}, moe={"recompute_layer": True}),
    # Other routing.
    case("cp2 tp2 sp sequence aux loss", 4, {"cp": 2, "tp": 2} | SP, moe={"load_balancing": ("seq_aux_loss",)}),
    # Over data-parallel ranks its window is another one than one rank's, so dp is 1.
    case("cp2 tp2 sp global aux loss", 4, {"cp": 2, "tp": 2} | SP, moe={"load_balancing": ("global_aux_loss",)}),
    case(
        "tp2 sp ep2 sigmoid and expert bias",
        4,
        {"tp": 2, "ep": 2} | SP,
        model={"model_type": "dots1"},
        moe={"enable_expert_bias": True},
    ),
    # Groups of tensors.
    case("dp2 distributed optimizer, groups", 2, DIST, optim=GROUPS),
    case("ep2 dp2 fully sharded, groups", 4, {"ep": 2} | SHARD, optim=GROUPS),
    case("pp2 tp2 sp ep2 etp1 dp2 groups", 8, {"pp": 2, "tp": 2, "ep": 2, "etp": 1} | SP | DIST, optim=GROUPS),
    case("pp2 zero-bubble, groups", 2, {"pp": 2, "pp_schedule": "zero-bubble"}, optim=GROUPS),
    case("tp4 frozen embedding, vocabulary 9", 4, {"tp": 4} | SP, model={"vocab_size": 9}, optim={"freeze": ("*embed_tokens*", "*.[0-2].*")}),
    case("pp2 tp2 dp2 tied, groups", 8, {"pp": 2, "tp": 2} | DIST, model=TIED, optim=GROUPS | {"freeze": ("*experts.1.*",)}),
    case("tp2 sp ep2 experts of one rank are trained", 4, {"tp": 2, "ep": 2} | SP, optim=SOME_EXPERTS),
    # CUDA graphs, and room for rows.
    case("dp2 replayed", 2, DIST, **REPLAYED),
    case("tp2 replayed", 2, {"tp": 2}, **REPLAYED),
    case("tp2 sp gathers overlapped, replayed", 2, {"tp": 2} | GATHERS, **REPLAYED),
    case("ep2 replayed", 2, {"ep": 2} | DIST, **REPLAYED),
    case("tp2 sp ep2 etp1 replayed", 2, {"tp": 2, "ep": 2, "etp": 1} | SP | DIST, **REPLAYED),
    case("ep2 etp2 replayed, recomputed", 4, {"ep": 2, "etp": 2} | DIST, recompute={"granularity": "full"}, **REPLAYED),
    case("ep2 replayed in pairs", 2, {"ep": 2} | DIST | EXCHANGE, **REPLAYED),
    case("dp2 replayed, adapters", 2, DIST, **LORA, **REPLAYED),
    case("ep2 dp2 replayed, adapters, clamped experts", 4, {"ep": 2} | DIST, model=OSS, **ALL, **REPLAYED),
    # Adapters.
    case("tp2 adapters", 2, {"tp": 2}, **LORA),
    case("tp2 sp ep2 etp1 dp2 distributed optimizer, adapters", 4, {"tp": 2, "ep": 2, "etp": 1} | SP | DIST, **LORA),
    case("tp4 etp2 adapters, two kv heads", 4, {"tp": 4, "etp": 2}, **LORA),
    case("pp2 cp2 zero-bubble, adapters", 4, {"pp": 2, "cp": 2, "pp_schedule": "zero-bubble"}, **LORA),
    case("ep2 dp2 fully sharded, adapters recomputed", 4, {"ep": 2} | SHARD, recompute={"granularity": "full"}, **LORA),
    case("tp2 sp ep2 etp1 adapters, clamped experts", 2, {"tp": 2, "ep": 2, "etp": 1} | SP, model=OSS, **ALL),
    case("tp2 etp2 adapters, latent attention, shared experts", 2, {"tp": 2}, model=LATENT, **ALL),
    case("tp2 sp ep2 etp1 dp2 distributed optimizer, nf4 base", 4, {"tp": 2, "ep": 2, "etp": 1} | SP | DIST, **NF4),
    case("pp2 tp2 etp2 zero-bubble, nf4 base", 4, {"pp": 2, "tp": 2, "pp_schedule": "zero-bubble"}, **NF4),
    case("ep2 pp2 fp8 base, recomputed", 4, {"ep": 2, "pp": 2}, recompute={"granularity": "full"}, **FP8),
    # What families add: norms of heads, biases, shared experts with and without gate, dense layers, part of a head turned.
    case("tp4 sp head norms, two kv heads", 4, {"tp": 4} | SP, model={"model_type": "qwen3"}),
    case("tp2 biases everywhere", 2, {"tp": 2}, model={"model_type": "llama", "attention_bias": True, "mlp_bias": True}),
    case("tp2 sp biases everywhere", 2, {"tp": 2} | SP, model={"model_type": "llama", "attention_bias": True, "mlp_bias": True}),
    case("tp2 shared expert with a gate", 2, {"tp": 2}, model=GATED),
    case("tp2 sp ep2 etp1 dp2 shared expert with a gate", 4, {"tp": 2, "ep": 2, "etp": 1} | SP | DIST, model=GATED | {"mlp_only_layers": [1]}),
    case("pp2 tp2 sp ep2 stored bias, shared, first dense", 4, {"pp": 2, "tp": 2, "ep": 2, "etp": 1} | SP, model=GLM),
    case("ep2 dp2 fully sharded, stored bias", 4, {"ep": 2} | SHARD, model=GLM),
    case("tp2 sp groups of experts", 2, {"tp": 2} | SP, model=GLM | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    case("cp2 windows on some layers", 2, {"cp": 2}, model=QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    case("cp2 tp2 sp ep2 etp1 head norms", 4, {"cp": 2, "tp": 2, "ep": 2, "etp": 1} | SP, model={"model_type": "qwen3_moe", "norm_topk_prob": False}),
    case("tp2 sp ep2 norms over all heads", 4, {"tp": 2, "ep": 2, "etp": 1} | SP, model={"model_type": "olmoe"}),
    case("tp4 norms over all heads, two kv heads", 4, {"tp": 4}, model={"model_type": "olmoe"}),
    # Latent attention, with its whole projections' gradients in parts, and further kinds of positions, norms and routers.
    case("tp2 sp ep2 etp1 latent attention", 2, {"tp": 2, "ep": 2, "etp": 1} | SP, model=LATENT),
    case("tp4 etp2 latent attention", 4, {"tp": 4, "etp": 2}, model=LATENT | {"attention_bias": True}),
    case("cp2 pp2 latent attention, queries without", 4, {"cp": 2, "pp": 2}, model=LATENT | LATENT_2),
    case("tp2 sp cp2 latent attention of GLM", 4, {"tp": 2, "cp": 2} | SP, model=LATENT | {"model_type": "glm4_moe_lite"}),
    case("tp2 sp ep2 dp2 neighbours turned, softmax with a bias", 4, {"tp": 2, "ep": 2, "etp": 1} | SP | DIST, model=ERNIE),
    case("tp4 vocabulary 65, sparsemixer, layer norms", 4, {"tp": 4}, model=PHI),
    case("pp2 tp2 sp factors everywhere", 4, {"pp": 2, "tp": 2} | SP, model=GRANITE),
    case("tp2 sp ep2 etp1 sinks, clamped experts with biases", 2, {"tp": 2, "ep": 2, "etp": 1} | SP, model=OSS),
    case("tp4 etp2 sinks, clamped experts in parts", 4, {"tp": 4, "etp": 2}, model=OSS),
    case("ep2 etp2 dp4 clamped experts", 4, {"ep": 2, "etp": 2} | DIST, model=OSS),
    case("pp2 cp2 sinks, clamped experts", 4, {"pp": 2, "cp": 2}, model=OSS),
    case("ep2 dp2 fully sharded, clamped experts recomputed", 4, {"ep": 2} | SHARD, model=OSS, recompute={"granularity": "full"}),
    case("tp2 sp norms last", 2, {"tp": 2} | SP, model={"model_type": "flex_olmo"}, dtype="float64"),
    case("tp4 norms of heads after the rotation", 4, {"tp": 4}, model={"model_type": "hunyuan_v1_moe"}),
    case("tp4 sp ep2 etp1 part turned, sigmoid", 4, {"tp": 4, "ep": 2, "etp": 1} | SP, model={"model_type": "minimax_m2", "rotary_dim": 4}),
)  # fmt: skip
