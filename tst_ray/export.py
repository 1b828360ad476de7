"""From a run to an ordinary Hugging Face folder, and a few lines of what the model writes.

    export_run    newest good checkpoint → config.json, model.safetensors, the tokenizer
    sample_text   continuations by plain `transformers`, from that folder

Nothing of this project is needed to load the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.errors import one_line
from tst_ray.checkpoint import CheckpointInfo, find_good
from tst_ray.errors import RunError
from tst_ray.metrics import add_event
from tst_ray.runstore import config_of
from tst_ray.settings import ModelConfig
from tst_ray.storage import Storage, patiently

log = logging.getLogger(__name__)
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_MAX_SAMPLED_BYTES = 4 << 30


def export_run(
    run: Storage,
    folder: str | None = None,
    step: int | None = None,
    key: bytes | None = None,
) -> tuple[int, str]:
    """Write the model of a run as a Hugging Face folder.

    Args:
        run: the run directory.
        folder: where to; None writes to `model` in the run directory.
        step: which checkpoint; None takes the newest that verifies.
        key: that must have signed it; None asks for no signature.

    Returns:
        the checkpoint's step, and the folder.

    Raises:
        RunError: there is no run, no checkpoint, or none intact; or the folder holds other files.
        DataError: the shards' tokenizer is not there, or is another one.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from transformers.utils import logging as transformers_logging

    from pipelines.manifest import Manifest
    from pipelines.tokenizer import check_tokenizer
    from tst_ray.exported import write_for_both
    from tst_ray.model import build_model
    from tst_ray.model_config import generation_config, hf_config
    from tst_ray.sharded import read_full

    transformers_logging.disable_progress_bar()
    section, plan = _read_run(run)
    info = _pick(run, step, key)
    manifest = Manifest.load(plan["shards"], run.location("manifest.json"))
    tokenizer = check_tokenizer(manifest)
    made = hf_config(
        section,
        vocab_size=manifest.vocab_size,
        eot_token=manifest.eot_token,
        kept=plan.get("model"),
    )
    made._attn_implementation = "eager"  # nothing is computed, and the run's may be on GPUs alone
    model = build_model(made, weights=False, sharded=False)
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    read_full(info.folder, state)
    set_model_state_dict(model, state["model"])

    target = folder or (run / "model").url
    num_bytes = sum(value.numel() * value.element_size() for value in model.parameters())
    with _scratch(Storage(target), num_bytes) as scratch:
        model.hf_model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_for_both(scratch, generation_config(section, plan.get("model")))
        _publish(scratch, Storage(target), is_ours=folder is None)
    return info.step, target


@contextlib.contextmanager
def _scratch(target: Storage, num_bytes: int) -> Iterator[Path]:
    """A folder to write a model in: beside its place; for an object store, of temporary files.

    Args:
        num_bytes: what the weights take.

    Raises:
        RunError: they do not fit there.
    """
    if target.is_local:
        place = Path(target.path)
        folder, remedy = place.with_name(f".{place.name}.new"), "make room there"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="tst-ray-model-"))
        remedy = "make room there, or set TMPDIR to a larger folder"
    try:
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise RunError(
                f"{folder.parent}: the model takes {num_bytes / 2**20:,.1f} MiB, and "
                f"{free / 2**20:,.1f} are free; {remedy}, then run the same command"
            )
        yield folder
    except Exception as error:  # the library of the weights raises others than OSError
        if "os error 28" not in str(error) and getattr(error, "errno", 0) != errno.ENOSPC:
            raise
        raise RunError(
            f"{folder.parent}: is full ({one_line(error)}); {remedy}, then run the same command"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sample_text(folder: str, num_samples: int = 3, length: int = 60) -> list[str]:
    """Continuations of nothing (the end-of-text token) by the exported model; one string each.

    Only for show, so nothing that goes wrong here may fail a trained run: it gives no samples then,
    nor where the folder is not local (`transformers` loads local folders) or the model too large.
    """
    storage = Storage(folder)
    if not storage.is_local or _weights_bytes(storage) > _MAX_SAMPLED_BYTES:
        return []
    try:
        return _sample(storage.path, num_samples, length)
    except Exception as error:  # generation has as many ways to fail as there are models
        log.warning("no samples: %s", error)
        return []


def _weights_bytes(folder: Storage) -> int:
    return sum(folder.size(name) for name in folder.names() if name.endswith(".safetensors"))


def _sample(folder: str, num_samples: int, length: int) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    longest = getattr(model.config, "max_position_embeddings", None) or length + 1
    torch.manual_seed(0)
    prompt = torch.full((num_samples, 1), tokenizer.eos_token_id)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max(min(length, longest - 1), 1),
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        pad_token_id=tokenizer.eos_token_id,
    )
    return list(tokenizer.batch_decode(out, skip_special_tokens=True))


def _read_run(run: Storage) -> tuple[ModelConfig, dict[str, Any]]:
    plan = run.read_json("plan.json")
    if not run.exists("config.yaml") or plan is None:
        raise RunError(f"{run.url}: not a run directory (no config.yaml and plan.json in it)")
    # No more than is needed: an older version's run may have settings that are no more.
    return ModelConfig.model_validate(config_of(run)["model"]), plan


def _pick(run: Storage, step: int | None, key: bytes | None) -> CheckpointInfo:
    from tst_ray.checkpoint import committed, verify

    root = run / "checkpoints"
    if step is None:
        info = find_good([root], lambda kind, **details: add_event(run, kind, **details), key=key)
        if info is None:
            raise RunError(f"{run.url}: has no checkpoint yet; nothing to export")
        return info
    found = [info for info in committed(root) if info.step == step]
    if not found:
        steps = ", ".join(str(info.step) for info in committed(root)) or "none"
        raise RunError(f"{run.url}: has no checkpoint of step {step}; it has {steps}")
    problem = verify(found[0], key=key)
    if problem:
        raise RunError(f"{found[0].folder.url}: is damaged ({problem})")
    return found[0]


def _publish(scratch: Path, target: Storage, is_ours: bool) -> None:
    """Move the finished folder into place: a reader never sees half of one.

    Args:
        is_ours: whether nobody else's files are there: it is the run directory's.

    Raises:
        RunError: other files are there, which would be lost.
    """
    json.loads((scratch / "config.json").read_text())  # written, and whole
    if not target.is_local:
        target.make()
        files = sorted(scratch.iterdir(), key=lambda path: (path.name == "config.json", path.name))
        for path in files:  # config.json last: without it, there is no model yet
            patiently(partial(target.upload, str(path), path.name))
        written = {path.name for path in files}
        for name in patiently(target.names):  # of an earlier export: a reader would take them first
            if _WEIGHTS.fullmatch(name) and name not in written:
                patiently(partial(target.remove, name))
        return
    place = Path(target.path)
    if others := [] if is_ours else _others(place, {path.name for path in scratch.iterdir()}):
        raise RunError(
            f"{place}: holds other files than a model ({others[0]}); name an empty or a new folder"
        )
    _let_others_read(scratch)
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    scratch.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _let_others_read(folder: Path) -> None:
    """Give each file the mode of config.json, which the umask decides: safetensors keeps its own to
    their owner."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _others(place: Path, written: set[str]) -> list[str]:
    """What a folder holds beside a model as it is written here, which replacing it would lose."""
    if not place.is_dir():
        return ["a file"] if place.exists() else []
    names = sorted(path.name for path in place.iterdir())
    return [name for name in names if name not in written and not _WEIGHTS.fullmatch(name)]
