"""Where models can be fetched from: what is written, and what is refused."""

from __future__ import annotations

import pytest

from moray.configs.deployment import Deployment
from moray.configs.errors import ConfigError
from moray.configs.model_url import ModelUrl, is_model_url

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "scheme", "location", "version", "pinned", "name"),
    [
        ("hf://deepseek-ai/DeepSeek-R1", "hf", "deepseek-ai/DeepSeek-R1", None, False, "DeepSeek-R1"),
        ("hf://deepseek-ai/DeepSeek-R1@main", "hf", "deepseek-ai/DeepSeek-R1", "main", False, "DeepSeek-R1"),
        ("hf://a/b@refs/pr/1", "hf", "a/b", "refs/pr/1", False, "b"),
        (f"hf://a/b@{COMMIT}", "hf", "a/b", COMMIT, True, "b"),
        ("s3://bucket/models/R1/", "s3", "bucket/models/R1", None, False, "R1"),
        ("s3://bucket/R1#0123456789abcdef", "s3", "bucket/R1", "0123456789abcdef", True, "R1"),
        ("s3://bucket/R#1", "s3", "bucket/R#1", None, False, "R#1"),
        ("https://host:8443/models/R1", "https", "host:8443/models/R1", None, False, "R1"),
        ("file:///shared/R1", "file", "/shared/R1", None, False, "R1"),
    ],
)
def test_a_url_says_what_to_fetch(
    text: str, scheme: str, location: str, version: str | None, pinned: bool, name: str
) -> None:
    url = ModelUrl.parse(text)
    assert (url.scheme, url.location, url.version) == (scheme, location, version)
    assert (url.is_pinned, url.name, str(url)) == (pinned, name, text.rstrip("/"))
    assert ModelUrl.parse(str(url)) == url
    assert Deployment(model=text).served_name == name


@pytest.mark.parametrize(
    "text",
    [
        "hf://R1",
        "hf://a/b/c",
        "hf://a/b@",
        "hf://a/b@x y",
        "hf://../b",
        "s3://bucket/../other",
        "://x",
        "https://user:key@host/R1",
        "https://host/R1?token=key",
        "https://host/R1#part",
    ],
)
def test_others_are_refused_without_showing_keys(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ModelUrl.parse(text)
    assert "key" not in str(refused.value).replace("~/.netrc", "")
    with pytest.raises(ConfigError, match="model"):
        Deployment.from_dict({"model": text})


def test_directories_never_mix() -> None:
    urls = [f"hf://a/b@{COMMIT}", f"hf://a/b@{COMMIT[::-1]}", f"hf://a--b/c@{COMMIT}"]
    urls += [
        f"{u}#0123456789abcdef" for u in ("s3://a/b/c", "s3://a/b%2Fc", "gs://a/b/c", "https://a:1/b", "https://a:2/b")
    ]
    directories = {ModelUrl.parse(url).directory() for url in urls}
    assert len(directories) == len(urls)
    assert not any(d.is_absolute() or ".." in d.parts for d in directories)


def test_directories_and_names_are_no_urls() -> None:
    assert not any(map(is_model_url, ("tiny-r1", "/models/R1", "./R1", "~/R1", "C:/R1")))
