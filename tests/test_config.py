"""Configuration: shorthands, overrides, the shipped files, and every refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tst_ray.config import diff, load_config, parse_config, shipped_configs
from tst_ray.errors import ConfigError
from tst_ray.plan import build_plan
from tst_ray.settings import SHIPPED, Config, read_shipped_model, shipped_models


def refusal(*overrides: str, path: str | None = None) -> list[str]:
    """The lines of the error that these overrides end in."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def write(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


# ---- what is shipped ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_parses_and_reads_back(file: Path) -> None:
    config = load_config(str(file))
    assert load_config(file.stem) == config
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    assert diff(config.dump(), load_config(file.stem).dump()) == []


def test_shipped_configs_are_the_promised_ones() -> None:
    paper = {"paper-270m", "paper-600m", "paper-3b", "paper-10b-a1b"}
    assert set(shipped_configs()) == paper | {"demo", "example-own-text"}
    assert set(shipped_models()) == paper | {"demo-0.4m"}


def test_no_argument_is_the_demo_file() -> None:
    config = load_config(None)
    assert config == load_config("demo")
    assert (config.tst.workers, config.cluster.workers) == ((1, 1), (2, 2))
    assert (config.tst.bag_size, config.tst.ratio) == (4, 0.3)
    assert config.data.sources[0].path == "python-stdlib"


@pytest.mark.parametrize("name", [n for n in shipped_configs() if n.startswith("paper")])
def test_paper_configs_use_llama_3s_vocabulary_and_untied_tables(name: str) -> None:
    config = load_config(name)
    assert config.model.config["vocab_size"] == 128_256
    assert config.model.config["tie_word_embeddings"] is False
    assert config.data.tokenizer == "meta-llama/Meta-Llama-3-8B"


def test_the_mixture_of_the_moe_is_half_and_half() -> None:
    sources = load_config("paper-10b-a1b").data.sources
    assert [(source.name, source.weight) for source in sources] == [
        ("dclm", 0.5),
        ("fineweb-edu", 0.5),
    ]


# ---- shorthands --------------------------------------------------------------------------------


def test_workers_are_a_number_or_a_range_and_dump_as_written() -> None:
    config = load_config(None, ["--cluster.workers=[2, 5]", "--tst.workers=3"])
    assert (config.cluster.workers, config.tst.workers) == ((2, 5), (3, 3))
    assert config.dump()["cluster"]["workers"] == [2, 5]
    assert config.dump()["tst"]["workers"] == 3


def test_workers_of_phase_one_are_the_clusters_once_these_are_set() -> None:
    assert load_config(None, ["--cluster.workers=4"]).tst.workers is None
    inline = load_config(None, ["--cluster.backend=inline"])
    assert (inline.tst.workers, inline.cluster.workers) == (None, (1, 1))


def test_model_spellings_mean_the_same() -> None:
    whole = read_shipped_model("demo-0.4m")
    named = load_config(None, ["--model=demo-0.4m"])
    assert named.model.config == whole
    assert parse_config({"model": {"source": "demo-0.4m"}}) == named
    assert parse_config({"model": whole}) == named
    assert parse_config({"model": {"config": whole}}) == named
    eager = parse_config({"model": {**whole, "attention": "eager"}}).model
    assert (eager.config, eager.attention) == (whole, "eager")


def test_model_fields_change_a_shipped_model() -> None:
    overrides = ["--model=paper-270m", "--model.config.hidden_size=144"]
    for either_order in (overrides, overrides[::-1]):
        assert load_config(None, either_order).model.config == {
            **read_shipped_model("paper-270m"),
            "hidden_size": 144,
            "head_dim": 16,  # it follows
        }
    assert load_config(None, ["--model.config.num_hidden_layers=3"]).model.config == {
        **read_shipped_model("demo-0.4m"),
        "num_hidden_layers": 3,
    }


def test_phases_replace_what_stands_before_them() -> None:
    phases = "--phases=[{bag_size: 4, steps: 5}, {bag_size: 1, steps: 5}]"
    config = load_config(None, ["--tst.bag_size=8", phases, "--train.steps=10"])
    assert config.phases is not None and len(config.phases) == 2


def test_the_last_of_two_overrides_wins() -> None:
    assert load_config(None, ["--train.steps=5", "--train.steps=7"]).train.steps == 7
    assert load_config(None, ["--model=paper-3b", "--model=demo-0.4m"]) == load_config(None)


