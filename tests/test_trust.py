"""A checkpoint is data: whoever can write one can spoil a run, and cannot have it run code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pipelines.manifest import Manifest
from tests.test_bad_input import arguments, interrupted
from tests.test_runs import write_text
from tests.tiny import make_config, make_corpus, make_job, run_inline
from tst_ray import dcp_metadata
from tst_ray.checkpoint import MARKER, META, committed, find_good, folder_name
from tst_ray.cli import main
from tst_ray.config import load_config
from tst_ray.errors import ConfigError, RunError
from tst_ray.export import export_run
from tst_ray.report import checkpoint_facts
from tst_ray.sharded import read_full, write
from tst_ray.signing import read_key
from tst_ray.storage import Storage

Damage = Callable[[Path, "Evil"], None]


class Evil:
    """An object whose unpickling makes a file."""

    def __init__(self, traces: Path) -> None:
        self.traces = traces

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.traces),)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def evil(tmp_path: Path) -> Evil:
    return Evil(tmp_path / "evil-was-here")


def recommit(folder: Path) -> None:
    """Make a checkpoint's checksums right again, as whoever can write it can."""
    meta = json.loads((folder / META).read_text())
    for entry in meta["files"]:
        content = (folder / entry["name"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / META).write_text(json.dumps(meta))
    (folder / MARKER).write_text(hashlib.sha256((folder / META).read_bytes()).hexdigest() + "\n")


def read_metadata(folder: Path) -> Any:
    return dcp.FileSystemReader(folder).read_metadata()


def rewrite(folder: Path, **values: Any) -> None:
    """Write a checkpoint's files anew with other values among its tensors, as DCP does."""
    entries = read_metadata(folder).state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    read_full(Storage(str(folder)), state)
    named = {name.replace("__", "."): value for name, value in values.items()}
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, overwrite=True)
    dcp.save({**state, **named}, storage_writer=writer)
    recommit(folder)


def spoil_metadata(folder: Path, evil: Evil) -> None:
    """What DCP reads, with one object more in it."""
    metadata = read_metadata(folder)
    metadata.planner_data = evil
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    recommit(folder)


def spoil_tensor(folder: Path, evil: Evil) -> None:
    """An object in the place of a tensor."""
    name = next(iter(read_metadata(folder).state_dict_metadata))
    rewrite(folder, **{name: evil})


def spoil_settings(folder: Path, evil: Evil) -> None:
    """An object among the optimizer's settings, which older versions kept there."""
    rewrite(folder, optimizer__param_groups__0__lr=evil)


REFUSED: dict[str, tuple[Damage, str]] = {
    "metadata": (spoil_metadata, ".metadata asks for posix.mkdir, which no checkpoint needs"),
    "tensor": (spoil_tensor, "which is no tensor"),
}


# ---- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    """The storage of a run of 8 steps, of which the checkpoints of steps 2, 4 and 6 are left."""
    folder = tmp_path_factory.mktemp("begun")
    config = make_config(folder, manifest, checkpoint__every=2, checkpoint__keep=100)
    run_inline(make_job(config, manifest))
    shutil.rmtree(folder / "tiny" / "checkpoints" / folder_name(8))
    return folder


def resumed(folder: Path, manifest: Manifest, **settings: Any) -> list[dict[str, Any]]:
    config = make_config(folder, manifest, checkpoint__every=2, checkpoint__keep=100, **settings)
    records = run_inline(make_job(config, manifest))
    assert [record["step"] for record in records] == list(range(1, 9))
    return records


@pytest.fixture
def storage(tmp_path: Path, begun: Path) -> Path:
    shutil.copytree(begun, tmp_path / "storage")
    return tmp_path / "storage"


def at(storage: Path, step: int) -> Path:
    return storage / "tiny" / "checkpoints" / folder_name(step)


