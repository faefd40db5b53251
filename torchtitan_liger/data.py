"""Text datasets that need no download: the standard library, and JSON Lines files.

`register_datasets()` adds three names to torchtitan's `DATASETS`:

    stdlib, stdlib_validation   the running Python's own sources, one document per file
    jsonl                       dataset_path is a JSON Lines file or a glob of them
"""

import glob
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path

import datasets
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets import DatasetConfig, text_datasets

__all__ = ["build_text_dataloader", "explain_empty_shard", "register_datasets"]

_INSTALLED = ("site-packages", "dist-packages", "__pycache__")
_TESTS_AND_TOOLS = ("test", "tests", "idlelib")
# Written by programs: 120 character tables much alike, and one file of 0.7 MB.
_GENERATED = ("encodings", "pydoc_data")
_SKIPPED_FOLDERS = {*_INSTALLED, *_TESTS_AND_TOOLS, *_GENERATED}
# Starts of names; both hold the paths of the machine that built this Python.
_BUILD_FOLDER, _BUILD_FILE = "config-", "_sysconfigdata"

# Of the 256 values of a hash's first byte: 5 % of the documents.
_VALIDATION_BYTES = 13


class _OurDataset(DatasetConfig):
    """Marks what a second call may replace."""


def register_datasets(text_field: str = "text") -> None:
    """Add `stdlib`, `stdlib_validation` and `jsonl` to torchtitan's datasets.

    Each name works as `training.dataset` and as `validation.dataset`. A second call
    replaces what the first one registered; a dataset of yours that has the name stays.

    `stdlib` and `stdlib_validation` are disjoint, the same on every machine with the
    same Python, and kept in memory. `dataset_path` may name another folder of sources.

    `jsonl` takes one document per line from the files of `dataset_path`, in sorted
    order. It is read once, on first use, into the cache of Hugging Face datasets
    (`HF_DATASETS_CACHE`), and memory-mapped from there. An edited file is read again.

    Args:
        text_field: the field of a JSON Lines object that holds the document.

    The datasets raise, when a dataloader is built from them:
        FileNotFoundError: no file at a `dataset_path`, no match for a glob, no Python
            sources in a folder.
        ValueError: no `dataset_path`, a folder for a file or a file for a folder, no
            documents, or a faulty line. The message gives the file and the line number.
    """
    stdlib = sysconfig.get_paths()["stdlib"]
    loaders = {
        "stdlib": (stdlib, partial(_load_sources, validation=False)),
        "stdlib_validation": (stdlib, partial(_load_sources, validation=True)),
        "jsonl": ("", partial(_load_jsonl, text_field=text_field)),
    }
    for name, (path, loader) in loaders.items():
        if isinstance(text_datasets.DATASETS.get(name), _OurDataset | None):
            config = _OurDataset(path, loader, itemgetter("text"))
            text_datasets.DATASETS[name] = config


def build_text_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = True,
) -> ParallelAwareDataloader:
    """torchtitan's function of this name, with the errors of `check_text_field` and
    `explain_empty_shard`."""
    check_text_field(job_config)
    with explain_empty_shard(job_config.training.dataset, dp_rank, dp_world_size):
        return text_datasets.build_text_dataloader(
            dp_world_size, dp_rank, tokenizer, job_config, infinite
        )


def check_text_field(job: JobConfig) -> None:
    """
    Raises:
        ValueError: for a `training.text_field` where no dataset is `jsonl`.
    """
    text_field = getattr(job.training, "text_field", "text")
    if text_field != "text" and "jsonl" not in {
        job.training.dataset,
        job.validation.dataset,
    }:
        raise ValueError(
            f"training.text_field is {text_field!r}, which only the dataset jsonl reads, "
            f'but training.dataset is {job.training.dataset!r}: set it to "jsonl", or '
            "leave training.text_field out"
        )


@contextmanager
def explain_empty_shard(
    dataset: str, dp_rank: int, dp_world_size: int
) -> Iterator[None]:
    """Around what builds a dataloader: name the cause when this rank gets no document.

    Hugging Face datasets says `IndexError: Index 2 out of range` then. Streamed
    datasets are not checked: their length is not known.

    Raises:
        ValueError: the dataset has fewer documents than there are data-parallel ranks.
    """
    try:
        yield
    except IndexError as error:
        # Shards are contiguous and as even as can be, so an empty one bounds the whole.
        # The lowest rank to raise has the exact number.
        raise ValueError(
            f"dataset {dataset!r} has at most {dp_rank} document(s) for {dp_world_size} "
            f"data-parallel ranks, and rank {dp_rank} gets none. Give it at least "
            f"{dp_world_size} documents (cut long ones into several), or use fewer ranks "
            "(parallelism.data_parallel_shard_degree, data_parallel_replicate_degree)"
        ) from error


