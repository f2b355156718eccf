"""Test-only: the SDXL UNet's own answer to latents, timesteps and a conditioning (from a file, to a file)."""

import torch
from fastapi import Body
from modules import script_callbacks, shared
from safetensors.torch import load_file, save_file


def endpoints(_demo, app):
    @app.post("/test/predict_xl")
    def predict(body: dict = Body(...)):  # noqa: B008
        given = load_file(body["file"])
        with torch.no_grad():
            cond = {"crossattn": given["crossattn"], "vector": given["vector"]}
            out = shared.sd_model.apply_model(given["latent"], given["timestep"], cond)
        save_file({"noise": out.float().contiguous()}, body["out"])
        return {}


script_callbacks.on_app_started(endpoints)
