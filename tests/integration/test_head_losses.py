"""Other losses in a job, from its TOML to its curves, on several layouts."""

from __future__ import annotations

import json
import os
import re
import textwrap

import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from tests.helpers import FLAG, ROOT, python_env, run_command, run_training
from torchtitan_liger.loss_curves import LOSS, read_tensorboard

pytestmark = pytest.mark.slow

TABLES = """
[head_loss]
logit_softcap = 5.0
temperature = 0.8

[head_loss.cross_entropy]
label_smoothing = 0.1

[head_loss.z_loss]
weight = 1e-3

[head_loss.focal]
weight = 0.3

[head_loss.entropy_bonus]
weight = 0.0
"""
WEIGHTS = {"cross_entropy": 1, "z_loss": 1e-3, "focal": 0.3, "entropy_bonus": 0.2}
LENGTH, LOCAL_BATCH = 64, 4


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A job on two documents of one micro-batch each: rank or micro-batch, all one."""
    folder = tmp_path_factory.mktemp("job")
    tokenizer = HuggingFaceTokenizer(str(ROOT / "torchtitan_liger/assets/tokenizer"))

    def num_tokens(text):
        return len(tokenizer.encode(text, add_bos=True, add_eos=True))

    documents = []
    for name in ("README.md", "pyproject.toml"):
        text = (ROOT / name).read_text()[:500]
        while (missing := LOCAL_BATCH * (LENGTH + 1) - num_tokens(text)) > 0:
            text += " self" * missing
        assert missing == 0
        documents.append(json.dumps({"text": text}))
    (folder / "data.jsonl").write_text("\n".join(documents))
    config = folder / "job.toml"
    text = (ROOT / "train_configs" / "debug_model.toml").read_text()
    config.write_text(text + TABLES)
    return config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights that every layout starts from; by themselves they draw others."""
    folder = tmp_path_factory.mktemp("seed")
    run = run_training(
        "--checkpoint.enable", "--checkpoint.create_seed_checkpoint", ngpu=1, cwd=folder
    )
    assert run.returncode == 0, run.stdout[-4000:]
    return folder / "outputs/checkpoint/step-0"


@pytest.fixture(scope="module")
def train(job, weights, tmp_path_factory):
    """Train two steps on `ngpu` processes: the log and the curves."""

    def train(ngpu, *args):
        folder = tmp_path_factory.mktemp("run")
        run = run_training(
            f"--job.config_file={job}",
            "--checkpoint.enable",
            f"--checkpoint.initial_load_path={weights}",
            "--checkpoint.interval=100",
            FLAG,
            "--head_loss.entropy_bonus.weight=0.2",  # wins over the TOML
            "--training.dataset=jsonl",
            f"--training.dataset_path={job.parent / 'data.jsonl'}",
            f"--training.seq_len={LENGTH}",
            f"--training.local_batch_size={LOCAL_BATCH}",
            f"--training.global_batch_size={2 * LOCAL_BATCH}",
            "--training.steps=2",
            "--metrics.log_freq=1",
            "--metrics.disable_color_printing",
            "--debug.seed=1",
            *args,
            ngpu=ngpu,
            cwd=folder,
        )
        assert run.returncode == 0, run.stdout[-4000:]
        return run.stdout, read_tensorboard(folder)

    return train


@pytest.fixture(scope="module")
def alone(train):
    return train(1)


def test_the_terms_make_up_the_loss(alone):
    _, curves = alone
    names = {tag for tag in curves if tag.startswith("head_loss/")}
    assert names == {
        f"head_loss/{name}"
        for name in (*WEIGHTS, "accuracy", "max_prob", "entropy", "perplexity")
    }
    for step, loss in curves[LOSS].items():
        total = sum(w * curves[f"head_loss/{n}"][step] for n, w in WEIGHTS.items())
        assert total == pytest.approx(loss, rel=1e-5)


def test_the_log_says_what_is_trained_on_and_what_it_is(alone):
    log, curves = alone
    assert (
        "The head's loss is cross_entropy + 0.001 * z_loss + 0.3 * focal + "
        "0.2 * entropy_bonus (head_loss." in log
    )
    assert "Preflight passed: chunked head" in log
    lines = re.findall(r"step: +(\d+)  head_loss: (.*)", log)
    assert [int(step) for step, _ in lines] == [1, 2]
    for step, line in lines:
        values = dict(re.findall(r"(\w+) ([-\d.e]+)", line))
        assert len(values) == 8
        for name, value in values.items():
            tag = f"head_loss/{name}"
            assert float(value) == pytest.approx(curves[tag][int(step)], rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [(), ("--parallelism.tensor_parallel_degree=2",)],
    ids=["FSDP2", "TP"],
)
def test_every_curve_is_that_of_one_process(layout, alone, train):
    log, curves = train(2, *layout)
    assert "Preflight passed: chunked head" in log
    _, expected = alone
    tags = [tag for tag in expected if tag.startswith(("head_loss/", LOSS))]
    assert len(tags) == 9
    for tag in tags:
        # A token more or less that is right, of 512
        slack = 0.0021 if tag == "head_loss/accuracy" else 0.0
        assert curves[tag] == pytest.approx(expected[tag], rel=1e-4, abs=slack), tag


def test_a_dataloader_of_ones_own_feeds_the_terms_as_the_readme_says(tmp_path):
    readme = (ROOT / "README.md").read_text()
    for name, first, last in (
        (
            "my_train",
            "    from torchtitan_liger.train import main\n",
            "main(register)\n",
        ),
        ("my_data", "    import torch\n    from torch.utils", "batch_size=size)\n"),
    ):
        start = readme.index(first)
        end = readme.index(last, start) + len(last)
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(readme[start:end]))
    run = run_command(
        ROOT / "run_train.sh",
        FLAG,
        "--head_loss.policy_gradient.weight=0.5",
        "--head_loss.policy_gradient.kind=reinforce",  # reads no old_logp
        "--checkpoint.enable",
        f"--training.seq_len={LENGTH}",
        "--training.steps=2",
        "--metrics.disable_color_printing",
        env=python_env(
            NGPU="1",
            TRAIN_FILE="my_train",
            PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
        ),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    unread = "The batch has old_logp, which no term of [head_loss] reads"
    assert run.stdout.count(unread) == 1
    curves = read_tensorboard(tmp_path)
    assert curves["head_loss/policy_gradient/advantage"][1] == 1.0
    # With advantages of one it is the cross entropy.
    cross_entropy = curves["head_loss/cross_entropy"][1]
    assert curves["head_loss/policy_gradient"][1] == pytest.approx(cross_entropy)
    assert curves[LOSS][1] == pytest.approx(1.5 * cross_entropy)
