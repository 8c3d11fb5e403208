"""How fast data is read and made: the loader's tokens/s, and tokenisation beside the bare tokenizers library.

    python tools/bench_data.py load [DATA ...] [--tokens-per-row 8192] [--seconds 5]
    python tools/bench_data.py prepare TEXT.jsonl --tokenizer PATH [--workers 2] [--repeats 3]

load: rows of a mixture of the folders, made and taken as train() takes them. Without a folder, of made-up ones on local
disk, not in memory at first: 100 million tokens each, in documents of log-normal lengths, means 100, 500 and 2,000.
prepare: tools/prepare_data.py on a file, and what tokenizers' encode_batch_fast alone takes for the same texts in
memory on as many threads, in turn; the ratio is of the fastest of each, by the clock, and by CPU time of all processes,
which other work on the machine changes less.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from prepare_data import prepare
from tokenizers import Tokenizer, models

from minitrain.config import DataConfig, SourceConfig, exit_with
from minitrain.data import PackedData
from minitrain.parallel.mesh import Mesh
from minitrain.storage import sha256, write_json, write_safetensors

VOCAB_SIZE = 60_000


def made_up(folder: Path, mean: int, tokens: int = 100_000_000) -> str:
    """A folder as tools/prepare_data.py leaves it, of random ids."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(mean)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    lengths = torch.empty(tokens // mean).log_normal_(generator=generator) * mean / 1.65  # the mean of that is exp(1/2)
    lengths = lengths.long().clamp(8)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(VOCAB_SIZE, (int(offsets[-1]),), generator=generator, dtype=torch.int32).to(torch.uint16)
    metadata = {"tokenizer_sha256": sha256(folder / "tokenizer.json"), "vocab_size": str(VOCAB_SIZE)}
    write_safetensors(folder / "shard-00000.safetensors", {"tokens": ids, "document_offsets": offsets}, metadata)
    with open(folder / "shard-00000.safetensors") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # to be read from the disk, not from memory
    write_json(folder / "report.json", {})
    return str(folder)


def load(sources: list[str], tokens_per_row: int, seconds: float) -> None:
    print("| data | packing | tokens/s | padding | first step after, s |\n|---|---|---|---|---|")
    for packing in ("concat", "best_fit"):
        start = time.perf_counter()
        cfg = DataConfig(
            sources=[SourceConfig(path) for path in sources], packing=packing, tokens_per_row=tokens_per_row,
            max_seqlen=min(4096, tokens_per_row), rows_per_step=8,
        )  # fmt: skip
        data = PackedData(cfg, Mesh(torch.device("cpu")), 1 << 30)
        next(data)
        opened, tokens, padding, start = time.perf_counter() - start, 0, 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for row in next(data):
                tokens, padding = tokens + tokens_per_row, padding + row.num_padding
        speed = tokens / (time.perf_counter() - start)
        names = " + ".join(Path(path).name for path in sources)
        print(f"| {names} | {packing} | {speed:,.0f} | {padding / tokens:.2%} | {opened:.1f} |", flush=True)


def compare(text: Path, tokenizer: str, workers: int, repeats: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    bare = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else tokenizer))
    bare.encode_special_tokens = True
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    megabytes = sum(len(t.encode()) for t in texts) / 1e6

    def alone():
        for i in range(0, len(texts), 1000):
            bare.encode_batch_fast(texts[i : i + 1000], add_special_tokens=False)

    def whole():
        with tempfile.TemporaryDirectory() as folder:
            prepare([text], Path(folder) / "out", tokenizer=tokenizer, workers=workers)

    jobs, least = {"tokenizers alone": alone, "prepare_data.py": whole}, {}
    for _ in range(repeats):
        for name, job in jobs.items():
            before = seconds()
            job()
            took = [after - start for start, after in zip(before, seconds(), strict=True)]
            print(f"{name}: {megabytes / took[0]:.2f} MB/s, {took[1]:.1f} s of CPU time", flush=True)
            least[name] = [min(pair) for pair in zip(took, least.get(name, took), strict=True)]
    clock, cpu = (old / new for old, new in zip(*least.values(), strict=True))
    print(f"{megabytes:.1f} MB, {workers} workers: ratio {clock:.2f} by the clock, {cpu:.2f} by CPU time")


def seconds() -> tuple[float, float]:
    """Of the clock, and of the CPU for this process and those that it had."""
    usage = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in usage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("load").add_argument
    add("data", nargs="*")
    add("--tokens-per-row", type=int, default=8192)
    add("--seconds", type=float, default=5.0)
    add = commands.add_parser("prepare").add_argument
    add("text", type=Path)
    add("--tokenizer", required=True)
    add("--workers", type=int, default=os.cpu_count())
    add("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.command == "prepare":
        compare(args.text, args.tokenizer, args.workers, args.repeats)
    elif args.data:
        load(args.data, args.tokens_per_row, args.seconds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            sources = [made_up(Path(folder) / f"{mean} tokens", mean) for mean in (100, 500, 2000)]
            for chosen in (*([source] for source in sources), sources):
                load(chosen, args.tokens_per_row, args.seconds)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        exit_with(error)
