"""What the data path costs, from text to a worker's batches.

tokenize   preparing text, against the tokenizer alone
ingest     shards to local batches: how fast, how soon, and against other loaders
scale      order and plan of a run of 10 T tokens on 16,384 workers
"""

from __future__ import annotations

import importlib.util
import pickle
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.corpus import SourceSpec
from pipelines.ingest import Feed
from pipelines.manifest import Manifest
from pipelines.order import Order, PhaseLayout, StreamSource
from pipelines.shards import TokenReader
from pipelines.tokenize import prepare
from tst_ray.bench.measure import Figure

_LENGTH, _SEQUENCES = 2048, 16
_BAGS = (1, 6, 16)
_STEP_S = 0.1
_SHORT, _LONG = 64, 4096  # steps: what a token costs is the difference, without the start
_TEXT_MB = 16

Texts = list[str]


# -- tokenize -------------------------------------------------------------------------------------


def tokenize() -> list[Figure]:
    """Megabytes of text a second, one core: reading, encoding and writing, against encoding."""
    from pipelines.tokenizer import load_tokenizer

    texts = _library(_TEXT_MB << 20)
    num_mb = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        _write(texts, Path(folder) / "text")
        manifest = _prepared(folder, "first")  # trains the tokenizer
        tokenizer = f"{manifest.folder}/tokenizer"
        whole, alone = [], []
        for number in range(3):
            started = time.process_time()
            _prepared(folder, f"again-{number}", tokenizer)
            whole.append(time.process_time() - started)
            encoder = load_tokenizer(tokenizer).backend_tokenizer
            started = time.process_time()
            for start in range(0, len(texts), 64):
                encoder.encode_batch(texts[start : start + 64], add_special_tokens=False)
            alone.append(time.process_time() - started)
    speed, bare = (num_mb / statistics.median(seconds) for seconds in (whole, alone))
    return [
        Figure("encode_batch alone", bare, "MB/s and core"),
        Figure("the whole preparation", speed, "MB/s and core"),
        Figure("the whole against it", speed / bare, "x", at_least=0.85),
    ]


def _library(num_bytes: int) -> Texts:
    """The first files of the Python standard library, about so many bytes."""
    import sysconfig

    texts, left = [], num_bytes
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        text = path.read_text(errors="ignore")
        texts.append(text)
        left -= len(text.encode())
        if left <= 0:
            break
    return texts


def _write(texts: Texts, folder: Path) -> None:
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:05d}.txt").write_text(text)


def _prepared(
    folder: str, name: str, tokenizer: str = "train", row_tokens: int = 65_536
) -> Manifest:
    return prepare(
        (SourceSpec(path=f"{folder}/text", name="text"),),
        folder=f"{folder}/{name}",
        backend="inline",
        log=lambda text: None,
        tokenizer=tokenizer,
        vocab_size=1024,
        validation_share=0.02,
        row_tokens=65_536,
        undecodable="skip",
    )


# -- ingest ---------------------------------------------------------------------------------------


def ingest() -> list[Figure]:
    """Batches of 16 sequences of L = 2,048 in bags of s, through Ray Data and through others.

    CPU seconds are those of all processes that take part, so that cores are counted, not clocks.
    """
    import ray

    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        _write(_library(_TEXT_MB << 20), Path(folder) / "text")
        manifest = _prepared(folder, "shards")
        reader = TokenReader(manifest, "text")
        tokens = reader.read(0, reader.num_tokens)
        np.save(f"{folder}/tokens.npy", tokens)
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, logging_level="error",
            log_to_driver=False,
        )  # fmt: skip
        try:
            for s in _BAGS:
                figures += _ingest(manifest, folder, s)
            figures += _resumes(manifest)
        finally:
            ray.shutdown()
    return figures


