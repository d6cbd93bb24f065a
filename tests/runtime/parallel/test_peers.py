"""transformers as a peer in benchmarks: spread over ranks it computes what one rank does, so that its time means something."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from benchmarks.peers import Result, choose, error_of, table
from benchmarks.step_profile import by_kind, kind_of
from benchmarks.step_work import Layout, Slice, Work
from runtime.parity.configs import tiny_config
from runtime.parity.ranks import RankPool

TINY = Slice(
    layers=2, hidden=32, ffn=48, experts=4, topk=2, heads=4, kv_heads=2, head_dim=8, vocab=61, positions=16
)  # fmt: skip
STEPS = 3


def losses(layout: Layout, *, spread: bool) -> list[float]:
    """The mean losses of steps over the same four micro-batches, however ranks share them."""
    from benchmarks.transformers_step import distribute, mixtral, trained

    ranks = dist.get_world_size() // layout.tp
    tokens = torch.randint(0, TINY.vocab, (4, 2, TINY.positions), generator=torch.Generator().manual_seed(0))
    net = distribute(mixtral(TINY), layout) if spread else mixtral(TINY)
    system = trained(net, lr=1e-2)
    found = torch.stack([system.step(list(tokens[dist.get_rank() // layout.tp :: ranks])) for _ in range(STEPS)])
    dist.all_reduce(found)
    return (found / dist.get_world_size()).tolist()


def in_world(world: int, layout: Layout) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        return losses(layout, spread=world > 1)


def test_experts_over_two_ranks_train_as_on_one(pool: RankPool) -> None:
    """Two micro-batches on each of two ranks are four on one: balancing losses, clipped gradients and updates, too."""
    (want,) = pool.run(1, in_world, 1, Layout())
    for found in pool.run(2, in_world, 2, Layout(ep=2)):
        assert found == pytest.approx(want, rel=1e-6)
    assert want[0] - want[-1] > 1e-3, "the updates are seen"


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "glm4_moe", "glm4_moe_lite"])
def test_other_families_train(family: str) -> None:
    from benchmarks.transformers_step import of_hub, trained

    config = tiny_config(family)
    tokens = torch.randint(0, config["vocab_size"], (2, 2, 16), generator=torch.Generator().manual_seed(0))
    system = trained(of_hub(config), lr=1e-2)
    losses = [float(system.step(list(tokens))) for _ in range(STEPS)]
    assert losses[0] == pytest.approx(math.log(config["vocab_size"]), rel=0.1)
    assert losses[0] - losses[-1] > 1e-2


def test_systems_for_other_families() -> None:
    work = Work.of("gpt-oss-20b", None, 1, "", 2, [4])
    chosen, _ = choose(work, None)
    assert {"runtime", "transformers, pure bf16"} <= set(chosen)
    assert not [name for name in chosen if "Megatron" in name]
    assert work.arguments[0] == "gpt-oss-20b"
    attention, experts = 2 * 2880 * 4096 + 2 * 2880 * 512, 4 * 3 * 2880 * 2880
    weights = 4 * (attention + experts) + 2880 * 201088
    seen = 2 * 4096 / 2 + 2 * 128  # keys, on average: two layers see all before, two see 128
    assert work.slice.flops(1) == pytest.approx(6 * weights + 12 * seen * 4096, rel=0.005)


def test_systems_without_a_place_say_why() -> None:
    one = Work.of("mixtral", None, 1, "", 2, [8])
    chosen, left_out = choose(one, None)
    assert {"runtime", "transformers, compiled, pure bf16"} <= set(chosen)
    assert not [name for name in chosen if "EP" in name or "overlap" in name]
    two = Work.of("mixtral", 4, 2, "ep2", 1, [8])
    chosen, left_out = choose(two, None)
    assert {"runtime", "runtime, overlap", "transformers, EP and FSDP, compiled, pure bf16"} <= set(chosen)
    assert any(line.startswith("transformers, pure bf16 is left out: on several GPUs") for line in left_out)
    assert two.arguments == ["mixtral", "8", "--layers", "4", "--tp", "1", "--ep", "2", "--sequences", "1"]
    with pytest.raises(SystemExit, match="none of --ranks 2"):
        Work.of("mixtral", None, 2, "ep4", 2, [8])
    with pytest.raises(SystemExit, match="expected degrees such as"):
        Work.of("mixtral", None, 2, "pp2", 2, [8])


def test_the_error_of_a_rank_is_named_not_its_launchers() -> None:
    stderr = (
        "[rank1]: Traceback (most recent call last):\n[rank1]: torch.OutOfMemoryError: CUDA out of memory.\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\nRoot Cause\n"
    )
    assert error_of(stderr) == "torch.OutOfMemoryError: CUDA out of memory."
    assert error_of("killed\n") == "killed"


def test_a_table_has_a_row_for_what_failed() -> None:
    work = Work.of("mixtral", 2, 2, "ep2", 1, [8])

    def result(*times: float) -> Result:
        return Result([{"ms": ms, "tokens_per_second": 1e6 / ms, "tflops": 500.0, "peak_gib": 30.0} for ms in times])

    kinds = {"communication": 1.0, "attention": 2.0, "products": 3.0, "optimizer": 4.0, "other": 5.0}
    results = {("runtime", 8): result(100, 110, 400), ("Megatron-Core", 8): result(150, 220, 500)}
    results["Megatron-Core", 8].kinds = kinds
    results["transformers, EP and FSDP, pure bf16", 8] = Result(failed="RuntimeError: a | b")
    rows = table(work, [name for name, _ in results], results)
    assert "| 8 | Megatron-Core | 220.0 (150.0 to 500.0) | 4,545 | 500 | 30.0 | 1.500 |" in rows
    assert "| 8 | transformers, EP and FSDP, pure bf16 | failed: RuntimeError: a / b | | | | |" in rows
    assert rows[-1] == "| 8 | Megatron-Core | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 |"


def test_kernels_are_sorted_by_what_they_do() -> None:
    """Names as profiles of the systems on an H100 have them."""
    names = {
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)": "communication",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": "attention",
        "nvjet_sm90_tss_192x192_64x3_2x1_v_badd_coopB_NTN": "products",
        "grouped_matmul": "products",
        "void multi_tensor_apply_kernel<TensorListMetadata<4, false>, transformer_engine::multi_tensor_adam::AdamFunctor": "optimizer",
        "triton_poi_fused_mul_silu_split_0": "other",
    }  # fmt: skip
    assert {name: kind_of(name) for name in names} == names
    assert by_kind([])["other"] == 0
