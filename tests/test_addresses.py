"""No secret that stands in an address is kept or shown anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.addresses import has_secret, masked
from pipelines.errors import DataError
from pipelines.storage import locate
from tests.test_bad_input import arguments
from tst_ray.cli import main
from tst_ray.config import diff
from tst_ray.errors import ConfigError
from tst_ray.storage import Storage

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
ADDRESS = f"s3://AKIAEXAMPLE:{SECRET}@bucket/folder"
FIELDS = (
    "data.sources",
    "data.prepared",
    "data.cache",
    "data.tokenizer",
    "run.storage",
    "model.source",
)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (ADDRESS, "s3://***@bucket/folder"),
        ("https://user:a::b@host/x", "https://***@host/x"),
        ("s3://KEY:SECRET@bucket/a/*.txt", "s3://***@bucket/a/*.txt"),
        ("https://user:1234@host/x", "https://***@host/x"),
        ("https://user:pa?ss#word@host/x", "https://***@host/x"),
        ("ftp://user:@host/x", "ftp://***@host/x"),
        ("https://user:pw@[::1]:80/x", "https://***@[::1]:80/x"),
        ("simplecache::s3://K:S@bucket/x", "simplecache::s3://***@bucket/x"),
        ("zip://a.csv::https://u:p@host/x.zip", "zip://a.csv::https://***@host/x.zip"),
        ("https://h/x?a=1&X-Amz-Signature=ab12&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("https://h/x?X-Amz-Credential=AK%2F1", "https://h/x?X-Amz-Credential=***"),
        ("https://h/x?X-Amz-Security-Token=z", "https://h/x?X-Amz-Security-Token=***"),
        ("https://h/x?sv=1&sig=ab%3D", "https://h/x?sv=1&sig=***"),
        ("https://h/x?token=abc", "https://h/x?token=***"),
        ("https://h/x?access_token=abc", "https://h/x?access_token=***"),
        ("https://h/x#access_token=abc", "https://h/x#access_token=***"),
        (
            "https://h/x?AWSAccessKeyId=A&Signature=b",
            "https://h/x?AWSAccessKeyId=***&Signature=***",
        ),
        ("s3://b/x?secret_key=abc&region=us", "s3://b/x?secret_key=***&region=us"),
        ("https://h/x?api-key=abc", "https://h/x?api-key=***"),
    ],
)
def test_a_secret_is_found_and_masked(address: str, shown: str) -> None:
    assert has_secret(address)
    assert masked(address) == shown
    assert masked(f'no "{address}", said so') == f'no "{shown}", said so'


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/folder/*.parquet",
        "s3://bucket/a@b:c/x",
        "abfss://container@account.dfs.core.windows.net/x",
        "hdfs://user@host:8020/x",
        "http://host:8080/a@b:c",
        "http://[::1]:8080/a@b",
        "http://host:80?mail=a@b",
        "zip://a.csv::s3://bucket/a@b.zip",
        "hf://datasets/owner/name@main/a:b.txt",
        "https://h/x?region=us&version=2&key=value&tokenizer=train",
        "C:/a@b",
        "owner/name",
        "a: b@c",
        "folder?token=abc",
    ],
)
def test_other_addresses_are_left_alone(address: str) -> None:
    assert not has_secret(address)
    assert masked(address) == address


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """All that was said, on both streams."""
    said = capsys.readouterr()
    text = said.out + said.err
    assert "Traceback" not in text
    assert SECRET not in text and SECRET[:12] not in text
    return text


@pytest.mark.parametrize("address", [ADDRESS, f"https://host/x?X-Amz-Signature={SECRET}"])
@pytest.mark.parametrize("command", ["run", "prepare", "plan"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_setting_with_a_secret_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, command: str, address: str
) -> None:
    (tmp_path / "text").mkdir()
    changes = {"run.storage": tmp_path / "runs", field: address}
    args = arguments(tmp_path / "runs", tmp_path / "text", **changes)
    assert main([command, *args]) == 2
    said = told(capsys)
    assert f"{field}" in said and "***" in said and "AWS_ACCESS_KEY_ID" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("way", ["file", "mapping", "more wrong", "no override", "no field"])
def test_however_it_is_written_it_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"data: {{sources: [a, {{path: '{ADDRESS}', weight: 1}}]}}\n")
    args: dict[str, list[str]] = {
        "file": ["--config", str(file)],
        "mapping": [f"--data.sources=[{{path: '{ADDRESS}', weigth: 2}}]"],
        "more wrong": [f"--data.sources={ADDRESS}", f"--train.steps={ADDRESS}", "--run.name=/"],
        "no override": [f"--{ADDRESS}"],
        "no field": [f"--data.soruces={ADDRESS}"],
    }
    assert main(["run", *args[way]]) == 2
    assert "***" in told(capsys)


def test_a_line_names_the_setting_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"--data.sources=[a, '{ADDRESS}']"]) == 2
    assert told(capsys).startswith('tst-ray: data.sources[1] = "s3://***@bucket/folder": a secret')


@pytest.mark.parametrize(
    "args",
    [
        ["status", ADDRESS],
        ["checkpoints", ADDRESS],
        ["export", ADDRESS],
        ["run", "--config", ADDRESS],
        ["run", "--run.storage", ADDRESS],
        ["status", "a", ADDRESS],
    ],
)
def test_other_commands_do_not_show_it_either(
    capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    try:
        status = main(args)
    except SystemExit as error:  # argparse's
        status = int(error.code or 0)
    assert status == 2
    assert "***" in told(capsys)


def test_nothing_opens_such_an_address() -> None:
    for opened, kind in ((Storage, ConfigError), (locate, DataError)):
        with pytest.raises(kind, match=r"^s3://\*\*\*@bucket/folder: a secret in an address"):
            opened(ADDRESS)


def test_a_run_that_has_one_already_does_not_show_it() -> None:
    before: dict[str, Any] = {"data": {"tokenizer": ADDRESS}}
    (line,) = diff(before, {"data": {"tokenizer": "train"}})
    assert "***" in line and SECRET not in line
