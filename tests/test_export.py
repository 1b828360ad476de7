"""The model folder: what plain `transformers` loads gives the logits that training computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig

from tests.chaos import small_filesystem
from tests.test_bad_input import arguments, interrupted
from tests.test_runs import SETTINGS, write_text
from tst_ray.checkpoint import committed
from tst_ray.cli import main
from tst_ray.errors import RunError
from tst_ray.export import _publish, export_run, sample_text
from tst_ray.storage import Storage


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    folder = tmp_path_factory.mktemp("export")
    text = write_text(folder / "text")
    args = arguments(folder, text, checkpoint__every=2)
    assert main(["run", *args]) == 0
    return Storage(str(folder / "bad"))


def test_its_logits_are_the_trainers(run: Storage, tmp_path: Path) -> None:
    """Against the weights of the checkpoint, put into a model by name, one by one."""
    from torch.distributed.checkpoint import FileSystemReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tst_ray.sharded import read_full

    model = AutoModelForCausalLM.from_pretrained(run.at("model"))
    newest = committed(run / "checkpoints")[0]
    entries = FileSystemReader(newest.folder.path).read_metadata().state_dict_metadata
    prefix = "model.hf_model."
    saved = {n: torch.empty(e.size) for n, e in entries.items() if n.startswith(prefix)}
    read_full(newest.folder, saved)
    trained = AutoModelForCausalLM.from_config(model.config)
    trained.load_state_dict({n.removeprefix(prefix): tensor for n, tensor in saved.items()})
    tokens = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, trained.eval()(tokens).logits)
    assert AutoTokenizer.from_pretrained(run.at("model")).vocab_size == model.config.vocab_size


def test_any_checkpoint_can_be_exported(run: Storage, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, first = export_run(run, str(tmp_path / "first"), step=2)
    weights = load_file(f"{first}/model.safetensors")
    last = load_file(run.at("model/model.safetensors"))
    assert any(not torch.equal(weights[name], last[name]) for name in last)
    with pytest.raises(RunError, match="has no checkpoint of step 3; it has 4, 2"):
        export_run(run, str(tmp_path / "third"), step=3)


def test_the_command_writes_it_again(
    run: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", run.url, "--to", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "again")
    written = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == Path(
        run.at("model/model.safetensors")
    ).read_bytes()


def test_the_attention_of_the_run_is_not_needed(run: Storage, tmp_path: Path) -> None:
    """It may be to be had on GPUs alone."""
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    config = yaml.safe_load(run.read("config.yaml"))
    config["model"]["attention"] = "owner/no_such_kernel"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    _, folder = export_run(Storage(str(copy)), str(tmp_path / "model"))
    assert "no_such_kernel" not in Path(folder, "config.json").read_text()


@pytest.mark.parametrize("source", ["changed", "gone"])
def test_a_run_goes_on_with_the_model_that_it_began_with(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], source: str
) -> None:
    fields = yaml.safe_load(SETTINGS["model.config"])
    config = LlamaConfig(**{k: v for k, v in fields.items() if k != "model_type"})
    config.save_pretrained(folder := tmp_path / "source")
    text = write_text(tmp_path / "text")
    args = arguments(tmp_path, text, checkpoint__every=2, model__source=folder, model__config=None)
    assert main(["run", *args]) == 0
    model = tmp_path / "bad" / "model"
    first = {path.name: path.read_bytes() for path in model.iterdir()}
    interrupted(tmp_path / "bad")
    shutil.rmtree(folder)
    if source == "changed":
        config.hidden_act, config.rope_parameters = "gelu", {"rope_theta": 7.0}
        config.save_pretrained(folder)
    capfd.readouterr()
    assert main(["run", *args]) == 0
    said = " ".join(capfd.readouterr().out.split())
    told = "began (hidden_act, rope_parameters); it goes on with those that it began with"
    assert (told in said) == (source == "changed")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == first


def test_a_run_of_an_older_version_reads_its_model_anew(run: Storage, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    plan = run.read_json("plan.json")
    assert plan.pop("model")["hidden_act"] == "silu"
    (copy / "plan.json").write_text(json.dumps(plan))
    _, folder = export_run(Storage(str(copy)), str(tmp_path / "model"))
    assert Path(folder, "config.json").read_bytes() == run.read("model/config.json")


def test_a_folder_with_other_files_is_left_alone(run: Storage, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(RunError, match="holds other files than a model"):
        export_run(run, str(tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_model_is_replaced_where_it_is_all_there_is(run: Storage, tmp_path: Path) -> None:
    place = tmp_path / "model"
    export_run(run, str(place), step=2)
    (place / "model-00001-of-00002.safetensors").write_text("of a larger one")
    export_run(run, str(place))
    assert not (place / "model-00001-of-00002.safetensors").exists()
    (place / "notes").mkdir()
    (place / "notes" / "precious.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds other files than a model \(notes\); name an empty"):
        export_run(run, str(place))
    assert (place / "notes" / "precious.txt").read_text() == "mine"
    Path(run.at("model/README.md")).write_text("of an older version")
    export_run(run)  # its own folder is the run's


def test_samples_are_text(run: Storage) -> None:
    samples = sample_text(run.at("model"), num_samples=2, length=5)
    assert len(samples) == 2
    assert all(isinstance(sample, str) for sample in samples)


def test_status_tells_where_it_stands(run: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", run.url]) == 0
    said = capsys.readouterr().out
    assert "finished" in said and "step 4 of 4" in said and "newest checkpoint: step 4" in said


def test_a_local_model_needs_no_temporary_folder(
    run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That may be small, as a job's memory-backed one is."""
    with small_filesystem(tmp_path / "small", 1) as small:
        (small / "filler").write_bytes(b"x" * (1 << 20))
        monkeypatch.setattr("tempfile.tempdir", str(small))
        _, folder = export_run(run, str(tmp_path / "model"))
    assert json.loads(Path(folder, "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "small"]


def test_a_model_for_which_there_is_no_room_is_told_in_a_line(
    run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_filesystem(tmp_path / "small", 1) as small:
        monkeypatch.setattr("tempfile.tempdir", str(small))
        (small / "filler").write_bytes(b"x" * (1 << 20))
        with pytest.raises(RunError, match=r"small: the model takes .* set TMPDIR to a larger"):
            export_run(run, "memory://far/model")
        with pytest.raises(RunError, match=r"small: the model takes .* make room there, then run"):
            export_run(run, str(small / "model"))
        # as where others fill it meanwhile
        usage = SimpleNamespace(free=1 << 40)
        monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
        with pytest.raises(RunError, match=r"small: is full \(.*set TMPDIR to a larger"):
            export_run(run, "memory://far/model")
        assert [path.name for path in small.iterdir()] == ["filler"]


def test_an_object_store_keeps_no_weights_of_an_earlier_export(tmp_path: Path) -> None:
    """transformers would take a single file of weights before the shards of a newer model."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-00001-of-00001.safetensors").write_text("new")
    target = Storage("memory://earlier/model")
    target.write("model.safetensors", "old")
    target.write("notes.txt", "somebody's")
    _publish(tmp_path, target, is_ours=True)
    kept = {"config.json", "model-00001-of-00001.safetensors", "notes.txt"}
    assert set(target.names()) == kept
