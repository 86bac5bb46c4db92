"""Bad input of a flow recipe by the command line: one sentence, before the first batch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_prefopt.backbones import LoRA, StableDiffusion, StableDiffusion3
from lit_prefopt.cli import main
from tests.helpers.recipes import small_recipe
from tests.helpers.runs import lines

SIZES = [
    ("36", "a multiple of 8"),
    pytest.param("104", "a multiple of 8 up to 96", marks=pytest.mark.slow),
]
"""Sides that are no whole number of patches, or beyond the table of positions."""

Refused = Callable[..., str]


@pytest.fixture
def copied(tiny_sd35_folder: str, tmp_path: Path) -> Path:
    """A copy of the pipeline, to be spoiled."""
    return Path(shutil.copytree(tiny_sd35_folder, tmp_path / "copied"))


@pytest.fixture
def refused(tiny_sd35_folder: str, shards: str, tmp_path: Path) -> Refused:
    """Run `fit` with changes to a small flow recipe; return the sentence that it ends with."""

    def run(
        *changes: str,
        pretrained: str | Path = tiny_sd35_folder,
        printed: pytest.CaptureFixture[str] | None = None,
    ) -> str:
        family = ["--backbone", "StableDiffusion3", "--backbone.pretrained", str(pretrained)]
        beats = ["--trainer.callbacks+", "tests.helpers.runs.Beat"]
        beats += ["--trainer.callbacks.path", str(tmp_path / "beat")]
        recipe = small_recipe(tiny_sd35_folder, shards, tmp_path / "run")
        with pytest.raises(SystemExit) as stop:
            main(["fit", *recipe, *family, *beats, *changes])
        assert lines(tmp_path / "beat") == []
        sentence = str(stop.value.code)
        if printed is not None:  # the parser prints its sentence, and exits with 2
            assert stop.value.code == 2
            sentence = printed.readouterr().err.strip().splitlines()[-1]
        assert sentence.startswith("lit-prefopt: ")
        assert "\n" not in sentence.strip()
        return sentence

    return run


def edit(file: Path, **fields: object) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "cure"), SIZES)
def test_a_resolution_that_does_not_fit(refused: Refused, side: str, cure: str) -> None:
    sentence = refused("--data.resolution", side)
    assert f"images of {side} x {side} pixels, which StableDiffusion3 cannot take" in sentence
    assert f"set `--data.resolution` to {cure}" in sentence


@pytest.mark.parametrize(
    ("step", "resolution", "size"), [("4", "32", "36 x 28"), ("8", "96", "104 x 88")]
)
def test_aspect_buckets_that_do_not_fit(
    refused: Refused, step: str, resolution: str, size: str
) -> None:
    buckets = ["--data.aspect_buckets", "true", "--data.bucket_step", step]
    sentence = refused(*buckets, "--data.resolution", resolution)
    assert f"images of {size} pixels" in sentence
    assert "`--data.bucket_step` as multiples of 8, and no side above 96" in sentence


@pytest.mark.parametrize(("side", "cure"), SIZES)
def test_grids_and_evaluations_that_do_not_fit(
    refused: Refused, tmp_path: Path, side: str, cure: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog")
    judge = "tests.helpers.judges.Brightness"
    kinds = {
        "SampleGrid": [],
        "Evaluation": [
            *("--trainer.callbacks.judge", judge, "--trainer.callbacks.prompts", "PromptFile"),
            *("--trainer.callbacks.prompts.path", str(tmp_path / "prompts.txt")),
        ],
    }
    for name, needed in kinds.items():
        size = ["--trainer.callbacks.sampling.width", side]
        sentence = refused("--trainer.callbacks+", name, *needed, *size)
        assert f"Images of {side} x 32 pixels cannot be sampled" in sentence
        assert cure in sentence


def on_cpu(folder: str, *arguments: str) -> list[str]:
    """Return the arguments of a generation on the CPU."""
    return [
        *("--backbone", "StableDiffusion3", "--backbone.pretrained", folder),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", *arguments),
    ]


@pytest.mark.parametrize(("side", "cure"), SIZES)
def test_other_commands_that_do_not_fit(
    tiny_sd35_folder: str, shards: str, tmp_path: Path, side: str, cure: str
) -> None:
    """Caches, generated pairs, evaluations, estimates and roll-outs, before they write anything."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "output"
    prompts.write_text("a cat\na dog")
    named = ["--data.prompts", "PromptFile", "--data.prompts.path", str(prompts)]
    judge = ["--model.judge", "tests.helpers.judges.Brightness"]
    size = ["--model.sampling.width", side, "--model.sampling.height", "32"]
    to = ["--model.output", str(output)]
    cpu = on_cpu(tiny_sd35_folder)
    small = small_recipe(tiny_sd35_folder, shards, output)
    both = ["--model.policy", tiny_sd35_folder, "--model.reference", tiny_sd35_folder]
    cache = ["--model.resolution", side, "--data.shards", shards]
    held_out = ["--model.sampling.width", "32", "--model.sampling.height", "32"]
    held_out += ["--data.validation", shards, "--data.resolution", side]
    rollouts = ["fit", "--config", "sd35-spo", *cpu, *named, *judge]
    rollouts += ["--trainer.default_root_dir", str(output), "--trainer.max_steps", "1"]
    rollouts += ["--data.batches", "1", "--data.batch_size", "1", "--batch.pairs", "null"]
    commands = {
        "cache": ["predict", "--config", "sd35-cache", *cpu, *cache, *to],
        "ranked": ["predict", "--config", "sd15-ranked", *cpu, *size, *judge, *named, *to],
        "evaluate": [
            "evaluate",
            "--config",
            "sd35",
            *both,
            *size,
            *judge,
            *named,
            *to,
            "--trainer.accelerator",
            "cpu",
        ],
        "estimate": ["estimate", *small, *cpu[:4], "--data.resolution", side],
        "roll-outs": [*rollouts, *size],
        "held out": [*rollouts, *held_out],
    }
    for name, command in commands.items():
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert cure in str(stop.value.code), name
        assert f"mages of {side} " in str(stop.value.code), name
        assert not [*output.rglob("*.tar"), *output.rglob("*.ckpt")], name