def test_a_hugging_face_id_is_left_to_be_loaded() -> None:
    model = load_config(
        None, ["--model=Qwen/Qwen3-0.6B", "--model.config.num_hidden_layers=2"]
    ).model
    assert (model.source, model.config) == ("Qwen/Qwen3-0.6B", {"num_hidden_layers": 2})


def test_sources_get_names_of_their_own() -> None:
    sources = load_config(
        None,
        ["--data.sources=[a/books/*.txt, b/books, {path: notes.jsonl.gz, name: n}, tokenizer/]"],
    ).data.sources
    assert [source.name for source in sources] == ["books", "books-2", "n", "tokenizer-2"]
    one = load_config(None, ["--data.sources=s3://bucket/web text/**/*.parquet"]).data.sources
    assert [source.name for source in one] == ["web-text"]


def test_prepared_shards_replace_sources() -> None:
    assert load_config(None, ["--data.prepared=shards"]).data.sources == ()
    replaced = load_config("paper-270m", ["--data.prepared=shards"])
    assert parse_config(replaced.dump()) == replaced
    assert load_config(None, ["--data.prepared=s", "--data.sources=[a]"]).data.prepared is None


def test_prepared_shards_are_mixed_by_weights_of_their_own() -> None:
    weights = load_config(None, ["--data.prepared=x", "--data.weights={a: 1, b: 2.5}"]).data.weights
    assert weights == {"a": 1, "b": 2.5}
    assert "data.sources a weight" in refusal("--data.weights={a: 1}")[0]
    assert "no weight is positive" in refusal("--data.prepared=x", "--data.weights={a: 0}")[0]
    assert "must be at least 0" in refusal("--data.prepared=x", "--data.weights={a: -1}")[0]


def test_phases_in_full_replace_tst_and_set_the_steps() -> None:
    config = load_config(
        None, ["--phases=[{bag_size: 8, steps: 10, workers: 3}, {bag_size: 2, steps: 5}]"]
    )
    assert config.train.steps == 15
    assert [phase.bag_size for phase in config.phase_settings()] == [8, 2]
    assert [config.workers_of(p) for p in config.phase_settings()] == [(3, 3), (2, 2)]
    assert parse_config(config.dump()) == config
    assert load_config("example-own-text", ["--phases=[{bag_size: 2, steps: 10000}]"]).phases


def test_tst_is_shorthand_for_two_phases() -> None:
    config = load_config(None, ["--train.steps=10", "--tst.fold=batch", "--tst.loss=mce_alt"])
    first, second = config.phase_settings()
    assert (first.bag_size, first.steps, first.fold, first.loss) == (4, 3, "batch", "mce_alt")
    assert (second.bag_size, second.steps) == (1, 7)
    assert len(load_config(None, ["--tst.ratio=0"]).phase_settings()) == 1


# ---- files and overrides -----------------------------------------------------------------------


def test_file_then_overrides_the_last_one_winning(tmp_path: Path) -> None:
    file = write(
        tmp_path, "train: {steps: 100, learning_rate: 2e-3}\nrun:\n  name: 2024-01-01\nfault:\n"
    )
    config = load_config(file, ["--train.steps=200", "--train.steps=300", "run.seed=7"])
    assert (config.train.steps, config.train.learning_rate) == (300, 0.002)
    assert (config.run.name, config.run.seed) == ("2024-01-01", 7)
    assert config.fault.max_failures == 3


def test_override_values_are_yaml() -> None:
    config = load_config(
        None,
        ["--checkpoint.async=false", "--train.betas=[0.8, 0.9]", "--train.learning_rate=1e-4",
         "--cluster.resources_per_worker={slot: 1}", "--train.threads=null"],
    )  # fmt: skip
    assert config.checkpoint.async_ is False
    assert config.train.betas == (0.8, 0.9)
    assert config.train.learning_rate == 1e-4
    assert config.cluster.resources_per_worker == {"slot": 1.0}
    assert config.train.threads is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--train.steps", "--train.steps: not an override; write --section.field=value"),
        ("--=3", "--=3: not an override; write --section.field=value"),
        ("--train.steps=[", "--train.steps, line 1: not valid YAML"),
        ("--run.seed.x=1", 'run.seed = {"x": 1}: must be a whole number'),
    ],
)
def test_overrides_that_are_not_are_refused(override: str, says: str) -> None:
    (line,) = refusal(override)
    assert line.startswith(says)


