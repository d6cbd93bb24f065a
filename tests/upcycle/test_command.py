"""`moeconv upcycle` as a user calls it: results, recipes, refusals, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from transformers import AutoModelForCausalLM

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.layout.degrees import Degrees
from moeconv.upcycling.planned import plan_upcycle
from moeconv.upcycling.recipe import Recipe
from tests.moeconv.models import digests
from tests.runtime.words import VOCAB_SIZE, make_tokenizer, real_text
from tests.upcycle.hub import gap, logits, make_folder

Call = Callable[..., Result]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("dense") / "llama", "llama", vocab_size=VOCAB_SIZE)
    make_tokenizer(folder)
    return folder


def test_folder_report_and_screen(call: Call, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(real_text())
    words = [
        "upcycle",
        llama,
        tmp_path / "moe",
        "--hf",
        "--method",
        "virtual-group",
        "--granularity",
        2,
        "--experts",
        8,
    ]
    result = call(*words, "--text", text, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert value["exact"] is True
    assert value["logits_error"] < 1e-5
    assert value["loss"] == pytest.approx(value["source_loss"], rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert value["parameters"] == model.num_parameters()
    report = json.loads((tmp_path / "moe" / "upcycle.json").read_text())
    assert report == {key: value[key] for key in report}
    assert report["recipe"]["granularity"] == 2
    assert (tmp_path / "moe" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    again = call(
        *[tmp_path / "again" if w == tmp_path / "moe" else w for w in words], "--no-check", "--max-shard-size", "40KB"
    )
    for part in (
        "virtual-group",
        "8 experts",
        f"{model.num_parameters():,} total",
        "computes what the source computes",
        "note",
    ):
        assert part in again.stdout
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    assert gap(logits(tmp_path / "moe"), logits(tmp_path / "again")) == 0


def test_inexact_methods_say_how_far_they_are_off(call: Call, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(real_text())
    result = call("upcycle", llama, tmp_path / "moe", "--method", "drop", "--text", text, "--json", "--dry-run")
    value = json.loads(result.stdout)
    assert value["exact"] is False
    assert value["inexact_because"] == ["drop draws 50% of each expert's neurons anew"]
    assert abs(value["loss"] - value["source_loss"]) > 1e-3
    assert value["logits_error"] > 1e-2
    assert not (tmp_path / "moe").exists()


def test_recipe_file_says_what_flags_say(call: Call, llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: drop\ndrop-ratio: 0.25\nexperts: 4\nlayers: [1]\ncarrier: qwen2_moe\nseed: 7\n")
    assert call("upcycle", llama, tmp_path / "a", "--recipe", recipe, "--seed", 8, "--no-check").exit_code == 0
    flags = [
        "--method",
        "drop",
        "--drop-ratio",
        0.25,
        "--experts",
        4,
        "--layers",
        1,
        "--carrier",
        "qwen2_moe",
        "--seed",
        8,
    ]
    assert call("upcycle", llama, tmp_path / "b", *flags, "--no-check").exit_code == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_mergekit_file_with_texts_for_experts(call: Call, llama: Path, tmp_path: Path) -> None:
    """Router rows against hidden states that transformers gives when it runs the whole model."""
    other = make_folder(tmp_path / "other", "llama", seed=1, vocab_size=VOCAB_SIZE)
    experts = [
        {"source_model": str(llama), "positive_prompts": ["def main():", "import os"], "negative_prompts": ["a poem"]},
        {"source_model": str(other), "positive_prompts": ["Once upon a time"]},
    ]
    table = {"base_model": str(llama), "gate_mode": "hidden", "dtype": "float32", "experts": experts}
    (tmp_path / "mergekit.yaml").write_text(yaml.safe_dump(table))
    result = call("upcycle", llama, tmp_path / "moe", "--recipe", tmp_path / "mergekit.yaml", "--no-check")
    assert result.exit_code == 0, result.stderr
    moe, sources = open_checkpoint(tmp_path / "moe"), [open_checkpoint(llama), open_checkpoint(other)]
    from transformers import AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    for layer in range(2):
        for expert in range(2):
            held = moe.read(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight")
            np.testing.assert_array_equal(held, sources[expert].read(f"model.layers.{layer}.mlp.gate_proj.weight"))
        seen: list[Any] = []
        hook = model.model.layers[layer].mlp.register_forward_hook(lambda m, i, o, seen=seen: seen.append(i[0][0, -1]))
        for text in ("def main():", "import os", "a poem", "Once upon a time"):
            model(**tokenizer(text, return_tensors="pt"))
        hook.remove()
        rows = [(seen[0] + seen[1]) / 2 - seen[2], seen[3]]
        want = np.stack([(row / row.norm()).detach().numpy() for row in rows])
        np.testing.assert_allclose(moe.read(f"model.layers.{layer}.block_sparse_moe.gate.weight"), want, atol=1e-5)
    np.testing.assert_array_equal(moe.read("model.norm.weight"), sources[0].read("model.norm.weight"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", 1], "never trains the router"),
        (["--top-k", 9], "there are 8 experts"),
        (["--carrier", "qwen3_moe"], "qwen2_moe, glm4_moe can hold this Llama"),
        (["--no-renormalize", "--carrier", "mixtral"], "routing weights that are not renormalised"),
        (["--shared-experts", 1, "--carrier", "mixtral"], "shared experts; qwen2_moe"),
        (["--layers", "1", "--carrier", "mixtral"], "dense layers; qwen2_moe"),
        (["--layers", "0", "--carrier", "glm4_moe"], "dense layers after one with experts"),
        (["--layers", "5"], "layers 0 to 1"),
        (["--granularity", 2], "virtual-group"),
        (["--method", "virtual-group", "--granularity", 5], "numbers that fit: 1, 2, 3, 4, 6"),
        (["--method", "virtual-group", "--granularity", 4, "--experts", 6], "multiple of --granularity 4"),
        (["--method", "split", "--experts", 7], "numbers that fit"),
        (["--method", "mix"], "--branch"),
        (["--method", "expand"], "has no experts to copy"),
        (["--router", "hidden"], "--prompts"),
        (["--router", "centroid"], "equal centroids"),
        (["--noise-std", 0.1], "--method noise"),
        (["--drop-ratio", 1.5], "from 0 to 1"),
        (["--hf", "--tp", 2], "--hf writes no shards"),
        (["--ep", 3], "8 experts can't be shared"),
        (["--method", "mix", "--branch", "nowhere"], "no such folder"),
    ],
)
def test_refusals_leave_nothing(words: list[object], message: str, call: Call, llama: Path, tmp_path: Path) -> None:
    result = call("upcycle", llama, tmp_path / "moe", *words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"attention_bias": True}, "no carrier can hold"),
        ("llama", {"mlp_bias": True}, "biases in the feed-forward part"),
        ("mixtral", {}, "enlarge a mixture with --method expand"),
    ],
)
def test_sources_that_no_carrier_holds(
    family: str, options: dict[str, Any], message: str, call: Call, tmp_path: Path
) -> None:
    source = make_folder(tmp_path / "dense", family, **options)
    result = call("upcycle", source, tmp_path / "moe")
    assert (result.exit_code, (tmp_path / "moe").exists()) == (1, False)
    assert message in result.stderr


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("methode: copy", "methode"),
        ("method: [copy]", "--method"),
        ("- copy", "expected a table"),
        ("a: b: c", "can't be read as YAML"),
        ("experts: many", "wrong type"),
        ("{base_model: B, experts: [{source_model: B}], gate_mode: cheap_embed}", "cheap_embed"),
        ("{base_model: B, experts: [{source_model: B, residual_scale: 0.1}], gate_mode: random}", "residual_scale"),
        ("{base_model: B, experts: [{source_model: B}], shared_experts: [{source_model: B}]}", "shared_experts"),
        ("{base_model: C, experts: [{source_model: B}], gate_mode: random}", "base_model"),
        (
            "{base_model: B, experts: [{source_model: B}, {source_model: B}], gate_mode: random, dtype: float16}",
            "dtype",
        ),
    ],
)
def test_bad_recipe_files(table: str, message: str, call: Call, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(table.replace("B", f'"{llama}"'))
    result = call("upcycle", llama, tmp_path / "moe", "--recipe", tmp_path / "recipe.yaml")
    assert (result.exit_code, (tmp_path / "moe").exists()) == (1, False)
    assert message in result.stderr


def test_check_stops_a_plan_that_computes_something_else(
    call: Call, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moeconv.upcycling.planned as module

    right = module.choose

    def wrong(*args: Any) -> Any:
        carrier, config = right(*args)
        return carrier, config | {"rms_norm_eps": 0.1}

    monkeypatch.setattr(module, "choose", wrong)
    result = call("upcycle", llama, tmp_path / "moe")
    assert result.exit_code == 3
    assert "nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_renormalisation_is_near_and_not_exact(call: Call, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "qwen2", "qwen2")
    for std, least, most in ((0.05, 1e-4, 1), (1e-4, 0, 1e-3)):
        words = [
            "--method",
            "virtual-group",
            "--granularity",
            2,
            "--experts",
            8,
            "--no-renormalize",
            "--router-std",
            std,
        ]
        value = json.loads(call("upcycle", source, tmp_path / "moe", *words, "--dry-run", "--json").stdout)
        assert not value["exact"]
        assert least <= value["logits_error"] < most


PROGRAM = """
import os, signal, sys
from pathlib import Path
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.layout.degrees import Degrees
from moeconv.upcycling.planned import plan_upcycle
from moeconv.upcycling.recipe import Recipe

