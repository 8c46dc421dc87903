"""Bad input ends in a non-zero exit and one message: got, wanted, and the way out.

The cases run through `run` in this process with a training mode that fails the test
when it is reached. What only a real process or the real pipeline can see is in
test_bad_programs.
"""

import sys
import types
from pathlib import Path

import jax
import pytest
from one_message import check_message

from ddrl_jax.config_file import load_config
from ddrl_jax.main import run
from ddrl_jax.workdir import open_workdir

ROOT = Path(__file__).resolve().parents[1]
SMOKE = f"--config={ROOT}/configs/quickstart.py:smoke"


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(word, *arguments): run refuses them with `word` in its message."""
    reached = types.SimpleNamespace(train=lambda *_: pytest.fail("training began"))
    monkeypatch.setitem(sys.modules, "ddrl_jax.train", reached)
    monkeypatch.chdir(tmp_path)

    def check(word: str, *arguments: str) -> None:
        code = run(["main", *arguments])
        captured = capsys.readouterr()
        check_message(code, captured.out + captured.err, word)
        assert captured.out == ""  # nothing but the message, and that on stderr

    return check


# ---- the command line itself: arguments, and a word of the message

ARGUMENTS = {
    "nothing": ([], "--workdir is missing"),
    "no config": (["--workdir=w"], "--config is missing"),
    "two configs": (
        [SMOKE, "--config=configs/base.py", "--workdir=w"],
        f"{SMOKE} --config=configs/base.py\n",
    ),
    "a config twice": (
        ["--mode=report", SMOKE, "--workdir=w", "--config", SMOKE[9:]],
        f"{SMOKE} {SMOKE}\n",
    ),
    "no workdir": ([SMOKE], "--workdir is missing"),
    "empty workdir": ([SMOKE, "--workdir="], "--workdir is missing"),
    "workdir without value": ([SMOKE, "--workdir"], "Missing value"),
    "workdir in a bucket": ([SMOKE, "--workdir=gs://b/run"], "mount a shared"),
    "workdir in latin-1": ([SMOKE, "--workdir=/tmp/caf\udce9"], "UTF-8"),
    "evaluation of no run": ([SMOKE, "--workdir=.", "--mode=evaluate"], "holds no run"),
    "no such mode": ([SMOKE, "--workdir=w", "--mode=tain"], 'did you mean "train"?'),
    "plan without devices": ([SMOKE, "--mode=plan"], "--plan.devices is missing"),
    "plan without a chip": (
        [SMOKE, "--mode=plan", "--plan.devices=8"],
        "--plan.chip is missing",
    ),
    "unknown chip": (
        [SMOKE, "--mode=plan", "--plan.devices=8", "--plan.chip=v5"],
        "no such chip",
    ),
    "devices of a plan in words": (
        [SMOKE, "--mode=plan", "--plan.devices=many", "--plan.chip=v5p"],
        "--plan.devices",
    ),
    "plan of a mesh that does not cover": (
        [SMOKE, "--mode=plan", "--plan.devices=6", "--plan.chip=v5p"]
        + ["--config.mesh.fsdp=4"],
        "does not cover the devices",
    ),
    "misspelt flag of a plan": ([SMOKE, "--workdir=w", "--plan.device=8"], "--plan.*"),
    "misspelt flag": ([SMOKE, "--workdri=w", "--workdir=w"], 'did you mean "workdir"?'),
    "no flag at all": ([SMOKE, "--workdir=w", "train"], "belongs to no flag"),
    "value apart": ([SMOKE, "--workdir=w", "--config.log.progress", "0"], "got:     0"),
    "flagfile": ([SMOKE, "--workdir=w", "--flagfile=none.txt"], "none.txt"),
    "config of a long name": ([f"--config={300 * 'x'}", "--workdir=w"], "too long"),
    "workdir of nobody": ([SMOKE, "--workdir=~no-such-user/w"], "--workdir begins"),
    "samples in the home of nobody": (
        [SMOKE, "--workdir=w", "--config.sample.output=~no-such-user/set"],
        "--config.sample.output begins with a home",
    ),
    "config of nobody": (["--config=~no-such-user/x.py", "--workdir=w"], "--config "),
    "report of a long name": ([f"--workdir={300 * 'x'}", "--mode=report"], "too long"),
    "report of nothing": (["--workdir=none", "--mode=report"], "is not a workdir"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, refused):
    arguments, word = ARGUMENTS[case]
    refused(word, *arguments)


# ---- keys and values of the configuration: arguments, and a word of the message

OVERRIDES = {
    "misspelt key": ("train.epoch=3", 'did you mean "train.epochs"?'),
    "misspelt section": ("optimiser.lr=1e-3", 'did you mean "optimizer.lr"?'),
    "key without section": ("lr=1e-3", "no key lr"),
    "empty key": ("=3", "no key"),
    "key of a key": ("train.epochs.first=3", "train.epochs"),
    "text for a number": ("train.epochs=many", "'many'"),
    "fraction for a count": ("train.epochs=1.5", "a whole number >= 1"),
    "nothing for a number": ("train.epochs=", "train.epochs"),
    "text for a switch": ("log.progress=maybe", "True or False"),
    "text for a tuple": ("policy.train_on=the first", "policy.train_on"),
    "half a tuple": ("policy.train_on=(0,", "policy.train_on"),
    "text for a table": ("rewards.weights=compressibility", "rewards.weights"),
    "half a table": ("rewards.weights={'compressibility'", "rewards.weights"),
    "number for a section": ("train=3", "config.train=3"),
    "section that lacks keys": ("log={'wandb': False}", "the key log."),
    "misspelt reward weight": ("rewards.weights.compresibility=1",
                               'did you mean "compressibility"?'),
    "reward not in the table": ("rewards.weights.incompressibility=1",
                                "replace the table"),
    "unknown reward": ("rewards.weights={'beauty': 1.0}", "'beauty'"),
    "misspelt reward": ("rewards.weights={'compresibility': 1.0}",
                        'did you mean "compressibility"?'),
    "negative reward weight": ("rewards.weights={'compressibility': -1.0}", "-1.0"),
    "no reward": ("rewards.weights={}", "no reward to train on"),
    "unknown judge": ("rewards.heldout=('retrival',)", 'did you mean "retrieval"?'),
    "trained judge": ("rewards.heldout=('compressibility',)", "judges nothing"),
    "unknown kernel": ("sampler.kernel=flow_gpro", 'did you mean "flow_grpo"?'),
    "unknown solver": ("evaluate.solver=eular", 'did you mean "euler"?'),
    "unknown model": ("model.name=emojy", 'did you mean "emoji"?'),
    "unknown dtype": ("model.dtype=float16", "bfloat16"),
    "unknown attention": ("model.attention=flash", "model.attention"),
    "unknown advantages": ("advantages.kind=groups", 'did you mean "group"?'),
    "unknown term": ("policy.term=reinforced", 'did you mean "reinforce"?'),
    "unknown transform": ("policy.transform=neg-exp", 'did you mean "neg_exp"?'),
    "unknown schedule": ("optimizer.schedule=cosin", 'did you mean "cosine"?'),
    "unknown data": ("data.source=emojis", 'did you mean "emoji"?'),
    "no steps": ("sampler.steps=0", "sampler.steps"),
    "negative steps": ("sampler.steps=-5", "sampler.steps"),
    "one step without noise": ("sampler.steps=1", "no noise"),
    "no noise": ("sampler.noise_level=0", "no noise"),
    "no evaluation steps": ("evaluate.steps=0", "evaluate.steps"),
    "no epochs": ("train.epochs=0", "train.epochs"),
    "no samples": ("prompts.group_size=0", "prompts.group_size"),
    "group of one": ("prompts.group_size=1", "prompts.group_size"),
    "minibatches": ("train.minibatches=3", "train.minibatches"),
    "microbatch": ("train.microbatch=-3", "train.microbatch"),
    "microbatch and devices": ("prompts.per_epoch=1", "divisible by 8"),
    "mesh too large": ("mesh.data=16", "8 device(s)"),
    "mesh that does not divide": ("mesh.fsdp=3", "mesh"),
    "two free axes": ("mesh.fsdp=-1", "-1 at most once"),
    "step that is not there": ("policy.train_on=(0,4)", "step 4"),
    "step without noise": ("policy.train_on=(0,3)", "step 3"),
    "step twice": ("policy.train_on=(0,0)", "none twice"),
    "negative step": ("policy.train_on=(-1,)", "policy.train_on"),
    "more steps than noise": ("policy.train_steps=4", "at most 3"),
    "clip 0": ("policy.clip_range=0", "policy.clip_range"),
    "clip NaN": ("policy.clip_range=nan", "a finite number > 0"),
    "learning rate 0": ("optimizer.lr=0", "optimizer.lr"),
    "learning rate NaN": ("optimizer.lr=nan", "optimizer.lr"),
    "learning rate inf": ("optimizer.lr=inf", "optimizer.lr"),
    "negative guidance": ("sampler.guidance_scale=-1", "sampler.guidance_scale"),
    "EMA 1": ("optimizer.ema_decay=1.0", "optimizer.ema_decay"),
    "dropout 1": ("data_term.text_dropout=1", "data_term.text_dropout"),
    "negative data weight": ("data_term.weight=-0.1", "data_term.weight"),
    "negative KL": ("policy.kl_weight=-0.1", "policy.kl_weight"),
    "LoRA too large": ("lora.rank=33", "lora.rank"),
    "negative LoRA": ("lora.rank=-1", "lora.rank"),
    "heads": ("model.heads=5", "model.heads"),
    "timeout 0": ("rewards.timeout=0", "rewards.timeout"),
    "no threads": ("rewards.threads=0", "rewards.threads"),
    "upscale 0": ("rewards.jpeg_upscale=0", "rewards.jpeg_upscale"),
    "more pictures than samples": ("evaluate.pictures=9", "evaluate.pictures"),
    "save every 0": ("checkpoint.every=0", "checkpoint.every"),
    "keep none": ("checkpoint.keep=0", "checkpoint.keep"),
    "unknown resume": ("checkpoint.resume=last", "last_good"),
    "data from nowhere": ("data.source=samples", "data.path"),
    "captions from nowhere": ("data.source=none", "captions"),
    "prompts from nowhere": ("prompts.source=file", "prompts.path"),
    "empty list of prompts": ("prompts.source=list", "prompts.list"),
    "weights from nowhere": ("model.init=runs/none.npz", "runs/none.npz"),
    "misspelt weights": ("model.init=asset", 'did you mean "assets"?'),
    "negative seed": ("seed=-1", "seed"),
    "samples to a bucket": ("sample.output=gs://bucket/set", "mount a bucket"),
    "samples to a blank": ("sample.output= ", "sample.output"),
    "cache in a bucket": ("data.cache=gs://bucket/cache", "data.cache"),
    "name in another encoding": ("name=caf\udce9", "name"),
}  # fmt: skip


@pytest.mark.parametrize("case", OVERRIDES)
def test_overrides(case, refused):
    override, word = OVERRIDES[case]
    refused(word, SMOKE, "--workdir=w", f"--config.{override}")


def test_overrides_that_do_not_go_together(refused):
    command = (SMOKE, "--workdir=w")
    refused("REINFORCE", *command, "--config.policy.term=reinforce")
    inner = "--config.train.inner_epochs=2"
    refused("inner_epochs 2", *command, "--config.policy.old_log_prob=exact", inner)
    nothing = ("--config.policy.weight=0", "--config.data_term.weight=0")
    refused("nothing to train", *command, *nothing)
    ode = ("--config.sampler.kernel=ddim", "--config.sampler.eta=0")
    refused("eta 0", *command, *ode)
    one = ("--config.rewards.threads=2", "--config.rewards={'threads': 1}")
    refused("overwrite", *command, *one)


def test_the_list_is_long_enough():
    assert len(ARGUMENTS) + len(OVERRIDES) + len(FILES) >= 60


# ---- the configuration file: its content (None: no file), and a word of the message

START = (
    "from configs import base\ndef get_config(variant=''):\n    c = base.get_config()"
)
FILES = {
    "missing": (None, "there is no such configuration file"),
    "empty": ("", "get_config"),
    "not Python": ("train: {epochs: 3\n", "SyntaxError"),
    "broken": (START + "\n    c.train.epochs ==== 3\n", "line 4"),
    "no get_config": ("config = {}\n", "get_config"),
    "get_config is no function": ("get_config = 3\n", "is no experiment"),
    "raises": ("def get_config():\n    raise RuntimeError('no luck')\n", "no luck"),
    "exits": ("import sys\nsys.exit(3)\n", "SystemExit"),
    "returns a dict": ("def get_config():\n    return {'a': 1}\n", "dict"),
    "returns nothing": ("def get_config():\n    pass\n", "NoneType"),
    "imports what is not there": ("import no_such_module\n", "no_such_module"),
    "wrong type": (START + "\n    c.train.epochs = 'many'\n    return c\n", "line 4"),
    "switch as number": (START + "\n    c.log.wandb = 2\n    return c\n", "line 4"),
    "misspelt key": (START + "\n    c.train.epoch = 3\n    return c\n",
                     'did you mean "train.epochs"?'),
    "missing key": (START + "\n    del c.train.epochs\n    return c\n",
                    "lacks the key train.epochs"),
    "placeholder that stays empty": (
        "from ml_collections.config_dict import required_placeholder\n" + START
        + "\n    c.seed = required_placeholder(int)\n    return c\n",
        "--config.seed=VALUE"),
    "a configuration of something else": (
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'batch': 3})\n", "batch"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_configuration_files(case, refused, tmp_path):
    content, word = FILES[case]
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    refused(word, f"--config={path}", "--workdir=w")


def test_configuration_files_that_are_no_text(refused, tmp_path):
    (tmp_path / "mine.py").write_bytes(b"\xff\x00\xfe")
    refused("mine.py", "--config=mine.py", "--workdir=w")
    (tmp_path / "mine.txt").write_text("def get_config(): pass\n")
    refused("mine.txt is not a .py file", "--config=mine.txt", "--workdir=w")
    refused("which is a folder", f"--config={tmp_path}", "--workdir=w")
    near = f"--config={ROOT}/configs/quickstar.py"
    refused(f'did you mean "{ROOT}/configs/quickstart.py"?', near, "--workdir=w")


VARIANTS = {
    "quickstart.py:smok": 'did you mean "smoke"?',
    "base.py:smok": 'did you mean "smoke"?',
    "emoji_pretrain.py:secnd": 'did you mean "second"?',
    "hacking.py:ddrl": ":ddrl_low-smoke",
    "hacking.py:ddrl_low-smok": 'did you mean "ddrl_low-smoke"?',
    "hacking.py:ddrl_lowsmoke": 'did you mean "ddrl_low-smoke"?',
    "aesthetic.py:drrl": 'did you mean "ddrl"?',
    "latent_emoji.py:is-compresibility": 'did you mean "is-compressibility"?',
    "video_14b.py:pods": 'did you mean "pod"?',
    "ddpo_sd.py": "is no experiment",
    "smoke.py:smoke": "is no experiment",
}


@pytest.mark.parametrize("spec", VARIANTS)
def test_variants(spec, refused):
    refused(VARIANTS[spec], f"--config={ROOT}/configs/{spec}", "--workdir=w")


def test_a_file_without_variants(refused, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return None\n")
    refused("mine.py has no variants", "--config=mine.py:smoke", "--workdir=w")


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"a caf\xe9\n"])
def test_prompt_files(content, refused, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    source = ("--config.prompts.source=file", "--config.prompts.path=prompts.txt")
    refused("prompts.txt", SMOKE, "--workdir=w", *source)


# ---- the workdir: the real training mode, refused before it builds anything


@pytest.fixture
def refused_workdir(monkeypatch, capsys):
    """refused_workdir(word, workdir): training refuses the folder, building nothing."""
    from ddrl_jax import train

    monkeypatch.setattr(train, "build", lambda *_: pytest.fail("a model was built"))
    kept = jax.config.jax_compilation_cache_dir  # pyright: ignore

    def check(word: str, workdir: Path | str, *arguments: str) -> None:
        code = run(["main", SMOKE, f"--workdir={workdir}", *arguments])
        captured = capsys.readouterr()
        check_message(code, captured.out + captured.err, word)

    yield check
    jax.config.update("jax_compilation_cache_dir", kept)


def test_a_workdir_that_can_not_be_written(refused_workdir, tmp_path):
    (tmp_path / "file").write_text("")
    refused_workdir(str(tmp_path / "file"), tmp_path / "file")
    refused_workdir("Not a directory", tmp_path / "file" / "run")
    refused_workdir("/proc/run", "/proc/run")


@pytest.mark.parametrize("name", ["config.json.tmp", "starts.jsonl"])
def test_a_full_disk(name, refused_workdir, tmp_path):
    (tmp_path / name).symlink_to("/dev/full")  # writing there is refused by the kernel
    refused_workdir("No space left on device", tmp_path)
    refused_workdir("make room and run the same command again", tmp_path)


def test_a_workdir_of_another_run(refused_workdir, tmp_path):
    config = load_config(SMOKE.removeprefix("--config="))
    with open_workdir(tmp_path / "used", config) as used:
        refused_workdir("another run is using", used.root)
    used.metrics.write_text('{"step": 0}\n')
    refused_workdir("train.minibatches", used.root, "--config.train.minibatches=1")
    used.config.write_text("{")
    refused_workdir("config.json", used.root)
    (tmp_path / "foreign" / "checkpoints").mkdir(parents=True)
    refused_workdir("without its config.json", tmp_path / "foreign")


@pytest.mark.parametrize("mode", ["evaluate", "export"])
def test_a_workdir_that_is_not_there(mode, refused_workdir, tmp_path):
    refused_workdir("no such folder", tmp_path / "none", f"--mode={mode}")