def test_override_below_a_list_is_refused() -> None:
    (line,) = refusal("--data.sources.weight=1", path="paper-10b-a1b")
    assert line == "--data.sources.weight=1: data.sources has no fields; give it whole"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {steps: 1\n", "line 2: not valid YAML"),
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: not valid YAML: steps is given twice"),
        ("- 1\n", "must hold sections"),
    ],
)
def test_files_that_are_not_configs_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (line,) = refusal(path=write(tmp_path, text))
    assert says in line and "mine.yaml" in line


def test_a_missing_file_names_the_nearest_shipped_config() -> None:
    (line,) = refusal(path="paper-270")
    assert line.startswith('--config = "paper-270": no such file')
    assert "did you mean paper-270m?" in line
    (line,) = refusal(path="~nosuch/mine.yaml")  # the home of nobody
    assert line.startswith('--config = "~nosuch/mine.yaml": no such file')


# ---- refusals ----------------------------------------------------------------------------------

REFUSED = [
    # one field
    ("--train.batch_size=0", "train.batch_size = 0: must be at least 1; it is "),
    ("--train.steps=-5", "train.steps = -5: must be at least 1"),
    ("--train.steps=1.5", "train.steps = 1.5: must be a whole number"),
    ('--train.steps="5"', 'train.steps = "5": must be a whole number'),
    ("--train.steps=true", "train.steps = true: must be a whole number"),
    ("--train.micro_batch_size=0", "train.micro_batch_size = 0: must be at least 1"),
    ("--train.learning_rate=.nan", "train.learning_rate = NaN: must be "),
    ("--train.learning_rate=.inf", "train.learning_rate = Infinity: must be finite"),
    ("--train.betas=[0.9]", "train.betas[1]: is not given"),
    ("--train.betas=[0.9, 1]", "train.betas[1] = 1: must be less than 1"),
    ("--train.warmup=1.5", "train.warmup = 1.5: must be a share of the steps in [0, 1)"),
    ("--train.compile=1", "train.compile = 1: must be true or false"),
    ("--train=5", "train = 5: must be a mapping of fields"),
    ("--tst.ratio=1", "tst.ratio = 1: must be less than 1"),
    ("--tst.ratio=-0.1", "tst.ratio = -0.1: must be at least 0"),
    ("--tst.weighting=unifrm", 'tst.weighting = "unifrm": must be one of uniform, power_law'),
    ("--tst.weighting=unifrm", "; did you mean uniform?"),
    ("--tst.mode=off", "tst.mode = false: must be one of full, input_only, output_only"),
    ("--data.validation_share=1", "data.validation_share = 1: must be less than 1"),
    ("--data.sources=[{name: a}]", "data.sources[0].path: is not given; it is "),
    ("--phases=[{bag_size: 2}]", "phases[0].steps: is not given"),
    ("--phases=[]", "phases = []: must not be empty"),
    ("--run.name=a/b", 'run.name = "a/b": must start with a letter or digit'),
    ("--model={model_type: llama, config: {hidden_size: 3}}", "model.model_type = "),
    ("--run.name=7", "run.name = 7: must be text, in quotes"),
    ("--cluster.workers=0", "cluster.workers = 0: must be at least 1 worker"),
    ("--cluster.workers=[4, 2]", "cluster.workers = [4, 2]: min is more than max; swap them"),
    ("--cluster.workers=[1, 2, 3]", "cluster.workers = [1, 2, 3]: must be a number of workers or "),
    ("--cluster.workers=1.5", "cluster.workers = 1.5: must be a number of workers or "),
    (
        "--cluster.resources_per_worker={slot: 0}",
        "cluster.resources_per_worker.slot = 0: must be more than 0",
    ),
    ("--cluster.resources_per_worker={slot: -1}", ".slot = -1: must be more than 0"),
    ("--cluster.resources_per_worker={CPU: 0}", "own; set cluster.cpus_per_worker instead"),
    ("--cluster.resources_per_worker={CPU: 8}", "own; set cluster.cpus_per_worker instead"),
    ("--cluster.resources_per_worker={GPU: 1}", "own; set cluster.gpus_per_worker instead"),
    ("--checkpoint.async=7", "checkpoint.async = 7: must be true or false"),
    # unknown fields
    ("--train.batchsize=3", "train.batchsize = 3: no such field; did you mean train.batch_size?"),
    ("--batch_size=3", "batch_size = 3: no such field; did you mean train.batch_size?"),
    ("--fault.x=3", "fault.x = 3: no such field; fault has max_failures"),
    ("--phases=[{bag_size: 1, stepz: 2, steps: 2}]", "did you mean phases[0].steps?"),
    # several fields
    ("--tst.ratio=0.00005", "tst.ratio = 5e-05: leaves a phase without steps"),
    ("--tst.ratio=0.99999", "tst.ratio = 0.99999: leaves a phase without steps"),
    ("--train.warmup=5900", "train.warmup = 5900: 5900 steps of warm-up and 600 of decay are more"),
    ("--train.decay=6000", "300 steps of warm-up and 6000 of decay are more than"),
    ("--cluster.workers=17", "cluster.workers = 17: at least 17 workers share 16 sequences a step"),
    ("--tst.workers=[17, 18]", "tst.workers = [17, 18]: at least 17 workers share 16 sequences"),
    ("--cluster.gpus_per_worker=0.5", "cluster.gpus_per_worker = 0.5: a worker trains on one GPU"),
    ("--data.vocab_size=100", "data.vocab_size = 100: a tokenizer of bytes needs at least 257"),
    ("--data.sources=[]", "data.sources = []: nothing to train on"),
    ("--data.sources=[{path: a, weight: 1}, b]", ": some sources have a weight and some have none"),
    ("--data.sources=[{path: a, weight: 0}]", ": every weight is 0"),
    (
        "--data.sources=[{path: a, name: units}]",
        'data.sources[0].name = "units": this name is taken',
    ),
    ("--data.sources=[{path: a, name: x}, {path: b, name: x}]", 'data.sources[1].name = "x": '),
    ("--model=demo-0.4n", 'model.source = "demo-0.4n": no such model; did you mean demo-0.4m?'),
    ("--model={source: gpt2, model_type: llama}", "model.source"),
]


