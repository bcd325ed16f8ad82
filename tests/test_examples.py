"""Every command that the repository shows can be typed: its program, flags, config keys and files are there."""

import importlib.util
import pathlib
import re

import pytest

import imagegpt_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("examples_checks", ROOT / "tests" / "examples" / "checks.py")
checks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checks)
commands, mistake, wrong_names = checks.commands, checks.mistake, checks.wrong_names

EXAMPLES = commands.examples()


@pytest.mark.parametrize("place", sorted({example.where.rpartition(":")[0] for example in EXAMPLES}))
def test_examples_can_be_typed(place):
    mistakes = [mistake(example) for example in EXAMPLES if example.where.rpartition(":")[0] == place]
    assert not any(mistakes), "\n".join(filter(None, mistakes))


def test_examples_are_seen():
    shown = {str(example).partition(": ")[2].partition(" --")[0] for example in EXAMPLES}
    for name in ("train", "encode", "sample", "evaluate"):
        assert f"python -m imagegpt_jax.{name}" in shown or f"imagegpt-jax {name}" in shown
    assert {"launch/local.sh", "launch/tpu_vm.sh run", "launch/gke.sh submit", "make demo"} <= shown
    assert len({example.where.rpartition(":")[0] for example in EXAMPLES}) > 40


TRAIN = "python -m imagegpt_jax.train --workdir=w"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python -m imagegpt_jax.trian --workdir=w", "no program imagegpt_jax.trian"),
        ("imagegpt-jax trian --workdir=w", "no trian"),
        ("python tools/demos.py", "no tools/demos.py"),
        (f"{TRAIN} --config=configs/decoders.py:size=B", "no config decoders.py"),
        (f"{TRAIN} --config=decoder:size=BB", "unknown size 'BB'"),
        (f"{TRAIN} --config=decoder:recipe=rar_C", "unknown recipe"),
        (f"{TRAIN} --config=decoder:size=test --config.optim.learning_rate=1", "learning_rate"),
        (f"{TRAIN} --config=decoder:size=test --config.steps=many", "steps"),
        (f"{TRAIN} --config=decoder:size=test --config.data.train_ops='decode|resise(8)'", "resise"),
        (f"{TRAIN} --config=decoder:size=test --config.data.train=photos:/data", "no kind of data"),
        (f"{TRAIN} --config=decoder:size=test --config.data.validation=tokens:t", "one split holds images"),
        (f"{TRAIN} --config=decoder:size=test --config.model.remat=some", "some"),
        (f"{TRAIN} --config=decoder:size=test --config.optim.name=adamm", "adamm"),
        (f"{TRAIN} --config=tokenizer:size=test --config.model.quantizer.kind=vqq", "vqq"),
        (f"{TRAIN} --config=decoder:size=L", "noise"),
        (f"{TRAIN} --config=tokenizer:size=vq16", "LPIPS"),
        (TRAIN, "--config is missing"),
        ("imagegpt-jax train --config=decoder:size=test", "workdir"),
        ("imagegpt-jax sample --decoder=d --prompt=a", "output"),
        ("imagegpt-jax sample --decoder=d --promt=a --output=o", "promt"),
        ("imagegpt-jax sample --decoder=d --outpaint=a.png --output=o", "margins"),
        ("imagegpt-jax sample --decoder=d --prompt=a --cfg_schedule=linaer --output=o", "linaer"),
        ("imagegpt-jax sample --decoder=d --prompt=a --num_images=few --output=o", "num_images"),
        ("imagegpt-jax encode --tokenizer=t --data=emoji:train --output=o extra", "unexpected words"),
        ("imagegpt-jax evaluate --images=a --protocol=adm --output=o", "protocol"),
        ("imagegpt-jax evaluate --images=a --metrics=fid,isc --output=o", "isc"),
        ("imagegpt-jax evaluate --checkpoint=a --sampler=cfg=3 --output=o", "cfg"),
        ("imagegpt-jax evaluate --checkpoint=a", "--output"),
        ("imagegpt-jax convert a b --to=llama3", "no layout"),
        ("imagegpt-jax convert a", "SOURCE and TARGET"),
        ("imagegpt-jax checkpoint list runs/a", "invalid choice"),
        ("launch/local.sh --process=2 -- --config=tokenizer:size=test --workdir=w", "--process=2"),
        ("launch/gke.sh start --name=a", "no action start"),
        ("sbatch --gpus=8 launch/slurm.sbatch -- --config=tokenizer:size=test --workdir=w", "--gpus=8"),
        ("sky launch launch/skypilot.yaml --env ARG=x", "no ARG"),
        ("docker run IMAGE imagegpt_jax.train --config=tokenizer:size=test", "workdir"),
        ("docker build --file=launch/Dockerfile --build-arg=EXTRAS=tpus .", "no extra tpus"),
        ("pip install -e '.[gpu]'", "no extra gpu"),
        ("make demos", "no demos"),
        ("--best_off=3", "no program takes"),
        ("--config.optim.rate", "no --config.optim.rate"),
    ],
)
def test_mistakes_are_seen(command, words):
    (example,) = commands.of_line("README.md:1", command, shown=True)
    assert words in (mistake(example) or "")


def test_both_spellings_are_parsed():
    for command in (
        "python -m imagegpt_jax.train --config=configs/decoder.py:size=B --workdir=w --config.tokenizer=t",
        "imagegpt-jax train --config=decoder:size=B --workdir=w --config.tokenizer=t",
        "imagegpt-jax pack --input=/data/photos --output=/data/packed",
        "imagegpt-jax demo --output=runs/demo",
    ):
        (example,) = commands.of_line("README.md:1", command, shown=True)
        assert mistake(example) is None


def test_messages_name_what_is_there():
    wrong = [f"{where}: {name}" for where, text in commands.messages() for name in wrong_names(text)]
    assert wrong == []


@pytest.mark.parametrize("page", commands.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_what_is_there(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)]
    if ROOT / "docs" in page.parents:
        links = []  # some lead to pages that are generated: building the site checks them
    wrong = [link for link in links if link and not (page.parent / link).exists()]
    calls = {name for name in re.findall(r"\big\.([a-z]\w*)", text) if name not in dir(imagegpt_jax)}
    assert [*wrong, *wrong_names(text), *calls] == []
