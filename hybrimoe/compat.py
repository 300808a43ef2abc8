"""Private interfaces of transformers, met here and nowhere else, so that a release that moves one breaks one file.

Each is a method or attribute of a model that transformers offers under no public name. Numba's are in
`scheduler.compiled`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cpu_kernels.jit.cache_dir import cache_home
from hybrimoe.errors import HybriMoEError
from hybrimoe.text_files import plain_texts, read_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TESTED = "5.23.0"
"""The release that the tests of this module last passed with."""
NOT_NEEDED = ("is_torch_distributed_available", "is_scipy_available")
"""What transformers' base of all models would import 1,000 modules for: models over several processes, and the losses
of object detection. It runs without either, as where they are not installed."""


DYNAMO = "torch._dynamo"
MASKS = f"{DYNAMO}._trace_wrapped_higher_order_op"
"""What transformers' masks take of torch's compiler. It imports nothing else of it."""


class CompatibilityError(HybriMoEError):
    """The installed transformers has not what this version of HybriMoE needs of it."""


@contextmanager
def without_what_is_not_needed() -> Iterator[None]:
    """Within the block transformers imports neither `NOT_NEEDED` nor reads its 2,000 files for names a second time,
    and not even once where an earlier process has (`KeptNames`). A release other than `TESTED` is left as it is, and
    its import takes longer."""
    if version("transformers") != TESTED:
        yield
        return
    if "transformers" not in sys.modules:
        sys.meta_path.insert(0, KeptNames(names_file()))
    import transformers
    from transformers.utils import import_utils

    define = import_utils.define_import_structure
    changes = [(home, name, lambda: False) for name in NOT_NEEDED for home in (import_utils, transformers.utils)]
    changes.append((import_utils, define.__name__, names_by_module(define)))
    before = [(home, name, getattr(home, name)) for home, name, _ in changes]
    try:
        for home, name, value in changes:
            setattr(home, name, value)
        yield
    finally:
        for home, name, value in before:
            setattr(home, name, value)


def leave_dynamo_out() -> None:
    """From now on this process imports `torch._dynamo`, torch's compiler of 800 modules, only for those who compile
    with it. Functions that torch and others make known to it, to be left alone or taken as they are, stay unknown. For
    programs that compile nothing with it."""
    if DYNAMO in sys.modules:
        return
    spec = importlib.util.find_spec(DYNAMO)
    if spec is None:
        return
    stand_in: Any = importlib.util.module_from_spec(ModuleSpec(DYNAMO, None, is_package=True))
    stand_in.__path__ = spec.submodule_search_locations
    stand_in.disable = lambda function=None, *_, **__: (lambda made: made) if function is None else function
    stand_in.allow_in_graph = stand_in.assume_constant_result = lambda function: function

    def make_real() -> Any:
        if sys.modules.get(DYNAMO) is stand_in:
            del sys.modules[DYNAMO]
        real = importlib.import_module(DYNAMO)
        if MASKS in sys.modules:  # imported before it, which has not made it an attribute
            setattr(real, MASKS.rpartition(".")[2], sys.modules[MASKS])
        return real

    def ask_the_real_one(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(make_real(), name)

    class RealFirst(MetaPathFinder):
        """Imports of its modules by their own names find the whole of it imported: by itself none of them can be."""

        def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
            if not name.startswith(f"{DYNAMO}.") or sys.modules.get(DYNAMO) is not stand_in:
                return None
            make_real()
            return _There.spec(sys.modules[name]) if name in sys.modules else None

    stand_in.__getattr__ = ask_the_real_one
    sys.modules[DYNAMO] = stand_in
    sys.meta_path.insert(0, RealFirst())


NEEDS_DYNAMO = re.compile(rb"^(from|import)\s+(\.|torch\.(_dynamo|_inductor|compiler))", re.MULTILINE)


def import_masks_alone() -> None:
    """After `leave_dynamo_out`: imports `MASKS` by itself, so that transformers' import of it does not bring the whole
    compiler. Does nothing where that is there, and where the module needs more of it."""
    stand_in = sys.modules.get(DYNAMO)
    if stand_in is None or MASKS in sys.modules or getattr(stand_in, "__file__", None):
        return
    spec = PathFinder.find_spec(MASKS, list(stand_in.__path__))
    if spec is None or spec.loader is None or spec.origin is None:
        return
    if NEEDS_DYNAMO.search(Path(spec.origin).read_bytes()):
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[MASKS] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[MASKS]
        raise


class _There(Loader):
    """Of a module that was imported while Python looked for it, and is not to be imported once more."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._own = module, module.__spec__

    @classmethod
    def spec(cls, module: ModuleType) -> ModuleSpec:
        """What Python then asks for it: it looks at the module's own, too, which is given back with the module."""
        module.__spec__ = ModuleSpec(module.__name__, cls(module))
        return module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module as it is."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Runs nothing."""
        module.__spec__ = self._own