@pytest.mark.parametrize(("override", "says"), REFUSED)
def test_each_refusal_is_one_line(override: str, says: str) -> None:
    (line,) = refusal(override)
    assert says in line


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--tst.loss=mce_alt", "--tst.weighting=power_law"], "mce_alt has no weights of places"),
        (["--tst.mode=input_only", "--tst.loss=mce_alt"], 'tst.loss = "mce_alt": tst.mode=input_o'),
        (
            ["--tst.mode=input_only", "--tst.weighting=exponential"],
            'weighting = "exponential": tst.mode=input_only has one target a position; leave it u',
        ),
        (
            ["--tst.mode=output_only", "--tst.fold=batch", "--tst.bag_size=6"],
            'tst.fold = "batch": tst.mode=output_only cuts no bags; leave it seq',
        ),
        (["--phases=[{bag_size: 2, steps: 5, fold: none, mode: output_only}]"], "phases[0].fold ="),
        (["--tst.fold=batch", "--tst.bag_size=6"], "set a multiple of 6, such as 66"),
        (["--tst.fold=none", "--tst.bag_size=6"], "train.sequence_length = 64: tst.fold=none cuts"),
        (["--model.pretrained=true"], "model.pretrained = true: there are no weights"),
        (["--model=paper-3b", "--model.pretrained=true"], "set model.source to a Hugging Face"),
        (["--model=a/b", "--model.pretrained=true"], 'data.tokenizer = "train": a pretrained'),
        (["--phases=[{bag_size: 2, steps: 5}]", "--tst.ratio=0.5"], "tst = {"),
        (["--phases=[{bag_size: 2, steps: 5}]", "--train.steps=6"], "the phases have 5 steps"),
        (
            ["--phases=[{bag_size: 2, steps: 5, fold: batch}]", "--train.sequence_length=5"],
            "phases[0].fold=batch cuts sequences into bags of 2; set a multiple of 2, such as 6",
        ),
    ],
)
def test_settings_that_cannot_work_together_are_refused(overrides: list[str], says: str) -> None:
    (line,) = refusal(*overrides)
    assert says in line


def test_settings_that_look_alike_but_work_are_taken() -> None:
    load_config(None, ["--tst.fold=batch", "--tst.bag_size=1", "--tst.mode=output_only"])
    load_config(None, ["--cluster.workers=[16, 99]"])
    load_config(None, ["--tst.fold=batch", "--tst.workers=64"])  # bags make 64 sequences of 16
    load_config(None, ["--train.warmup=0", "--train.decay=6000"])
    load_config(None, ["--tst.bag_size=1"])


def test_everything_wrong_is_reported_at_once() -> None:
    lines = refusal(
        "--train.batch_size=0",
        "--tst.weighting=cubic",
        "--train.lr=3",
        "nonsense",
        "--cluster.gpus_per_worker=2",
        "--train.warmup=5900",
    )
    starts = ["nonsense:", "tst.weighting =", "train.batch_size =", "train.lr =",
              "cluster.gpus_per_worker =", "train.warmup ="]  # fmt: skip
    assert sorted(line.partition(" = ")[0].partition(":")[0] for line in lines) == sorted(
        start.rstrip(" =:") for start in starts
    )