def _feed(manifest: Manifest, s: int, steps: int) -> Feed:
    length = _LENGTH * s
    source = StreamSource("text", manifest.sources[0].train.tokens, 1.0)
    layout = PhaseLayout(0, steps, _SEQUENCES, length, s)
    order = Order((source,), (layout,), manifest.row_tokens, 1 << 24, 0)
    place = f"{manifest.folder}/manifest.json"
    return Feed(manifest.folder, place, manifest.fingerprint, order, 0, s, manifest.dtype)


def _ingest(manifest: Manifest, folder: str, s: int) -> Iterator[Figure]:
    rates = {}
    more = _LONG // s  # steps, so that every bag size reads as many tokens
    for name, batches in _loaders(manifest, folder, s):
        _drain(batches(_SHORT))  # starts what needs to be started
        short, long = (
            _cpu_s(lambda steps=steps, batches=batches: _drain(batches(steps)))  # type: ignore[misc]
            for steps in (_SHORT, _SHORT + more)
        )
        rates[name] = more * _SEQUENCES * _LENGTH * s / max(long - short, 1e-9)
        yield Figure(f"s = {s}: {name}", rates[name], "tokens/s and core")
        yield Figure(f"s = {s}: {name}, to start and read {_SHORT} steps", short, "CPU s")
    share = _wait_share(manifest, s)
    yield Figure(f"s = {s}: Ray Data, waited for of steps of 0.1 s", share, "x", 0.01)
    for name in rates.keys() - {"Ray Data"}:
        at_least = 1.0 if "streaming" in name else None
        yield Figure(
            f"s = {s}: Ray Data against {name}", rates["Ray Data"] / rates[name], "x",
            at_least=at_least,
        )  # fmt: skip


def _wait_share(manifest: Manifest, s: int) -> float:
    """How much of the time of steps that take `_STEP_S` is waiting for their batch."""
    batches = _through_ray(_feed(manifest, s, 2 * _SHORT), 0)
    next(batches)
    waited, started = 0.0, time.perf_counter()
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            return waited / (time.perf_counter() - started)
        time.sleep(_STEP_S)


def _loaders(
    manifest: Manifest, folder: str, s: int
) -> Iterator[tuple[str, Callable[[int], Iterator[Any]]]]:
    """Loaders of so many steps of tokens (int64), in a random order: ours, torch's, MosaicML's."""
    length = _LENGTH * s + s
    yield (
        "Ray Data",
        lambda steps: (
            batch["tokens"].astype(np.int64) for batch in _through_ray(_feed(manifest, s, steps), 0)
        ),
    )
    yield "torch's DataLoader", lambda steps: _mapped(folder, length, steps)
    if importlib.util.find_spec("streaming"):
        yield "MosaicML streaming", lambda steps: _mosaic(folder, length, steps)


def _through_ray(feed: Feed, step: int) -> Iterator[Any]:
    """Local batches as one worker has them."""
    import ray.data

    from pipelines.ingest import local_batches, ray_dataset

    for first, last in feed.parts(1):
        if last <= step:
            continue
        dataset = ray_dataset(feed, max(step, first), last, 1)
        dataset.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
        dataset.context.enable_progress_bars = False
        (split,) = dataset.streaming_split(1, equal=True)
        yield from local_batches(split, feed, 1)