IMPORT_UTILS = "transformers.utils.import_utils"


def names_file() -> Path:
    """Where the names of transformers' models are kept, for its files as they lie there now."""
    spec = importlib.util.find_spec("transformers")
    folder = Path((spec and spec.origin) or "").parent / "models"
    stamp = hashlib.sha256(repr((version("transformers"), str(folder), sorted(_files(str(folder))))).encode())
    return cache_home() / f"transformers-names-{stamp.hexdigest()[:16]}.json"


def _files(folder: str) -> Iterator[tuple[str, int, int]]:
    """Path, time of the last change in ns, and size of all sources below."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.name != "__pycache__":
                    yield from _files(entry.path)
            elif entry.name.endswith(".py"):
                about = entry.stat()
                yield entry.path, about.st_mtime_ns, about.st_size


class KeptNames(MetaPathFinder):
    """For the one import of transformers that follows: what it finds out of the names of its models by reading 2,000
    files, which takes a third of a second, is kept in `file`, and read from there where it is."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The module that reads names, which is changed once it is there; this finder then steps aside."""
        if name != IMPORT_UTILS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def changed(module: Any) -> None:
            execute(module)
            module.define_import_structure = self.keeping(module.define_import_structure)

        spec.loader.exec_module = changed  # type: ignore[method-assign]
        return spec

    def keeping(self, define: Callable[..., Any]) -> Callable[..., Any]:
        """transformers' own `define`, of which one answer is kept: that for all models."""

        @cache
        @wraps(define)
        def defined(path: Any, prefix: str | None = None) -> Any:
            if prefix != "models":
                return define(path, prefix)
            names = self.read()
            if names is None:
                names = define(path, prefix)
                self.write(names)
            return names

        return defined

    def read(self) -> dict[frozenset[str], dict[str, set[str]]] | None:
        """The names by what they need and by module; None where there is no such file."""
        try:
            found = json.loads(self.file.read_bytes())
            return {frozenset(needs): {path: set(names) for path, names in of.items()} for needs, of in found}
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write(self, names: Mapping[frozenset[str], Mapping[str, set[str]]]) -> None:
        """Keeps them, without a word where nothing can be written."""
        told = [[sorted(needs), {path: sorted(of) for path, of in by.items()}] for needs, by in names.items()]
        own = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(told), encoding="utf-8")
            own.replace(self.file)


