import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets import DatasetConfig, text_datasets

import torchtitan_liger.data
from torchtitan_liger.data import (
    build_text_dataloader,
    check_text_field,
    explain_empty_shard,
    register_datasets,
)

# torchdata 0.11 calls a function that torch has deprecated since.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

ASSETS = Path(torchtitan_liger.data.__file__).parent / "assets" / "tokenizer"
SCRIPT = Path(__file__).parents[2] / "scripts" / "train_tokenizer.py"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Our datasets in a registry and a cache of this test's own."""
    monkeypatch.setattr(text_datasets, "DATASETS", dict(text_datasets.DATASETS))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    register_datasets()


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(str(ASSETS))


def load(name: str, path: Path | str | None = None) -> list[str]:
    config = text_datasets.DATASETS[name]
    documents = config.loader(config.path if path is None else str(path))
    return [config.sample_processor(document) for document in documents]


def write(path: Path, *texts: str, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def sources(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    return folder


# --- stdlib -----------------------------------------------------------------------


def test_stdlib_is_the_same_each_time() -> None:
    assert load("stdlib") == load("stdlib")


def test_stdlib_is_the_library_and_not_what_is_installed() -> None:
    documents = load("stdlib")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    assert (stdlib / "argparse.py").read_text(encoding="utf-8") in documents
    assert Path(pytest.__file__).read_text(encoding="utf-8") not in documents
    assert len(documents) > 300


def test_validation_is_about_five_percent_and_disjoint() -> None:
    train, validation = load("stdlib"), load("stdlib_validation")
    assert not set(train) & set(validation)
    assert 0.03 < len(validation) / (len(train) + len(validation)) < 0.08


def test_the_hash_of_a_name_orders_and_splits(tmp_path: Path) -> None:
    names = [f"module_{i}" for i in range(200)]
    folder = sources(tmp_path / "lib", **{name: name for name in names})
    digests = {name: hashlib.sha256(f"{name}.py".encode()).digest() for name in names}
    by_hash = sorted(names, key=digests.__getitem__)
    cut = sum(digest[0] < 13 for digest in digests.values())
    assert 0 < cut < 30
    assert load("stdlib_validation", folder) == by_hash[:cut]
    assert load("stdlib", folder) == by_hash[cut:]


def test_only_sources_of_the_library_are_documents(tmp_path: Path) -> None:
    folder = sources(tmp_path / "lib", wanted="wanted", blank=" \n", empty="")
    (folder / "latin.py").write_bytes(b"caf\xe9")
    (folder / "notes.txt").write_text("no Python")
    (folder / "_sysconfigdata_x86.py").write_text("paths")
    (folder / "nowhere.py").symlink_to(folder / "missing.py")
    for skipped in ("site-packages", "test", "idlelib", "encodings", "config-3.11-x"):
        sources(folder / skipped, module=skipped)
    sources(folder / "email", module="in a package")
    assert sorted(load("stdlib", folder)) == ["caf\ufffd", "in a package", "wanted"]


def test_a_python_without_sources_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped = str(tmp_path / "python311.zip")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": zipped})
    register_datasets()
    with pytest.raises(FileNotFoundError, match='set dataset = "jsonl"') as error:
        load("stdlib")
    assert zipped in str(error.value)


# --- jsonl ------------------------------------------------------------------------


def test_blank_lines_and_a_byte_order_mark_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two \\u00e9"}')
    assert load("jsonl", path) == ["one", "two é"]


def test_a_glob_reads_its_files_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", "third")
    write(tmp_path / "a.jsonl", "first", "second")
    write(tmp_path / "c.json", "not matched")
    assert load("jsonl", tmp_path / "*.jsonl") == ["first", "second", "third"]


def test_an_empty_file_among_others_is_fine(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", "only")
    assert load("jsonl", tmp_path / "*.jsonl") == ["only"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "a1.jsonl", "matched")
    assert load("jsonl", tmp_path / "a[1].jsonl") == ["matched"]
    write(tmp_path / "a[1].jsonl", "named")
    assert load("jsonl", tmp_path / "a[1].jsonl") == ["named"]


def test_a_relative_path_starts_at_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        os.utime(write(tmp_path / name / "a.jsonl", name), ns=(1, 1))
        monkeypatch.chdir(tmp_path / name)
        assert load("jsonl", "a.jsonl") == [name]


def test_an_edited_file_is_never_read_from_the_cache(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "old")
    os.utime(path, ns=(1, 1))
    assert load("jsonl", path) == ["old"]
    write(path, "new")
    os.utime(path, ns=(2, 2))  # the same size
    assert load("jsonl", path) == ["new"]
    write(path, "newer")
    os.utime(path, ns=(2, 2))  # the same time
    assert load("jsonl", path) == ["newer"]


def test_an_unchanged_file_is_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", "text")
    stat = path.stat()
    load("jsonl", path)
    path.write_bytes(b"!" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load("jsonl", path) == ["text"]


def test_the_text_field_may_have_another_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "title", "body": "story"}\n')
    register_datasets(text_field="body")
    assert load("jsonl", path) == ["story"]
    register_datasets()
    assert load("jsonl", path) == ["title"]


def test_a_dataset_of_ones_own_stays() -> None:
    own = DatasetConfig("", lambda path: [], lambda sample: "mine")
    text_datasets.DATASETS["jsonl"] = own
    register_datasets(text_field="body")
    assert text_datasets.DATASETS["jsonl"] is own


def test_no_progress_bar_goes_into_a_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load("jsonl", write(tmp_path / "a.jsonl", "text"))
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"text": "cut', r"not JSON \(Unterminated string starting at: column 10"),
        (b'{"text": "caf\xe9"}', "not JSON .*can't decode byte 0xe9 in position 13"),
        (b"[" * 100_000, "not JSON .*recursion"),
        (b'["a"]', "a list where an object is wanted"),
        (b'{"title": "a", "body": "b"}', r"no field 'text', only \['body', 'title'\]"),
        (b'{"text": null}', "field 'text' is None, not a string"),
        (b'{"text": 3}', "field 'text' is 3, not a string"),
        (b'{"text": "a\\ud800"}', "field 'text' is not valid Unicode .* character 1"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, line: bytes, fault: str) -> None:
    write(tmp_path / "a.jsonl", "fine")
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=fault) as error:
        load("jsonl", tmp_path / "*.jsonl")
    assert type(error.value) is ValueError
    assert str(error.value).startswith(f"{path}:3: ")


def test_a_mended_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not JSON"):
        load("jsonl", path)
    assert load("jsonl", write(path, "fine")) == ["fine"]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_documents_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="no documents in ") as error:
        load("jsonl", path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "*.jsonl", "folder*"])
def test_a_path_without_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="no file matches it") as error:
        load("jsonl", tmp_path / name)
    assert repr(str(tmp_path / name)) in str(error.value)


