"""`moeconv plan`: what it prints, that its flags are the trainer's, and what it says of layouts that can't be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.main import main
from runtime.settings.assemble import make_run
from runtime.settings.check import check_run
from runtime.settings.flags import parse_flags
from tests.support.configs import tiny_config

MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral") / "config.json"
    path.write_text(json.dumps(MIXTRAL))
    return path


def plan(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["plan", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def plan_json(*words: object) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(plan(*words, "--json"))
    return out


def test_a_layout_is_described(mixtral: Path) -> None:
    words = (mixtral.parent, "--gpus", 64, "--pp", 4, "--ep", "8", "--seq-length", 4096, "--global-batch-size", 512)
    found = plan_json(*words, "--use-distributed-optimizer")
    assert found["layout"] == "dp16 pp4 ep8"
    state = found["memory"]["stages"][0]
    # A stage's 8 layers: one of 8 experts, and a 16th of the dense weights' optimizer state.
    experts, dense = 8 * 3 * 4096 * 14336, 8 * (4096 * (4096 * 2 + 1024 * 2) + 8 * 4096 + 2 * 4096) + 32000 * 4096
    assert state["weights"] == pytest.approx(2 * (experts + dense), rel=1e-3)
    assert state["masters"] == pytest.approx(4 * (experts / 2 + dense / 16), rel=1e-3)
    assert found["memory"]["peak"] == max(stage["peak"] for stage in found["memory"]["stages"])
    assert 0.2 < found["step"]["utilization"] < 0.6
    assert {entry["axis"] for entry in found["step"]["bytes_sent"]} == {"dp", "edp", "ep", "pp"}
    text = plan(*words, "--use-distributed-optimizer")
    assert "fits" in text
    assert "--expert-model-parallel-size 8" in text


@pytest.mark.parametrize(
    "words",
    [
        "--gpus 8 --tp 2 --sp --ep 4 --etp 1 --use-distributed-optimizer",
        "--gpus 16 --pp 4 --vpp 2 --ep 2 --recompute-granularity full --moments-dtype bfloat16",
        "--gpus 8 --pp 4 --pp-layers 7,9,9,7 --fully-shard --moe-layer-recompute",
        "--gpus 4 --pp 2 --pipeline-schedule zero-bubble --recompute-activations",
        "--gpus 8 --cp 4 --ep 8 --moe-aux-loss-coeff 0.01 --micro-batch-size 2",
    ],
)
def test_the_flags_are_the_trainers(mixtral: Path, words: str) -> None:
    """What is printed to paste starts the same run as what was planned."""
    given = (mixtral, *words.split(), "--seq-length", 4096, "--global-batch-size", 64)
    found = plan_json(*given)
    line = ["--load", str(mixtral.parent), "--mock-data", "--train-iters", "1", *found["flags"]]
    from moeconv.families import FAMILIES
    from moeconv.families.base import Model

    run = make_run(parse_flags(line), Model.from_config(FAMILIES["mixtral"], MIXTRAL), mixtral)
    check_run(run, found["gpus"])
    again = plan_json(mixtral, "--gpus", found["gpus"], *found["flags"])
    assert again == found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gpus 8 --tp 3", "--tensor-model-parallel-size 3"),
        ("--gpus 9 --tp 3", "32 attention heads and 8 key/value heads can't be shared by 3 ranks; degrees that fit: 1, 2, 4, 8"),
        ("--gpus 6 --ep 3", "8 experts can't be shared by 3 ranks; degrees that fit: 1, 2, 4, 8"),
        ("--gpus 5 --pp 5", "say how with --pp-layers, for example 7,7,6,6,6"),
        ("--gpus 8 --tp 2 --ep 2", "need --sequence-parallel"),
        ("--gpus 8 --gpu h101", "--gpu 'h101' is unknown; did you mean h100?"),
        ("--gpus 8 --nodes 3", "--gpus is 8, and --nodes 3"),
        ("--gpus 8 --tpp 2", "unknown flag --tpp"),
        ("--gpus 8 --ep 8 --global-batch-size 12", "take a multiple of 8"),
        ("--gpus 8 --gpu missing.yaml", "missing.yaml: can't be read"),
        ("--gpus 9 --search --tp 3", "--tensor-model-parallel-size 3: 32 attention heads"),
        ("--gpus 9 --search --tp 2", "--tensor-model-parallel-size 2: no layout of 9 GPUs has these"),
        ("--gpus 8 --ep 8 --gpu a100 --fp8-format hybrid", "--fp8-format hybrid: NVIDIA A100-SXM4-80GB computes nothing in 8 bits"),
        ("--gpus 16 --search --ep 3", "--expert-model-parallel-size 3: 8 experts can't be shared by 3 ranks"),
    ],
)  # fmt: skip
def test_bad_layouts_are_named(mixtral: Path, words: str, expected: str) -> None:
    assert expected in plan(mixtral, *words.split(), code=1)


def test_bad_sources_are_named(tmp_path: Path, mixtral: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "model_type is 'bert'; supported are" in plan(tmp_path, code=1)
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in plan(tmp_path / "empty", code=1)
    assert "no such folder or file" in plan(tmp_path / "missing", code=1)
    assert "SRC is missing" in plan("--gpus", "8", code=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("like: h1", "like is 'h1'; expected one of h100"),
        ("hbm_tbs: 3", "hbm_tbs is no constant of a machine; nearest: hbm_tb_s"),
        ("hbm_tb_s: fast", "hbm_tb_s is 'fast'; expected a number above 0"),
        ("passes: {norms: 1}", "passes.norms is unknown"),
        ("links: {nvlink: 3}", "links.nvlink: expected latency_us, hop_us and gb_s"),
        ("- 1", "expected keys and values"),
        ("a: [", "is no YAML"),
    ],
)
def test_bad_calibration_files_are_named(tmp_path: Path, mixtral: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert expected in plan(mixtral, "--gpus", 8, "--gpu", path, code=1)


def test_a_calibration_file_changes_what_it_says(tmp_path: Path, mixtral: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("like: h100\ngpu: mine\nmeasured: true\ngrouped_tflops: 68.5\n")
    slow, fast = (plan_json(mixtral, "--gpus", 8, "--ep", 8, "--gpu", gpu) for gpu in (path, "h100"))
    assert slow["memory"] == fast["memory"]
    assert slow["step"]["seconds"] > 3 * fast["step"]["seconds"]


def test_quantised_weights_are_planned_as_plain_ones(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3") | {"quantization_config": {"quant_method": "fp8"}, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "planned for plain ones" in plan(tmp_path, "--ep", 2, "--seq-length", 64)


def test_without_degrees_the_best_layouts_are_listed(mixtral: Path) -> None:
    words = (mixtral, "--gpus", 32, "--seq-length", 4096, "--top", 3)
    found = plan_json(*words)
    assert len(found["layouts"]) == 3
    assert found["tried"] > 100
    best = found["layouts"][0]
    again = plan_json(mixtral, "--gpus", 32, *best["flags"])
    assert again["step"] == best["step"]
    assert again["memory"] == best["memory"]
    text = plan(*words)
    assert f"{best['step']['seconds'] * 1e3:,.0f}" in text
    assert "left out: " in text


def test_given_degrees_are_kept_in_a_search(mixtral: Path) -> None:
    found = plan_json(mixtral, "--gpus", 32, "--search", "--ep", 4, "--seq-length", 4096, "--top", 5)
    assert all("ep4" in layout["layout"] for layout in found["layouts"])


def test_where_nothing_fits_it_is_said_and_smaller_moments_are_tried(mixtral: Path) -> None:
    assert "NOTHING FITS: the smallest is" in plan(mixtral, "--gpus", 2, "--seq-length", 4096)
    text = plan(mixtral, "--gpus", 8, "--seq-length", 4096)
    assert "with --master-weights remainder --moments-dtype bfloat16:" in text
    assert plan_json(mixtral, "--gpus", 8, "--seq-length", 4096)["changed"] == {
        "master_weights": "remainder",
        "moments_dtype": "bfloat16",
    }
    assert "DOES NOT FIT" in plan(mixtral, "--gpus", 8, "--ep", 8, "--seq-length", 4096)


def test_scaling_is_told(mixtral: Path) -> None:
    words = (mixtral, "--gpus", 16, "--pp", 2, "--ep", 8, "--seq-length", 4096, "--global-batch-size", 64, "--scaling")
    found = plan_json(*words)["scaling"]
    assert [point["gpus"] for point in found["weak"]][:3] == [16, 32, 64]
    assert "scaling (data parallelism grows)" in plan(*words)


def test_no_torch_is_imported(mixtral: Path) -> None:
    program = (
        "import sys, time; start = time.perf_counter(); from cli.main import main\n"
        f"main(['plan', {str(mixtral)!r}, '--gpus', '8', '--json'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