def test_a_wrong_field_is_not_blamed_twice() -> None:
    # 17 workers are too many for the default batch, but the batch is not the default one.
    (line,) = refusal("--train.batch_size=none", "--cluster.workers=17")
    assert line.startswith('train.batch_size = "none"')


# ---- the same run ------------------------------------------------------------------------------


def changed(*overrides: str) -> list[str]:
    return diff(load_config(None).dump(), load_config(None, overrides).dump())


def test_diff_names_what_would_change_the_run() -> None:
    assert changed("--train.batch_size=32", "--model.config.hidden_size=48") == [
        "model.config.hidden_size: run has 96, now 48",
        "model.config.head_dim: run has 32, now 16",
        "train.batch_size: run has 16, now 32",
    ]
    assert changed("--data.sources=[python-stdlib, more]") == [
        'data.sources[1].path: run has null, now "more"',
        'data.sources[1].name: run has null, now "more"',
        'data.sources[1].text_field: run has null, now "text"',
    ]
    assert any(line.startswith("tst.bag_size") for line in changed("--tst.bag_size=2"))
    assert changed("--train.betas=[0.9, 0.99]") == [
        "train.betas: run has [0.9, 0.95], now [0.9, 0.99]"
    ]


def test_diff_lets_a_run_move_and_grow() -> None:
    assert (
        changed(
            "--run.storage=elsewhere",
            "--cluster.workers=[1, 4]",
            "--cluster.cpus_per_worker=2",
            "--tst.workers=2",
            "--train.micro_batch_size=4",
            "--checkpoint.every=7",
            "--metrics.val_every=9",
            "--fault.max_failures=0",
        )
        == []
    )
    phases = "--phases=[{{bag_size: 2, steps: 5, workers: {}}}]"
    one, two = (load_config(None, [phases.format(n)]).dump() for n in (1, 2))
    assert diff(one, two) == []


# ---- the module itself -------------------------------------------------------------------------


def test_importing_the_config_brings_in_nothing_heavy() -> None:
    code = (
        "import sys, tst_ray.config; "
        "heavy = 'torch', 'transformers', 'ray', 'pyarrow', 'numpy'; "
        "print([module for module in heavy if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_field_says_what_it_is() -> None:
    def undescribed(section: Any, path: str = "") -> list[str]:
        missing = []
        for name, field in section.model_fields.items():
            if not field.description:
                missing.append(path + name)
            if hasattr(field.annotation, "model_fields"):
                missing += undescribed(field.annotation, f"{path}{name}.")
        return missing

    assert undescribed(Config) == []


@pytest.mark.parametrize("written", ["1000", "1e3", "1_000", "1000.0", "1E+3", "10_0e1"])
def test_a_whole_number_may_be_written_in_any_way(written: str) -> None:
    config = load_config(
        None,
        [
            f"--train.steps={written}", f"--run.seed={written}", f"--train.warmup={written}",
            f"--cluster.workers=[1,{written}]", "--train.decay=0", f"--train.batch_size={written}",
        ],
    )  # fmt: skip
    seen = [config.train.steps, config.run.seed, config.train.warmup, config.cluster.workers[1]]
    assert seen == [1000] * 4 and all(type(value) is int for value in seen)
    phases = load_config(None, [f"--phases=[{{bag_size: 2.0, steps: {written}}}]"])
    assert phases.train.steps == 1000
    assert parse_config(phases.dump()) == phases


@pytest.mark.parametrize("text", ["1.5", "1e-3", "1.5e0", "inf", "'1e3'"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^train\.steps = .*: must be a whole number"):
        load_config(None, [f"--train.steps={text}"])


def test_a_warm_up_of_one_point_nought_may_mean_either() -> None:
    with pytest.raises(ConfigError, match=r"^train\.warmup = 1\.0: must be a share"):
        load_config(None, ["--train.warmup=1.0"])


@pytest.mark.parametrize("written", ["--cluster.workers=2", "--tst.workers=[2,4]"])
def test_inline_is_one_worker_whatever_is_written_for_ray(written: str) -> None:
    config = load_config(None, ["--cluster.backend=inline", written])
    assert {config.workers_of(phase) for phase in config.phase_settings()} == {(1, 1)}
    assert len(build_plan(config).stages()) == 1