def test_a_folder_is_refused_with_its_glob(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: .*\*\.jsonl"):
        load("jsonl", tmp_path)


def test_jsonl_without_a_path_is_refused(tokenizer: HuggingFaceTokenizer) -> None:
    with pytest.raises(ValueError, match=r"set training\.dataset_path .*validation"):
        build_text_dataloader(1, 0, tokenizer, job_config("jsonl"))


# --- dataloader -------------------------------------------------------------------


def job_config(dataset: str, path: Path | None = None) -> JobConfig:
    config = JobConfig()
    for section in (config.training, config.validation):
        section.dataset = dataset
        section.dataset_path = None if path is None else str(path)
        section.local_batch_size = 2
        section.seq_len = 8
    return config


def tokens(batches: Iterator[Any], count: int) -> list[torch.Tensor]:
    return [next(batches)[0]["input"] for _ in range(count)]


def test_a_resumed_dataloader_gives_the_same_next_batches(
    tmp_path: Path, tokenizer: HuggingFaceTokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", *(f"document {i} " * i for i in range(9)))
    config = job_config("jsonl", path)
    first = build_text_dataloader(1, 0, tokenizer, config)
    batches = iter(first)
    tokens(batches, 3)
    state = first.state_dict()
    second = build_text_dataloader(1, 0, tokenizer, config)
    second.load_state_dict(state)
    torch.testing.assert_close(
        tokens(iter(second), 40), tokens(batches, 40), rtol=0, atol=0
    )


def test_ranks_read_disjoint_documents(
    tmp_path: Path, tokenizer: HuggingFaceTokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", "zero " * 50, "one " * 50, "two " * 50)
    seen = []
    for rank in range(2):
        loader = build_text_dataloader(
            2, rank, tokenizer, job_config("jsonl", path), infinite=False
        )
        text = "".join(
            tokenizer.decode(row)
            for inputs, _ in loader
            for row in inputs["input"].tolist()
        )
        seen.append({word for word in ("zero", "one", "two") if word in text})
    assert seen == [{"zero", "one"}, {"two"}]


def test_every_dataset_of_ours_builds_both_dataloaders(
    tmp_path: Path, tokenizer: HuggingFaceTokenizer
) -> None:
    path = write(tmp_path / "a.jsonl", "text " * 100)
    for name in ("stdlib", "stdlib_validation", "jsonl"):
        config = job_config(name, path if name == "jsonl" else None)
        for build in (
            build_text_dataloader,
            text_datasets.build_text_validation_dataloader,
        ):
            loader = build(
                dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=config
            )
            inputs, labels = next(iter(loader))
            assert torch.equal(inputs["input"][:, 1:], labels[:, :-1])
            assert labels.shape == (2, 8)


def test_a_rank_without_documents_is_refused(
    tmp_path: Path, tokenizer: HuggingFaceTokenizer
) -> None:
    config = job_config("jsonl", write(tmp_path / "a.jsonl", "one", "two"))
    build_text_dataloader(3, 1, tokenizer, config)
    with pytest.raises(
        ValueError, match=r"'jsonl' has at most 2 document\(s\) for 3 data-parallel"
    ):
        build_text_dataloader(3, 2, tokenizer, config)
    with (
        pytest.raises(ValueError, match="and rank 2 gets none"),
        explain_empty_shard(config.validation.dataset, dp_rank=2, dp_world_size=3),
    ):
        text_datasets.build_text_validation_dataloader(3, 2, tokenizer, config)


def test_an_unknown_dataset_is_left_to_torchtitan(
    tokenizer: HuggingFaceTokenizer,
) -> None:
    with pytest.raises(ValueError, match=r"Dataset nope is not supported.*'stdlib'"):
        build_text_dataloader(1, 0, tokenizer, job_config("nope"))


# --- tokenizer --------------------------------------------------------------------


def test_the_vocabulary_has_16384_tokens(tokenizer: HuggingFaceTokenizer) -> None:
    assert tokenizer.get_vocab_size() == 16_384
    assert sorted(tokenizer.get_vocab().values()) == list(range(16_384))


def test_torchtitan_finds_and_adds_the_special_tokens(
    tokenizer: HuggingFaceTokenizer,
) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    ids = tokenizer.encode("x = 1", add_bos=True, add_eos=True)
    assert (ids[0], ids[-1]) == (0, 1)
    assert ids[1:-1] == tokenizer.encode("x = 1", add_bos=False, add_eos=False)
    assert tokenizer.decode(ids) == "x = 1"


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x  # tabs,  spaces \r\n\n\n    end ",
        "emoji 👩🏽‍🚀🏳️‍🌈, 漢字, العربية, e\u0301 \u00e9",
        "".join(map(chr, range(0x800))),
        "\U0010ffff\ufffd\u2028\x00",
        "",
    ],
)
def test_any_text_comes_back(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def train_tokenizer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_tokenizer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {f"module_{i}": f"def function_{i}(): return {i}\n" for i in range(20)}
    folder = str(sources(tmp_path / "lib", **texts))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": folder})


@pytest.mark.usefixtures("small_stdlib")
def test_training_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    script = train_tokenizer()
    for name in ("a", "b"):
        script.save(script.train(vocab_size=270), tmp_path / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (
            tmp_path / "b" / name
        ).read_bytes()
    trained = HuggingFaceTokenizer(str(tmp_path / "a"))
    assert (trained.bos_id, trained.eos_id, trained.vocab_size) == (0, 1, 270)


@pytest.mark.usefixtures("small_stdlib")
@pytest.mark.parametrize(
    ("vocab_size", "fault"), [(257, "too small: .* 258"), (9_999, "too large: ")]
)
def test_an_impossible_vocabulary_is_refused(vocab_size: int, fault: str) -> None:
    with pytest.raises(ValueError, match=f"--vocab-size {vocab_size} is {fault}"):
        train_tokenizer().train(vocab_size)


@pytest.mark.parametrize("section", ["training", "validation"])
def test_a_text_field_is_of_jsonl_alone(section):
    job = JobConfig()
    check_text_field(job)
    job.training.text_field = "body"  # as our config module's
    with pytest.raises(
        ValueError, match="text_field is 'body', .*dataset is 'c4_test'"
    ):
        build_text_dataloader(1, 0, None, job)
    getattr(job, section).dataset = "jsonl"
    check_text_field(job)


def test_a_file_is_no_folder_of_sources(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    with pytest.raises(ValueError, match='is a file, .* set dataset = "jsonl"'):
        text_datasets.DATASETS["stdlib"].loader(str(path))


def test_two_stars_are_any_folders(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    write(folder / "x.jsonl", "one")
    assert load("jsonl", f"{tmp_path}/**/*.jsonl") == ["one"]