def _mapped(folder: str, length: int, steps: int) -> Iterator[Any]:
    """torch's DataLoader over a memory map."""
    import torch

    class Mapped(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.tokens = np.load(f"{folder}/tokens.npy", mmap_mode="r")

        def __len__(self) -> int:
            return steps * _SEQUENCES

        def __getitem__(self, index: int) -> Any:
            start = index * 7919 * length % (len(self.tokens) - length)
            return torch.from_numpy(self.tokens[start : start + length].astype(np.int64))

    return iter(torch.utils.data.DataLoader(Mapped(), batch_size=_SEQUENCES, num_workers=1))


def _mosaic(folder: str, length: int, steps: int) -> Iterator[Any]:
    """MosaicML's StreamingDataset over the same tokens, written in its format first."""
    import torch
    from streaming import MDSWriter, StreamingDataset  # type: ignore[import-not-found,unused-ignore]

    place = f"{folder}/mds-{length}-{steps}"
    tokens = np.load(f"{folder}/tokens.npy", mmap_mode="r")
    if not Path(place).exists():
        with MDSWriter(out=place, columns={"tokens": "bytes"}) as writer:
            for number in range(steps * _SEQUENCES):
                start = number * length % (len(tokens) - length)
                writer.write({"tokens": tokens[start : start + length].tobytes()})

    def collate(rows: list[Any]) -> torch.Tensor:
        arrays = [np.frombuffer(row["tokens"], tokens.dtype).astype(np.int64) for row in rows]
        return torch.from_numpy(np.stack(arrays))

    dataset = StreamingDataset(local=place, shuffle=True, batch_size=_SEQUENCES)
    return iter(
        torch.utils.data.DataLoader(
            dataset, batch_size=_SEQUENCES, num_workers=1, collate_fn=collate
        )
    )


def _drain(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass


def _cpu_s(call: Callable[[], Any]) -> float:
    """CPU seconds that a call takes, in this process and all that work beside it.

    Those of the whole machine, less what it takes at rest: Ray's processes are many.
    """
    # What came before may still be ending in the first of these seconds.
    idle = min(_busy_s(lambda: time.sleep(1.0)) for _ in range(3))
    started = time.monotonic()
    busy = _busy_s(call)
    return max(busy - idle * (time.monotonic() - started), 1e-9)


def _busy_s(call: Callable[[], Any]) -> float:
    before = _machine_cpu_s()
    call()
    return _machine_cpu_s() - before


def _machine_cpu_s() -> float:
    import os

    user, nice, system, *_ = Path("/proc/stat").read_text().split()[1:]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _resumes(manifest: Manifest) -> Iterator[Figure]:
    """The first batch after a resume, early and late in a run of a million steps."""
    feed = _feed(manifest, 1, 1_000_000)
    seconds = {}
    for step in (0, 999_000):
        times = []
        for _ in range(3):
            started = time.perf_counter()
            next(_through_ray(feed, step))
            times.append(time.perf_counter() - started)
        seconds[step] = statistics.median(times)
        yield Figure(f"first batch from step {step:,}", seconds[step], "s")
    yield Figure("late against early", seconds[999_000] / seconds[0], "x", 1.3)


# -- scale ----------------------------------------------------------------------------------------


def scale() -> list[Figure]:
    """Order and plan of 10 T tokens in 10 M rows of shards, for 16,384 workers; pure, no files."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens, workers, row = 10 * 10**12, 16_384, 1_000_000
    sequences, length = workers, 4096
    steps = tokens // (sequences * length)
    layouts = (
        PhaseLayout(0, steps // 4, sequences, length * 6, 6),
        PhaseLayout(steps // 4, steps - steps // 4, sequences, length, 1),
    )
    order = Order((StreamSource("all", tokens, 1.0),), layouts, row, 1 << 30, 0)
    feeds = [
        Feed("/nowhere", "/nowhere", "", order, phase, bag, "uint32")
        for phase, bag in ((0, 6), (1, 1))
    ]
    late = steps - 1000

    started = time.perf_counter()
    order.spans(late)
    batch = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(100):
        spans = order.spans(late)
        order.linear(spans.select(slice(0, 1)), length)
    position = (time.perf_counter() - started) / 100 / sequences
    started = time.perf_counter()
    parts = [part for feed in feeds for part in feed.parts(workers)]
    first = next(part for part in parts if part[1] > late)
    feeds[1].chunks(max(first[0], late), first[1], workers)
    planned = time.perf_counter() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return [
        Figure("a global batch of 16,384 sequences", batch * 1e3, "ms"),
        Figure("a position", position * 1e3, "ms", 1.0),
        Figure("a resume, planned", planned, "s", 1.0),
        Figure("datasets of the run, pickled", len(pickle.dumps(parts)) / 1e6, "MB"),
        Figure("memory for all of it", grown / 1024, "MB", 100.0),
    ]
