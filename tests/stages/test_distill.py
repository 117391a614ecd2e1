"""The distillation stage as a user runs it: recipes in, one sentence or a student's model folder out."""

import json
from pathlib import Path

import pytest
import tomli_w
import torch
from diffusers import WanTransformer3DModel
from tiny_distill import CONSISTENCY, DMD, ODE, OPTIMIZER, TEACHER_FORCING, config_of, make_teacher, recipe_table
from tiny_model import TINY_TRANSFORMER, TINY_VIDEO
from tiny_rlhf import PROMPTS, lines, newest, weights
from torch import Tensor

from reelforge.engine.core import rng
from reelforge.engine.distill import trainer
from reelforge.engine.distill.pairs import PART
from reelforge.engine.io.shards import ShardReader
from reelforge.engine.io.video import write_video
from reelforge.engine.model.folder import ModelFolder, load_generation_defaults
from reelforge.engine.model.generator import Generator, Job, decode_uint8, resolve
from reelforge.engine.model.layout import packed_teacher_forcing
from reelforge.engine.model.wan import WanTransformer
from reelforge.engine.model.weights import load_transformer, save_transformer
from reelforge.stages import cache, distill
from reelforge.stages.cli import main
from reelforge.stages.distill_parts import build, set_up

CPU = torch.device("cpu")
ALWAYS = {"step", "skipped", "lr", "step_s"}
CRITICS = ALWAYS | {"critic_lr", "critic_loss", "critic_grad_norm"}
STUDENTS = ALWAYS | {"critic_lr", "loss", "grad_norm", "dmd", "sample_rms", "dropped", "replay_gap"}
SHAPE = (16, 3, 4, 4)  # of the tiny clip's latents


@pytest.fixture(scope="module")
def teacher(model_folder, tmp_path_factory) -> Path:
    return make_teacher(model_folder, tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="module")