def names_by_module(define: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' own `define`, which remembers what it has read, for its package of models: read as a part of
    transformers already, and now asked for as a package by itself."""
    import transformers

    models = Path(transformers.__file__).parent / "models"

    def defined(path: Any, prefix: str | None = None) -> Any:
        if prefix is not None or Path(path) != models / "__init__.py":
            return define(path, prefix)
        known = define(models, prefix=models.name)
        return {
            backends: {name.partition(".")[2]: names for name, names in of.items() if name.startswith("models.")}
            for backends, of in known.items()
        }

    return defined


def generation_settings(model: PreTrainedModel, options: dict[str, Any]) -> Any:
    """The model's generation configuration with `options` (of `generate`) on top, its special tokens resolved."""
    import torch

    config, _ = _call(model, "_prepare_generation_config", None, **options)
    _call(model, "_prepare_special_tokens", config, device=torch.device("cpu"))
    return config


def logits_processors(model: PreTrainedModel, settings: Any, n_prompt_tokens: int, device: str = "cpu") -> Any:
    """The processors that `generate` would use for `settings` and logits on `device`, in its order."""
    return _call(
        model, "_get_logits_processor",
        generation_config=settings, input_ids_seq_length=n_prompt_tokens, device=device, model_kwargs={},
    )  # fmt: skip


def takes_dynamic_cache(model: PreTrainedModel) -> bool:
    """Whether the model takes transformers' own growing cache; else it makes a cache of its own kind."""
    return bool(_call(model, "_supports_default_dynamic_cache"))


def compute_missing(model: PreTrainedModel, missing: set[str]) -> None:
    """Gives parameters and buffers that no checkpoint stores their values, on the CPU."""
    _call(model, "_move_missing_keys_from_meta_to_device", missing, {"": "cpu"}, None, None)
    _call(model, "_initialize_missing_keys", False)


def forgive_known_keys(model: PreTrainedModel, report: Any) -> None:
    """Takes keys out of a loading report that the model says may be missing or left over."""
    _call(model, "_adjust_missing_and_unexpected_keys", report)


def gguf_tokenizer(architecture: str, metadata: Mapping[str, Any]) -> Any:
    """The tokenizer (of the package tokenizers) that the vocabulary in a GGUF file's metadata describes."""
    mapping, convert = _gguf("GGUF_TOKENIZER_MAPPING"), _gguf("convert_gguf_tokenizer")
    names = {f"tokenizer.{key}": name for key, name in mapping["tokenizer"].items()}
    return convert(architecture, {names[key]: value for key, value in metadata.items() if key in names})[0]


def gguf_splits() -> frozenset[str]:
    """The vocabularies of GGUF files, by their names there, whose way of splitting text transformers knows."""
    return frozenset(_gguf("GGUF_PRE_TOKENIZER_SPLITS"))


def output_tie(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of the output layer's weight and of the embedding that it may be tied to; None where it may not be, or
    already is."""
    output = model.get_output_embeddings()
    if output is None:
        return None
    sources: dict[str, str] = dict(_attribute(model, "_tied_weights_keys") or {})
    tied = _attribute(model, "all_tied_weights_keys")
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight is output.weight and name in sources:
            return None if name in tied else (name, sources[name])
    return None


def tie_output(model: PreTrainedModel) -> None:
    """Lets a model whose weights are yet to come have its output layer tied to the input embeddings."""
    for part in (model.config, model.config.get_text_config(decoder=True)):
        part.tie_word_embeddings = True
    model.all_tied_weights_keys = _call(model, "get_expanded_tied_weights_keys", all_submodels=True)


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Patterns of parameters that the model's class keeps in another dtype than `dtype`."""
    return dict(_call(model, "_get_dtype_plan", dtype))


NOT_IMPORTED = re.compile(r"^Could not import module '")
"""How transformers begins an error of an import of its own, whose cause is what failed."""
CALLED_BY_OTHERS = ("importlib", "torch", "transformers")
"""Packages whose code runs while another one is imported."""
FIRST_TORCHVISION = 15
"""torchvision 0.15 belongs to torch 2.0, 0.16 to 2.1, and so on (the table in torchvision's README)."""


def torchvision_release() -> str:
    """The torchvision that belongs to the installed torch, and how it is installed."""
    torch_version = version("torch")
    major, minor = torch_version.split(".")[:2]
    fitting = (
        f"'torchvision==0.{FIRST_TORCHVISION + int(minor)}.*'" if major == "2" and minor.isdigit() else "torchvision"
    )
    return (
        f"the release that belongs to torch {torch_version}: pip install {fitting}, with --no-deps where torch is a"
        " build of its own"
    )


def import_fault(error: BaseException) -> tuple[str, str] | None:
    """What is wrong and what to do where transformers cannot be imported because of a package that it takes if it is
    there (a torchvision that was built for another torch); None for other errors."""
    if not isinstance(error, ImportError) or not NOT_IMPORTED.match(str(error)):
        return None
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    modules = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame, _ in walk_tb(first.__traceback__)]
    for name in reversed(modules):
        try:
            found = None if name in CALLED_BY_OTHERS else version(name)
        except (PackageNotFoundError, ValueError):
            continue
        if found is not None:
            fitting = f"install {torchvision_release()}" if name == "torchvision" else f"pip install --upgrade {name}"
            what = (
                f"{name} {found} does not import here ({_first_line(first)}), and transformers takes it if it is there"
            )
            return what, f"{fitting}; or leave it out: pip uninstall {name}"
    return None


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def has_processor(folder: Path) -> bool:
    """Whether a model's folder has the settings of a processor for images."""
    return folder.is_dir() and any((folder / name).is_file() for name in PROCESSOR_FILES)


def image_processor(folder: Path, tokenizer: Any, model_type: str) -> Any:
    """transformers' processor of a model, for images only: its parts for video (which need torchvision) and sound are
    left out.

    Raises ImportError for a package that the family's processor needs, and whatever transformers raises of its files.
    """
    import transformers
    from transformers import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    settings: dict[str, Any] = {}
    for file in (folder / name for name in PROCESSOR_FILES):
        if file.is_file():
            settings = json.loads(read_text(file)) | settings
    name = settings.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(model_type)
    if not name:
        raise HybriMoEError(f"transformers {version('transformers')} has no processor for {model_type}")
    of_family: Any = getattr(transformers, name)

    class ForImages(of_family):  # type: ignore[misc] # the class is known at run time only
        """The family's processor, of which parts may be missing."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            """As transformers does; a part that is left out is none of a wrong class."""
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    with plain_texts(folder) as plain:
        seeing = AutoImageProcessor.from_pretrained(plain, trust_remote_code=False)
    parts = {"image_processor": seeing, "tokenizer": tokenizer}
    file = folder / PROCESSOR_FILES[0]
    own = json.loads(read_text(file)) if file.is_file() else {}
    return ForImages.from_args_and_dict([parts.get(name) for name in of_family.get_attributes()], own)


def prepared_image(processor: Any, pixels: Any) -> tuple[dict[str, Any], str]:
    """What a processor makes of one image (tensors by the names of arguments), and the text that stands for it."""
    settings = processor._merge_kwargs(tokenizer_init_kwargs={}, return_tensors="pt")["images_kwargs"]
    seen, (text,) = processor._process_images([pixels], **{**settings, "return_tensors": "pt"})
    return dict(seen), str(text)


def image_features_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Names of what `get_image_features` takes."""
    import inspect

    return frozenset(inspect.signature(model.get_image_features).parameters)


def _attribute(model: PreTrainedModel, name: str) -> Any:
    if not hasattr(model, name):
        raise CompatibilityError(
            f"transformers {version('transformers')} has no {name}, which HybriMoE needs (tested with {TESTED});"
            f" install a release that fits: pip install 'transformers=={TESTED}'"
        )
    return getattr(model, name)


def _gguf(name: str) -> Any:
    """What transformers' reading of GGUF files has under `name`."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    found = getattr(gguf_tokenizer_mapping, name, None)
    if found is None:
        raise CompatibilityError(
            f"transformers {version('transformers')} has no {name} for GGUF files, which {TESTED} has; install a"
            f" release that fits: pip install 'transformers=={TESTED}'"
        )
    return found


def _call(model: PreTrainedModel, name: str, *arguments: Any, **named: Any) -> Any:
    method: Callable[..., Any] = _attribute(model, name)
    try:
        return method(*arguments, **named)
    except TypeError as error:
        installed = version("transformers")
        if installed == TESTED:
            raise
        raise CompatibilityError(
            f"transformers {installed} takes other arguments for {name} than {TESTED} does ({error});"
            f" install a release that fits: pip install 'transformers=={TESTED}'"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
