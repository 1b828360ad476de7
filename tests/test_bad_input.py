"""Bad input ends with one clear line and exit status 1 or 2; nothing is overwritten.

In process, without Ray: what is refused is refused before a worker group would start.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from pipelines.manifest import Manifest, verify_shards
from tests.test_runs import SETTINGS, write_text
from tests.test_tokenize import number_shards
from tst_ray.cli import main
from tst_ray.storage import Storage


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "files")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A prepared folder of the text."""
    cache = tmp_path_factory.mktemp("shards")
    assert main(["prepare", *arguments(cache, text)]) == 0
    (folder,) = [path.parent for path in cache.rglob("manifest.json")]
    return folder


@pytest.fixture
def copied(tmp_path: Path, shards: Path) -> Path:
    """The prepared folder again, to be damaged."""
    shutil.copytree(shards, tmp_path / "copied")
    return tmp_path / "copied"


def arguments(storage: Path, text: Any, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        **SETTINGS,
        "data.sources": text,
        "run.storage": storage,
        "run.name": "bad",
        "cluster.backend": "inline",
        "cluster.workers": 1,
        "train.steps": 4,
        "tst.ratio": 0.5,
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in settings.items() if value is not None]


def prepared(folder: Path) -> dict[str, Any]:
    return {"data__sources": None, "data__prepared": folder}


def refused(capsys: pytest.CaptureFixture[str], status: int, args: list[str]) -> str:
    """What a refused command says; it must be lines for people, in the given exit status."""
    assert main(["run", *args]) == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.startswith("tst-ray: ")
    return said


Capsys = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("train.batch_size", 0, "train.batch_size = 0"),
        ("train.batch_size", -4, "train.batch_size = -4"),
        ("tst.ratio", 1.0, "tst.ratio = 1"),
        ("tst.ratio", -0.1, "tst.ratio = -0.1"),
        ("tst.weighting", "linear", 'tst.weighting = "linear"'),
        ("tst.bag_size", 0, "tst.bag_size = 0"),
        ("train.stepz", 5, "train.steps"),
        ("run.seed", 2**64, "must be at most 18,446,744,073,709,551,615"),
        ("data.vocab_size", 2**40, "must be at most 16,777,216"),
        ("nonsense.field", 1, "nonsense"),
        ("train.steps", "many", 'train.steps = "many"'),
    ],
)
def test_settings_out_of_range(
    capsys: Capsys, tmp_path: Path, text: Path, field: str, value: Any, said: str
) -> None:
    args = [a for a in arguments(tmp_path, text) if not a.startswith(f"--{field}=")]
    assert said in refused(capsys, 2, [*args, f"--{field}={value}"])
    assert not (tmp_path / "bad").exists()


def test_several_errors_come_at_once(capsys: Capsys, tmp_path: Path, text: Path) -> None:
    args = arguments(tmp_path, text, train__batch_size=0, tst__ratio=2, tst__weighting="x")
    said = refused(capsys, 2, args)
    assert all(field in said for field in ("train.batch_size", "tst.ratio", "tst.weighting"))


def test_a_missing_corpus(capsys: Capsys, tmp_path: Path) -> None:
    said = refused(capsys, 2, arguments(tmp_path, "/nowhere"))
    assert said == "tst-ray: data.sources = /nowhere: not found; correct the path\n"
    said = refused(capsys, 2, arguments(tmp_path, "/nowhere/*.txt"))
    assert said.startswith("tst-ray: data.sources = /nowhere/*.txt: there is no folder /nowhere")