out, fatal, calls = sys.argv[2], int(sys.argv[3]), 0
def watch(event, args):
    global calls
    if event in ("open", "os.mkdir", "os.rename") and str(args[0]).startswith(out):
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
planned = plan_upcycle(open_checkpoint(sys.argv[1]), Recipe(method="drop"))
sys.addaudithook(watch)
write_sharded(planned, Path(out), Degrees(tp=2, ep=4), Options(workers=2))
print(calls)
"""


def test_a_killed_run_is_resumed(llama: Path, tmp_path: Path) -> None:
    planned = plan_upcycle(open_checkpoint(llama), Recipe(method="drop"))
    write_sharded(planned, tmp_path / "whole", Degrees(tp=2, ep=4), Options())
    words = [sys.executable, "-c", PROGRAM, str(llama)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    counted = subprocess.run(
        [*words, str(tmp_path / "counted"), "0"], capture_output=True, text=True, env=environment, check=True
    )
    calls = int(counted.stdout)
    for fatal in (calls // 3, calls * 9 // 10):
        out = tmp_path / f"killed-{fatal}"
        killed = subprocess.run(
            [*words, str(out), str(fatal)], capture_output=True, text=True, env=environment, check=False
        )
        assert killed.returncode == -signal.SIGKILL
        assert not out.exists()
        other = plan_upcycle(open_checkpoint(llama), Recipe(method="drop", seed=1))
        with pytest.raises(Exception, match="begun with other"):
            write_sharded(other, out, Degrees(tp=2, ep=4), Options(resume=True))
        write_sharded(planned, out, Degrees(tp=2, ep=4), Options(resume=True))
        assert digests(out) == digests(tmp_path / "whole")
