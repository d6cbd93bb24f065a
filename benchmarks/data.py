"""Training data: how fast text is tokenized and in what memory, how soon token files are open, and whether batches are ready.

Usage: python -m benchmarks.data [--work FOLDER] [--text-mb 64] [--tokens 1e9] TOKENIZER
TOKENIZER is a folder with a tokenizer, such as a checkpoint. FOLDER takes about 2 bytes a token and 5 bytes a byte of text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np

from runtime.data.config import DataConfig
from runtime.data.indexed import write_index
from runtime.data.loader import DataSource, Loader
from runtime.data.pool import num_cores
from runtime.data.prefetch import Prefetcher

SEQ = 2048


def real_documents(size: int) -> list[str]:
    """Give the standard library's sources as documents, over and over, until they are `size` characters."""
    sources = [path.read_text(errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    documents: list[str] = []
    total = 0
    while total < size:
        document = sources[len(documents) % len(sources)]
        documents.append(document)
        total += len(document)
    return documents


def measure_prepare(work: Path, tokenizer: Path, megabytes: int) -> None:
    """Tokenize JSON Lines, plain and compressed, of two sizes: the memory must not follow the size."""
    print("| input | size | processes | tokens/s | tokens/s a process | peak memory of the parent | of a worker |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for size in (megabytes // 4, megabytes):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in real_documents(size * 10**6)).encode()
        for name in ("a.jsonl", "a.jsonl.gz"):
            path = work / name
            path.write_bytes(gzip.compress(lines, 1) if name.endswith("gz") else lines)
            for workers in sorted({1, num_cores()}):
                out = work / f"prepared-{size}-{name}-{workers}"
                program = (
                    "import resource, sys\nfrom cli.main import main\n"
                    "main(sys.argv[1:], standalone_mode=False)\n"
                    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
                )
                command = [
                    "prepare-data",
                    str(path),
                    str(out),
                    "--tokenizer",
                    str(tokenizer),
                    "--workers",
                    str(workers),
                    "--json",
                ]
                output = subprocess.run(
                    [sys.executable, "-c", program, *command], capture_output=True, text=True, check=True
                ).stdout
                result, parent, worker = json.loads(output[: output.rindex("}") + 1]), *map(int, output.split()[-2:])
                rate = result["tokens"] / result["seconds"]
                shown = f"{worker / 1000:.0f} MB" if workers > 1 else ""
                print(
                    f"| {name} | {len(lines) / 1e6:.0f} MB | {workers} | {rate:,.0f} | {rate / workers:,.0f} | {parent / 1000:.0f} MB | {shown} |",
                    flush=True,
                )


def make_tokens(work: Path, tokens: int) -> Path:
    """Write a pair of so many tokens, documents of 20 to 2000 tokens; the ids are zeros that take no room on the disk."""
    lengths = np.random.default_rng(0).integers(20, 2000, tokens // 1000).astype(np.int32)
    path = work / "large.bin"
    with open(path, "wb") as file:
        file.truncate(int(lengths.sum()) * 2)
    write_index(path.with_suffix(".idx"), lengths, np.dtype(np.uint16))
    return path


def measure_open(work: Path, tokens: int) -> None:
    """Open many tokens, and read batches with and without a computation that hides the reading."""
    path = make_tokens(work, tokens)
    for label in ("first time", "again"):
        begin, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        config = DataConfig(data_path=(str(path),), seq_length=SEQ, vocab_size=32000, data_cache_path=work / "cache")
        data = DataSource(config, work)
        samples = data.samples("train")
        data.samples("valid")
        data.fingerprint()
        samples.sample(0)
        seconds = time.perf_counter() - begin
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1000
        print(
            f"{label}: {samples.num_tokens:,} tokens in {samples.num_documents:,} documents open in {seconds:.2f} s, {grown:.0f} MB more memory"
        )
    loader = Loader(samples=samples, micro_batch_size=4, dp_rank=0, dp_size=1)
    begin = time.perf_counter()
    for step in range(50):
        loader.global_batch(64 * step, 64)
    seconds = time.perf_counter() - begin
    print(f"read without prefetching: {50 * 64 * SEQ / seconds / 1e6:.1f} M tokens/s a rank")
    prefetcher = Prefetcher(loader, num_workers=2)
    waits = []
    for step in range(50, 80):
        time.sleep(2 * seconds / 50)  # stands for a step that takes twice as long as reading its batch
        prefetcher.global_batch(64 * step, 64)
        waits.append(prefetcher.wait_seconds)
    prefetcher.close()
    print(
        f"wait for a batch with prefetching: median {1000 * sorted(waits)[15]:.2f} ms, longest after the first {1000 * max(waits[1:]):.2f} ms"
    )


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/moeconv-data"))
    parser.add_argument("--text-mb", type=int, default=64)
    parser.add_argument("--tokens", type=lambda text: int(float(text)), default=10**9)
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    try:
        measure_open(options.work, options.tokens)
        measure_prepare(options.work, options.tokenizer, options.text_mb)
    finally:
        shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