@pytest.mark.parametrize("command", ["run", "prepare", "plan"])
def test_missing_shards_and_tokenizers(
    capsys: Capsys, tmp_path: Path, text: Path, command: str
) -> None:
    """Bad usage, told by the setting, before anything starts."""
    missing = arguments(tmp_path, text, **prepared(tmp_path / "none"))
    assert main([command, *missing]) == 2
    line = f"tst-ray: data.prepared = {tmp_path}/none: no folder of shards (no manifest.json in it)"
    assert capsys.readouterr().err.startswith(line)
    if command != "plan":
        assert main([command, *arguments(tmp_path, text, data__tokenizer="./none")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("tst-ray: data.tokenizer = ./none: cannot be loaded (no such folder")


def test_a_picture_is_refused_by_name(capsys: Capsys, tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7")
    said = refused(capsys, 2, arguments(tmp_path, tmp_path / "a.pdf"))
    assert said.startswith(f"tst-ray: data.sources = {tmp_path}/a.pdf: is no file of text; convert")


def test_a_held_out_share_far_from_the_one_asked_for_is_told(capfd: Capsys, tmp_path: Path) -> None:
    """One of six short documents has nearly all of the text."""
    (tmp_path / "text").mkdir()
    for number in range(6):
        words = f"some words {number}\n" * (38 if number == 3 else 1)
        (tmp_path / "text" / f"{number}.txt").write_text(words)
    args = arguments(tmp_path / "runs", tmp_path / "text", data__validation_share=0.3)
    assert main(["prepare", *args]) == 0
    said = capfd.readouterr().err
    assert re.search(r"held out for validation are [\d.]+% of text, where data\.validation_share "
                     r"asks for 30\.00%: ", said)  # fmt: skip


def test_an_empty_corpus(capsys: Capsys, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, 2, arguments(tmp_path, tmp_path / "empty"))
    (tmp_path / "empty" / "blank.txt").write_text("")
    assert "empty" in refused(capsys, 2, arguments(tmp_path, tmp_path / "empty"))


def test_text_that_does_not_decode(capsys: Capsys, tmp_path: Path, text: Path) -> None:
    shutil.copytree(text, tmp_path / "text")
    (tmp_path / "text" / "latin.txt").write_bytes("café\n".encode("latin-1") * 50)
    said = refused(
        capsys, 1, arguments(tmp_path / "a", tmp_path / "text", data__undecodable="refuse")
    )
    assert "latin.txt" in said
    args = arguments(tmp_path / "b", tmp_path / "text")
    assert main(["prepare", *args, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [source["skipped"] for source in facts["sources"].values()] == [1]


def test_a_run_does_not_feed_on_its_own_output(capsys: Capsys, tmp_path: Path, text: Path) -> None:
    shutil.copytree(text, source := tmp_path / "source")
    args = arguments(source / "runs", source, data__cache=source / "shards")
    facts = []
    for _ in range(2):
        capsys.readouterr()
        assert main(["prepare", *args, "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
        assert main(["run", *args]) == 0
    assert facts[0] == facts[1]
    assert facts[0]["sources"]["source"]["documents"] == len(list(text.iterdir()))


def test_text_that_is_left_out_is_told(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text("some words to train on\n" * 30)
    (tmp_path / "text" / "latin.txt").write_bytes("café\n".encode("latin-1") * 50)
    assert main(["run", *arguments(tmp_path / "runs", tmp_path / "text")]) == 0
    said = capfd.readouterr().out
    assert "text: left out 1 texts (latin.txt: not UTF-8 at byte 3" in said


def test_a_model_that_cannot_be_is_told_before_the_text_is_tokenized(
    capsys: Capsys, tmp_path: Path, text: Path
) -> None:
    args = [a for a in arguments(tmp_path, text) if not a.startswith("--model.config")]
    said = refused(capsys, 2, [*args, "--model.config={model_type: lama, hidden_size: 16}"])
    assert "did you mean llama?" in said
    assert not (tmp_path / "shards").exists()


def test_a_field_that_no_model_reads_is_told(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, shards: Path
) -> None:
    args = arguments(tmp_path / "runs", None, **prepared(shards))
    args += ["--model.config.num_layers=24", "--model.config.rope_theta=5000.0"]
    assert main(["run", *args]) == 0
    said = capfd.readouterr().out
    assert "model.config.num_layers: llama has no such field; it is ignored" in said
    assert said.count("it is ignored") == 1


def test_a_gpu_that_is_not_there_is_told_before_the_text_is_tokenized(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = refused(capsys, 2, arguments(tmp_path, text, cluster__gpus_per_worker=1))
    assert said.startswith("tst-ray: cluster.gpus_per_worker = 1: torch sees no GPU")
    assert not (tmp_path / "shards").exists()


def test_an_error_of_training_is_told_in_a_line(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: Path
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr("tst_ray.worker.Trainer.train_step", fails)
    said = refused(capsys, 1, arguments(tmp_path, None, **prepared(shards)))
    assert said.startswith(f"tst-ray: {tmp_path / 'bad'}: RuntimeError: out of memory and more; ")
    events = Storage(str(tmp_path / "bad")).read_lines("events.jsonl")
    (traceback,) = [event["traceback"] for event in events if event["event"] == "error"]
    assert "train_phases" in traceback and "in fails" in traceback


def test_settings_that_prepared_shards_do_not_heed_are_told(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, shards: Path
) -> None:
    changes = {"data__row_tokens": 128, "data__validation_share": 0.5, "data__undecodable": "skip"}
    assert main(["prepare", *arguments(tmp_path, None, **prepared(shards), **changes)]) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "ignored" in line]
    assert said == [
        "data.row_tokens = 128: is ignored with data.prepared; the shards were made with 512",
        "data.validation_share = 0.5: is ignored with data.prepared; the shards were made with 0.1",
    ]


def test_an_override_without_its_sign_is_explained(capsys: Capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--train.steps", "2000"])
    said = capsys.readouterr().err
    assert "unrecognized arguments: 2000; write --section.field=value" in said


def test_sigterm_while_nothing_trains_is_told(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path
) -> None:
    """Ray's handler of SIGTERM, which is there until a stage trains, exits with its number."""

    def terminated(*args: Any) -> None:
        raise SystemExit(signal.SIGTERM)

    monkeypatch.setattr("tst_ray.coordinator.prepare_corpus", terminated)
    said = refused(capsys, 143, arguments(tmp_path, text))
    assert said == "tst-ray: terminated; the same command resumes the run\n"


def first_shard(folder: Path) -> Path:
    manifest = Manifest.load(str(folder))
    return folder / manifest.sources[0].train.shards[0].file


def test_a_shard_cut_short(capsys: Capsys, tmp_path: Path, copied: Path) -> None:
    shard = first_shard(copied)
    shard.write_bytes(shard.read_bytes()[:-10])
    said = refused(capsys, 1, arguments(tmp_path / "runs", None, **prepared(copied)))
    assert shard.name in said and "bytes instead of" in said


def test_an_altered_shard(capsys: Capsys, tmp_path: Path, copied: Path) -> None:
    shard = first_shard(copied)
    content = bytearray(shard.read_bytes())
    for position in range(200, 1_000):
        content[position] ^= 0xFF
    shard.write_bytes(bytes(content))
    said = refused(capsys, 1, arguments(tmp_path / "runs", None, **prepared(copied)))
    assert shard.name in said


def test_shards_that_moved_are_found_where_they_are_now(
    capsys: Capsys, tmp_path: Path, copied: Path
) -> None:
    """The run goes on with them, and so does the export, which needs their tokenizer."""
    runs, moved = tmp_path / "runs", tmp_path / "moved"
    assert main(["run", *arguments(runs, None, **prepared(copied))]) == 0
    copied.rename(moved)
    shutil.rmtree(runs / "bad" / "model")
    capsys.readouterr()
    assert main(["export", str(runs / "bad")]) == 1
    assert "tokenizer: cannot be loaded (no such folder); run `tst-ray" in capsys.readouterr().err
    assert main(["run", *arguments(runs, None, **prepared(moved))]) == 0
    assert json.loads((runs / "bad" / "plan.json").read_text())["shards"] == str(moved)
    assert (runs / "bad" / "model" / "tokenizer.json").exists()


def test_a_folder_of_shards_that_is_given_is_the_one_that_is_read(
    capsys: Capsys, tmp_path: Path, copied: Path, text: Path
) -> None:
    """Also where those that the run began with are still there."""
    runs = tmp_path / "runs"
    args = arguments(runs, None, **prepared(copied), checkpoint__every=2)
    assert main(["run", *args]) == 0
    interrupted(run := runs / "bad")
    other = tmp_path / "other"
    assert main(["prepare", *arguments(other, text, data__validation_share=0.3)]) == 0
    (other,) = [path.parent for path in other.rglob("manifest.json")]
    for folder, said in ((tmp_path / "nowhere", "no folder of"), (other, "holds another corpus")):
        capsys.readouterr()
        assert said in refused(capsys, 2, arguments(runs, None, **prepared(folder)))
    shutil.copytree(copied, tmp_path / "second")
    assert main(["run", *arguments(runs, None, **prepared(tmp_path / "second"))]) == 0
    assert json.loads((run / "plan.json").read_text())["shards"] == str(tmp_path / "second")


@pytest.mark.parametrize("how", ["moved", "damaged"])
def test_text_that_has_grown_does_not_keep_a_run_from_its_own_shards(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for name in ("MIN_UNIT_BYTES", "MAX_UNIT_BYTES"):
        monkeypatch.setattr(f"pipelines.corpus.{name}", 2**14)
    shutil.copytree(text, grown := tmp_path / "text")
    args = arguments(tmp_path, grown, checkpoint__every=2, data__cache=tmp_path / "cache")
    assert main(["run", *args]) == 0
    interrupted(run := tmp_path / "bad")
    (grown / "z.txt").write_text("text that was added\n" * 300)
    (folder,) = (tmp_path / "cache").iterdir()
    if how == "moved":
        (tmp_path / "cache").rename(tmp_path / "moved")
        args = arguments(tmp_path, grown, checkpoint__every=2, data__cache=tmp_path / "moved")
        folder = tmp_path / "moved" / folder.name
    else:
        first_shard(folder).unlink()
    assert main(["run", *args]) == 0
    assert json.loads((run / "plan.json").read_text())["shards"] == str(folder)
    assert (run / "model" / "model.safetensors").exists()


def interrupted(run: Path) -> None:
    """Leave a run of four steps as if it had been stopped after two."""
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "model")


@pytest.mark.parametrize("how", ["damaged", "of a later text"])
def test_a_manifest_that_is_not_the_runs_is_saved_again(
    capsys: Capsys, tmp_path: Path, text: Path, how: str
) -> None:
    args = arguments(tmp_path, text, checkpoint__every=2)
    assert main(["run", *args]) == 0
    interrupted(run := tmp_path / "bad")
    path = run / "manifest.json"
    content = path.read_text()
    later = json.loads(content)
    later["sources"][0]["train"]["shards"].pop()
    path.write_text("\0" * 4096 if how == "damaged" else json.dumps(later))
    assert main(["run", *args]) == 0
    assert json.loads(path.read_text()) == json.loads(content)
    assert (run / "model" / "model.safetensors").exists()


def test_shards_that_are_made_again_under_other_names_are_those_of_the_run(
    tmp_path: Path, text: Path
) -> None:
    args = arguments(tmp_path, text, checkpoint__every=2)
    assert main(["run", *args]) == 0
    interrupted(run := tmp_path / "bad")
    folder = next((tmp_path / "shards").iterdir())
    number_shards(str(folder))
    shutil.copy(folder / "manifest.json", run / "manifest.json")
    first_shard(folder).unlink()
    assert main(["run", *args]) == 0
    verify_shards(Manifest.load(str(folder), str(run / "manifest.json")))


def test_shards_of_another_tokenizer(capsys: Capsys, tmp_path: Path, copied: Path) -> None:
    path = copied / "tokenizer" / "tokenizer.json"
    path.write_text(
        path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    said = refused(capsys, 1, arguments(tmp_path / "runs", None, **prepared(copied)))
    assert "fingerprint" in said and "tokenizer" in said


@pytest.mark.parametrize("how", ["missing", "altered"])
def test_a_run_whose_tokenizer_is_no_longer_the_shards(
    capsys: Capsys, tmp_path: Path, copied: Path, how: str
) -> None:
    """Refused before it trains on, and not published; also where the shards are as they were."""
    args = arguments(tmp_path, None, **prepared(copied), checkpoint__every=2)
    assert main(["run", *args]) == 0
    interrupted(run := tmp_path / "bad")
    path = copied / "tokenizer" / "tokenizer.json"
    if how == "missing":
        shutil.rmtree(path.parent)
    else:
        path.write_text(
            path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true')
        )
    capsys.readouterr()
    said = refused(capsys, 1, args)
    assert f"{copied}/tokenizer" in said and "run `tst-ray prepare` again" in said
    assert not (run / "checkpoints" / "step-00000004").exists()
    assert main(["export", str(run)]) == 1
    assert f"{copied}/tokenizer" in capsys.readouterr().err
    assert not (run / "model").exists()


def test_a_token_beyond_the_vocabulary(capsys: Capsys, tmp_path: Path, copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["vocab_size"] = 270
    (copied / "manifest.json").write_text(json.dumps(manifest))
    said = refused(capsys, 1, arguments(tmp_path / "runs", None, **prepared(copied)))
    assert "270" in said and "token" in said


def test_sequences_longer_than_the_corpus(capsys: Capsys, tmp_path: Path, shards: Path) -> None:
    changes = {
        "train__sequence_length": 64,
        "tst__bag_size": 4_096,
        "train__batch_size": 1,
        **prepared(shards),
    }
    said = refused(capsys, 1, arguments(tmp_path / "runs", None, **changes))
    assert "fewer than the 266,240" in said


def test_positions_beyond_the_model(capsys: Capsys, tmp_path: Path, shards: Path) -> None:
    changes = {"train__sequence_length": 128, **prepared(shards)}
    said = refused(capsys, 2, arguments(tmp_path / "runs", None, **changes))
    assert "max_position_embeddings" in said and "128" in said


def test_more_workers_than_this_machine_can_hold(
    capsys: Capsys, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    changes = {"cluster__backend": "ray", "cluster__workers": 500, "train__batch_size": 1000}
    said = refused(capsys, 2, arguments(tmp_path, text, **changes))
    assert "cluster.workers = 500: needs 500 CPUs" in said


def test_storage_that_cannot_be_written(capsys: Capsys, tmp_path: Path, text: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "run.storage" in refused(capsys, 1, arguments(tmp_path / "file" / "runs", text))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_directory_of_another_config(capsys: Capsys, tmp_path: Path, shards: Path) -> None:
    args = arguments(tmp_path, None, **prepared(shards))
    assert main(["run", *args]) == 0
    capsys.readouterr()
    files = {p: p.read_bytes() for p in (tmp_path / "bad").rglob("*") if p.is_file()}
    other = arguments(tmp_path, None, **prepared(shards), train__learning_rate=0.5)
    said = refused(capsys, 2, other)
    assert "train.learning_rate: run has 0.002, now 0.5" in said
    for path, content in files.items():
        if path.name != "driver.lock":
            assert path.read_bytes() == content, path


def test_a_damaged_last_checkpoint_is_trained_again(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, shards: Path
) -> None:
    """Never an older model in silence: back to the checkpoint before, and on from there."""
    args = arguments(tmp_path, None, **prepared(shards), checkpoint__every=2)
    assert main(["run", *args]) == 0
    run = tmp_path / "bad"
    model = (run / "model" / "model.safetensors").read_bytes()
    data = next((run / "checkpoints" / "step-00000004").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    capfd.readouterr()
    assert main(["run", *args]) == 0
    assert "the last checkpoint is damaged; going back to step 2" in capfd.readouterr().out
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "checkpoint_damaged"] == [4]
    assert (run / "model" / "model.safetensors").read_bytes() == model


def test_an_address_without_a_cluster(
    capsys: Capsys, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    said = refused(capsys, 1, arguments(tmp_path, text, cluster__backend="ray"))
    assert "RAY_ADDRESS = 127.0.0.1:9" in said


def test_no_run_to_export_or_show(capsys: Capsys, tmp_path: Path) -> None:
    for command in ("export", "status"):
        assert main([command, str(tmp_path)]) == 1
        assert "not a run directory" in capsys.readouterr().err