@pytest.mark.slow
def test_a_cache_that_another_transformer_cannot_take(
    tiny_sd35_folder: str, shards: str, refused: Refused, copied: Path, tmp_path: Path
) -> None:
    """The cached latents are as large as the pipeline that cached them allows."""
    cache = ["--model.resolution", "48", "--data.shards", shards]
    to = ["--model.output", str(tmp_path / "cache")]
    main(["predict", "--config", "sd35-cache", *on_cpu(tiny_sd35_folder), *cache, *to])
    small = StableDiffusion3(str(copied), reference="none").policy.denoiser
    small.register_to_config(pos_embed_max_size=4)
    small.pos_embed.pos_embed = small.pos_embed.pos_embed[:, :16].clone()
    small.save_pretrained(copied / "transformer")
    cached = ["--data", "CachedPairs", "--data.shards", str(tmp_path / "cache")]
    cached += ["--data.validation", "null"]
    arguments = ["fit", "--config", "sd35-diffusion-dpo", *on_cpu(str(copied)), *cached]
    arguments += ["--backbone.encoders", "false", "--trainer.callbacks", "Checkpoints"]
    arguments += ["--trainer.default_root_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"CachedPairs yields images of 48 x 48 .* up to 32\."):
        main(arguments)


# Pipelines and components ---------------------------------------------------------------------


@pytest.mark.slow
def test_pipelines_of_other_families(
    refused: Refused, tiny_folder: str, tiny_xl_folder: str, tiny_lcm_folder: str, copied: Path
) -> None:
    edit(copied / "model_index.json", _class_name="FluxPipeline")
    for folder in (tiny_folder, tiny_xl_folder, tiny_lcm_folder, copied):
        sentence = refused(pretrained=folder)
        assert re.search(r"is a \w+Pipeline and not a StableDiffusion3Pipeline", sentence)
        assert "take the backbone of its family" in sentence


@pytest.mark.slow
def test_components_of_other_families(refused: Refused, tiny_folder: str, copied: Path) -> None:
    unet, vae = f"{tiny_folder}/unet", f"{tiny_folder}/vae"
    for option in ("denoiser", "reference"):
        assert "is a UNet2DConditionModel" in refused(f"--backbone.{option}", unet)
    assert "4 latent channels and the denoiser 16" in refused("--backbone.vae", vae)
    assert "has no AutoencoderTiny" in refused("--backbone.decoder", vae)
    edit(copied / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    assert "is a FluxTransformer2DModel" in refused(pretrained=copied)
    shutil.rmtree(copied / "transformer")
    assert "has no transformer" in refused(pretrained=copied)


def lora(backbone: StableDiffusion | StableDiffusion3, folder: Path) -> str:
    """Save a LoRA and return its file."""
    return str(backbone.save(folder))


@pytest.mark.slow
def test_loras_of_other_families(
    refused: Refused, tiny_folder: str, tiny_sd35_folder: str, tmp_path: Path
) -> None:
    files = {
        "UNet": lora(StableDiffusion(tiny_folder, lora=LoRA(2)), tmp_path / "unet"),
        "deep": str(tmp_path / "deep.safetensors"),
    }
    own = load_file(lora(StableDiffusion3(tiny_sd35_folder, lora=LoRA(2)), tmp_path / "own"))
    deeper = {key.replace("blocks.1.", "blocks.9."): x.contiguous() for key, x in own.items()}
    save_file(deeper, files["deep"])
    for file in files.values():
        sentence = refused("--backbone.start_lora", file)
        assert "is a LoRA of another model family" in sentence
        assert "name the base that it was trained on" in sentence


@pytest.mark.slow
def test_targets_of_other_families(refused: Refused) -> None:
    rank = ["--backbone.lora.rank", "2"]
    sentence = refused(*rank, "--backbone.lora.targets", "[attn1.to_q]")
    assert "match no layer of SD3Transformer2DModel ('attn1.to_q')" in sentence
    assert "The LoRA has no targets" in refused(*rank, "--backbone.lora.targets", "[]")


# Schedulers -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "is a EulerDiscreteScheduler"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "is a FlowMatchHeun"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"prediction_type": "epsilon"}, "a field of DDPM's"),
        ({"num_train_timesteps": 500}, "500 timesteps"),
        ({"shift": -3}, "shift is -3"),
    ],
)
def test_schedulers_that_are_not_known(
    refused: Refused, copied: Path, fields: dict[str, object], words: str
) -> None:
    edit(copied / "scheduler" / "scheduler_config.json", **fields)
    assert words in refused(pretrained=copied)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "words"), [("{", "cannot be read"), ("[]", "is not a mapping")])
