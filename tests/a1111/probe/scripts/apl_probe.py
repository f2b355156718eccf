"""Test-only extension: writes the conditioning that a job samples with, and plays other people's extensions.

Linked into the host by `webui_host.py` while the tests run. Told what to do by APL_PROBE, a folder.
"""

import copy
import json
import os
from pathlib import Path

import torch
from modules import processing, prompt_parser, script_callbacks, scripts, shared
from safetensors.torch import save_file

FOLDER = Path(os.environ.get("APL_PROBE", "/nonexistent"))
ORDERS = {"late": "", "nested": 0}
count = 0


def flat(prefix, cond, into):
    """Every tensor of a conditioning, by a name that says where it stood."""
    if torch.is_tensor(cond):
        into[prefix] = cond.detach().float().cpu().contiguous().clone()
    elif isinstance(cond, dict):
        for key, value in cond.items():
            flat(f"{prefix}.{key}", value, into)


def dump(c, uc, kind):
    global count
    found, notes = {}, {"kind": kind, "weights": []}
    for index, parts in enumerate(getattr(c, "batch", [])):
        for at, part in enumerate(parts):
            notes["weights"].append(part.weight)
            for step, schedule in enumerate(part.schedules):
                flat(f"c.{index}.{at}.{step}", schedule.cond, found)
    for index, schedules in enumerate(uc or []):
        for step, schedule in enumerate(schedules):
            flat(f"u.{index}.{step}", schedule.cond, found)
    save_file(found, str(FOLDER / f"{count:04d}.safetensors"), {"notes": json.dumps(notes)})
    count += 1


def skip_unet(p):
    """In Forge, whose UNet here is full-size and all zeros: answer what it would, without the minutes."""
    objects = getattr(p.sd_model, "forge_objects", None)
    if objects is not None:
        unet = objects.unet.clone()
        unet.set_model_unet_function_wrapper(lambda apply_model, params: torch.zeros_like(params["input"]))
        objects.unet = unet


class Probe(scripts.Script):
    def title(self):
        return "apl test probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process_batch(self, p, *args, **kwargs):
        if ORDERS["late"]:  # as wildcard extensions do: the prompt is known only now
            p.prompts = [prompt.replace("__late__", ORDERS["late"]) for prompt in p.prompts]

    def process_before_every_sampling(self, p, *args, **kwargs):
        skip_unet(p)
        dump(kwargs.get("c"), kwargs.get("uc"), type(p).__name__)

    def postprocess_image(self, p, pp, *args):
        if not ORDERS["nested"]:
            return
        ORDERS["nested"] -= 1
        # As detailers do: a job of their own on the picture, in which a list of scripts decides who runs.
        inner = processing.StableDiffusionProcessingImg2Img(
            sd_model=shared.sd_model, init_images=[pp.image], prompt=p.prompts[0],
            negative_prompt=p.negative_prompts[0], seed=1, steps=2, denoising_strength=0.9, width=p.width,
            height=p.height, do_not_save_samples=True, do_not_save_grid=True, sampler_name="Euler", cfg_scale=7.0)
        inner.scripts = copy.copy(p.scripts)
        inner.scripts.alwayson_scripts = [each for each in p.scripts.alwayson_scripts if isinstance(each, Probe)]
        inner.scripts.callback_map = {}
        inner.script_args = p.script_args
        pp.image = processing.process_images(inner).images[0]


class OwnJobs(scripts.Script):
    """A selectable script that makes jobs from nothing, without scripts and arguments."""

    def title(self):
        return "apl test own jobs"

    def show(self, is_img2img):
        return True

    def ui(self, is_img2img):
        return []

    def run(self, p, *args):
        own = processing.StableDiffusionProcessingTxt2Img(
            sd_model=shared.sd_model, prompt=p.prompt, negative_prompt=p.negative_prompt, steps=p.steps, seed=p.seed,
            width=p.width, height=p.height, cfg_scale=p.cfg_scale, sampler_name="Euler", do_not_save_samples=True,
            do_not_save_grid=True)
        own.script_args = ()
        result = processing.process_images(own)
        dump(own.c if hasattr(own.c, "batch") else None, own.uc, "own")
        return result


def orders(_demo, app):
    from fastapi import Body

    @app.post("/test/orders")
    def take(body: dict = Body(...)):  # noqa: B008
        ORDERS.update(body)
        return ORDERS

    @app.post("/test/encode")
    def encode(body: dict = Body(...)):  # noqa: B008
        """What another extension may do outside any job: a plain list, straight to the model."""
        texts = body["texts"]
        if "negative" in body:
            texts = prompt_parser.SdConditioning(texts, is_negative_prompt=body["negative"])
        found = {}
        with torch.no_grad():
            flat("x", shared.sd_model.get_learned_conditioning(texts), found)
        name = FOLDER / "encode.safetensors"
        save_file(found, str(name))
        return {"shape": {key: list(value.shape) for key, value in found.items()}}

    @app.post("/test/predict")
    def predict(body: dict = Body(...)):  # noqa: B008
        """The UNet's own answer to a latent, a timestep and a prompt's conditioning (from a file, to a file)."""
        from safetensors.torch import load_file

        given = load_file(body["file"])
        with torch.no_grad():
            out = shared.sd_model.apply_model(given["latent"], given["timestep"], {"c_crossattn": [given["cond"]],
                                                                                   "c_concat": []})
            decoded = shared.sd_model.decode_first_stage(given["latent"])
        save_file({"noise": out.float().contiguous(), "picture": decoded.float().contiguous()}, body["out"])
        return {}

    @app.post("/test/reload_scripts")
    def reload_scripts():
        """The part of "Reload UI" that runs script files again."""
        with shared.state_lock if hasattr(shared, "state_lock") else processing.devices.without_autocast():
            script_callbacks.script_unloaded_callback()
            before = list(script_callbacks.callback_map) if hasattr(script_callbacks, "callback_map") else []
            saved = scripts.scripts_txt2img, scripts.scripts_img2img
            scripts.load_scripts()
            scripts.scripts_txt2img, scripts.scripts_img2img = saved
        return {"callbacks": len(before)}


script_callbacks.on_app_started(orders)


if "APL_OPEN_CLIP" in os.environ:  # a tiny architecture for tests of two encoders
    import open_clip

    open_clip.add_model_config(os.environ["APL_OPEN_CLIP"])