def events(storage: Path, kind: str) -> list[dict[str, Any]]:
    lines = (storage / "tiny" / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


@pytest.mark.parametrize("which", REFUSED)
def test_a_run_passes_by_a_checkpoint_that_asks_for_code(
    storage: Path, manifest: Manifest, evil: Evil, which: str
) -> None:
    spoil, said = REFUSED[which]
    spoil(at(storage, 6), evil)
    records = resumed(storage, manifest)
    assert not evil.traces.exists()
    (damaged,) = events(storage, "checkpoint_damaged")
    assert damaged["step"] == 6 and said in damaged["problem"]
    assert [record["attempt"] for record in records] == [1] * 4 + [2] * 4


def test_settings_that_older_versions_kept_are_not_read(
    storage: Path, manifest: Manifest, evil: Evil
) -> None:
    before = Storage(str(storage / "tiny")).read_lines("metrics.jsonl")
    spoil_settings(at(storage, 6), evil)
    after = resumed(storage, manifest)
    assert not evil.traces.exists()
    assert [record["attempt"] for record in after] == [1] * 6 + [2] * 2
    assert [record["loss"] for record in after] == [record["loss"] for record in before]


def test_a_checkpoint_of_an_older_version_is_gone_on_from(
    storage: Path, manifest: Manifest
) -> None:
    """Its files hold the optimizer's settings, too, and its format is 1."""
    before = Storage(str(storage / "tiny")).read_lines("metrics.jsonl")
    old = {"lr": 0.01, "betas": (0.9, 0.95), "params": ["hf_model.lm_head.weight"], "fused": True}
    rewrite(at(storage, 6), **{f"optimizer__param_groups__0__{k}": v for k, v in old.items()})
    meta = at(storage, 6) / META
    meta.write_text(meta.read_text().replace('"format": 2', '"format": 1'))
    recommit(at(storage, 6))
    assert [facts["state"] for facts in verified(storage / "tiny")] == ["committed"] * 3
    after = resumed(storage, manifest)
    assert [record["attempt"] for record in after] == [1] * 6 + [2] * 2
    assert [record["loss"] for record in after] == [record["loss"] for record in before]


def verified(run: Path, key: bytes | None = None) -> list[dict[str, Any]]:
    return checkpoint_facts(Storage(str(run)), verify_all=True, key=key)


@pytest.mark.parametrize("which", REFUSED)
def test_verification_says_so(storage: Path, evil: Evil, which: str) -> None:
    spoil, said = REFUSED[which]
    spoil(at(storage, 6), evil)
    newest, *others = verified(storage / "tiny")
    assert not evil.traces.exists()
    assert newest["state"] == "damaged" and said in newest["problem"]
    assert [facts["state"] for facts in others] == ["committed"] * 2


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A checkpoint's files, of tensors of many kinds."""
    (tmp_path / "files").mkdir()
    write(make_state(), tmp_path / "files")
    return tmp_path / "files"


def make_state() -> dict[str, Any]:
    kinds = [torch.bfloat16, torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn]
    return {"w": torch.ones(3, 4), **{str(kind): torch.ones(2).to(kind) for kind in kinds}}


def names_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_checkpoints_own_metadata_is_read(files: Path) -> None:
    content = (files / ".metadata").read_bytes()
    assert dcp_metadata.problem(content, names_of(files)) is None
    assert dcp_metadata.load(content).state_dict_metadata["w"].size == torch.Size([3, 4])


def test_only_tensors_are_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="hold tensors alone, not float"):
        write({"w": torch.ones(2), "lr": 0.1}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_reading_needs_no_verification_to_be_safe(tmp_path: Path, evil: Evil) -> None:
    """Another may have written the files since they were verified."""
    writer = dcp.FileSystemWriter(tmp_path / "entry", single_file_per_rank=True)
    dcp.save({"w": evil, "b": torch.ones(2)}, storage_writer=writer)
    (tmp_path / "names").mkdir()
    write({"w": torch.ones(2)}, tmp_path / "names")
    metadata = read_metadata(tmp_path / "names")
    metadata.planner_data = evil
    (tmp_path / "names" / ".metadata").write_bytes(pickle.dumps(metadata))
    for name, said in (("entry", "has no tensor w"), ("names", "asks for posix.mkdir")):
        for wanted in (torch.zeros(2), 0.5):
            with pytest.raises(OSError, match=said):
                read_full(Storage(str(tmp_path / name)), {"w": wanted})
    assert not evil.traces.exists()


def test_a_tensors_own_bytes_are_no_code(tmp_path: Path, evil: Evil) -> None:
    write({"w": torch.ones(2)}, tmp_path)
    place = next(iter(read_metadata(tmp_path).storage_data.values()))
    file, raw = tmp_path / place.relative_path, io.BytesIO()
    torch.save(evil, raw)
    file.write_bytes(raw.getvalue())
    metadata = read_metadata(tmp_path)
    next(iter(metadata.storage_data.values())).length = len(raw.getvalue())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(OSError, match="mkdir"):
        read_full(Storage(str(tmp_path)), {"w": torch.zeros(2)})
    assert not evil.traces.exists()


class Calls:
    """Unpickles to whatever a name says."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is damaged"),
        (b"\x80\x04rubbish", "is damaged"),
        (pickle.dumps({}), "holds no metadata"),
        (pickle.dumps(Calls(eval, "1")), "asks for builtins.eval"),
        (pickle.dumps(Calls(getattr, torch.Size, "mro")), "asks for builtins.getattr"),
        (b"ctorch\nhub.load\n.", "asks for torch.hub.load"),
        (b"ctorch\nload\n.", "asks for torch.load"),
        (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
        (b"ctorch.distributed.checkpoint.metadata\nos\n.", r"metadata.os"),
    ],
)
def test_what_is_no_metadata_is_refused(content: bytes, said: str) -> None:
    problem = dcp_metadata.problem(content, ())
    assert problem is not None and said in problem and "\n" not in problem
    with pytest.raises(ValueError, match=said):
        dcp_metadata.load(content)


def test_verification_changes_no_class_that_a_pickle_names() -> None:
    """A pickle can set what a class has, and not only what an object has."""
    evil = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n(N}S'spoilt'\nI1\nstb."
    from torch.distributed.checkpoint.metadata import MetadataIndex

    assert dcp_metadata.problem(evil, ()) is not None
    assert not hasattr(MetadataIndex, "spoilt")


def test_metadata_speaks_of_the_checkpoints_own_files_alone(files: Path) -> None:
    metadata = read_metadata(files)
    first = next(iter(metadata.storage_data))
    metadata.storage_data[first].relative_path = "../../secret"
    problem = dcp_metadata.problem(pickle.dumps(metadata), names_of(files))
    assert problem == ".metadata speaks of '../../secret', no file of the checkpoint"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda meta: meta["files"].append(dict(meta["files"][0], name="../../x")), "names '../.."),
        (lambda meta: meta["files"].append(dict(meta["files"][0], name="..")), "names '..'"),
        (lambda meta: meta["files"].append(dict(meta["files"][0], name="/x")), "names '/x'"),
        (lambda meta: meta["files"].append({"name": "x"}), "misspells 'bytes'"),
        (lambda meta: meta["files"][0].update(bytes="many"), "without a name, a size"),
        (lambda meta: meta.update(files=7), "misses or misspells"),
        (lambda meta: meta.update(step=12), "is that of step 12"),
        (lambda meta: meta.update(world_size=None), "has no world_size"),
        (lambda meta: meta.pop("world_size"), "misspells 'world_size'"),
        (
            lambda meta: meta.update(files=[e for e in meta["files"] if e["name"] != ".metadata"]),
            "lists no .metadata",
        ),
    ],
)
def test_meta_json_speaks_of_the_checkpoints_own_files_alone(
    storage: Path, change: Callable[[Any], Any], said: str
) -> None:
    folder = at(storage, 6)
    meta = json.loads((folder / META).read_text())
    change(meta)
    (folder / META).write_text(json.dumps(meta))
    (folder / MARKER).write_text(hashlib.sha256((folder / META).read_bytes()).hexdigest())
    newest = verified(storage / "tiny")[0]
    assert newest["state"] == "damaged" and said in newest["problem"]


def test_a_meta_json_that_is_too_deep_is_damage(storage: Path) -> None:
    folder = at(storage, 6)
    (folder / META).write_text("[" * 200_000)
    (folder / MARKER).write_text(hashlib.sha256((folder / META).read_bytes()).hexdigest())
    assert "nested too deeply" in verified(storage / "tiny")[0]["problem"]


# ---- export ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the whole command, with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    args = arguments(folder, write_text(folder / "text"), checkpoint__every=2)
    assert main(["run", *args]) == 0
    return folder


@pytest.mark.parametrize("which", REFUSED)
def test_export_runs_no_code(finished: Path, tmp_path: Path, evil: Evil, which: str) -> None:
    shutil.copytree(finished / "bad", tmp_path / "run")
    run = Storage(str(tmp_path / "run"))
    spoil, said = REFUSED[which]
    spoil(tmp_path / "run" / "checkpoints" / folder_name(4), evil)
    with pytest.raises(RunError, match=said):
        export_run(run, str(tmp_path / "model"), step=4)
    assert export_run(run, str(tmp_path / "model"))[0] == 2
    assert not evil.traces.exists()


def test_the_commands_refuse_it_in_a_line(
    finished: Path, tmp_path: Path, evil: Evil, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished / "bad", tmp_path / "run")
    for step in (2, 4):
        spoil_metadata(tmp_path / "run" / "checkpoints" / folder_name(step), evil)
    assert main(["checkpoints", str(tmp_path / "run"), "--verify"]) == 1
    said = capsys.readouterr()
    assert "asks for posix.mkdir" in said.out and "none of its 2 checkpoints is good" in said.err
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 1
    said = capsys.readouterr()
    assert "step 4: .metadata asks for posix.mkdir" in said.err and "Traceback" not in said.err
    assert not evil.traces.exists()


def test_others_cannot_read_a_runs_settings(tmp_path: Path, finished: Path) -> None:
    """They are in config.yaml and plan.json, and TensorBoard shows them; the rest is to be read."""
    before = os.umask(0o022)
    try:
        assert main(["run", *arguments(tmp_path, finished / "text")]) == 0
    finally:
        os.umask(before)
    run = tmp_path / "bad"
    for_others = {
        path.name for path in run.iterdir() if path.stat().st_mode & (5 if path.is_dir() else 4)
    }
    kept = {path.name for path in run.iterdir()} - for_others
    assert {"config.yaml", "plan.json", "tensorboard"} <= kept
    assert {"run.json", "metrics.jsonl", "events.jsonl", "checkpoints"} <= for_others
    for name in ("config.yaml", "plan.json"):
        assert (run / name).stat().st_mode & 0o777 == 0o640
    assert (run / "tensorboard").stat().st_mode & 0o777 == 0o750


# ---- signatures --------------------------------------------------------------------------------


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    return path


def unsign(folder: Path) -> None:
    (folder / MARKER).write_text((folder / MARKER).read_text().splitlines()[0] + "\n")


def forge_weights(folder: Path) -> None:
    """Other weights, all checksums right again, and the signature that was there."""
    signature = (folder / MARKER).read_text().splitlines()[1]
    file = next(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    recommit(folder)
    with (folder / MARKER).open("a") as marker:
        marker.write(signature + "\n")


def rename_older(folder: Path) -> None:
    """An older checkpoint, rightly signed, in the place of a newer one."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name(folder_name(4)), folder)


FORGERIES = {
    unsign: "it is not signed, and checkpoint.key_file is set",
    forge_weights: "its signature is not by the key in checkpoint.key_file",
    rename_older: "is that of step 4",
}


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
def test_what_the_key_did_not_sign_is_passed_by(
    tmp_path: Path, manifest: Manifest, key_file: Path, forge: Callable[[Path], None]
) -> None:
    storage = tmp_path / "storage"
    settings = {"checkpoint__key_file": key_file}
    whole = resumed(storage, manifest, **settings)
    assert [f["state"] for f in verified(storage / "tiny", read_key(str(key_file)))] == [
        "committed"
    ] * 4
    shutil.rmtree(at(storage, 8))
    forge(at(storage, 6))
    assert FORGERIES[forge] in verified(storage / "tiny", read_key(str(key_file)))[0]["problem"]
    records = resumed(storage, manifest, **settings)
    (damaged,) = events(storage, "checkpoint_damaged")
    assert damaged["step"] == 6 and FORGERIES[forge] in damaged["problem"]
    assert [record["attempt"] for record in records] == [1] * 4 + [2] * 4
    assert [record["loss"] for record in records] == [record["loss"] for record in whole]


def test_the_key_is_in_no_file_of_the_run(
    tmp_path: Path, manifest: Manifest, key_file: Path
) -> None:
    resumed(tmp_path / "storage", manifest, checkpoint__key_file=key_file)
    key = key_file.read_bytes().strip()
    written = [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]
    assert written and not [path for path in written if key in path.read_bytes()]


def test_a_node_without_the_key_says_so(tmp_path: Path, manifest: Manifest, key_file: Path) -> None:
    """Each worker reads it by itself; the driver's has been read by then."""
    job = make_job(make_config(tmp_path, manifest, checkpoint__key_file=key_file), manifest)
    key_file.unlink()
    with pytest.raises(RunError, match=rf"key_file = {key_file}: cannot be read .* every node"):
        run_inline(job)


def test_another_key_is_refused_and_the_right_one_is_not(
    tmp_path: Path, manifest: Manifest, key_file: Path
) -> None:
    storage = tmp_path / "storage"
    resumed(storage, manifest, checkpoint__key_file=key_file)
    root = Storage(str(storage / "tiny" / "checkpoints"))
    with pytest.raises(RunError, match=r"step 8: its signature is not by the key"):
        find_good([root], lambda kind, **details: None, key=b"another key of some length")
    good = find_good([root], lambda kind, **details: None, key=read_key(str(key_file)))
    assert good is not None and good.step == 8
    without = find_good([root], lambda kind, **details: None)
    assert without is not None and without.step == 8
    assert committed(root)[0].step == 8


def test_the_commands_take_the_key(
    finished: Path, tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not only from config.yaml, which lies where the checkpoints do."""
    run = tmp_path / "bad"
    shutil.copytree(finished / "bad", run)
    asked = ["--key-file", str(key_file)]
    assert main(["checkpoints", str(run), "--verify"]) == 0
    assert main(["checkpoints", str(run), "--verify", *asked]) == 1
    assert "it is not signed" in capsys.readouterr().out
    assert main(["export", str(run), "--to", str(tmp_path / "model"), *asked]) == 1
    assert "it is not signed, and checkpoint.key_file is set" in capsys.readouterr().err
    assert main(["export", str(run), "--key-file", str(tmp_path / "gone")]) == 1
    assert f"key_file = {tmp_path}/gone: cannot be read" in capsys.readouterr().err


def test_a_whole_run_is_signed_and_exported(
    finished: Path, tmp_path: Path, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = {"checkpoint__key_file": key_file, "checkpoint__every": 2}
    args = arguments(tmp_path, finished / "text", **key)
    assert main(["run", *args]) == 0
    assert main(["checkpoints", str(tmp_path / "bad"), "--verify"]) == 0  # by its own key_file
    interrupted(tmp_path / "bad")
    unsign(tmp_path / "bad" / "checkpoints" / folder_name(2))
    capsys.readouterr()
    assert main(["run", *args]) == 1
    assert "it is not signed, and checkpoint.key_file is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory); give a file that every node can read"),
        (b"", "holds 0 bytes, and a key has at least 16"),
        (b" \n", "holds 0 bytes"),
        (b"short\n", "holds 5 bytes"),
    ],
)
def test_a_key_that_is_none_is_refused_before_the_start(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"checkpoint\.key_file = ") as refused:
        load_config(None, [f"--checkpoint.key_file={path}"])
    assert said in str(refused.value)


def test_a_key_files_path_is_the_same_everywhere(
    tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="give the full path"):
        load_config(None, ["--checkpoint.key_file=key"])
    monkeypatch.setenv("HOME", str(tmp_path))
    load_config(None, ["--checkpoint.key_file=~/key"])