def test_a_broken_scheduler_file_is_named(
    refused: Refused, copied: Path, text: str, words: str
) -> None:
    file = copied / "scheduler" / "scheduler_config.json"
    file.write_text(text)
    sentence = refused(pretrained=copied)
    assert f"{file} {words}" in sentence
    assert "copy it again" in sentence


# Prompts and guidance -------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["text_encoder_3", "tokenizer_3"])
def test_a_t5_that_is_not_on_disk(refused: Refused, copied: Path, part: str) -> None:
    shutil.rmtree(copied / part)
    sentence = refused(pretrained=copied)
    assert f"has no {part}" in sentence
    assert "`--backbone.t5 false`" in sentence


@pytest.mark.slow
def test_a_t5_that_was_not_copied_whole(refused: Refused, copied: Path) -> None:
    (file,) = (copied / "text_encoder_3").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert "`--backbone.t5 false`" in refused(pretrained=copied)


@pytest.mark.slow
def test_another_encoder_that_is_not_on_disk(refused: Refused, copied: Path) -> None:
    """The two CLIPs have no option that leaves them out."""
    shutil.rmtree(copied / "text_encoder_2")
    sentence = refused(pretrained=copied)
    assert "has no text_encoder_2" in sentence
    assert "t5" not in sentence


@pytest.mark.slow
@pytest.mark.parametrize("count", ["0", "513", "null"])
def test_tokens_that_t5_cannot_have(refused: Refused, count: str) -> None:
    assert "give a number from 1 up to 512" in refused("--backbone.text_tokens", count)


def test_prompts_beyond_the_encoders_are_counted(
    tiny_sd35_folder: str, shards: str, tmp_path: Path
) -> None:
    """With 10 of T5's tokens no prompt fits (`picture number 7`), by default all do."""
    recipe = small_recipe(tiny_sd35_folder, shards, tmp_path / "run")
    recipe += ["--backbone", "StableDiffusion3", "--backbone.pretrained", tiny_sd35_folder]
    recipe += ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    with pytest.warns(UserWarning, match=r"(\d+) of the first \1 training prompts are longer"):
        main(["fit", *recipe, "--backbone.text_tokens", "10"])


@pytest.mark.slow
@pytest.mark.parametrize("option", ["guidance", "guidance_width", "prediction", "teacher"])
def test_options_that_the_model_does_not_take(
    refused: Refused, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """The scale of a distilled model, and what belongs to UNets."""
    last = refused(f"--backbone.{option}", "3.5", printed=capsys)
    assert last.startswith(f"lit-prefopt: --backbone.{option}: ")
    assert "StableDiffusion3 takes" in last or "did you mean" in last


@pytest.mark.slow
def test_a_step_without_a_density(tiny_sd35_folder: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog")
    named = ["--data.prompts", "PromptFile", "--data.prompts.path", str(tmp_path / "prompts.txt")]
    judge = ["--model.judge", "tests.helpers.judges.Brightness", "--model.sampling.eta", "0"]
    to = ["--trainer.default_root_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="set `sampling.eta` above 0"):
        main(["fit", "--config", "sd35-spo", *on_cpu(tiny_sd35_folder), *named, *judge, *to])


@pytest.mark.slow
def test_nothing_of_it_refuses_a_recipe_that_fits(
    tiny_sd35_folder: str, shards: str, tmp_path: Path
) -> None:
    """Wide and upright buckets of whole patches, one step."""
    recipe = small_recipe(tiny_sd35_folder, shards, tmp_path / "run")
    recipe += ["--backbone", "StableDiffusion3", "--backbone.pretrained", tiny_sd35_folder]
    recipe += ["--data.aspect_buckets", "true", "--data.bucket_step", "8"]
    main(["fit", *recipe, "--data.resolution", "64", "--trainer.max_steps", "1"])
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 1