def chain(teacher, tmp_path_factory) -> Path:
    """A finished run of all three sub-phases; its recipe lies beside it."""
    root = tmp_path_factory.mktemp("chain")
    recipe_file(root, teacher, few_step=DMD, causal_init=ODE, self_forcing=DMD)
    assert main(["distill", str(root / "recipe.toml")]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def latents(teacher, clips_folder, tmp_path_factory) -> Path:
    """A latent cache of the tiny clips."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    cache.run(cache.CacheConfig(clips_folder, teacher, folder, TINY_VIDEO, device="cpu"))
    return folder


def recipe_file(root: Path, model: Path, **changes: object) -> str:
    path = root / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_table(root, model, **changes)))
    return str(path)


def transformer_folder(root: Path, **changes: object) -> Path:
    """A folder with a transformer of another architecture, and nothing else."""
    model = WanTransformer.from_config(TINY_TRANSFORMER | changes, seed=3)
    model.proj_out.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    root.mkdir(parents=True, exist_ok=True)
    save_transformer(model, root / "transformer")
    return root


def parts_of(config, name: str):
    """A phase before its first step, and its task."""
    setup = set_up(config, CPU)
    prompts = ModelFolder.load(config.teacher).text_encoder.encode([*PROMPTS, "dark"])
    text = torch.stack([torch.nn.functional.pad(each, (0, 0, 0, 12 - len(each))) for each in prompts])
    config.output.mkdir(exist_ok=True)
    parts = build(config, name, setup, config.student or config.teacher, text)
    return parts, parts.losses.__self__


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- the chain ---


def test_the_chain_leaves_a_run_directory_for_each_phase(chain, teacher):
    before = weights(teacher / "transformer")
    for name, steps in {"few_step": 6, "causal_init": 2, "self_forcing": 6}.items():
        root = chain / name
        assert {"config.resolved.toml", "run.json", "metrics.jsonl", "transformer"} <= {p.name for p in root.iterdir()}
        shown = sorted(path.relative_to(root / "samples").as_posix() for path in root.glob("samples/*/*"))
        assert shown == [f"step-{steps:08d}/{number:02d}.mp4" for number in range(2)]
        after, saved = weights(root / "transformer"), newest(root)
        assert saved.step == steps and same(after, saved.groups["ema"])
        moved = [not torch.equal(after[key], before[key]) for key in before]
        assert all(moved)
        before = after
    assert same(weights(chain / "model" / "transformer"), before)
    assert WanTransformer3DModel.from_pretrained(chain / "model" / "transformer").config.num_layers == 2
    for name in ("few_step", "self_forcing"):
        found = lines(chain / name, "step")
        assert [set(line) for line in found] == [CRITICS, CRITICS, STUDENTS] * 2
        assert all(line["replay_gap"] < 1e-5 and line["dropped"] == 0 for line in found if "dmd" in line)
        assert all(line["lr"] == line["critic_lr"] == 1e-3 for line in found)
    assert [set(line) for line in lines(chain / "causal_init", "step")] == [ALWAYS | {"loss", "grad_norm"}] * 2


def test_a_phase_starts_from_the_one_before(chain, teacher, tmp_path):
    alone = config_of(tmp_path, teacher, student=str(chain / "few_step"), causal_init=ODE)
    distill.run(alone)
    assert same(weights(alone.output / "causal_init/transformer"), weights(chain / "causal_init/transformer"))


def clip(folder: Path, prompt: str, path: Path, *overrides: str) -> bytes:
    """The file of a prompt's clip, made by the folder's own settings."""
    model = ModelFolder.load(folder)
    generator = Generator(model, resolve(model.defaults, overrides), 0)
    write_video(path, decode_uint8(model.codec, generator.latents([Job(prompt, 0)]))[0], model.defaults.video.fps)
    return path.read_bytes()


def test_generate_samples_the_student_by_its_folder_alone(chain, tmp_path, capsys):
    defaults = load_generation_defaults(chain / "model")
    assert defaults.denoising_steps == (1000.0, 500.0) and defaults.guidance_scale == 1
    assert (defaults.chunk_frames, defaults.first_chunk_frames, defaults.video) == (1, 0, TINY_VIDEO)
    assert main(["generate", str(chain / "model"), "--prompt", PROMPTS[0], "--out", str(tmp_path / "videos")]) == 0
    record, summary = capsys.readouterr().out.splitlines()
    assert "8 network evaluations each" in summary  # three chunks of two steps and two clean passes
    made = Path(json.loads(record)["path"]).read_bytes()
    assert made == clip(chain / "model", PROMPTS[0], tmp_path / "again.mp4")


def test_previews_are_what_generate_makes(chain, tmp_path):
    for number in range(2):
        shown = (chain / f"self_forcing/samples/step-00000006/{number:02d}.mp4").read_bytes()
        assert shown == clip(chain / "model", PROMPTS[number], tmp_path / "clip.mp4", "precision=fp32")


def test_a_finished_run_is_told_and_not_repeated(chain, capsys):
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.is_file()}
    assert main(["distill", str(chain.parent / "recipe.toml")]) == 0
    told = capsys.readouterr()
    assert "is finished" in told.err
    (line,) = told.out.splitlines()
    facts = json.loads(line)
    assert facts.keys() == {"model", "seconds", "few_step", "causal_init", "self_forcing"}
    assert facts["model"] == str(chain / "model") and facts["seconds"].keys() == facts.keys() - {"model", "seconds"}
    assert all(seconds > 0 for seconds in facts["seconds"].values())
    assert facts["self_forcing"].keys() == STUDENTS | CRITICS and facts["self_forcing"]["step"] == 6
    assert before == {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.is_file()}


def test_help_names_the_verb(capsys):
    with pytest.raises(SystemExit) as left:
        main(["distill", "--help"])
    assert left.value.code == 0 and "few-step student" in capsys.readouterr().out


# --- phases on their own ---


def test_a_bidirectional_few_step_student(teacher, tmp_path):
    config = config_of(tmp_path, teacher, few_step=DMD, previews=50, schedule={"kind": "euler", "flow_shift": 2.0})
    folder = distill.run(config).model
    defaults = load_generation_defaults(folder)
    assert (defaults.chunk_frames, defaults.first_chunk_frames, defaults.schedule.flow_shift) == (3, 0, 2.0)
    shown = sorted((config.output / "few_step/samples/step-00000006").iterdir())
    assert len(shown) == len(PROMPTS)
    assert shown[5].read_bytes() == clip(folder, PROMPTS[5], tmp_path / "clip.mp4", "precision=fp32")


@pytest.mark.parametrize("context", [{"kind": "clean"}, {"kind": "last_step"}, {"noise": 0.25}], ids=str)
def test_a_first_chunk_of_its_own_and_what_it_leaves_for_the_next(teacher, tmp_path, context):
    phase = DMD | {"rollout": {"context": context}}
    config = config_of(tmp_path, teacher, chunk_frames=2, first_chunk_frames=1, self_forcing=phase)
    folder = distill.run(config).model
    defaults = load_generation_defaults(folder)
    assert (defaults.chunk_frames, defaults.first_chunk_frames) == (2, 1)
    assert defaults.context == config.self_forcing.rollout.context
    assert all(line["replay_gap"] < 1e-5 for line in lines(config.output / "self_forcing", "replay_gap"))
    shown = config.output / "self_forcing/samples/step-00000006/00.mp4"
    assert shown.read_bytes() == clip(folder, PROMPTS[0], tmp_path / "clip.mp4", "precision=fp32")


def test_an_autoregressive_diffusion_model_keeps_the_teachers_many_steps(teacher, tmp_path):
    config = config_of(tmp_path, teacher, causal_init=TEACHER_FORCING)
    folder = distill.run(config).model
    defaults = load_generation_defaults(folder)
    assert (defaults.chunk_frames, defaults.denoising_steps) == (1, ())
    assert (defaults.guidance_scale, defaults.num_steps, defaults.negative_prompt) == (2, 3, "dark")
    shown = config.output / "causal_init/samples/step-00000002/01.mp4"
    assert shown.read_bytes() == clip(folder, PROMPTS[1], tmp_path / "clip.mp4", "precision=fp32")


def packed_loss(model: WanTransformer, x0: Tensor, text: Tensor, seed: int = 0) -> float:
    """Teacher forcing's loss of step 0 by hand, chunks of one frame, shift 3."""
    u = torch.stack([rng.uniform(rng.key("tf_sigma", seed, 0, slot), 3) for slot in range(4)]).double()
    sigma = (3 * u / (1 + 2 * u)).float()
    s = sigma[:, None, :, None, None]
    noise = rng.normal([rng.key("sft_noise", seed, 0, slot) for slot in range(4)], SHAPE)
    both = torch.cat((x0, (1 - s) * x0 + s * noise), dim=2)
    told = torch.cat((torch.zeros(4, 3), 1000 * sigma), dim=1)
    with torch.no_grad():
        velocity = model(both, told, text, layout=packed_teacher_forcing((1, 1, 1)))[:, :, 3:]
    return (velocity - (noise - x0)).square().mean().item()


def test_teacher_forcing_learns_from_the_ends_of_trajectories(teacher, tmp_path):
    config = config_of(tmp_path, teacher, causal_init=TEACHER_FORCING)
    distill.run(config)
    order = rng.generator("init_clips", 0, 0).permutation(10)[:4].tolist()
    store = ShardReader(config.output / "pairs/part-00000")
    x0 = torch.stack([store.tensors(str(pair))["states"][-1].float() for pair in order])
    assert [store.rows[str(pair)].facts["prompt"] for pair in order] == [PROMPTS[pair % 6] for pair in order]
    encoded = ModelFolder.load(teacher).text_encoder.encode([PROMPTS[pair % 6] for pair in order])
    text = torch.stack([torch.nn.functional.pad(each, (0, 0, 0, 12 - len(each))) for each in encoded])
    by_hand = packed_loss(load_transformer(teacher / "transformer"), x0, text)
    assert lines(config.output / "causal_init")[0]["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_teacher_forcing_learns_from_real_clips(teacher, latents, tmp_path):
    config = config_of(tmp_path, teacher, causal_init=TEACHER_FORCING | {"cache": str(latents)})
    distill.run(config)
    assert not (config.output / "pairs").exists()
    clips = cache.LatentCache.open(latents)
    order = rng.generator("init_clips", 0, 0).permutation(len(clips))[:4].tolist()
    text = clips.text(order, [rng.key("caption", 0, 0, slot) for slot in range(4)])
    by_hand = packed_loss(load_transformer(teacher / "transformer"), clips.latents(order), text)
    assert lines(config.output / "causal_init")[0]["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_consistency_takes_the_start_or_another_folder_for_its_teacher(teacher, latents, tmp_path):
    """With the start given by name nothing changes; an autoregressive model of another size teaches something else."""
    found = {}
    other = transformer_folder(tmp_path / "other", num_layers=1)
    for name, folder in {"none": None, "start": teacher, "other": other}.items():
        phase = CONSISTENCY | {"cache": str(latents)} | ({"teacher": str(folder)} if folder else {})
        config = config_of(tmp_path / name, teacher, causal_init=phase)
        found[name] = weights(distill.run(config).model / "transformer")
    assert same(found["none"], found["start"]) and not same(found["none"], found["other"])
    from_ends = config_of(tmp_path / "ends", teacher, causal_init=CONSISTENCY)
    distill.run(from_ends)
    assert (from_ends.output / "pairs").exists() and len(lines(from_ends.output / "causal_init")) == 2


def test_trajectories_are_the_guided_teachers(teacher, tmp_path):
    """Stored states against Euler's loop: noise named by prompt and number, v_u + w (v_c - v_u), prompts in turn."""
    phase = ODE | {"pairs": {"count": 8, "substeps": 3, "batch_size": 5}}
    config = config_of(tmp_path, teacher, causal_init=phase)
    distill.run(config)
    folder, store = ModelFolder.load(teacher), ShardReader(config.output / "pairs/part-00000")
    assert set(store.rows) == {str(pair) for pair in range(8)} and PART == 256
    u = torch.cat((torch.linspace(1000, 500, 4)[:-1], torch.linspace(500, 0, 4))).double() / 1000
    sigmas = (3 * u / (1 + 2 * u)).tolist()

    def velocity(x: Tensor, sigma: float, prompt: str) -> Tensor:
        (text,) = folder.text_encoder.encode([prompt])
        text = torch.nn.functional.pad(text, (0, 0, 0, 12 - len(text)))[None]
        return folder.transformer(x, torch.tensor([1000 * sigma]), text)

    for pair in (0, 5, 7):
        prompt = PROMPTS[pair % 6]
        assert store.rows[str(pair)].facts == {"prompt": prompt}
        x = rng.normal([rng.key("x_T", 0, 0, rng.key("prompt:" + prompt), pair)], SHAPE)
        expected = []
        with torch.no_grad():
            for k in range(6):
                if k % 3 == 0:
                    expected.append(x)
                negative, positive = (velocity(x, sigmas[k], words) for words in ("dark", prompt))
                x = x + (sigmas[k + 1] - sigmas[k]) * (negative + 2.0 * (positive - negative))
        states = store.tensors(str(pair))["states"].float()
        torch.testing.assert_close(states, torch.cat((*expected, x)), rtol=2**-8, atol=1e-5)  # bf16


# --- what is trained ---

LORA = {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v"]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_are_merged_into_weights_that_nothing_rounded(teacher, tmp_path, precision):
    phases = {name: phase | {"lora": LORA} for name, phase in {"causal_init": ODE, "self_forcing": DMD}.items()}
    for phase in phases.values():
        phase["train"] = phase["train"] | {"precision": precision}
    config = config_of(tmp_path, teacher, **phases)
    folder = distill.run(config).model
    before = weights(teacher / "transformer")
    for where in (config.output / "causal_init", config.output / "self_forcing", folder):
        after = weights(where / "transformer")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if name.endswith(("to_q.weight", "to_v.weight"))} and len(moved) == 8
        assert after.keys() == before.keys()
        before = after if where.name == "causal_init" else before
    saved = newest(config.output / "self_forcing").groups["ema"]
    name = "blocks.0.attn1.to_q"
    update = 2.0 * saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"]
    start = weights(config.output / "causal_init/transformer")[f"{name}.weight"]
    torch.testing.assert_close(weights(folder / "transformer")[f"{name}.weight"], start + update, rtol=0, atol=1e-7)


def test_an_adapted_critic_shares_the_teachers_weights(teacher, tmp_path):
    config = config_of(tmp_path, teacher, self_forcing=DMD | {"critic_lora": LORA})
    parts, task = parts_of(config, "self_forcing")
    assert task.teacher is None
    assert {name.rpartition(".lora_")[0][-4:] for name in parts.state.critic.parameters} == {"to_q", "to_v"}
    for name, parameter in parts.state.critic.parameters.items():
        parameter.data += rng.normal([rng.key(name)], parameter.shape)[0]
    x, timestep = rng.normal([1, 2], SHAPE), torch.tensor([800.0, 300.0])
    text = task.text[[0, 1, -1]]
    teach, criticise = task._scores(text)
    plain = load_transformer(teacher / "transformer")
    with torch.no_grad():
        conditional, negative = plain(x, timestep, text[:2]), plain(x, timestep, text[2:].expand(2, -1, -1))
        torch.testing.assert_close(teach(x, timestep), negative + 2 * (conditional - negative), rtol=0, atol=1e-5)
        assert (criticise(x, timestep) - conditional).abs().max() > 0.01
    distill.run(config)
    saved = newest(config.output / "self_forcing").groups
    assert saved["critic_weights"].keys() == parts.state.critic.parameters.keys()
    assert any(value.any() for name, value in saved["critic_weights"].items() if "lora_B" in name)
    assert saved["weights"].keys() == weights(teacher / "transformer").keys()


def test_teacher_critic_and_student_of_different_size(teacher, tmp_path):
    student = transformer_folder(tmp_path / "student", num_layers=1, num_attention_heads=1)
    critic = transformer_folder(tmp_path / "critic", num_layers=3, ffn_dim=20)
    phases = {"few_step": DMD, "causal_init": ODE, "self_forcing": DMD}
    config = config_of(tmp_path, teacher, student=str(student), critic=str(critic), **phases)
    folder = distill.run(config).model
    made = load_transformer(folder / "transformer").config
    assert (made.num_layers, made.width) == (1, 12)
    assert any("blocks.2" in name for name in newest(config.output / "self_forcing").groups["critic_weights"])
    assert clip(folder, PROMPTS[0], tmp_path / "clip.mp4")


# An eps above rounding: where a gradient is 0 but for rounding, Adam would walk at full speed.
SMOOTH = {"lr": 1e-3, "warmup_steps": 1, "ema_decay": 0.5, "eps": 1e-3}


@pytest.mark.parametrize("phase", ["self_forcing", "causal_init"])
def test_checkpointing_and_micro_batches_change_nothing(teacher, tmp_path, phase):
    method = CONSISTENCY if phase == "causal_init" else DMD | {"critic_optimizer": SMOOTH}
    found = {}
    for name, changes in {
        "whole": {},
        "recomputed": {"gradient_checkpointing": True},
        "ones": {f"{phase}__train__micro_batch_size": 1},
        "threes": {f"{phase}__train__micro_batch_size": 3},
    }.items():
        config = config_of(tmp_path / name, teacher, **{phase: method | {"optimizer": SMOOTH}}, **changes)
        found[name] = weights(distill.run(config).model / "transformer")
    assert same(found["whole"], found["recomputed"])
    start = weights(teacher / "transformer")
    for name in ("ones", "threes"):
        for key, value in found["whole"].items():
            torch.testing.assert_close(found[name][key], value, rtol=0, atol=1e-6, msg=key)
    assert max((found["whole"][key] - start[key]).abs().max() for key in start) > 5e-4


# --- turns, exits and videos that go on ---


def test_a_video_that_goes_on_is_rolled_out_with_the_weights_of_now(teacher, tmp_path):
    """Its text too: the student's turn may come between two of its segments, and replay projects text anew."""
    fast = {"optimizer": OPTIMIZER | {"lr": 0.05}, "dmd": {"critic_steps": 1}, "rollout": {"segments": 3}}
    mine = config_of(tmp_path, teacher, self_forcing=DMD | fast)
    distill.run(mine)
    gaps = [line["replay_gap"] for line in lines(mine.output / "self_forcing", "replay_gap")]
    assert len(gaps) == 3 and max(gaps) < 1e-5


@pytest.mark.parametrize("critic_steps", [1, 5])
def test_both_networks_meet_every_exit_of_a_cycle(teacher, tmp_path, monkeypatch, critic_steps):
    """By the run's steps, critic and student would each meet their own two of four exits only."""
    seen: dict[bool, list[int]] = {True: [], False: []}
    real, cycle = trainer.exit_steps, critic_steps + 1
    taken: list[int] = []
    monkeypatch.setattr(trainer, "exit_steps", lambda *facts: taken.append(real(*facts)[0]) or real(*facts))
    phase = DMD | {"dmd": {"critic_steps": critic_steps}, "rollout": {"exit_policy": "cycle"}}
    phase["train"] = phase["train"] | {"steps": 4 * cycle, "batch_size": 1}
    steps = [1000.0, 750.0, 500.0, 250.0]
    distill.run(config_of(tmp_path, teacher, self_forcing=phase, denoising_steps=steps, previews=0))
    for step, exit_step in enumerate(taken):
        seen[step % cycle == critic_steps].append(exit_step)
    assert seen[True] == [0, 1, 2, 3] and seen[False] == [0, 1, 2, 3] * critic_steps