def _load_sources(folder: str, validation: bool) -> Dataset:
    if os.path.isfile(folder):
        raise ValueError(
            f"dataset_path {folder!r} is a file, where a folder of Python sources is "
            'wanted: for a JSON Lines file set dataset = "jsonl"'
        )
    # The hash of a file's place in the folder both splits and orders: alike on every
    # machine, and files of one package end up on different ranks.
    paths = {
        hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest(): path
        for path in _python_files(folder)
    }
    texts = (
        path.read_text(encoding="utf-8", errors="replace")
        for digest, path in sorted(paths.items())
        if (digest[0] < _VALIDATION_BYTES) == validation
    )
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise FileNotFoundError(
            f"no {'validation' if validation else 'training'} documents: {folder!r} has "
            f"{len(paths)} Python files (.py). A frozen or zipped Python keeps none: set "
            'dataset = "jsonl" and dataset_path to a JSON Lines file'
        )
    return Dataset.from_dict({"text": documents})


def _python_files(folder: str) -> Iterator[Path]:
    for parent, subfolders, names in os.walk(folder):
        # Pruned rather than filtered: site-packages may hold 100,000 files.
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith(_BUILD_FOLDER)
        ]
        for name in names:
            path = Path(parent, name)
            # is_file: in an image made small, a link may lead nowhere.
            wanted = name.endswith(".py") and not name.startswith(_BUILD_FILE)
            if wanted and path.is_file():
                yield path


def _load_jsonl(dataset_path: str, text_field: str) -> Dataset:
    files = tuple(
        (path, os.stat(path).st_size, os.stat(path).st_mtime_ns)
        for path in _jsonl_files(dataset_path)
    )
    try:
        with _progress_bars_only_on_a_terminal():
            # The arguments of the generator name the entry in the cache. Its lock lets
            # one process write the entry while the other ranks wait for it.
            return Dataset.from_generator(
                _read_jsonl,
                features=Features({"text": Value("large_string")}),
                gen_kwargs={"files": files, "text_field": text_field},
            )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _jsonl_files(dataset_path: str) -> list[str]:
    if not dataset_path:
        raise ValueError(
            "dataset 'jsonl' needs a path: set training.dataset_path (for validation, "
            "validation.dataset_path) to a JSON Lines file or a glob, 'data/*.jsonl'"
        )
    if os.path.isdir(dataset_path):
        raise ValueError(
            f"dataset_path {dataset_path!r} is a folder: name its files with a glob, "
            f"{os.path.join(dataset_path, '*.jsonl')!r}"
        )
    # A file whose name has brackets is itself, not a pattern.
    paths = [dataset_path]
    if not os.path.exists(dataset_path):
        paths = glob.glob(dataset_path, recursive=True)
    files = sorted(os.path.abspath(path) for path in paths if os.path.isfile(path))
    if not files:
        raise FileNotFoundError(
            f"dataset_path {dataset_path!r} is no file, and no file matches it as a "
            f"glob from {os.getcwd()!r}: give a JSON Lines file or 'data/*.jsonl'"
        )
    return files


def _read_jsonl(
    files: tuple[tuple[str, int, int], ...], text_field: str
) -> Iterator[dict[str, str]]:
    # `files` is a tuple because Hugging Face would call this once per item of a list.
    empty = True
    for path, _size, _mtime in files:
        with open(path, "rb") as lines:
            for number, line in enumerate(map(bytes.strip, lines), start=1):
                if line:
                    yield {"text": _parse(line, text_field, f"{path}:{number}")}
                    empty = False
    if empty:
        names = ", ".join(path for path, _size, _mtime in files)
        raise ValueError(
            f"no documents in {names}: write one JSON object per line, "
            f'{{"{text_field}": "..."}}'
        )


def _parse(line: bytes, text_field: str, place: str) -> str:
    try:
        # Some editors start a file with a byte order mark; -sig drops it.
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        # json counts lines too, from the start of its argument.
        reason = str(error).replace("line 1 column", "column")
        raise ValueError(
            f"{place}: not JSON ({reason}); write one whole object per line, in UTF-8"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{place}: a {type(record).__name__} where an object is wanted, "
            f'{{"{text_field}": "..."}}'
        )
    if text_field not in record:
        raise ValueError(
            f"{place}: no field {text_field!r}, only {sorted(record)}; set "
            "training.text_field to one of these"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {text_field!r} is {text!r:.50}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: field {text_field!r} is not valid Unicode ({error.reason} at "
            f"character {error.start}); write \\ud800 to \\udfff only in pairs"
        ) from error
    return text


@contextmanager
def _progress_bars_only_on_a_terminal() -> Iterator[None]:
    # A log file would keep every state of the bar. An environment variable that is set
    # stays in force, and datasets warns of an attempt to overrule it.
    user_chose = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None
    if user_chose or datasets.are_progress_bars_disabled() or sys.stderr.isatty():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
